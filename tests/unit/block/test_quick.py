"""The short way for small requests, on real files: it does all that the long way does, or nothing."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from blockjobs.base.offload import InlineOffload
from blockjobs.base.span import Span
from blockjobs.block.claims import ALL, Perm
from blockjobs.block.drivers import file_medium
from blockjobs.block.drivers.file_medium import CACHED_WRITE_BYTES_MAX, FileMedium
from blockjobs.block.graph import Graph
from blockjobs.block.node import Node
from blockjobs.block.quick import read_now, zeroes_fast
from blockjobs.jobs.create_image import create_image
from blockjobs.jobs.create_options import BlockdevCreateOptions
from blockjobs.schema.command import convert
from blockjobs.testing.graphs import add_node, new_graph, run_in_graph

CONTENT = os.urandom(1 << 20)


def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(CONTENT)
    return path


def now(node: Node, at: int, length: int) -> bytes | None:
    """What the short way gives; one more try, since every so often it declines for others' sake."""
    content = bytearray(length)
    for _ in range(2):
        if read_now(node, at, memoryview(content)):
            return bytes(content)
    return None


def on_raw(tmp_path: Path, body: Callable[[Graph, Node], Awaitable[None]], **more: object) -> None:
    async def main(graph: Graph) -> None:
        file = {"driver": "file", "node-name": "file", "filename": str(disk(tmp_path))}
        await body(graph, await add_node(graph, driver="raw", node_name="raw", file=file, **more))

    run_in_graph(main)


def test_cached_bytes_come_at_once_and_are_counted(tmp_path: Path) -> None:
    async def body(graph: Graph, node: Node) -> None:
        assert now(node, 1234, 5678) == CONTENT[1234 : 1234 + 5678]
        assert now(node, (1 << 20) - 10, 10) == CONTENT[-10:]
        assert node.tally.of("read").operations == 2
        assert node.tally.of("read").size_bytes == 5688
        assert now(node, (1 << 20) - 10, 11) is None

    on_raw(tmp_path, body)


def test_a_window_shifts_the_place(tmp_path: Path) -> None:
    async def body(graph: Graph, node: Node) -> None:
        assert now(node, 10, 100) == CONTENT[522:622]

    on_raw(tmp_path, body, offset=512)


def test_an_overlapping_write_under_way_means_the_long_way(tmp_path: Path) -> None:
    async def body(graph: Graph, node: Node) -> None:
        async with node.tracker.exclusive(Span(4096, 4096)):
            assert now(node, 8191, 10) is None
            assert now(node, 8192, 10) == CONTENT[8192:8202]
        assert now(node, 8191, 10) == CONTENT[8191:8201]

    on_raw(tmp_path, body)


def test_filters_that_look_at_reads_are_asked(tmp_path: Path) -> None:
    async def body(graph: Graph) -> None:
        file = {"driver": "file", "filename": str(disk(tmp_path))}
        rule = {"event": "none", "iotype": "read", "errno": 5}
        failing = {"driver": "blkdebug", "node-name": "debug", "image": file, "inject-error": [rule]}
        top = await add_node(graph, driver="raw", node_name="top", file=failing)
        assert now(top, 0, 512) is None
        assert now(graph.node("debug"), 0, 512) is None

    run_in_graph(body)


def test_qcow2_answers_for_plain_clusters_whose_table_is_in_memory(tmp_path: Path) -> None:
    async def body(graph: Graph) -> None:
        path = str(tmp_path / "disk.qcow2")
        await create_image(graph, convert({"driver": "file", "filename": path, "size": 0}, BlockdevCreateOptions))
        layout = {"driver": "qcow2", "size": 1 << 20, "file": {"driver": "file", "filename": path}}
        await create_image(graph, convert(layout, BlockdevCreateOptions))
        node = await add_node(graph, driver="qcow2", node_name="disk", file={"driver": "file", "filename": path})
        root = await graph.claim("a test", node, needs=Perm.CONSISTENT_READ | Perm.WRITE, shares=ALL)
        assert now(node, 0, 512) == bytes(512), "nothing is there"
        await node.write(0, CONTENT[:131072])
        await node.zero(Span(65536, 65536))
        assert now(node, 100, 1000) == CONTENT[100:1100]
        assert now(node, 65000, 1000) is None, "it ends in a cluster of zeroes"
        assert now(node, 66000, 1000) == bytes(1000)
        await node.write(196608, CONTENT[:262144])
        assert now(node, 196608 + 5, 262000) == CONTENT[5:262005], "clusters that lie together"
        assert now(node, 196608, 262145) is None, "the last one is not there"
        assert now(node, 131072 + 65535, 10) is None, "the first one is not there"
        await node.zero(Span(262144, 65536))
        assert now(node, 196608, 262144) is None, "one in the middle is zero"
        await node.write(262144, CONTENT[:65536])
        together = now(node, 196608, 262144)
        assert together in (None, await node.read(196608, 262144))
        assert await node.read(65000, 1000) == CONTENT[65000:65536] + bytes(464)
        await graph.release(root)

    run_in_graph(body)


# --- writes into the page cache


def test_short_writes_stay_in_the_loops_thread_and_long_ones_leave_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hops: list[str] = []

    class Counting(InlineOffload):
        async def run(self, work: Callable[..., object], *args: object) -> object:
            hops.append(getattr(work, "__name__", ""))
            return await super().run(work, *args)

    async def body(graph: Graph) -> None:
        file = {"driver": "file", "filename": str(disk(tmp_path))}
        node = await add_node(graph, driver="raw", node_name="raw", file=file)
        root = await graph.claim("a test", node, needs=Perm.CONSISTENT_READ | Perm.WRITE, shares=ALL)
        hops.clear()
        await node.write(4096, b"a" * 4096)
        assert hops == []
        await node.write(0, b"b" * (CACHED_WRITE_BYTES_MAX + 1))
        assert len(hops) == 1
        await node.write(8192, b"c" * 512, fua=True)
        assert "sync" in hops
        expected = bytearray(CONTENT)
        expected[: CACHED_WRITE_BYTES_MAX + 1] = b"b" * (CACHED_WRITE_BYTES_MAX + 1)
        expected[8192:8704] = b"c" * 512
        assert (tmp_path / "disk.raw").read_bytes() == expected
        await graph.release(root)

    run_in_graph(body, new_graph(offload=Counting()))


def test_after_a_slow_write_the_next_ones_leave_the_loop_alone_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        medium = FileMedium(os.open(disk(tmp_path), os.O_RDWR))
        assert medium.write_cached(0, [b"one", b"two"])
        assert not medium.write_cached((1 << 20) - 1, [b"xx"]), "the file would grow"
        monkeypatch.setattr(file_medium, "SLOW_WRITE_NS", -1)
        monkeypatch.setattr(file_medium, "thread_waits", iter((3, 3, 4, 5)).__next__)
        assert medium.write_cached(0, [b"slow"])
        assert medium.write_cached(0, [b"late"]), "nobody knew how often the thread had slept"
        assert medium.write_cached(0, [b"slow"]), "the thread was interrupted, but did not sleep"
        monkeypatch.undo()
        assert not medium.write_cached(0, [b"next"])
        medium.close()
        assert (tmp_path / "disk.raw").read_bytes()[:6] == b"slowwo"

    asyncio.run(main())


def test_whether_zeroing_is_fast_is_asked_of_the_file(tmp_path: Path) -> None:
    async def body(graph: Graph, node: Node) -> None:
        assert zeroes_fast(node, Span(7, 9))
        medium = graph.node("file").driver.medium
        assert isinstance(medium, FileMedium)
        medium._can_punch = medium._can_zero_range = False
        assert not zeroes_fast(node, Span(7, 9))

    on_raw(tmp_path, body)


# --- chains


def test_an_overlay_passes_reads_on_to_its_backing_image(tmp_path: Path) -> None:
    async def body(graph: Graph) -> None:
        path = str(tmp_path / "top.qcow2")
        await create_image(graph, convert({"driver": "file", "filename": path, "size": 0}, BlockdevCreateOptions))
        layout = {"driver": "qcow2", "size": 2 << 20, "file": {"driver": "file", "filename": path}}
        await create_image(graph, convert(layout, BlockdevCreateOptions))
        base = {"driver": "raw", "node-name": "base", "file": {"driver": "file", "filename": str(disk(tmp_path))}}
        file = {"driver": "file", "filename": path}
        node = await add_node(graph, driver="qcow2", node_name="disk", file=file, backing=base)
        root = await graph.claim("a test", node, needs=Perm.CONSISTENT_READ | Perm.WRITE, shares=ALL)
        await node.write(65536, b"new")
        assert now(node, 1000, 512) == CONTENT[1000:1512], "no L2 table says anything about it"
        assert now(node, 65536, 10) == b"new" + CONTENT[65539:65546]
        assert now(node, 131072, 512) == CONTENT[131072:131584], "the L2 table says nothing about it"
        assert graph.node("base").tally.of("read").operations == 0, "as on the long way"
        async with graph.node("base").tracker.exclusive(Span(131072, 1)):
            assert now(node, 131072, 512) is None
        assert now(node, 1 << 20, 512) is None, "the backing image is shorter"
        assert await node.read(1 << 20, 512) == bytes(512)
        await graph.release(root)

    run_in_graph(body)


def test_a_backing_image_with_a_filter_or_a_door_of_its_own_is_asked(tmp_path: Path) -> None:
    async def body(graph: Graph) -> None:
        for name in ("top", "mid"):
            path = str(tmp_path / f"{name}.qcow2")
            await create_image(graph, convert({"driver": "file", "filename": path, "size": 0}, BlockdevCreateOptions))
            layout = {"driver": "qcow2", "size": 1 << 20, "file": {"driver": "file", "filename": path}}
            await create_image(graph, convert(layout, BlockdevCreateOptions))
        mid = await add_node(
            graph, driver="qcow2", node_name="mid", file={"driver": "file", "filename": str(tmp_path / "mid.qcow2")}
        )
        root = await graph.claim("a test", mid, needs=Perm.CONSISTENT_READ | Perm.WRITE, shares=ALL)
        await mid.write(0, CONTENT[:4096])
        file = {"driver": "file", "filename": str(tmp_path / "top.qcow2")}
        top = await add_node(graph, driver="qcow2", node_name="top", file=file, backing="mid", read_only=True)
        assert now(mid, 0, 512) == CONTENT[:512]
        assert now(top, 0, 512) is None, "clusters of an image that is written may move"
        assert await top.read(0, 512) == CONTENT[:512]
        await graph.release(root)

    run_in_graph(body)


def test_while_a_worker_waits_for_the_file_the_loop_keeps_away_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_ns = [0]
    clock = SimpleNamespace(now_ns=lambda: now_ns[0])
    medium = FileMedium(os.open(disk(tmp_path), os.O_RDWR), clock=clock)
    seen: list[bool] = []

    def slow_sync(descriptor: int) -> None:
        seen.append(medium.write_cached(0, [b"one"]))
        now_ns[0] += file_medium.HUNG_NS + 1
        seen.append(medium.write_cached(0, [b"two"]))

    monkeypatch.setattr(os, "fdatasync", slow_sync)
    medium.write(0, b"new")
    medium.sync()
    assert seen == [True, False]
    assert medium.write_cached(0, [b"six"])
    medium.close()
