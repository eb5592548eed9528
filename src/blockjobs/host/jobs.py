"""Starting jobs."""

import builtins
from collections.abc import Sequence
from typing import Any, TypeVar

from blockjobs.block.node import Node
from blockjobs.host.core import Core
from blockjobs.lifecycle.handle import JobHandle
from blockjobs.schema.command import convert

T = TypeVar("T")


class Jobs(Core):
    """The part of `Host` that starts jobs; their options are the members of the QMP commands."""

    async def backup(
        self,
        source: Node,
        target: Node,
        *,
        id: str | None = None,
        sync: str = "full",
        bitmap: str | None = None,
        bitmap_mode: str | None = None,
        compress: bool = False,
        level: str = "default",
        speed_bytes_per_s: int = 0,
        **options: Any,
    ) -> JobHandle:
        """Start a backup job: `target` becomes what `source` is at this instant.

        Args:
            source: may be written to meanwhile.
            target: of the same length.
            id: unique among live jobs; generated if not given.
            sync: full, top (only the source's own layer), none (only what is about to be overwritten), bitmap or
                incremental (only what a dirty bitmap of the source holds).
            bitmap: name of that bitmap; with sync full or top one that is to record what changes from now on.
            bitmap_mode: what becomes of it: on-success (cleared if the job succeeds), never or always.
            compress: store compressed clusters.
            level: fast, default or best.
            speed_bytes_per_s: 0 for no limit.
            options: further members of `blockdev-backup`, with underscores for dashes.

        Raises:
            UsageError: in QEMU's words; nothing has changed.
        """
        from blockjobs.jobs.backup_options import BlockdevBackup
        from blockjobs.jobs.transaction import BlockdevBackupAction, run_transaction

        members = {
            "device": source.name,
            "target": target.name,
            "sync": sync,
            "bitmap": bitmap,
            "bitmap_mode": bitmap_mode,
            "compress": compress,
            "x_compress_level": level,
            "speed": speed_bytes_per_s,
            **options,
        }
        async with self.jobs.control:
            action = BlockdevBackupAction(data=self._convert("backup", id, members, BlockdevBackup))
            (job,) = await run_transaction(self, [action])
            return job

    async def mirror(
        self,
        source: Node,
        target: Node,
        *,
        id: str | None = None,
        sync: str = "full",
        copy_mode: str = "background",
        speed_bytes_per_s: int = 0,
        **options: Any,
    ) -> JobHandle:
        """Start a mirror job: `target` becomes what `source` is and stays it; `complete()` moves the users over.

        Args:
            source: may be written to meanwhile, through what `access` yields.
            target: of the same length.
            id: unique among live jobs; generated if not given.
            sync: full, top (only the source's own layer) or none (only what is written from now on).
            copy_mode: background, or write-blocking: every write is done on both sides.
            speed_bytes_per_s: 0 for no limit.
            options: further members of `blockdev-mirror`, with underscores for dashes.

        Raises:
            UsageError: in QEMU's words; nothing has changed.
        """
        from blockjobs.jobs.mirror_options import BlockdevMirror
        from blockjobs.jobs.mirror_start import start_blockdev_mirror

        members = {
            "device": source.name,
            "target": target.name,
            "sync": sync,
            "copy_mode": copy_mode,
            "speed": speed_bytes_per_s,
            **options,
        }
        async with self.jobs.control:
            return await start_blockdev_mirror(self, self._convert("mirror", id, members, BlockdevMirror))

    async def stream(
        self, device: Node, *, id: str | None = None, speed_bytes_per_s: int = 0, **options: Any
    ) -> JobHandle:
        """Start a job that copies into an image what it reads from its backing images, and then does without them.

        Args:
            device: the image; it may be in use.
            id: unique among live jobs; generated if not given.
            speed_bytes_per_s: 0 for no limit.
            options: further members of `block-stream` (`base_node`, `bottom`, ...), with underscores for dashes.

        Raises:
            UsageError: in QEMU's words; nothing has changed.
        """
        from blockjobs.jobs.chain_options import BlockStream
        from blockjobs.jobs.stream_start import start_stream

        members = {"device": device.name, "speed": speed_bytes_per_s, **options}
        async with self.jobs.control:
            return await start_stream(self, self._convert("stream", id, members, BlockStream))

    async def commit(
        self, device: Node, *, id: str | None = None, speed_bytes_per_s: int = 0, **options: Any
    ) -> JobHandle:
        """Start a job that merges images of a chain down into one below them.

        Args:
            device: the root of the chain. If it is to be merged too, the job becomes ready and wants to be completed.
            id: unique among live jobs; generated if not given.
            speed_bytes_per_s: 0 for no limit.
            options: further members of `block-commit` (`top_node`, `base_node`, ...), with underscores for dashes.

        Raises:
            UsageError: in QEMU's words; nothing has changed.
        """
        from blockjobs.jobs.chain_options import BlockCommit
        from blockjobs.jobs.commit_start import start_commit

        members = {"device": device.name, "speed": speed_bytes_per_s, **options}
        async with self.jobs.control:
            return await start_commit(self, self._convert("commit", id, members, BlockCommit))

    async def amend(self, node: Node, *, id: str | None = None, force: bool = False, **options: Any) -> JobHandle:
        """Start a job that changes what was chosen when an image was made.

        Args:
            node: the image; its users are held meanwhile.
            id: unique among live jobs; generated if not given.
            force: what loses data, or could lock its owner out, is wanted.
            options: members of the format's amend options, with underscores for dashes (`version`, `refcount_bits`,
                `lazy_refcounts`, `backing_file`, `backing_fmt`, `size`, `data_file`, `data_file_raw`, `encrypt`).

        Raises:
            UsageError: the node cannot be amended at all. Everything else fails inside the job.
        """
        from blockjobs.jobs.amend import XBlockdevAmend, start_amend

        plain = {name.replace("_", "-"): value for name, value in options.items() if value is not None}
        members = {"node_name": node.name, "force": force, "options": {"driver": node.driver_name, **plain}}
        async with self.jobs.control:
            return start_amend(self, self._convert("amend", id, members, XBlockdevAmend))

    async def snapshot_save(
        self, tag: str, devices: Sequence[Node], *, vmstate: Node | None = None, id: str | None = None
    ) -> JobHandle:
        """Start a job that saves the machine's state and keeps all devices as they are then, inside their images.

        Args:
            tag: name of the snapshot.
            devices: all of them have it afterwards, or none.
            vmstate: the one whose image takes the machine's state; by default the first.
            id: unique among live jobs; generated if not given.

        Raises:
            UsageError: the id is taken. Everything else fails inside the job.
        """
        from blockjobs.jobs.snapshot_start import SnapshotSave, start_snapshot_save

        options = self._snapshot_options("snapshot-save", id, tag, devices, vmstate)
        async with self.jobs.control:
            return start_snapshot_save(self, convert(options, SnapshotSave))

    async def snapshot_load(
        self, tag: str, devices: Sequence[Node], *, vmstate: Node | None = None, id: str | None = None
    ) -> JobHandle:
        """Start a job that makes all devices, and the machine, what they were. For the rest see `snapshot_save`."""
        from blockjobs.jobs.snapshot_start import SnapshotLoad, start_snapshot_load

        options = self._snapshot_options("snapshot-load", id, tag, devices, vmstate)
        async with self.jobs.control:
            return start_snapshot_load(self, convert(options, SnapshotLoad))

    async def snapshot_delete(self, tag: str, devices: Sequence[Node], *, id: str | None = None) -> JobHandle:
        """Start a job that deletes the snapshot on every device that has it. Arguments, errors: `snapshot_save`."""
        from blockjobs.jobs.snapshot_start import SnapshotDelete, start_snapshot_delete

        options = self._snapshot_options("snapshot-delete", id, tag, devices, None)
        async with self.jobs.control:
            return start_snapshot_delete(self, convert(options, SnapshotDelete))

    def _snapshot_options(
        self, type: str, id: str | None, tag: str, devices: Sequence[Node], vmstate: Node | None
    ) -> dict[str, Any]:
        if id is None:
            id = f"{type}{self._names}"
            self._names += 1
        options: dict[str, Any] = {"job-id": id, "tag": tag, "devices": [node.name for node in devices]}
        if type != "snapshot-delete" and devices:
            options["vmstate"] = (vmstate or devices[0]).name
        return options

    def _convert(self, type: str, id: str | None, members: dict[str, Any], wanted: builtins.type[T]) -> T:
        """Options of a job as a command would get them."""
        if id is None:
            id = f"{type}{self._names}"
            self._names += 1
        plain = {name.replace("_", "-"): value for name, value in members.items() if value is not None}
        converted: T = convert({"job-id": id, **plain}, wanted)
        return converted
