import asyncio
import random

import pytest

from blockjobs.base.span import Span
from blockjobs.base.units import KiB, MiB
from blockjobs.block.bitmap import DirtyBitmap
from blockjobs.block.claims import ALL, Perm
from blockjobs.block.execute import Scatter
from blockjobs.block.mirror_copy import ChangeMap, MirrorCopy
from blockjobs.testing.clock import run
from blockjobs.testing.little_host import LittleHost

SIZE = 4 * MiB
CONTENT = random.Random(7).randbytes(SIZE)


async def made(host: LittleHost, granularity: int = 64 * KiB) -> MirrorCopy:
    source, target = await host.disk("source", CONTENT), await host.disk("target", SIZE)
    for node in (source, target):
        await host.graph.claim("a test", node, needs=Perm.CONSISTENT_READ | Perm.WRITE, shares=ALL)
    changes = ChangeMap(map=DirtyBitmap(SIZE, granularity))
    source.attach_bitmap(changes)
    graph = host.graph
    return MirrorCopy(
        source=source, target=target, changes=changes, unit=granularity, offload=graph.offload, clock=graph.clock
    )


async def copy_all(copy: MirrorCopy) -> int:
    count = 0
    while (flight := copy.take()) is not None:
        await copy.move(await copy.prepare(flight))
        count += 1
    return count


def test_a_batch_ends_at_a_granule_however_far_it_reaches() -> None:
    async def main() -> None:
        async with LittleHost() as host:
            copy = await made(host)
            copy.dirty.set_all()
            copy.pace.reach_bytes = 100_000
            first = copy.take()
            assert first is not None and first.span == Span(0, 64 * KiB)
            await copy.move(await copy.prepare(first))
            await copy_all(copy)
            assert host.disks["target"].pages.read(0, SIZE) == CONTENT

    run(main())


def test_scattered_granules_are_one_batch_and_nothing_between_is_copied() -> None:
    async def main() -> None:
        async with LittleHost() as host:
            copy = await made(host)
            for at in range(0, SIZE, 256 * KiB):
                copy.dirty.set(Span(at, 1))
            arrived: list[int] = []
            copy.on_arrived = arrived.append
            assert await copy_all(copy) == 1
            assert arrived == [SIZE // 4]
            shown = host.disks["target"].pages.read(0, SIZE)
            for at in range(0, SIZE, 64 * KiB):
                wanted = CONTENT[at : at + 64 * KiB] if at % (256 * KiB) == 0 else bytes(64 * KiB)
                assert shown[at : at + 64 * KiB] == wanted

    run(main())


def test_flights_never_overlap_even_if_a_guest_makes_one_dirty_again() -> None:
    async def main() -> None:
        async with LittleHost() as host:
            copy = await made(host)
            copy.dirty.set(Span(0, 128 * KiB))
            first = copy.take()
            assert first is not None
            await host.graph.node("source").write(70_000, b"again")
            assert copy.dirty.any() and copy.take() is None and copy.passed_over
            await copy.move(await copy.prepare(first))
            second = copy.take()
            assert second is not None and second.parts == [Span(64 * KiB, 64 * KiB)]
            await copy.move(await copy.prepare(second))
            assert host.disks["target"].pages.read(70_000, 5) == b"again"

    run(main())


def test_a_write_to_both_sides_waits_for_a_copy_of_the_same_bytes_only() -> None:
    async def main() -> None:
        async with LittleHost() as host:
            copy = await made(host)
            source, target = host.graph.node("source"), host.graph.node("target")
            copy.dirty.set(Span(0, 1))
            copy.dirty.set(Span(256 * KiB, 1))
            flight = copy.take()
            assert flight is not None and len(flight.parts) == 2

            async def write(at: int) -> None:
                await copy.change_both(Span(at, 3), lambda: source.write(at, b"new"), lambda: target.write(at, b"new"))

            await asyncio.wait_for(write(128 * KiB), 1)
            waiting = asyncio.ensure_future(write(10))
            await asyncio.sleep(1)
            assert not waiting.done()
            await copy.move(await copy.prepare(flight))
            await waiting
            for at in (10, 128 * KiB):
                assert host.disks["target"].pages.read(at, 3) == b"new" == host.disks["source"].pages.read(at, 3)
            assert not copy.dirty.any()

    run(main())


def test_the_end_of_another_write_beside_one_to_both_sides_is_not_lost() -> None:
    async def main() -> None:
        async with LittleHost() as host:
            copy = await made(host)
            source, target = host.graph.node("source"), host.graph.node("target")

            async def on_source() -> None:
                await source.write(0, b"a" * 64 * KiB)
                await source.write(5, b"by another way")

            await copy.change_both(Span(0, 64 * KiB), on_source, lambda: target.write(0, b"a" * 64 * KiB))
            assert copy.dirty.any()
            await copy_all(copy)
            assert target.length and host.disks["target"].pages.read(0, 19) == b"aaaaaby another way"

    run(main())


@pytest.mark.parametrize("marks", ["all", "data", "some"])
def test_a_new_disk_is_planned_in_pieces(marks: str) -> None:
    async def main() -> None:
        async with LittleHost() as host:
            copy = await made(host)
            for at in range(128 * KiB, SIZE, 256 * KiB):
                await host.graph.node("source").discard(Span(at, 128 * KiB))
            copy.dirty.clear(Span(0, SIZE))
            parts = {
                "all": [Span(0, SIZE)],
                "data": [Span(at, 128 * KiB) for at in range(0, SIZE, 256 * KiB)],
                # Each begins in data, reaches over what is none, and ends in data.
                "some": [Span(at + 64 * KiB, 256 * KiB) for at in range(0, SIZE - 512 * KiB, 512 * KiB)],
            }[marks]
            for part in parts:
                copy.dirty.set(part)
            copy.zeroed = DirtyBitmap(SIZE, 64 * KiB)
            copy.zeroed.set_all()
            flight = copy.take()
            assert flight is not None and flight.parts == parts
            batch = await copy.prepare(flight)
            [step] = batch.steps
            moved = sum(part.length for part in parts) // (1 if marks == "data" else 2)
            assert isinstance(step, Scatter) and batch.moved_bytes == moved
            assert copy.zeroed.dirty_bytes() == SIZE - moved, "where it is about to write, nothing is promised any more"
            await copy.move(batch)
            shown = host.disks["target"].pages.read(0, SIZE)
            wanted = host.disks["source"].pages.read(0, SIZE)
            inside = bytearray(SIZE)
            for part in parts:
                inside[part.at : part.end] = wanted[part.at : part.end]
            assert shown == inside
            copy.dirty.set_all()
            for at in (0, 256 * KiB):
                await host.graph.node("source").write(at, b"new")
            copy.dirty.set(Span(512 * KiB, 1))
            await copy_all(copy)
            shown = host.disks["target"].pages.read(0, SIZE)
            assert shown == host.disks["source"].pages.read(0, SIZE) and shown[:3] == b"new"

    run(main())


def test_what_a_cut_flight_of_parts_holds_is_all_that_is_copied() -> None:
    async def main() -> None:
        async with LittleHost() as host:
            copy = await made(host)
            copy.dirty.clear(Span(0, SIZE))
            host.disks["target"].write(0, b"old!" * (SIZE // 4))
            for at in range(0, SIZE, 256 * KiB):
                copy.dirty.set(Span(at, 128 * KiB))
            await host.graph.node("source").discard(Span(512 * KiB, 128 * KiB))
            flight = copy.take()
            assert flight is not None
            await copy.move(await copy.prepare(flight, moved_max=192 * KiB))
            assert flight.parts == [Span(0, 128 * KiB), Span(256 * KiB, 64 * KiB)]
            await copy_all(copy)
            shown, source = (host.disks[name].pages.read(0, SIZE) for name in ("target", "source"))
            for at in range(0, SIZE, 128 * KiB):
                wanted = b"old!" * (32 * KiB) if at % (256 * KiB) else source[at : at + 128 * KiB]
                assert shown[at : at + 128 * KiB] == wanted

    run(main())


def test_a_flight_that_is_cut_may_have_passed_something_over() -> None:
    async def main() -> None:
        async with LittleHost() as host:
            copy = await made(host)
            copy.dirty.set_all()
            flight = copy.take()
            assert flight is not None
            batch = await copy.prepare(flight, moved_max=128 * KiB)
            assert copy.passed_over and flight.span == Span(0, 128 * KiB)
            await copy.move(batch)
            await copy_all(copy)
            assert host.disks["target"].pages.read(0, SIZE) == CONTENT

    run(main())
