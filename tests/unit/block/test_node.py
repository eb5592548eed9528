"""The doors of a node: ranges, rights, limits, mapping, zero detection, status."""

import asyncio
import errno
import random
import subprocess
from pathlib import Path

import pytest

from blockjobs.base.errors import IoFailure
from blockjobs.base.offload import ThreadOffload
from blockjobs.base.span import Span
from blockjobs.block.claims import ALL, Perm
from blockjobs.block.extents import Extent
from blockjobs.block.graph import Graph
from blockjobs.block.node import Node
from blockjobs.block.vocabulary import Kind, ZeroMode
from blockjobs.testing.disk import SimDisk
from blockjobs.testing.graphs import add_node, new_graph, run_in_graph

K = 1024
READ, WRITE = Perm.CONSISTENT_READ, Perm.WRITE


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


async def writable(graph: Graph, **options: object) -> Node:
    node = await add_node(graph, **options)
    await graph.claim("a test", node, READ | WRITE, ALL)
    return node


def qemu_img(*arguments: str) -> str:
    return subprocess.run(["qemu-img", *arguments], check=True, capture_output=True, text=True).stdout


def test_ranges_and_rights() -> None:
    async def body(graph: Graph) -> None:
        await graph.open_medium(SimDisk(bytes(64 * K)), "disk")
        node = await writable(graph, driver="raw", node_name="n", size=4096, file="disk")
        for work in (node.read(4000, 97), node.write(4000, bytes(97)), node.zero(Span(4096, 1)), node.read(10**9, 1)):
            with pytest.raises(IoFailure) as caught:
                await work
            assert caught.value.errno == errno.EIO
        await node.write(4000, bytes(96))
        assert await node.read(5000, 0) == b""
        await node.write(4096, b"")
        read_only = await add_node(graph, driver="raw", node_name="ro", read_only=True, file="disk")
        for work in (read_only.write(0, b"x"), read_only.zero(Span(0, 1)), read_only.discard(Span(0, 1))):
            with pytest.raises(IoFailure) as caught:
                await work
            assert caught.value.errno == errno.EPERM
        idle = await add_node(graph, driver="raw", node_name="idle", file="disk")
        with pytest.raises(AssertionError, match="no user that may write"):
            await idle.write(0, b"x")

    run_in_graph(body)


def test_a_protocol_grows_only_for_those_who_may_resize() -> None:
    async def body(graph: Graph) -> None:
        disk = SimDisk(bytes(512))
        file = await graph.open_medium(disk, "disk")
        root = await graph.claim("a test", file, READ | WRITE, ALL)
        with pytest.raises(IoFailure):
            await file.write(512, b"x")
        await graph.change_claim(root, needs=READ | WRITE | Perm.RESIZE, shares=ALL)
        await file.write(512, b"x")
        assert disk.size() == 513
        assert file.length == 1024
        assert await file.read(512, 600) == b"x" + bytes(599)

    run_in_graph(body)


class Watched(SimDisk):
    """Notes how runs are zeroed."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.zeroed: list[tuple[int, int, bool]] = []

    def zero(self, at: int, length: int, *, unmap: bool) -> None:
        self.zeroed.append((at, length, unmap))
        super().zero(at, length, unmap=unmap)


@pytest.mark.parametrize(
    ("mode", "zeroed"),
    [
        ("off", []),
        ("on", [(0, 32 * K, False), (32 * K, 4 * K, False)]),
        ("unmap", [(0, 32 * K, True), (32 * K, 4 * K, True)]),
    ],
)
def test_zero_detection(mode: str, zeroed: list[tuple[int, int, bool]]) -> None:
    async def body(graph: Graph) -> None:
        disk = Watched(b"\1" * (64 * K))
        await graph.open_medium(disk, "disk")
        node = await writable(graph, driver="raw", node_name="n", detect_zeroes=mode, discard="unmap", file="disk")
        await node.write(0, bytearray(32 * K), fua=True)
        await node.write(32 * K, memoryview(bytes(4 * K)))
        await node.write(40 * K, b"\0\1")
        assert await node.read(0, 36 * K) == bytes(36 * K)
        assert await node.read(40 * K, 3) == b"\0\1\1"
        assert disk.zeroed == zeroed

    run_in_graph(body)


@pytest.mark.parametrize(("given", "unmaps"), [("unmap", True), ("ignore", False)])
def test_discard_needs_permission(given: str, unmaps: bool) -> None:
    async def body(graph: Graph) -> None:
        disk = Watched(b"\1" * (64 * K))
        await graph.open_medium(disk, "disk")
        node = await writable(graph, driver="raw", node_name="n", discard=given, file="disk")
        await node.discard(Span(0, 32 * K))
        assert (await node.read(0, 1) == b"\0") is unmaps
        await node.zero(Span(0, 32 * K), mode=ZeroMode.UNMAP)
        await node.zero(Span(0, 4 * K), mode=ZeroMode.KEEP)
        assert await node.read(0, 1) == b"\0"
        assert disk.zeroed == [(0, 32 * K, unmaps), (0, 4 * K, False)]
        assert await node.block_status(Span(0, 64 * K)) == [
            Extent(0, 32 * K, Kind.ZERO, 1),
            Extent(32 * K, 32 * K, Kind.DATA, 1),
        ]

    run_in_graph(body)


@pytest.mark.parametrize("align", [512, 4096])
def test_requests_are_padded_and_split_to_a_drivers_limits(align: int) -> None:
    async def body(graph: Graph) -> None:
        await graph.open_medium(SimDisk(bytes(96 * K + 512)), "disk")
        limits = {"align": align, "max-transfer": 8 * K, "opt-write-zero": 8 * K, "max-write-zero": 16 * K}
        await add_node(graph, driver="blkdebug", node_name="limited", image="disk", discard="unmap", **limits)
        node = await writable(graph, driver="raw", node_name="n", file="limited")
        model, chance = bytearray(node.length), random.Random(align)
        for _ in range(120):
            at = chance.randrange(len(model))
            length = min(chance.choice([1, 100, 5000, 40 * K]), len(model) - at)
            match chance.randrange(3):
                case 0:
                    model[at : at + length] = content = chance.randbytes(length)
                    await node.write(at, content)
                case 1:
                    model[at : at + length] = bytes(length)
                    await node.zero(Span(at, length))
                case _:
                    assert await node.read(at, length) == model[at : at + length]
        assert await node.read(0, len(model)) == model

    run_in_graph(body)


def test_overlapping_unaligned_writes_do_not_lose_each_other() -> None:
    async def body(graph: Graph) -> None:
        await graph.open_medium(SimDisk(bytes(64 * K)), "disk")
        await add_node(graph, driver="blkdebug", node_name="limited", image="disk", align=4096)
        node = await writable(graph, driver="raw", node_name="n", file="limited")
        async with asyncio.TaskGroup() as group:
            for at in range(0, 16 * K, 100):
                group.create_task(node.write(at, bytes([at // 100 % 255 + 1]) * 100))
        content = await node.read(0, 16 * K)
        assert all(content[at] == at // 100 % 255 + 1 for at in range(16 * K))

    run_in_graph(body)


def test_a_medium_error_becomes_an_io_failure_that_names_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(graph: Graph) -> None:
        disk = SimDisk(bytes(64 * K))
        await graph.open_medium(disk, "disk")
        node = await writable(graph, driver="raw", node_name="n", file="disk")

        def fail(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, "full")

        for name in ("write", "writev", "zero", "read_into", "sync"):
            monkeypatch.setattr(disk, name, fail)
        for work in (node.read(0, 9), node.write(0, b"x"), node.zero(Span(0, 9)), node.flush()):
            with pytest.raises(IoFailure) as caught:
                await work
            assert caught.value.errno == errno.ENOSPC
            assert "n" in caught.value.where or "disk" in caught.value.where
        assert node.tracker.live == []
        assert len(node.in_flight) == 0

    run_in_graph(body)


def test_flushes_reach_the_medium_unless_told_otherwise() -> None:
    async def body(graph: Graph) -> None:
        disk = SimDisk(bytes(64 * K))
        synced = []
        disk.sync = lambda: synced.append(1)
        await graph.open_medium(disk, "disk")
        node = await writable(graph, driver="raw", node_name="n", file="disk")
        await node.flush()
        assert len(synced) == 1
        await node.write(0, b"x", fua=True)
        assert len(synced) == 2
        await asyncio.gather(*(node.flush() for _ in range(50)))
        assert len(synced) < 10  # flushes that come together share a sync
        loose = await writable(graph, driver="raw", node_name="l", cache={"no-flush": True}, file="disk")
        before = len(synced)
        await loose.flush()
        assert len(synced) == before

    run_in_graph(body)


@pytest.mark.qemu
def test_a_chain_reads_as_qemu_reads_it(tmp_path: Path) -> None:
    qemu_img("create", "-q", "-f", "raw", "base.raw", "1M")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "mid.qcow2", "3M")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2", "top.qcow2", "4M")
    for name, format_name, commands in [
        ("base.raw", "raw", ["write -P 1 0 1M"]),
        ("mid.qcow2", "qcow2", ["write -P 2 512k 256k", "write -z 64k 64k", "write -P 3 2M 64k"]),
        ("top.qcow2", "qcow2", ["write -P 4 100k 1k", "write -z 768k 128k", "write -P 5 3500k 4k"]),
    ]:
        steps = [part for command in commands for part in ("-c", command)]
        subprocess.run(["qemu-io", "-f", format_name, *steps, name], check=True, capture_output=True)
    qemu_img("convert", "-O", "raw", "top.qcow2", "flat.raw")

    async def body(graph: Graph) -> None:
        top = await add_node(graph, driver="qcow2", node_name="top", file={"driver": "file", "filename": "top.qcow2"})
        assert await top.read(0, top.length) == Path("flat.raw").read_bytes()
        extents = await top.block_status(Span(0, top.length))
        assert sum(extent.length for extent in extents) == top.length
        depth_at = {extent.at: (extent.kind, extent.depth) for extent in extents}
        assert depth_at[0] == (Kind.DATA, 3)
        assert depth_at[512 * K] == (Kind.DATA, 2)
        assert depth_at[768 * K] == (Kind.ZERO, 1)
        assert depth_at[2048 * K] == (Kind.DATA, 2)
        mid = top.backing
        assert mid is not None and mid.read_only and mid.name.startswith("#block")
        above = await top.block_status(Span(0, top.length), base=mid)
        assert {extent.depth for extent in above} == {0, 1}
        assert sum(extent.length for extent in above if extent.depth) == (64 + 128 + 64) * K
        assert top.cluster_size == 64 * K

    run_in_graph(body, new_graph(offload=ThreadOffload()))


@pytest.mark.qemu
def test_random_requests_on_an_overlay_match_a_byte_array() -> None:
    qemu_img("create", "-q", "-f", "raw", "base.raw", "600k")
    Path("base.raw").write_bytes(random.Random(2).randbytes(600 * K))
    options = "cluster_size=4k"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, "-b", "base.raw", "-F", "raw", "top.qcow2", "1M")
    model = bytearray(Path("base.raw").read_bytes() + bytes(424 * K))

    async def body(graph: Graph) -> None:
        file = {"driver": "file", "filename": "top.qcow2"}
        top = await writable(graph, driver="qcow2", node_name="top", discard="unmap", file=file)
        chance = random.Random(3)
        for _ in range(150):
            at = chance.randrange(len(model))
            length = min(chance.choice([1, 512, 5000, 30 * K]), len(model) - at)
            match chance.randrange(4):
                case 0 | 1:
                    model[at : at + length] = content = chance.randbytes(length)
                    await top.write(at, content, fua=chance.random() < 0.1)
                case 2:
                    model[at : at + length] = bytes(length)
                    await top.zero(Span(at, length))
                case _:
                    assert await top.read(at, length) == model[at : at + length]
        await top.flush()
        assert await top.read(0, len(model)) == model

    run_in_graph(body, new_graph(offload=ThreadOffload()))
    assert "No errors" in qemu_img("check", "top.qcow2")
    qemu_img("convert", "-O", "raw", "top.qcow2", "flat.raw")
    assert Path("flat.raw").read_bytes() == model
