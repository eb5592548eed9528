"""What nodes count, and how the graph is listed."""

import pytest

from blockjobs.base.errors import IoFailure
from blockjobs.base.span import Span
from blockjobs.block.claims import ALL, Perm
from blockjobs.block.graph import Graph
from blockjobs.block.graph_listing import list_graph
from blockjobs.block.stats import block_stats
from blockjobs.testing.disk import SimDisk
from blockjobs.testing.faults import Fault, FaultPlan, FaultyMedium, Operation
from blockjobs.testing.graphs import add_node, run_in_graph

READ, WRITE = Perm.CONSISTENT_READ, Perm.WRITE


def test_requests_are_counted_at_the_doors() -> None:
    async def body(graph: Graph) -> None:
        disk = await graph.open_medium(SimDisk(bytes(1 << 20)), "disk")
        node = await add_node(graph, driver="raw", node_name="n", file="disk", discard="unmap")
        await graph.claim("x", node, READ | WRITE, ALL)
        await node.read(0, 4096)
        await node.write(65536, b"a" * 512, fua=True)
        await node.zero(Span(8192, 4096))
        await node.discard(Span(0, 4096))
        await node.flush()
        stats = block_stats(node).stats
        assert (stats.rd_operations, stats.rd_bytes) == (1, 4096)
        assert (stats.wr_operations, stats.wr_bytes) == (2, 512 + 4096)
        assert (stats.unmap_operations, stats.unmap_bytes) == (1, 4096)
        assert stats.flush_operations == 1
        assert stats.wr_highest_offset == 65536 + 512
        assert stats.rd_total_time_ns > 0 and stats.wr_total_time_ns > 0
        below = block_stats(node).parent
        assert below is not None and below.node_name == disk.name
        assert below.stats.wr_highest_offset == 65536 + 512  # though the write passed its doors by
        assert below.driver_specific is not None and below.driver_specific.discard_bytes_ok == 4096

    run_in_graph(body)


def test_failures_are_counted_apart() -> None:
    async def body(graph: Graph) -> None:
        await graph.open_medium(
            FaultyMedium(SimDisk(bytes(65536)), FaultPlan([Fault(nth=1, operation=Operation.WRITE)])), "disk"
        )
        node = await add_node(graph, driver="raw", node_name="n", file="disk")
        await graph.claim("x", node, READ | WRITE, ALL)
        with pytest.raises(IoFailure):
            await node.write(0, bytes(512))
        stats = block_stats(node).stats
        assert (stats.failed_wr_operations, stats.wr_operations, stats.wr_bytes) == (1, 0, 0)

    run_in_graph(body)


def test_the_graph_is_listed_with_users_and_rights() -> None:
    async def body(graph: Graph) -> None:
        await graph.open_medium(SimDisk(bytes(65536)), "disk")
        node = await add_node(graph, driver="raw", node_name="n", file="disk", offset=0, size=65536)
        await graph.claim("an unnamed block device", node, READ | WRITE, ALL & ~Perm.RESIZE)
        await graph.claim("backup job 'j'", node, Perm(0), ALL, name="main node", follows=False)
        listed = list_graph(graph)
        assert [(each.id, each.type, each.name) for each in listed.nodes] == [
            (2, "block-driver", "n"),
            (4, "block-driver", "disk"),
            (3, "block-job", "j"),
            (1, "block-backend", ""),
        ]
        everything = ["resize", "write-unchanged", "write", "consistent-read"]
        assert [(edge.parent, edge.child, edge.name, edge.perm, edge.shared_perm) for edge in listed.edges] == [
            (2, 4, "file", ["write", "consistent-read"], everything[1:]),
            (3, 2, "main node", [], everything),
            (1, 2, "root", ["write", "consistent-read"], everything[1:]),
        ]

    run_in_graph(body)
