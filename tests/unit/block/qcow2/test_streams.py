"""Compressed clusters as workers see them."""

import errno
import itertools
import random
from collections.abc import Awaitable, Callable

import pytest

from blockjobs.base.span import Span
from blockjobs.base.units import KiB
from blockjobs.block.drivers.qcow2.create import NewImage
from blockjobs.block.drivers.qcow2.driver import Qcow2
from blockjobs.block.drivers.qcow2.entries import CompressedRun
from blockjobs.block.drivers.qcow2.streams import InflatedMedium
from blockjobs.block.medium import Allocation
from blockjobs.block.node import Node
from blockjobs.block.plan import RunKind, trace
from blockjobs.block.zero_search import without_zeroes
from blockjobs.testing.clock import run
from blockjobs.testing.disk import SimDisk
from blockjobs.testing.little_host import LittleHost
from blockjobs.wire.qcow2_tables import unpack_compressed

CLUSTERS = 40
Scenario = Callable[[LittleHost, Node, bytes], Awaitable[None]]


def some_content(cluster_size: int) -> bytes:
    chance = random.Random(cluster_size)
    return b"".join(chance.randbytes(KiB) * (cluster_size // KiB) for _ in range(CLUSTERS))


def compressed(scenario: Scenario, content: bytes, **members: object) -> None:
    async def main() -> None:
        async with LittleHost() as host:
            image = NewImage(size=len(content), **members)
            node = await host.qcow2("source", image)
            guest = await host.guest(node)
            assert isinstance(node.driver, Qcow2)
            compress = node.driver.compressor("default")
            assert compress is not None
            clusters = {at: content[at : at + image.cluster_size] for at in range(0, len(content), image.cluster_size)}
            await node.driver.write_compressed([(at, compress(cluster)) for at, cluster in clusters.items()])
            await node.flush()
            await scenario(host, node, content)
            await host.graph.release(guest)

    run(main())


async def media_of(node: Node) -> list[InflatedMedium]:
    runs = await trace(node, Span(0, node.length), through_backing=True)
    assert {each.kind for each in runs} == {RunKind.DATA}
    media = [each.medium for each in runs]
    assert [each.medium_at for each in runs] == [each.at for each in runs]
    return [medium for medium in media if isinstance(medium, InflatedMedium)]


@pytest.mark.parametrize("zstd", [False, True])
@pytest.mark.parametrize("cluster_size", [4 * KiB, 64 * KiB])
def test_any_part_is_read_as_the_node_reads_it(cluster_size: int, zstd: bool) -> None:
    async def scenario(host: LittleHost, node: Node, content: bytes) -> None:
        (medium,) = await media_of(node)
        chance = random.Random(3)
        for _ in range(60):
            at = chance.randrange(len(content))
            length = chance.randrange(1, chance.choice((100, 3 * cluster_size, len(content))))
            buffer = memoryview(bytearray(min(length, len(content) - at)))
            medium.read_into(at, buffer)
            assert buffer == content[at : at + len(buffer)]
            medium.read_ahead([(at, len(buffer))])
            assert medium.allocations(at, len(buffer)) == [Allocation(at, len(buffer), True)]
        assert medium.size() == medium.allocated_size() == len(content)
        medium.close()

    compressed(scenario, some_content(cluster_size), cluster_size=cluster_size, zstd=zstd)


def test_many_parts_of_many_runs_are_read_like_each() -> None:
    async def scenario(host: LittleHost, node: Node, content: bytes) -> None:
        (medium,) = await media_of(node)
        (run,) = medium._runs
        cut = [0, 1, 5, len(run.words)]
        medium._runs = [
            CompressedRun(run.at + first * 4 * KiB, run.words[first:end]) for first, end in itertools.pairwise(cut)
        ]
        chance = random.Random(5)
        parts = [(first * 4 * KiB, end * 4 * KiB) for first, end in itertools.pairwise(cut)]
        for _ in range(30):
            reads = []
            for start, end in chance.choices(parts, k=5):
                at = chance.randrange(start, end)
                reads.append((at, chance.randrange(1, end - at + 1)))
            buffer = memoryview(bytearray(sum(length for _, length in reads)))
            medium.read_many_into(reads, buffer)
            assert buffer == b"".join(content[at : at + length] for at, length in reads)
            medium.read_ahead(reads)

    compressed(scenario, some_content(4 * KiB), cluster_size=4 * KiB)


@pytest.mark.parametrize("zstd", [False, True])
def test_a_spoiled_stream_is_an_error_and_so_is_one_behind_the_end(zstd: bool) -> None:
    async def scenario(host: LittleHost, node: Node, content: bytes) -> None:
        (medium,) = await media_of(node)
        disk = host.disks["source-file"]
        last = unpack_compressed(medium._runs[-1].words[-1], 16)
        for spoil in (lambda: disk.write(last.at, b"\xff" * last.length), lambda: disk.truncate(last.at)):
            spoil()
            with pytest.raises(OSError) as failed:
                medium.read_into(len(content) - 3 * 64 * KiB, memoryview(bytearray(3 * 64 * KiB)))
            assert failed.value.errno == errno.EIO
        whole = memoryview(bytearray(64 * KiB))
        medium.read_into(0, whole)
        assert whole == content[: 64 * KiB]

    compressed(scenario, some_content(64 * KiB), zstd=zstd)


class Counted(SimDisk):
    """Counts the bytes that are read from it."""

    read_bytes = 0

    def read_into(self, at: int, buffer: memoryview) -> None:
        self.read_bytes += len(buffer)
        super().read_into(at, buffer)


@pytest.mark.parametrize("zstd", [False, True])
@pytest.mark.parametrize("cluster_size", [4 * KiB, 64 * KiB, 2048 * KiB])
def test_zeroes_are_found_and_nothing_else_is_inflated_for_that(cluster_size: int, zstd: bool) -> None:
    """Streams of zeroes, as of a program that does not look for them."""
    chance = random.Random(1)
    content = b"".join(
        bytes(cluster_size) if number in (1, 2, 5) else chance.randbytes(2 * KiB) * (cluster_size // 2 // KiB)
        for number in range(7)
    )

    async def scenario(host: LittleHost, node: Node, content: bytes) -> None:
        runs = await trace(node, Span(0, node.length), through_backing=True)
        counted = Counted(host.disks["source-file"].pages)
        (medium,) = {run.medium for run in runs if run.kind is RunKind.DATA}
        assert isinstance(medium, InflatedMedium)
        medium._file = counted
        found = without_zeroes(runs, cluster_size)
        zeroes = [(run.at // cluster_size, run.length // cluster_size) for run in found if run.kind is RunKind.ZERO]
        assert zeroes == [(1, 2), (5, 1)]
        assert 0 < counted.read_bytes <= 3 * (cluster_size // 64 + 1024)

    compressed(scenario, content, cluster_size=cluster_size, zstd=zstd)


def test_nobody_writes_there() -> None:
    async def scenario(host: LittleHost, node: Node, content: bytes) -> None:
        (medium,) = await media_of(node)
        before = host.disks["source-file"].pages.read(0, 1 << 20)
        for change in (
            lambda: medium.write(0, b"x"),
            lambda: medium.writev(0, [b"x"]),
            lambda: medium.zero(0, 1, unmap=True),
            lambda: medium.discard(0, 1),
            lambda: medium.copy_from(medium, 0, 0, 1),
            lambda: medium.truncate(0),
        ):
            with pytest.raises(OSError) as failed:
                change()
            assert failed.value.errno == errno.EROFS
        medium.sync()
        assert host.disks["source-file"].pages.read(0, 1 << 20) == before

    compressed(scenario, some_content(4 * KiB), cluster_size=4 * KiB)
