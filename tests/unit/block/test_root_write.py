"""Writing a root in one hop: all that requests one after another do, in the same order, counted and recorded alike."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blockjobs.base.errors import IoFailure
from blockjobs.base.offload import InlineOffload
from blockjobs.base.span import Span
from blockjobs.block.bitmap import DirtyBitmap
from blockjobs.block.claims import ALL, Perm
from blockjobs.block.graph import Graph
from blockjobs.block.node import Node
from blockjobs.block.node_bitmap import NodeBitmap
from blockjobs.block.root_write import write_root
from blockjobs.testing.crash import RecordingMedium, WriteLog
from blockjobs.testing.disk import SimDisk
from blockjobs.testing.faults import Fault, FaultPlan, FaultyMedium, Operation
from blockjobs.testing.graphs import add_node, run_in_graph

PIECES = [(8192, b"table"), (4096, b"more")]
RIGHTS = Perm.WRITE | Perm.RESIZE | Perm.CONSISTENT_READ


class CountingOffload(InlineOffload):
    """Notes which calls were made, each of which would be a hop to a worker."""

    def __init__(self) -> None:
        self.hops = 0

    async def run(self, work: Callable[..., Any], *args: Any) -> Any:
        self.hops += 1
        return await super().run(work, *args)


async def written(node: Node) -> None:
    await write_root(node, 0, b"root", length=16384, first=PIECES)


def test_the_order_is_length_then_pieces_then_the_root_between_two_flushes() -> None:
    async def body(graph: Graph) -> None:
        acts = {}
        for name in ("short", "long"):
            log = WriteLog()
            node = await graph.open_medium(RecordingMedium(SimDisk(), log), name)
            await graph.claim("a test", node, needs=RIGHTS, shares=ALL)
            if name == "long":
                node.attach_bitmap(NodeBitmap(map=DirtyBitmap(0, 65536), name="b"))
            await written(node)
            acts[name] = [(entry.act, entry.at, entry.length) for entry in log.changes]
            tally = node.tally
            assert {kind: tally.of(kind).operations for kind in ("write", "flush", "resize")} == {
                "write": 3,
                "flush": 2,
                "resize": 1,
            }
            assert (tally.of("write").size_bytes, tally.write_end) == (13, 8197)
        assert acts["short"] == acts["long"]
        kinds = [act.name for act, _, _ in acts["short"]]
        assert kinds == ["TRUNCATE", "WRITE", "WRITE", "SYNC", "WRITE", "SYNC"]

    run_in_graph(body)


def test_it_is_one_hop_for_a_file_and_none_to_close_it(tmp_path: Path) -> None:
    async def body(graph: Graph) -> None:
        graph.offload = offload = CountingOffload()
        path = tmp_path / "image"
        path.touch()
        node = await add_node(graph, driver="file", node_name="file", filename=str(path))
        claim = await graph.claim("a test", node, needs=RIGHTS, shares=ALL)
        await written(node)
        assert offload.hops == 1
        assert path.read_bytes() == b"root".ljust(4096, b"\0") + b"more".ljust(4096, b"\0") + b"table".ljust(
            8192, b"\0"
        )
        await graph.release(claim)
        await graph.remove("file")

    run_in_graph(body)


def test_a_filter_sees_the_requests(tmp_path: Path) -> None:
    async def body(graph: Graph) -> None:
        path = tmp_path / "image"
        path.write_bytes(bytes(16384))
        fails = {"event": "none", "iotype": "flush", "once": True}
        file = {"driver": "file", "node-name": "file", "filename": str(path)}
        node = await add_node(graph, driver="blkdebug", node_name="filter", image=file, inject_error=[fails])
        await graph.claim("a test", node, needs=RIGHTS, shares=ALL)
        with pytest.raises(IoFailure):
            await write_root(node, 0, b"root", first=PIECES)
        assert path.read_bytes()[:4096] == bytes(4096) and path.read_bytes()[4096:4100] == b"more"
        await write_root(node, 0, b"root", first=PIECES)
        assert path.read_bytes()[:4] == b"root"

    run_in_graph(body)


def test_nothing_of_the_root_is_written_after_a_failed_flush() -> None:
    async def body(graph: Graph) -> None:
        disk = SimDisk()
        plan = FaultPlan([Fault(nth=1, operation=Operation.SYNC, errno=errno.ENOSPC)])
        node = await graph.open_medium(FaultyMedium(disk, plan), "disk")
        await graph.claim("a test", node, needs=RIGHTS, shares=ALL)
        with pytest.raises(IoFailure) as failed:
            await written(node)
        assert failed.value.errno == errno.ENOSPC
        assert disk.pages.read(0, 4) == bytes(4)
        assert node.tally.of("write").failed == 3
        assert len(node.in_flight) == 0 and node.tracker.is_free(Span(0, 16384), exclusive=True)

    run_in_graph(body)


def test_a_bitmap_that_comes_meanwhile_records_it() -> None:
    class Attaching(SimDisk):
        def sync(self) -> None:
            if not node.bitmaps:
                node.attach_bitmap(NodeBitmap(map=DirtyBitmap(node.length, 4096), name="b"))
            super().sync()

    async def body(graph: Graph) -> None:
        nonlocal node
        node = await graph.open_medium(Attaching(), "disk")
        await graph.claim("a test", node, needs=RIGHTS, shares=ALL)
        await written(node)
        (bitmap,) = node.bitmaps
        assert bitmap.map.length == 16384 and bitmap.map.count_bytes() == 3 * 4096

    node: Node
    run_in_graph(body)
