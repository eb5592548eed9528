"""`blockdev-snapshot-internal-sync`, also in transactions, and its deletion (spec/jobs.md §7): one disk, no machine."""

import logging
from typing import TYPE_CHECKING

from blockjobs.base.errors import BlockjobsError, UsageError
from blockjobs.block.info import SnapshotInfo
from blockjobs.block.internal_snapshots import InternalSnapshot
from blockjobs.block.node import Node
from blockjobs.jobs.block_job import check_root
from blockjobs.jobs.snapshot_group import cut, find, snapshots_of
from blockjobs.jobs.transaction import Action, Prepared, actions
from blockjobs.schema.types import Options

if TYPE_CHECKING:
    from blockjobs.jobs.block_job import JobHost
    from blockjobs.lifecycle.spec import Group

log = logging.getLogger(__name__)
_OPERATION = "internal snapshot"


class BlockdevSnapshotInternal(Options, frozen=True, kw_only=True):
    """A disk, and the name of a snapshot inside its image."""

    device: str
    name: str


class _Taken(Prepared):
    """The snapshot is there; it goes again if another action fails."""

    def __init__(self, node: Node, id: str) -> None:
        self._node, self._id = node, id

    async def commit(self) -> None:
        """See `Prepared`: it is done."""

    async def abort(self) -> None:
        try:
            await snapshots_of(self._node).delete(self._id)
        except BlockjobsError as error:
            log.warning("a snapshot stays in the image of node '%s': %s", self._node.name, error)


@actions.add
class InternalSnapshotAction(Action, frozen=True, kw_only=True, tag="blockdev-snapshot-internal-sync"):
    """See `BlockdevSnapshotInternal`."""

    data: BlockdevSnapshotInternal

    async def prepare(self, host: "JobHost", group: "Group | None") -> Prepared:
        """See `Action`."""
        device, name = self.data.device, self.data.name
        node = _root(host, device)
        if node.read_only:
            raise UsageError(f"Device '{device}' is read only")
        if node.driver.internal_snapshots is None:
            raise _unsupported(node, device)
        if not name:
            raise UsageError("Name is empty")
        if find(node, name) is not None:
            raise UsageError(f"Snapshot with name '{name}' already exists on device '{device}'")
        clock = host.graph.clock
        try:
            await node.flush()
            made = await snapshots_of(node).create(cut(name), date_ns=clock.wall_ns(), vm_clock_ns=clock.now_ns())
        except BlockjobsError as error:
            raise UsageError(f"Failed to create snapshot '{name}' on device '{device}': {error}") from error
        return _Taken(node, made.id)


async def delete_internal_snapshot(host: "JobHost", device: str, id: str | None, name: str | None) -> SnapshotInfo:
    """Delete a snapshot inside an image.

    Args:
        device: the disk.
        id, name: at least one of them; both must fit then.

    Returns:
        What it was.

    Raises:
        UsageError: in QEMU's words; nothing has changed.
        IoFailure: the snapshot is there as before, or gone.
    Waits: for requests on the disk, I/O. Checkpoint: no.
    """
    node = _root(host, device)
    if id is None and name is None:
        raise UsageError("Name or id must be provided")
    if node.driver.internal_snapshots is None:
        raise _unsupported(node, device)
    if node.read_only:
        raise UsageError(f"Device '{device}' is read only")
    entry = find(node, name, id)
    if entry is None:
        shown_id, shown_name = ("null" if each is None else each for each in (id, name))
        raise UsageError(f"Snapshot with id '{shown_id}' and name '{shown_name}' does not exist on device '{device}'")
    async with host.graph.drained(node):
        await snapshots_of(node).delete(entry.id)
    return info_of(entry)


def info_of(entry: InternalSnapshot) -> SnapshotInfo:
    """A snapshot as QMP tells of it."""
    return SnapshotInfo(
        id=entry.id,
        name=entry.name,
        vm_state_size=entry.vm_state_bytes,
        date_sec=entry.date_ns // 10**9,
        date_nsec=entry.date_ns % 10**9,
        vm_clock_sec=entry.vm_clock_ns // 10**9,
        vm_clock_nsec=entry.vm_clock_ns % 10**9,
        icount=entry.icount,
    )


def _root(host: "JobHost", device: str) -> Node:
    node = host.graph.find(device)
    check_root(node)
    node.check_op(_OPERATION)
    return node


def _unsupported(node: Node, device: str) -> UsageError:
    return UsageError(
        f"Block format '{node.driver_name}' used by device '{device}' does not support internal snapshots"
    )
