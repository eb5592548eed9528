"""Host: nodes, jobs and events of one program, as one async context manager to embed.

    async with Host() as host:
        source = await host.open("disk.qcow2", read_only=True)
        target = await host.open("copy.qcow2")
        job = await host.backup(source, target, speed_bytes_per_s=100 * MiB)
        outcome = await job.outcome()

Two hosts in one process do not know of each other. Daemon, command line and tests are built on it.
"""

import asyncio
import builtins
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Self, TypeVar

from blockjobs.base.bus import Bus
from blockjobs.base.clock import Clock, SystemClock
from blockjobs.base.entropy import Entropy, SystemEntropy
from blockjobs.base.errors import UsageError
from blockjobs.base.offload import Offload, ThreadOffload
from blockjobs.block import bitmaps, drivers  # noqa: F401  importing it registers them
from blockjobs.block.bitmaps import BlockDirtyBitmapAdd, BlockDirtyBitmapMerge
from blockjobs.block.chain_map import MapRun, map_chain
from blockjobs.block.claims import ALL, Perm
from blockjobs.block.compare import first_difference
from blockjobs.block.drivers.file import File
from blockjobs.block.drivers.qcow2.check import CheckResult, check_image
from blockjobs.block.drivers.qcow2.repair import repair_image
from blockjobs.block.graph import Graph
from blockjobs.block.info import BlockDirtyInfo, ImageInfo, dirty_infos
from blockjobs.block.inspect import inspect_image
from blockjobs.block.node import Node
from blockjobs.block.node_bitmap import BlockDirtyBitmap, bitmap_at
from blockjobs.block.objects import Objects
from blockjobs.block.options import BlockdevOptions
from blockjobs.block.policy import OpenPolicy
from blockjobs.block.users import Root
from blockjobs.export.registry import Exports
from blockjobs.jobs.backup_options import BlockdevBackup
from blockjobs.jobs.chain_options import BlockCommit, BlockStream
from blockjobs.jobs.commit_start import start_commit
from blockjobs.jobs.create import create_image
from blockjobs.jobs.create_options import BlockdevCreateOptions
from blockjobs.jobs.mirror_options import BlockdevMirror
from blockjobs.jobs.mirror_start import start_blockdev_mirror
from blockjobs.jobs.stream_start import start_stream
from blockjobs.jobs.transaction import BlockdevBackupAction, run_transaction
from blockjobs.lifecycle.engine import Engine
from blockjobs.lifecycle.handle import JobHandle
from blockjobs.schema.command import convert

T = TypeVar("T")


class Host:
    """Everything that a storage daemon has, without the daemon.

    Attributes:
        jobs: the engine: `submit`, `get`, `jobs`, `history`.
        graph: the nodes.
        exports: what NBD clients may use: `start_server`, `add`, `remove`, `infos`, `stop_server`.
        bus: events, as structs.
        objects: throttle groups and secrets by id.
        clock, offload: the ports it was given.
        quitting: set once `shutdown` has cancelled all jobs; whoever runs the host leaves then.
    """

    def __init__(
        self,
        *,
        clock: Clock | None = None,
        offload: Offload | None = None,
        entropy: Entropy | None = None,
        image_roots: Sequence[str] = (),
        history_max: int = 1000,
    ) -> None:
        """See the class.

        Args:
            clock: virtual in tests (`blockjobs.testing.clock`).
            offload: where blocking calls run; threads by default.
            entropy: seeded in simulation.
            image_roots: directories that images may name backing files in; by default their own.
            history_max: outcomes of jobs kept after they were dismissed.
        """
        self.clock = clock or SystemClock()
        self.offload = offload or ThreadOffload()
        self.bus = Bus()
        self.objects = Objects()
        self.graph = Graph(
            clock=self.clock,
            offload=self.offload,
            entropy=entropy or SystemEntropy(),
            bus=self.bus,
            policy=OpenPolicy(tuple(image_roots)),
            objects=self.objects,
        )
        self.exports = Exports(self.graph, self.bus, self.objects)
        self.jobs = Engine(self.clock, self.bus, history_max=history_max)
        self.quitting = asyncio.Event()
        self._names = 0

    async def __aenter__(self) -> Self:
        await self.jobs.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Drop all NBD clients, cancel all jobs, wait for them, close all images and stop the workers."""
        try:
            try:
                await self.exports.close()
            finally:
                await self.jobs.__aexit__(kind, error, trace)
        finally:
            try:
                await self.graph.close()
            finally:
                self.offload.close()

    async def shutdown(self) -> None:
        """Drop NBD clients, cancel all jobs, newest first, and set `quitting` (spec/lifecycle.md §5, process exit)."""
        await self.exports.close()
        await self.jobs.cancel_all()
        self.quitting.set()

    # --- images

    async def open(
        self, filename: str, *, format: str = "qcow2", node_name: str | None = None, read_only: bool = False
    ) -> Node:
        """Open an image file with its backing chain.

        Args:
            filename: path of the file.
            format: qcow2 or raw; never guessed, since a guest may write any header to its disk.
            node_name: how to call it; generated if not given.
            read_only: nobody may write; other programs may then read it too.

        Raises:
            UsageError: it cannot be opened as told; nothing is open.
        """
        if node_name is None:
            node_name = f"node{self._names}"
            self._names += 1
        file = {"driver": "file", "filename": filename}
        options = {"driver": format, "node-name": node_name, "read-only": read_only, "file": file}
        if format == "raw" or not read_only:
            options["discard"] = "unmap"
        return await self.blockdev_add(options)

    async def blockdev_add(self, options: dict[str, Any]) -> Node:
        """Open a node described as for QMP's `blockdev-add`.

        Raises:
            UsageError: in QEMU's words; nothing is open.
        """
        return await self.graph.open(convert(options, BlockdevOptions))

    async def create_image(self, filename: str, format: str, length: int, **options: Any) -> None:
        """Make an image file; the options are those of `blockdev-create` (`backing_file`, `cluster_size`, ...).

        Args:
            filename: a file that is there already and that nobody uses is overwritten.
            format: qcow2 or raw.
            length: virtual size in bytes.
            options: members of the format's creation options, with underscores for dashes.

        Raises:
            UsageError: wrong options, or the file is in use or cannot be made; a new file is not left behind.
            IoFailure: it cannot be written.
        """
        members = {name.replace("_", "-"): value for name, value in options.items() if value is not None}
        if format not in ("qcow2", "raw"):
            raise UsageError(f"Unknown format '{format}': use qcow2 or raw")
        await new_image(self.graph, filename, format, {"size": length, **members})

    async def close_nodes(self, *nodes: Node) -> None:
        """Close images opened here, in this order; what nothing else uses goes with them.

        Raises:
            UsageError: something uses a node.
        """
        for node in nodes:
            await self.graph.remove(node.name)

    @asynccontextmanager
    async def access(self, node: Node, *, write: bool = False, resize: bool = False) -> AsyncIterator[Root]:
        """Hold the rights to read (and write) `node` inside the block.

        Yields:
            The hold, whose `.node` is where to read and write: a job may put a filter above `node` meanwhile, and
            whoever went on writing to `node` itself would pass by a running backup.

        Raises:
            PermissionConflict: another user does not share them.
        """
        needs = Perm.CONSISTENT_READ | (Perm.WRITE if write else Perm(0)) | (Perm.RESIZE if resize else Perm(0))
        root = await self.graph.claim("this program", node, needs=needs, shares=ALL)
        try:
            yield root
        finally:
            await self.graph.release(root)

    # --- looking at images

    def open_files(self) -> set[tuple[int, int]]:
        """(device, inode) of every file behind an open node, so that nobody replaces one of them."""
        drivers_open = [node.driver for node in self.graph.nodes()]
        return {driver.identity for driver in drivers_open if isinstance(driver, File) and driver.identity}

    async def image_info(self, file: dict[str, Any], *, format: str = "qcow2") -> ImageInfo:
        """What an image's own headers say. It may be in use; nothing that it names is opened.

        Args:
            file: options of the node that holds it (`{"driver": "file", "filename": ...}`).
            format: qcow2 or raw.

        Raises:
            UsageError: it cannot be opened.
            IoFailure: it cannot be read.
        """
        return await inspect_image(self.graph, file, format)

    async def check_image(self, file: dict[str, Any]) -> CheckResult:
        """Check the metadata of a qcow2 image that nobody writes to.

        Args:
            file: options of the node that holds it.

        Raises:
            UsageError: it cannot be opened, is in use by a writer, or makes too little sense.
            IoFailure: it cannot be read.
        """
        async with self._alone_with(file, repair=False) as node:
            return await check_image(node, offload=self.offload)

    async def repair_image(self, file: dict[str, Any]) -> CheckResult:
        """Rebuild the reference counts of a qcow2 image that nobody uses; returns what a check finds afterwards.

        Raises:
            UsageError: it cannot be opened, is in use, or is beyond repair; nothing was changed.
            IoFailure: it cannot be read or written; its reference counts are the old ones or the new ones.
        """
        async with self._alone_with(file, repair=True) as node:
            return await repair_image(node, offload=self.offload)

    @asynccontextmanager
    async def _alone_with(self, file: dict[str, Any], *, repair: bool) -> AsyncIterator[Node]:
        """A file that nobody else writes to, or uses at all during a repair."""
        node = await self.blockdev_add({**file, "read-only": not repair, "node-name": "checked-file"})
        try:
            needs, shares = Perm.CONSISTENT_READ, Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED
            if repair:
                needs, shares = Perm.CONSISTENT_READ | Perm.WRITE | Perm.RESIZE, Perm(0)
            root = await self.graph.claim("check", node, needs=needs, shares=shares)
            try:
                yield node
            finally:
                await self.graph.release(root)
        finally:
            await self.close_nodes(node)

    def map(self, node: Node) -> AsyncIterator[MapRun]:
        """Where each run of `node` is stored; use it inside `access`. Raises and waits as `map_chain`."""
        return map_chain(node)

    async def first_difference(
        self, one: Node, other: Node, *, advance: Callable[[int], None] = lambda count: None
    ) -> int | None:
        """Offset of the first byte in which two nodes differ, None if there is none.

        Args:
            one, other: what lies past the end of the shorter one counts as zero.
            advance: told how many more bytes are dealt with.

        Raises:
            IoFailure, ImageCorrupt: one of them could not be read.
            PermissionConflict: another user does not let them be read.
        """
        async with self.access(one), self.access(other):
            return await first_difference(one, other, advance=advance)

    # --- dirty bitmaps

    def bitmaps(self, node: Node) -> list[BlockDirtyInfo]:
        """The dirty bitmaps of a node, the newest first; those of jobs have no name."""
        return dirty_infos(node)

    async def add_bitmap(
        self,
        node: Node,
        name: str,
        *,
        granularity: int | None = None,
        persistent: bool = False,
        enabled: bool = True,
    ) -> None:
        """Give a node a clean bitmap, which records what is written from now on.

        Args:
            granularity: bytes a bit, a power of two; by default the node's cluster size, within 4 KiB to 64 KiB.
            persistent: it is stored with the image when that is closed.
            enabled: it records.

        Raises:
            UsageError: in QEMU's words; the node is as before.
        """
        wanted = BlockDirtyBitmapAdd(
            node=node.name, name=name, granularity=granularity, persistent=persistent, disabled=not enabled
        )
        await bitmaps.add_bitmap(self.graph, wanted)

    async def remove_bitmap(self, node: Node, name: str) -> None:
        """Take a bitmap away, from the image too.

        Raises:
            UsageError: there is none, or it is busy or readonly.
            IoFailure: it could not be taken out of the image; it stays.
        """
        await bitmaps.remove_bitmap(*bitmap_at(self.graph, node.name, name))

    def clear_bitmap(self, node: Node, name: str) -> None:
        """Make a bitmap clean.

        Raises:
            UsageError: there is none, or it may not be changed.
        """
        bitmaps.clear_bitmap(bitmap_at(self.graph, node.name, name)[1])

    async def enable_bitmap(self, node: Node, name: str, enabled: bool) -> None:
        """Let a bitmap record, or not any more.

        Raises:
            UsageError: there is none, or it may not be used.
        """
        await bitmaps.enable_bitmap(*bitmap_at(self.graph, node.name, name), enabled)

    async def merge_bitmaps(self, node: Node, target: str, sources: Sequence[tuple[Node, str]]) -> None:
        """Mark in a bitmap all that other bitmaps, of nodes of the same length, have marked.

        Raises:
            UsageError: in QEMU's words; the target is as before.
        """
        named = [BlockDirtyBitmap(node=owner.name, name=name) for owner, name in sources]
        await bitmaps.merge_bitmaps(self.graph, BlockDirtyBitmapMerge(node=node.name, target=target, bitmaps=[*named]))

    # --- jobs

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
        members = {"device": device.name, "speed": speed_bytes_per_s, **options}
        async with self.jobs.control:
            return await start_commit(self, self._convert("commit", id, members, BlockCommit))

    def _convert(self, type: str, id: str | None, members: dict[str, Any], wanted: builtins.type[T]) -> T:
        """Options of a job as a command would get them."""
        if id is None:
            id = f"{type}{self._names}"
            self._names += 1
        plain = {name.replace("_", "-"): value for name, value in members.items() if value is not None}
        converted: T = convert({"job-id": id, **plain}, wanted)
        return converted


async def new_image(graph: Graph, filename: str, format: str, members: dict[str, Any]) -> None:
    """Make a file and, for a format with metadata, the image in it."""
    layout = {"driver": "file", "filename": filename, "size": members["size"] if format == "raw" else 0}
    if format == "raw":
        layout |= {name: value for name, value in members.items() if name != "size"}
    await create_image(graph, convert(layout, BlockdevCreateOptions))
    if format != "raw":
        file = {"driver": "file", "filename": filename}
        await create_image(graph, convert({"driver": format, "file": file, **members}, BlockdevCreateOptions))
