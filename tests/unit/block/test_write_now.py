"""Writes the short way: all that the long way does, in one turn of the loop, or nothing at all."""

import errno
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from blockjobs.base.errors import IoFailure
from blockjobs.base.span import Span
from blockjobs.block.bitmap import DirtyBitmap
from blockjobs.block.claims import ALL, Perm
from blockjobs.block.drivers.file import File
from blockjobs.block.drivers.qcow2.driver import Qcow2
from blockjobs.block.gate import Gate
from blockjobs.block.graph import Graph
from blockjobs.block.node import Node
from blockjobs.block.node_bitmap import NodeBitmap
from blockjobs.block.quick import WriteRun, write_now
from blockjobs.block.write_threshold import set_write_threshold, write_threshold
from blockjobs.jobs.create_image import create_image
from blockjobs.jobs.create_options import BlockdevCreateOptions
from blockjobs.schema.command import convert
from blockjobs.testing.graphs import add_node, new_graph, run_in_graph

CONTENT = os.urandom(1 << 20)
CLUSTER = 65536
Body = Callable[[Graph, Node], Awaitable[None]]


def now(node: Node, at: int, content: bytes) -> bool:
    """One more try, since every so often the file declines for others' sake."""
    return any(write_now(node, at, memoryview(content)) for _ in range(2))


@asynccontextmanager
async def used(graph: Graph, node: Node) -> AsyncIterator[Node]:
    root = await graph.claim("a test", node, needs=Perm.CONSISTENT_READ | Perm.WRITE, shares=ALL)
    try:
        yield node
    finally:
        await graph.release(root)


def on_raw(tmp_path: Path, body: Body, *, file: dict[str, object] | None = None, **more: object) -> bytes:
    """Run the body with a raw node in use; returns the file's bytes afterwards."""
    path = tmp_path / "disk.raw"
    path.write_bytes(CONTENT)

    async def main(graph: Graph) -> None:
        below = {"driver": "file", "node-name": "file", "filename": str(path), **(file or {})}
        async with used(graph, await add_node(graph, driver="raw", node_name="raw", file=below, **more)) as node:
            await body(graph, node)

    run_in_graph(main)
    return path.read_bytes()


def on_qcow2(tmp_path: Path, body: Body, **layout: object) -> None:
    """Run the body with a qcow2 node in use whose first two clusters are written."""

    async def main(graph: Graph) -> None:
        path = str(tmp_path / "disk.qcow2")
        await create_image(graph, convert({"driver": "file", "filename": path, "size": 0}, BlockdevCreateOptions))
        file = {"driver": "file", "filename": path}
        image = {"driver": "qcow2", "size": 1 << 20, "file": file, **layout}
        await create_image(graph, convert(image, BlockdevCreateOptions))
        file = {**file, "node-name": "file"}
        async with used(graph, await add_node(graph, driver="qcow2", node_name="disk", file=file)) as node:
            await node.write(0, CONTENT[: 2 * CLUSTER])
            await body(graph, node)

    run_in_graph(main)


def test_a_write_on_raw_is_there_and_counted(tmp_path: Path) -> None:
    async def body(graph: Graph, node: Node) -> None:
        assert now(node, 1000, b"new")
        assert (node.tally.of("write").operations, node.tally.of("write").size_bytes) == (1, 3)
        assert node.tally.write_end == 1003
        assert graph.node("file").tally.write_end == 1003
        assert await node.read(999, 5) == CONTENT[999:1000] + b"new" + CONTENT[1003:1004]
        assert not now(node, (1 << 20) - 1, b"xx"), "past the end"

    assert on_raw(tmp_path, body)[:1004] == CONTENT[:1000] + b"new" + CONTENT[1003:1004]


def test_a_window_shifts_the_place(tmp_path: Path) -> None:
    async def body(graph: Graph, node: Node) -> None:
        assert now(node, 10, b"new")

    assert on_raw(tmp_path, body, offset=512)[522:525] == b"new"


def test_the_file_itself_can_be_written_so(tmp_path: Path) -> None:
    async def body(graph: Graph, node: Node) -> None:
        async with used(graph, graph.node("file")) as file:
            assert now(file, 7, b"new")
            assert file.tally.of("write").operations == 1

    assert on_raw(tmp_path, body)[7:10] == b"new"


def test_overlapping_requests_under_way_mean_the_long_way(tmp_path: Path) -> None:
    async def body(graph: Graph, node: Node) -> None:
        for ticket in (node.tracker.shared(Span(4096, 4096)), node.tracker.exclusive(Span(4096, 4096))):
            async with ticket:
                assert not now(node, 8191, b"xx")
                assert now(node, 8192, b"yy")
            assert now(node, 8191, b"zz")

    on_raw(tmp_path, body)


def test_a_shut_gate_on_any_node_of_the_way_holds_the_write(tmp_path: Path) -> None:
    async def body(graph: Graph, node: Node) -> None:
        for name in ("raw", "file"):
            gate = Gate()
            gate.shut([graph.node(name)])
            assert not now(node, 0, b"new")
            gate.open()
            assert now(node, 0, b"new")

    on_raw(tmp_path, body)


def test_bitmaps_record_it_as_the_long_way_does(tmp_path: Path) -> None:
    async def body(graph: Graph, node: Node) -> None:
        bitmap = NodeBitmap(map=DirtyBitmap(node.length, 65536), name="b")
        node.attach_bitmap(bitmap)
        assert now(node, 65535, b"xx")
        assert bitmap.map.count_bytes() == 131072
        bitmap.freeze()
        assert now(node, 200000, b"x")
        assert bitmap.map.count_bytes() == 131072
        bitmap.abdicate()
        assert bitmap.map.count_bytes() == 65536
        node.detach_bitmap(bitmap)

    on_raw(tmp_path, body)


def test_a_bitmap_of_the_file_below_means_the_long_way(tmp_path: Path) -> None:
    async def body(graph: Graph, node: Node) -> None:
        file = graph.node("file")
        bitmap = NodeBitmap(map=DirtyBitmap(file.length, 65536), name="b")
        file.attach_bitmap(bitmap)
        assert not now(node, 0, b"x")
        await node.write(0, b"x")
        assert bitmap.map.count_bytes() == 65536
        file.detach_bitmap(bitmap)
        assert now(node, 0, b"x")

    on_raw(tmp_path, body)


@pytest.mark.parametrize("where", ["raw", "file"])
def test_nodes_that_look_for_zeroes_are_asked(tmp_path: Path, where: str) -> None:
    async def body(graph: Graph, node: Node) -> None:
        assert not now(node, 0, b"new")

    option = {"detect-zeroes": "on"}
    on_raw(tmp_path, body, **({"file": option} if where == "file" else option))


def test_without_rights_there_is_no_short_way_and_rights_are_looked_at_anew(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(CONTENT)

    async def main(graph: Graph) -> None:
        node = await add_node(graph, driver="raw", node_name="raw", file={"driver": "file", "filename": str(path)})
        assert node.length == len(CONTENT)
        assert not now(node, 0, b"new"), "nobody may write"
        async with used(graph, node):
            assert now(node, 0, b"new")
        assert not now(node, 0, b"bad"), "nobody may write any more"

    run_in_graph(main)
    assert path.read_bytes()[:3] == b"new"


def test_filters_that_watch_writes_are_asked_and_others_are_passed(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(CONTENT)

    def failing(kind: str, image: object) -> dict[str, object]:
        rule = {"event": "none", "iotype": kind, "errno": 5, "sector": 2000}
        return {"driver": "blkdebug", "node_name": kind, "image": image, "inject-error": [rule]}

    async def main(graph: Graph) -> None:
        raw = {"driver": "raw", "node-name": "raw", "file": {"driver": "file", "filename": str(path)}}
        reads = await add_node(graph, **failing("read", raw))
        assert reads.length == len(CONTENT)
        async with used(graph, reads):
            assert now(reads, 0, b"new"), "it looks at reads only"
            assert reads.tally.of("write").operations == graph.node("raw").tally.of("write").operations == 1
        writes = await add_node(graph, **failing("write", "read"))
        async with used(graph, writes):
            assert not now(writes, 0, b"bad")

    run_in_graph(main)
    assert path.read_bytes()[:3] == b"new"


def test_long_writes_and_direct_ones_leave_the_loop_alone(tmp_path: Path) -> None:
    async def body(graph: Graph, node: Node) -> None:
        assert not now(node, 0, CONTENT[:65537])

    async def direct(graph: Graph, node: Node) -> None:
        assert not now(node, 0, CONTENT[:4096])

    on_raw(tmp_path, body)
    on_raw(tmp_path, direct, file={"cache": {"direct": True}})


def test_a_failed_write_is_reported_counted_and_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(graph: Graph, node: Node) -> None:
        file = graph.node("file").driver
        assert isinstance(file, File)

        def full(at: int, contents: object) -> bool:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        bitmap = NodeBitmap(map=DirtyBitmap(node.length, 65536), name="b")
        node.attach_bitmap(bitmap)
        monkeypatch.setattr(file.medium, "write_cached", full)
        with pytest.raises(IoFailure) as caught:
            now(node, 0, b"new")
        assert caught.value.errno == errno.ENOSPC
        assert (node.tally.of("write").failed, node.tally.of("write").operations) == (1, 0)
        assert bitmap.map.count_bytes() == 65536, "a part may have been written"
        node.detach_bitmap(bitmap)

    on_raw(tmp_path, body)


def test_stored_bitmaps_of_a_raw_image_are_marked_first(tmp_path: Path) -> None:
    async def body(graph: Graph, node: Node) -> None:
        assert now(node, 0, b"new")
        bitmap = NodeBitmap(map=DirtyBitmap(node.length, 65536), name="b", persistent=True)
        node.attach_bitmap(bitmap)
        store = node.driver.bitmap_store
        store.must_mark = True
        assert not now(node, 0, b"bad")
        store.must_mark = False
        assert now(node, 0, b"new")
        node.detach_bitmap(bitmap)

    class Store:
        must_mark = False

    async def with_store(graph: Graph, node: Node) -> None:
        node.driver.bitmap_store = Store()
        await body(graph, node)
        node.driver.bitmap_store = None

    assert on_raw(tmp_path, with_store)[:3] == b"new"


# --- qcow2


def image_of(node: Node) -> Qcow2:
    assert isinstance(node.driver, Qcow2)
    return node.driver


def test_qcow2_overwrites_one_cluster_of_its_own(tmp_path: Path) -> None:
    async def body(graph: Graph, node: Node) -> None:
        assert now(node, 1000, b"new")
        assert await node.read(999, 5) == CONTENT[999:1000] + b"new" + CONTENT[1003:1004]
        assert node.tally.of("write").operations == 2
        assert now(node, CLUSTER, CONTENT[:CLUSTER]), "a whole cluster"
        assert not now(node, CLUSTER - 1, b"xx"), "two clusters"
        assert not now(node, 2 * CLUSTER, b"x"), "a cluster that is not there yet"
        await node.zero(Span(0, CLUSTER))
        assert not now(node, 0, b"x"), "a cluster of zeroes"

    on_qcow2(tmp_path, body)


def test_qcow2_waits_for_requests_of_the_same_cluster(tmp_path: Path) -> None:
    async def body(graph: Graph, node: Node) -> None:
        async with node.tracker.exclusive(Span(0, 10)):
            assert not now(node, 20000, b"x")
            assert now(node, CLUSTER, b"x")

    on_qcow2(tmp_path, body)


def test_qcow2_does_not_overwrite_what_it_may_not(tmp_path: Path) -> None:
    async def body(graph: Graph, node: Node) -> None:
        image = image_of(node).image
        table = image.mapping.l2.peek(image.mapping.table_at(0))
        assert table is not None
        words = table.items[:]
        for word in (words[0] & ~(1 << 63), words[0] | 1, words[0] | 1 << 62, words[0] + 512, 1 << 63):
            table.items[0] = word
            assert not now(node, 0, b"x"), hex(word)
        table.items[0] = words[0]
        assert now(node, 0, b"x")
        for name, value in (("is_corrupt", True), ("has_unmarked_bitmaps", True), ("_may_change", False)):
            before = getattr(image, name)
            setattr(image, name, value)
            assert not now(node, 0, b"x"), name
            setattr(image, name, before)
        image.mapping.trusts_flags = False
        assert not now(node, 0, b"x"), "internal snapshots: flags may be false"
        image.mapping.trusts_flags = True
        image.allocator.guarded.add((words[0] & (1 << 56) - 1) // CLUSTER)
        assert not now(node, 0, b"x"), "metadata is there"
        image.allocator.guarded.remove((words[0] & (1 << 56) - 1) // CLUSTER)
        image.mapping.l2._tables.clear()
        assert not now(node, 0, b"x"), "the table must be read first"
        await node.write(0, b"x")
        assert now(node, 0, b"x")

    on_qcow2(tmp_path, body)


def test_qcow2_with_a_shared_table_or_subclusters_takes_the_long_way(tmp_path: Path) -> None:
    async def shared(graph: Graph, node: Node) -> None:
        image = image_of(node).image
        entry = image.mapping.l1.words[0]
        image.mapping.l1.words[0] = entry & ~(1 << 63)
        assert not now(node, 0, b"x")
        image.mapping.l1.words[0] = entry
        assert now(node, 0, b"x")

    async def subclusters(graph: Graph, node: Node) -> None:
        assert not now(node, 0, b"x")

    on_qcow2(tmp_path, shared)
    (tmp_path / "disk.qcow2").unlink()
    on_qcow2(tmp_path, subclusters, **{"extended-l2": True})


def test_what_was_written_so_is_durable_after_a_flush() -> None:
    """On a disk that forgets: the flush that follows covers it."""
    from blockjobs.testing.disk import SimDisk
    from blockjobs.testing.faults import FaultyMedium

    disk = SimDisk(bytes(4096))

    async def main(graph: Graph) -> None:
        node = await graph.open_medium(FaultyMedium(disk, is_cached=lambda: True), "disk")
        async with used(graph, node):
            assert write_now(node, 0, memoryview(b"kept"))
            await node.flush()
            assert write_now(node, 8, memoryview(b"lost"))

    run_in_graph(main, new_graph())
    assert disk._durable.read(0, 4) == b"kept"


def test_writes_in_a_row_are_counted_together_the_failed_ones_too(tmp_path: Path) -> None:
    async def body(graph: Graph, node: Node) -> None:
        run, content = WriteRun(node), memoryview(b"new")
        assert any(run.write(100, content) for _ in range(2)) and any(run.write(50, content) for _ in range(2))
        assert not node.tally.of("write").operations
        run.end()
        run.end()
        tally = node.tally
        assert (tally.of("write").operations, tally.of("write").size_bytes, tally.write_end) == (2, 6, 103)

    on_raw(tmp_path, body)


def test_a_row_ends_where_the_first_write_made_somebody_look_anew(tmp_path: Path) -> None:
    async def body(graph: Graph, node: Node) -> None:
        set_write_threshold(graph, "raw", 1000)
        run = WriteRun(node)
        assert any(run.write(2000, memoryview(b"x")) for _ in range(2))
        assert write_threshold(node) == 0, "the event is sent before the next write"
        assert not any(run.write(0, memoryview(b"x")) for _ in range(2))
        assert now(node, 0, b"x")

    on_raw(tmp_path, body)
