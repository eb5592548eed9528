"""Commands that look at the graph of nodes, or change it (spec/block-layer.md §1, §5; spec/jobs.md §8)."""

from typing import TYPE_CHECKING

from blockjobs.base.errors import UsageError
from blockjobs.block.backing_file import check_in_chain, name_backing_file, root_node
from blockjobs.block.child_change import add_child, remove_child
from blockjobs.block.graph_listing import XDbgBlockGraph, list_graph
from blockjobs.block.options import BlockdevOptions
from blockjobs.block.reopen_plan import reopen
from blockjobs.block.stats import BlockStats, block_stats
from blockjobs.jobs.snapshot import BlockdevSnapshot, BlockdevSnapshotSync, SnapshotAction, SnapshotSyncAction
from blockjobs.jobs.transaction import run_transaction
from blockjobs.schema.command import qmp

if TYPE_CHECKING:
    from blockjobs.host import Host


@qmp.command(since="4.0", features=("unstable",), waits=False)
def x_debug_query_block_graph(host: "Host") -> XDbgBlockGraph:
    """List all nodes, their users, and the edges between them with their rights."""
    return list_graph(host.graph)


@qmp.command(since="0.14", waits=False)
def query_blockstats(host: "Host", *, query_nodes: bool = False) -> list[BlockStats]:
    """Tell what devices, or nodes, have been asked to do so far, the oldest first.

    Args:
        query_nodes: list the nodes; devices of virtual machines do not exist here.
    """
    return [block_stats(node) for node in reversed(host.graph.nodes())] if query_nodes else []


@qmp.command(since="2.5", features=("allow-write-only-overlay",))
async def blockdev_snapshot(host: "Host", options: BlockdevSnapshot) -> None:
    """Put an open node on top of another, whose users use it from now on; the other becomes its read-only backing.

    Args:
        options: both nodes.
    """
    await run_transaction(host, [SnapshotAction(data=options)])


@qmp.command(since="0.14")
async def blockdev_snapshot_sync(host: "Host", options: BlockdevSnapshotSync) -> None:
    """Put an image on top of a node, whose users use it from now on; the node becomes its read-only backing.

    Args:
        options: the node, and which image file, or how to make it.
    """
    await run_transaction(host, [SnapshotSyncAction(data=options)])


@qmp.command(since="2.1")
async def change_backing_file(host: "Host", *, device: str, image_node_name: str, backing_file: str) -> None:
    """Let an image's header name another backing file; the graph stays as it is.

    Args:
        device: the top of the chain.
        image_node_name: the image in the chain whose header is changed.
        backing_file: the new name; empty for none. It is neither opened nor checked.
    """
    top = root_node(host.graph, device)
    image = host.graph.node(image_node_name)
    check_in_chain(top, image)
    try:
        await name_backing_file(host.graph, image, backing_file or None, image.driver_name)
    except UsageError as error:
        raise UsageError(f"Could not change backing file to '{backing_file}': {error}") from error


@qmp.command(since="6.1")
async def blockdev_reopen(host: "Host", *, options: list[BlockdevOptions]) -> None:
    """Give open nodes new options; what is left out goes back to its default. All of them, or none.

    Args:
        options: for each node its complete description, as for `blockdev-add`.
    """
    await reopen(host.graph, options)


@qmp.command(since="2.7", features=("unstable",))
async def x_blockdev_change(host: "Host", *, parent: str, child: str | None = None, node: str | None = None) -> None:
    """Add a child to a node, or take one away; quorum nodes only.

    Args:
        parent: the node whose children change.
        child: the edge that goes, as `children.1`.
        node: the node that is to be a new child.
    """
    above = host.graph.find(parent)
    if child is not None and node is not None:
        raise UsageError("The parameters child and node are in conflict")
    if node is not None:
        await add_child(host.graph, above, node)
    elif child is not None:
        await remove_child(host.graph, above, child)
    else:
        raise UsageError("Either child or node must be specified")
