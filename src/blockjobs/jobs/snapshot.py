"""`blockdev-snapshot` and `blockdev-snapshot-sync`, as actions of transactions (spec/jobs.md §8)."""

import logging
from typing import TYPE_CHECKING

from blockjobs.base.errors import BlockjobsError, NodeNotFound, UsageError
from blockjobs.block.edit import Edit
from blockjobs.block.node import Node
from blockjobs.block.options import BlockdevOptions, NodeOptions
from blockjobs.block.snapshot import OPERATION, take_snapshot
from blockjobs.jobs.new_image import NewImageMode, make_image, refuse_protocols, refuse_unknown
from blockjobs.jobs.transaction import Action, Prepared, actions
from blockjobs.schema.command import convert
from blockjobs.schema.types import Options

if TYPE_CHECKING:
    from blockjobs.jobs.block_job import JobHost
    from blockjobs.lifecycle.spec import Group

log = logging.getLogger(__name__)


class BlockdevSnapshot(Options, frozen=True, kw_only=True):
    """Puts an open node on top of another."""

    node: str
    overlay: str


class BlockdevSnapshotSync(Options, frozen=True, kw_only=True):
    """Opens an image, which it makes unless told that it exists, and puts it on top of a node."""

    device: str | None = None
    node_name: str | None = None
    snapshot_file: str
    snapshot_node_name: str | None = None
    format: str | None = None
    mode: NewImageMode | None = None


class _Snapshot(Prepared):
    """The graph has been changed already; nobody writes before the transaction ends, so it can be reversed."""

    def __init__(self, edit: Edit) -> None:
        self._edit = edit

    async def commit(self) -> None:
        try:
            await self._edit.finish()
        except BlockjobsError as error:  # the snapshot is taken; an overlay that nobody uses could not be closed well
            log.warning("%s", error)

    async def abort(self) -> None:
        await self._edit.undo()


@actions.add
class SnapshotAction(Action, frozen=True, kw_only=True, tag="blockdev-snapshot"):
    """See `BlockdevSnapshot`."""

    data: BlockdevSnapshot

    async def prepare(self, host: "JobHost", group: "Group | None") -> Prepared:
        """See `Action`."""
        node = host.graph.find(self.data.node)
        node.check_op(OPERATION)
        overlay = host.graph.find(self.data.overlay)
        return _Snapshot(await take_snapshot(host.graph, node, overlay))


@actions.add
class SnapshotSyncAction(Action, frozen=True, kw_only=True, tag="blockdev-snapshot-sync"):
    """See `BlockdevSnapshotSync`."""

    data: BlockdevSnapshotSync

    async def prepare(self, host: "JobHost", group: "Group | None") -> Prepared:
        """See `Action`. A file that was made stays when the transaction is undone."""
        graph, options = host.graph, self.data
        node = _node_of(host, options)
        node.check_op(OPERATION)
        if options.snapshot_node_name is None:
            raise UsageError("New overlay node-name missing")
        if any(other.name == options.snapshot_node_name for other in graph.nodes()):
            raise UsageError("New overlay node-name already in use")
        format_name = options.format or "qcow2"
        refuse_unknown(format_name)
        refuse_protocols(options.snapshot_file)
        if options.mode is not NewImageMode.EXISTING:
            await make_image(graph, options.snapshot_file, format_name, node.length, node)
        return _Snapshot(await take_snapshot(graph, node, _description(options, format_name)))


def _node_of(host: "JobHost", options: BlockdevSnapshotSync) -> Node:
    """The node; `device` would be a device of a virtual machine, so it is only told in the error."""
    name = options.node_name or ""
    try:
        return host.graph.find(name)
    except NodeNotFound:
        raise NodeNotFound(device=options.device or "", node=name) from None


def _description(options: BlockdevSnapshotSync, format_name: str) -> NodeOptions:
    described: dict[str, object] = {
        "driver": format_name,
        "node-name": options.snapshot_node_name,
        "file": {"driver": "file", "filename": options.snapshot_file},
    }
    if format_name != "raw":
        described["backing"] = None
    converted: NodeOptions = convert(described, BlockdevOptions)
    return converted
