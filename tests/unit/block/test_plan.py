from collections.abc import Sequence

from blockjobs.base.span import Span
from blockjobs.base.units import KiB, MiB
from blockjobs.block.execute import Copy, Zero, execute
from blockjobs.block.known_zero import known_zero
from blockjobs.block.placing import Placed, Placing
from blockjobs.block.plan import Run, RunKind, clip, pair, trace
from blockjobs.testing.clock import run
from blockjobs.testing.disk import SimDisk
from blockjobs.testing.little_host import LittleHost


def kinds(runs: Sequence[Run]) -> list[tuple[int, int, RunKind]]:
    return [(each.at, each.length, each.kind) for each in runs]


def sparse() -> SimDisk:
    disk = SimDisk()
    disk.truncate(1 * MiB)
    disk.write(256 * KiB, b"x" * (128 * KiB))
    return disk


def test_holes_of_a_file_are_zero_and_the_rest_is_on_its_medium() -> None:
    async def scenario() -> None:
        async with LittleHost() as host:
            disk = sparse()
            node = await host.disk("d", b"", medium=disk)
            runs = await trace(node, Span(0, 1 * MiB), through_backing=True)
            assert kinds(runs) == [
                (0, 256 * KiB, RunKind.ZERO),
                (256 * KiB, 128 * KiB, RunKind.DATA),
                (384 * KiB, 640 * KiB, RunKind.ZERO),
            ]
            assert runs[1].medium is disk and runs[1].medium_at == 256 * KiB
            assert await known_zero(node, Span(0, 512 * KiB)) == [Span(0, 256 * KiB), Span(384 * KiB, 128 * KiB)]

    run(scenario())


def test_a_raw_offset_shifts_places_and_past_the_end_is_zero() -> None:
    async def scenario() -> None:
        async with LittleHost() as host:
            disk = sparse()
            await host.disk("d", b"", medium=disk)
            node = await host.add(driver="raw", node_name="r", file="d", offset=300 * KiB, size=100 * KiB)
            runs = await trace(node, Span(0, 100 * KiB), through_backing=True)
            assert kinds(runs) == [(0, 84 * KiB, RunKind.DATA), (84 * KiB, 16 * KiB, RunKind.ZERO)]
            assert runs[0].medium_at == 300 * KiB

    run(scenario())


def test_a_filter_that_watches_reads_makes_bytes_opaque_but_not_zeroes() -> None:
    async def scenario() -> None:
        async with LittleHost() as host:
            await host.disk("d", b"", medium=sparse())
            node = await host.add(
                driver="blkdebug", node_name="b", image="d", inject_error=[{"event": "none", "iotype": "read"}]
            )
            runs = await trace(node, Span(0, 512 * KiB), through_backing=True)
            assert [kind for _, _, kind in kinds(runs)] == [RunKind.ZERO, RunKind.OPAQUE, RunKind.ZERO]

    run(scenario())


def test_a_watched_target_has_no_places_and_a_plain_one_has() -> None:
    async def scenario() -> None:
        async with LittleHost() as host:
            disk = SimDisk(bytes(1 * MiB))
            await host.disk("d", b"", medium=disk)
            watched = await host.add(
                driver="blkdebug", node_name="b", image="d", inject_error=[{"event": "none", "iotype": "write"}]
            )
            plain = await host.add(driver="raw", node_name="r", file="d", offset=4 * KiB)
            spans = [Span(0, 64 * KiB), Span(128 * KiB, 64 * KiB)]
            assert not await Placing().reserve(watched, spans)
            placing = Placing()
            assert await placing.reserve(plain, spans)
            assert placing.placed == [
                Placed(0, 64 * KiB, disk, 4 * KiB),
                Placed(128 * KiB, 64 * KiB, disk, 132 * KiB),
            ]
            assert not plain.tracker.is_free(Span(0, 1), exclusive=True)
            await placing.release()
            assert plain.tracker.is_free(Span(0, 1), exclusive=True)

    run(scenario())


def test_pair_joins_what_is_contiguous_on_both_sides() -> None:
    source, target = SimDisk(bytes(1000)), SimDisk()
    runs = [
        Run(0, 100, RunKind.DATA, source, 500),
        Run(100, 50, RunKind.DATA, source, 600),
        Run(150, 50, RunKind.ZERO),
        Run(200, 100, RunKind.DATA, source, 0),
    ]
    placed = [Placed(0, 120, target, 0), Placed(120, 130, target, 120), Placed(250, 50, target, 900)]
    assert pair(runs, placed) == [
        Copy(source, 500, target, 0, 150),
        Zero(target, 150, 50),
        Copy(source, 0, target, 200, 50),
        Copy(source, 50, target, 900, 50),
    ]


def test_clip_keeps_places_in_step() -> None:
    medium = SimDisk()
    runs = [Run(0, 100, RunKind.DATA, medium, 1000), Run(100, 100, RunKind.ZERO)]
    assert clip(runs, [Span(20, 30), Span(90, 20)]) == [
        Run(20, 30, RunKind.DATA, medium, 1020),
        Run(90, 10, RunKind.DATA, medium, 1090),
        Run(100, 10, RunKind.ZERO),
    ]


def test_execute_copies_and_zeroes() -> None:
    source, target = SimDisk(b"abcdef"), SimDisk(b"......")
    execute([Copy(source, 1, target, 0, 1), Zero(target, 1, 1), Copy(source, 3, target, 2, 1)])
    assert target.pages.read(0, 6) == b"b\0d..."
