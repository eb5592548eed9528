"""Commands that look at the graph of nodes, or change it (spec/block-layer.md §1, §5; spec/jobs.md §8)."""

from typing import TYPE_CHECKING

from blockjobs.block.graph_listing import XDbgBlockGraph, list_graph
from blockjobs.block.stats import BlockStats, block_stats
from blockjobs.schema.command import qmp

if TYPE_CHECKING:
    from blockjobs.host import Host


@qmp.command(since="4.0", features=("unstable",))
async def x_debug_query_block_graph(host: "Host") -> XDbgBlockGraph:
    """List all nodes, their users, and the edges between them with their rights."""
    return list_graph(host.graph)


@qmp.command(since="0.14")
async def query_blockstats(host: "Host", *, query_nodes: bool = False) -> list[BlockStats]:
    """Tell what devices, or nodes, have been asked to do so far, the oldest first.

    Args:
        query_nodes: list the nodes; devices of virtual machines do not exist here.
    """
    return [block_stats(node) for node in reversed(host.graph.nodes())] if query_nodes else []
