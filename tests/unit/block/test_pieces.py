"""Copies planned in columns: when, how far, and with the same result as run by run."""

import random
from itertools import accumulate

import pytest

from blockjobs.base.span import Span
from blockjobs.base.units import KiB, MiB
from blockjobs.block.claims import ALL, Perm
from blockjobs.block.copier import BlockCopy
from blockjobs.block.drivers.qcow2.create import NewImage
from blockjobs.block.execute import Gather, Scatter
from blockjobs.block.layers import trace_pieces
from blockjobs.block.pieces import Pieces
from blockjobs.block.plan import Run, RunKind
from blockjobs.testing.clock import run
from blockjobs.testing.disk import SimDisk
from blockjobs.testing.little_host import LittleHost

SIZE = 8 * MiB
CLUSTER = 64 * KiB
CHANCE = random.Random(6)
NUMBERS = sorted(CHANCE.sample(range(SIZE // CLUSTER), 40))
MEDIUM = SimDisk()


def test_pieces_of_runs() -> None:
    zero = Run(0, CLUSTER, RunKind.ZERO)
    data = Run(CLUSTER, 2 * CLUSTER, RunKind.DATA, MEDIUM, 512)
    assert Pieces.of([zero, data], CLUSTER) == Pieces(MEDIUM, [CLUSTER], [2 * CLUSTER], [512])
    assert Pieces.of([zero], CLUSTER) is None
    assert Pieces.of([zero, data], 4 * CLUSTER) is None
    assert Pieces.of([data, Run(3 * CLUSTER, CLUSTER, RunKind.DATA, SimDisk(), 0)], CLUSTER) is None
    for kind in (RunKind.ABSENT, RunKind.OPAQUE):
        assert Pieces.of([data, Run(3 * CLUSTER, CLUSTER, kind)], CLUSTER) is None


def test_where_the_first_bytes_end() -> None:
    pieces = Pieces(MEDIUM, [0, 10, 30], [5, 10, 7], [100, 200, 300])
    assert [pieces.end_of(most) for most in (0, 3, 5, 9, 15, 21, 22, 99)] == [0, 3, 10, 14, 30, 36, None, None]
    assert pieces.before(14) == Pieces(MEDIUM, [0, 10], [5, 4], [100, 200])
    assert pieces.before(10) == Pieces(MEDIUM, [0], [5], [100])
    assert pieces.before(0) == Pieces(MEDIUM, [], [], [])
    many = Pieces(MEDIUM, list(range(0, 10000, 2)), [1] * 5000, [0] * 5000)
    assert many.end_of(99999) == 2 * 4096


@pytest.mark.parametrize("seed", range(30))
def test_what_lies_in_any_parts(seed: int) -> None:
    chance = random.Random(seed)

    def some_spans() -> list[Span]:
        cuts = sorted(chance.sample(range(200), 2 * chance.randrange(1, 20)))
        return [Span.between(start, end) for start, end in zip(cuts[::2], cuts[1::2], strict=True)]

    runs, parts = some_spans(), some_spans()
    pieces = Pieces(MEDIUM, [run.at for run in runs], [run.length for run in runs], [1000 + run.at for run in runs])
    found = pieces.within(parts)
    inside = [part.intersect(run) for run in runs for part in parts]
    assert found.spans() == [span for span in inside if span]
    assert found.medium_at == [1000 + at for at in found.at]


async def copier_of(host: LittleHost) -> BlockCopy:
    source, target = host.graph.node("source"), host.graph.node("target")
    await host.graph.claim("a copy", source, needs=Perm.CONSISTENT_READ, shares=ALL)
    await host.graph.claim("a copy", target, needs=Perm.WRITE, shares=ALL)
    copier = BlockCopy(
        source=lambda: source,
        target=lambda: target,
        offload=host.graph.offload,
        clock=host.clock,
        cluster_size=CLUSTER,
    )
    copier.dirty.set_all()
    return copier


async def scattered(host: LittleHost, kind: str) -> None:
    """A source of that format with some clusters in random order."""
    numbers = CHANCE.sample(NUMBERS, len(NUMBERS))
    await make(host, "source", kind)
    for number in numbers:
        await host.graph.node("source").write(number * CLUSTER, bytes([number + 1]) * CLUSTER)


async def make(host: LittleHost, name: str, kind: str) -> None:
    if kind == "raw":
        await host.disk(name, SIZE)
    else:
        await host.qcow2(name, NewImage(size=SIZE))
    await host.guest(host.graph.node(name))


async def expect_copied(host: LittleHost) -> None:
    source, target = host.graph.node("source"), host.graph.node("target")
    for at in range(0, SIZE, CLUSTER):
        assert await target.read(at, CLUSTER) == await source.read(at, CLUSTER), at


async def release_all(host: LittleHost) -> None:
    for node in host.graph.nodes():
        for root in [each for each in node.parents if hasattr(each, "user")]:
            await host.graph.release(root)


@pytest.mark.parametrize(("source", "target"), [("qcow2", "qcow2"), ("qcow2", "raw"), ("raw", "qcow2"), ("raw", "raw")])
def test_scattered_clusters(source: str, target: str) -> None:
    async def main() -> None:
        async with LittleHost() as host:
            await scattered(host, source)
            await make(host, "target", target)
            copier = await copier_of(host)
            flight = copier.take()
            assert flight is not None
            batch = await copier.prepare(flight, moved_max=20 * CLUSTER)
            assert flight.span == Span(0, NUMBERS[20] * CLUSTER) and batch.moved_bytes == 20 * CLUSTER
            assert not batch.doors
            assert [type(step) for step in batch.steps] == ([Gather] if target == "qcow2" else [Scatter])
            await copier.move(batch)
            while (flight := copier.take()) is not None:
                await copier.move(await copier.prepare(flight))
            await expect_copied(host)
            await release_all(host)

    run(main())


def test_a_target_with_clusters_is_planned_run_by_run() -> None:
    async def main() -> None:
        async with LittleHost() as host:
            await scattered(host, "qcow2")
            await make(host, "target", "qcow2")
            for number in (*NUMBERS[3:5], NUMBERS[-1] - 1):
                await host.graph.node("target").write(number * CLUSTER, b"\xff" * CLUSTER)
            copier = await copier_of(host)
            while (flight := copier.take()) is not None:
                batch = await copier.prepare(flight)
                assert not any(isinstance(step, Gather) for step in batch.steps)
                await copier.move(batch)
            await expect_copied(host)
            await release_all(host)

    run(main())


def test_holes_of_the_medium_are_left_out_in_whole_units() -> None:
    medium = SimDisk()
    medium.truncate(4 * MiB)
    for at, length in ((MiB + 4 * KiB, 4 * KiB), (MiB + 60 * KiB, 8 * KiB), (2 * MiB - 4 * KiB, 8 * KiB)):
        medium.write(at, b"x" * length)
    found = Pieces(medium, [0, 5 * MiB], [2 * MiB, CLUSTER], [0, 2 * MiB]).without_holes(MiB, CLUSTER, 1 << 40)
    assert found.at == [MiB, 2 * MiB - CLUSTER, 5 * MiB]
    assert found.length == [2 * CLUSTER, CLUSTER, CLUSTER]
    assert found.medium_at == [MiB, 2 * MiB - CLUSTER, 2 * MiB]
    # A unit that its run does not have as a whole: what it has of it.
    part = Pieces(medium, [CLUSTER - 512], [MiB], [MiB + 3584]).without_holes(1, CLUSTER, 1 << 40)
    assert part.at == [CLUSTER, CLUSTER + 960 * KiB] and part.length == [CLUSTER, CLUSTER - 512]
    assert part.medium_at == [MiB + 4 * KiB, MiB + 964 * KiB]
    # What is behind enough is not looked for.
    runs = Pieces(medium, [0, 5 * MiB], [2 * MiB, CLUSTER], [0, 2 * MiB])
    assert runs.without_holes(MiB, CLUSTER, 4 * KiB).at == [MiB, 2 * MiB - CLUSTER]


def test_the_parts_of_pieces() -> None:
    pieces = Pieces(MEDIUM, [10, 30], [10, 10], [100, 200])
    assert pieces.within([Span(10, 10), Span(30, 10)]) == pieces
    assert pieces.within([Span(0, 100)]) == pieces
    assert pieces.within([Span(0, 5), Span(20, 10), Span(50, 5)]).at == []
    assert pieces.within([Span(12, 2), Span(16, 18), Span(39, 9)]) == Pieces(
        MEDIUM, [12, 16, 30, 39], [2, 4, 4, 1], [102, 106, 200, 209]
    )


def test_pieces_as_runs() -> None:
    pieces = Pieces(MEDIUM, [10, 30], [5, 10], [100, 200])
    data, zero = RunKind.DATA, RunKind.ZERO
    assert pieces.runs(Span(4, 50)) == [
        Run(4, 6, zero),
        Run(10, 5, data, MEDIUM, 100),
        Run(15, 15, zero),
        Run(30, 10, data, MEDIUM, 200),
        Run(40, 14, zero),
    ]
    assert Pieces(MEDIUM, [], [], []).runs(Span(4, 50)) == [Run(4, 50, zero)]


@pytest.mark.parametrize("window", [False, True])
def test_bytes_that_begin_anywhere_in_a_raw_disk(window: bool) -> None:
    async def main() -> None:
        async with LittleHost() as host:
            offset = 3 * 512 if window else 0
            medium = await host.disk("source-file", SIZE + offset)
            await host.add(driver="raw", node_name="source", file="source-file", offset=offset, size=SIZE)
            await host.disk("target-file", SIZE + 2 * offset)
            await host.add(driver="raw", node_name="target", file="target-file", offset=2 * offset, size=SIZE)
            await host.guest(host.graph.node("source"))
            await host.guest(host.graph.node("target"))
            for number in NUMBERS:
                await host.graph.node("source").write(number * CLUSTER + 999 * number, bytes([number + 1]) * 3000)
            copier = await copier_of(host)
            while (flight := copier.take()) is not None:
                batch = await copier.prepare(flight)
                assert all(isinstance(step, Scatter) for step in batch.steps)
                await copier.move(batch)
            await expect_copied(host)
            assert host.disks["target-file"].allocated_size() < SIZE * 3 // 4
            assert medium.length == SIZE + offset
            await release_all(host)

    run(main())


class Counted(SimDisk):
    """Counts the bytes read."""

    read_bytes = 0

    def read_into(self, at: int, buffer: memoryview) -> None:
        self.read_bytes += len(buffer)
        super().read_into(at, buffer)


def test_zeroes_are_sought_once_whatever_the_target_is() -> None:
    async def main() -> None:
        async with LittleHost() as host:
            content = bytes([1]) * CLUSTER + bytes(CLUSTER) + bytes([2]) * 2 * CLUSTER
            medium = Counted(content)
            await host.disk("source", 0, medium=medium)
            await host.disk("target-file", len(content))
            host.disks["target-file"].write(0, b"old" * 1000)
            await host.add(driver="raw", node_name="target", file="target-file", discard="unmap", detect_zeroes="unmap")
            copier = await copier_of(host)
            while (flight := copier.take()) is not None:
                await copier.move(await copier.prepare(flight))
            assert host.disks["target-file"].pages.read(0, len(content)) == content
            assert medium.read_bytes <= len(content) + 3 * CLUSTER  # the search, then the copy of what is not zero
            await release_all(host)

    run(main())


class Brief(SimDisk):
    """Looks no further than it is asked to."""

    def data_runs(self, at: int, length: int, enough_bytes: int) -> tuple[list[int], list[int]]:
        starts, lengths = super().data_runs(at, length, enough_bytes)
        before = accumulate(lengths, initial=0)
        count = sum(total <= enough_bytes for total, _ in zip(before, lengths, strict=False))
        return starts[:count], lengths[:count]


def test_zeroes_above_do_not_count_as_enough() -> None:
    """What an overlay hides of its base says nothing of how much there is to copy."""

    async def main() -> None:
        async with LittleHost() as host:
            disk = Brief()
            disk.truncate(SIZE)
            for at in (0, SIZE // 2):
                disk.write(at, b"x" * CLUSTER)
            await host.disk("base", b"", medium=disk)
            top = await host.qcow2("top", NewImage(size=SIZE), backing="base")
            await host.guest(top)
            await top.zero(Span(0, CLUSTER))
            pieces = await trace_pieces(top, Span(0, SIZE), CLUSTER, CLUSTER // 2)
            assert pieces is not None
            assert pieces.spans() == [Span(SIZE // 2, CLUSTER)]
            await release_all(host)

    run(main())
