"""Any set of overlapping requests ends, and no two that exclude each other are ever inside together."""

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st

from blockjobs.base.span import Span
from blockjobs.block.tracker import RangeTracker

requests = st.lists(
    st.tuples(st.integers(0, 20), st.integers(1, 8), st.booleans(), st.integers(0, 3), st.booleans()), max_size=25
)


@given(requests)
@settings(max_examples=100)
def test_exclusion_order_and_progress(plan: list[tuple[int, int, bool, int, bool]]) -> None:
    async def main() -> None:
        tracker = RangeTracker()
        inside: list[tuple[Span, bool]] = []
        entered: list[int] = []
        queued: list[int] = []

        async def use(number: int, span: Span, exclusive: bool, turns: int) -> None:
            queued.append(number)
            async with tracker.exclusive(span) if exclusive else tracker.shared(span):
                for other, others in inside:
                    assert not (other.overlaps(span) and (exclusive or others))
                entered.append(number)
                inside.append((span, exclusive))
                try:
                    for _ in range(turns):
                        await asyncio.sleep(0)
                finally:
                    inside.remove((span, exclusive))

        tasks = [
            asyncio.create_task(use(number, Span(at, length), exclusive, turns))
            for number, (at, length, exclusive, turns, _) in enumerate(plan)
        ]
        await asyncio.sleep(0)
        for task, (*_, cancel) in zip(tasks, plan, strict=True):
            if cancel:
                task.cancel()
        if tasks:
            await asyncio.wait_for(asyncio.wait(tasks), 5)
        for task in tasks:
            if not task.cancelled():
                task.result()
        assert tracker.live == []
        # First come, first served among those that exclude each other.
        for later in entered:
            for earlier in entered[entered.index(later) + 1 :]:
                a, b = plan[earlier], plan[later]
                overlap = Span(a[0], a[1]).overlaps(Span(b[0], b[1]))
                assert not (overlap and (a[2] or b[2]) and earlier < later)

    asyncio.run(main())
