"""block-set-write-threshold: one event for the first write past an offset, whichever way the write goes."""

import pytest

from blockjobs.base.errors import IoFailure, UsageError
from blockjobs.base.span import Span
from blockjobs.block.claims import ALL, Perm
from blockjobs.block.graph import Graph
from blockjobs.block.node import Node
from blockjobs.block.stats import block_stats
from blockjobs.block.write_threshold import BlockWriteThreshold, set_write_threshold, write_threshold
from blockjobs.testing.disk import SimDisk
from blockjobs.testing.faults import Fault, FaultPlan, FaultyMedium, Operation
from blockjobs.testing.graphs import add_node, run_in_graph

READ, WRITE = Perm.CONSISTENT_READ, Perm.WRITE


async def stack(graph: Graph, medium: object = None) -> tuple[Node, Node, Node]:
    """A raw node above a filter above a disk of 1 MiB, in use by a writer."""
    disk = await graph.open_medium(medium or SimDisk(bytes(1 << 20)), "disk")
    middle = await add_node(graph, driver="blkdebug", node_name="middle", image="disk")
    node = await add_node(graph, driver="raw", node_name="n", file="middle", discard="unmap")
    await graph.claim("x", node, READ | WRITE, ALL)
    return node, middle, disk


def test_one_event_and_then_silence() -> None:
    async def body(graph: Graph) -> None:
        node, _, _ = await stack(graph)
        heard: list[object] = []
        set_write_threshold(graph, "n", 8192)
        assert write_threshold(node) == 8192
        with graph.bus.listening(heard.append):
            await node.write(4096, bytes(4096))
            await node.discard(Span(4096, 4096))
            await node.read(16384, 4096)
            assert heard == []
            await node.write(8000, bytes(1024))
            await node.write(16384, bytes(4096))
        assert heard == [BlockWriteThreshold(node_name="n", amount_exceeded=832, write_threshold=8192)]
        assert write_threshold(node) == 0
        stats = block_stats(node).stats
        assert (stats.wr_operations, stats.unmap_operations, stats.wr_highest_offset) == (3, 1, 20480)

    run_in_graph(body)


@pytest.mark.parametrize("name", ["middle", "disk"])
def test_nodes_below_are_told_of_what_others_write_through_them(name: str) -> None:
    async def body(graph: Graph) -> None:
        node, _, _ = await stack(graph)
        heard: list[object] = []
        await node.write(0, b"a" * 4096)  # routes are found before the threshold is set
        set_write_threshold(graph, name, 4096)
        with graph.bus.listening(heard.append):
            await node.zero(Span(4096, 4096))
        assert heard == [BlockWriteThreshold(node_name=name, amount_exceeded=4096, write_threshold=4096)]

    run_in_graph(body)


def test_zero_takes_it_back_and_unknown_nodes_are_named() -> None:
    async def body(graph: Graph) -> None:
        node, _, _ = await stack(graph)
        heard: list[object] = []
        set_write_threshold(graph, "n", 10)
        set_write_threshold(graph, "n", 0)
        with graph.bus.listening(heard.append):
            await node.write(0, bytes(512))
        assert heard == []
        with pytest.raises(UsageError, match="Device 'nope' not found"):
            set_write_threshold(graph, "nope", 1)

    run_in_graph(body)


def test_a_write_that_fails_tells_too() -> None:
    async def body(graph: Graph) -> None:
        plan = FaultPlan([Fault(nth=1, operation=Operation.WRITE)])
        node, _, _ = await stack(graph, FaultyMedium(SimDisk(bytes(1 << 20)), plan))
        heard: list[object] = []
        set_write_threshold(graph, "n", 10)
        with graph.bus.listening(heard.append), pytest.raises(IoFailure):
            await node.write(0, bytes(512))
        assert heard == [BlockWriteThreshold(node_name="n", amount_exceeded=502, write_threshold=10)]

    run_in_graph(body)
