"""Tickets: order, overlap, cancellation."""

import asyncio

from blockjobs.base.span import Span
from blockjobs.block.tracker import RangeTracker


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_shared_tickets_overlap_and_exclusive_ones_wait_in_order() -> None:
    async def main() -> None:
        tracker, log = RangeTracker(), []

        async def use(name: str, span: Span, exclusive: bool, gate: asyncio.Event) -> None:
            async with tracker.exclusive(span) if exclusive else tracker.shared(span):
                log.append(name)
                await gate.wait()

        gates = {name: asyncio.Event() for name in "abcde"}
        async with asyncio.TaskGroup() as group:
            for name, span, exclusive in [
                ("a", Span(0, 10), False),
                ("b", Span(5, 10), False),
                ("c", Span(8, 4), True),
                ("d", Span(9, 1), False),
                ("e", Span(20, 5), True),
            ]:
                group.create_task(use(name, span, exclusive, gates[name]))
            await settle()
            assert log == ["a", "b", "e"]
            gates["a"].set()
            await settle()
            assert log == ["a", "b", "e"]  # b is still in the way of c, and d waits behind c
            gates["b"].set()
            await settle()
            assert log[3:] == ["c"]
            gates["c"].set()
            await settle()
            assert log[4:] == ["d"]
            for gate in gates.values():
                gate.set()
        assert tracker.live == []

    asyncio.run(main())


def test_a_cancelled_waiter_gives_its_place_up() -> None:
    async def main() -> None:
        tracker = RangeTracker()
        async with tracker.exclusive(Span(0, 10)):
            waiter = asyncio.create_task(tracker.exclusive(Span(0, 1)).__aenter__())
            await settle()
            assert not tracker.is_free(Span(0, 1), exclusive=False)
            waiter.cancel()
            await settle()
            assert len(tracker.live) == 1
        assert tracker.is_free(Span(0, 1), exclusive=True)

    asyncio.run(main())


def test_touching_and_empty_runs_do_not_wait() -> None:
    async def main() -> None:
        tracker = RangeTracker()
        async with tracker.exclusive(Span(0, 10)):
            assert tracker.is_free(Span(10, 5), exclusive=True)
            async with tracker.exclusive(Span(10, 5)), tracker.exclusive(Span(5, 0)):
                pass

    asyncio.run(main())
