"""The raw and null drivers."""

import asyncio

import pytest

from blockjobs.base.errors import BlockjobsError
from blockjobs.base.span import Span
from blockjobs.block.claims import ALL, Perm
from blockjobs.block.extents import Extent
from blockjobs.block.graph import Graph
from blockjobs.block.vocabulary import Kind
from blockjobs.testing.disk import SimDisk
from blockjobs.testing.graphs import add_node, run_in_graph

K = 1024


def test_a_window_shifts_everything() -> None:
    async def body(graph: Graph) -> None:
        disk = SimDisk()
        disk.write(16 * K, b"\1" * (16 * K))
        await graph.open_medium(disk, "disk")
        window = await add_node(
            graph, driver="raw", node_name="w", offset=12 * K, size=8 * K, discard="unmap", file="disk"
        )
        await graph.claim("x", window, Perm.CONSISTENT_READ | Perm.WRITE, ALL)
        assert window.length == 8 * K
        assert not window.open_ended
        assert await window.block_status(Span(0, 8 * K)) == [
            Extent(0, 4 * K, Kind.ZERO, 1),
            Extent(4 * K, 4 * K, Kind.DATA, 1),
        ]
        await window.write(4 * K - 2, b"abcd")
        assert disk.pages.read(16 * K - 2, 5) == b"abcd\1"
        await window.zero(Span(4 * K, 2))
        assert disk.pages.read(16 * K - 2, 5) == b"ab\0\0\1"
        await window.discard(Span(4 * K, 4 * K))
        assert disk.pages.read(16 * K, 4 * K) == bytes(4 * K)
        unaligned = await add_node(graph, driver="raw", node_name="u", offset=3, file="disk")
        assert await unaligned.read(12 * K + 4 * K - 3, 2) == bytes(2)
        assert unaligned.length == 32 * K  # rounded up, as QEMU does

    run_in_graph(body)


def test_null_reads_promise_zeroes_only_when_told() -> None:
    async def body(graph: Graph) -> None:
        plain = await add_node(graph, driver="null-co", node_name="plain")
        zeroes = await add_node(graph, driver="null-aio", node_name="zeroes", size=1000, read_zeroes=True)
        assert (plain.length, zeroes.length) == (1 << 30, 1024)
        assert (plain.filename, zeroes.driver_name) == ("null-co://", "null-aio")
        buffer = bytearray(b"xyz")
        await plain.read_into(0, memoryview(buffer))
        assert buffer == b"xyz"
        await zeroes.read_into(0, memoryview(buffer))
        assert buffer == bytes(3)
        assert (await plain.block_status(Span(0, 9)))[0].kind is Kind.DATA
        assert (await zeroes.block_status(Span(0, 9)))[0].kind is Kind.ZERO
        await graph.claim("x", plain, Perm.WRITE, ALL)
        await plain.write(0, b"x", fua=True)
        await plain.zero(Span(0, 512))
        with pytest.raises(BlockjobsError, match="below 2"):
            await add_node(graph, driver="null-co", node_name="n", size=-1)

    run_in_graph(body)


def test_null_latency() -> None:
    async def body(graph: Graph) -> None:
        node = await add_node(graph, driver="null-co", node_name="slow", latency_ns=20_000_000)
        loop = asyncio.get_running_loop()
        start = loop.time()
        await asyncio.gather(*(node.read(0, 1) for _ in range(10)))
        assert 0.019 < loop.time() - start < 1

    run_in_graph(body)
