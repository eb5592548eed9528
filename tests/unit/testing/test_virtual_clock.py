import asyncio
import time

import pytest

from blockjobs.base.bus import Bus
from blockjobs.base.offload import InlineOffload
from blockjobs.lifecycle.context import JobContext
from blockjobs.lifecycle.engine import Engine
from blockjobs.testing.clock import EPOCH_NS, Deadlock, VirtualClock, run

DAY_S = 24 * 3600


def test_a_day_takes_no_time_and_is_exact() -> None:
    async def main() -> int:
        clock = VirtualClock()
        for second in range(1, 2001):
            await clock.sleep_until(second * 10**9)
            assert clock.now_ns() == second * 10**9
        await asyncio.sleep(DAY_S - 2000)
        assert clock.wall_ns() - EPOCH_NS == clock.now_ns()
        return clock.now_ns()

    began_s = time.perf_counter()
    assert run(main()) == DAY_S * 10**9
    assert time.perf_counter() - began_s < 5


def test_the_past_is_no_wait() -> None:
    async def main() -> None:
        clock = VirtualClock()
        await asyncio.sleep(5)
        await clock.sleep_until(10**9)
        assert clock.now_ns() == 5 * 10**9

    run(main())


def test_timers_fire_in_order() -> None:
    async def main() -> list[int]:
        order: list[int] = []

        async def after(seconds: int) -> None:
            await asyncio.sleep(seconds)
            order.append(seconds)

        async with asyncio.TaskGroup() as group:
            for seconds in (30, 10, 20):
                group.create_task(after(seconds))
        return order

    assert run(main()) == [10, 20, 30]


def test_a_deadlock_raises_at_once_and_names_the_blocked() -> None:
    async def main() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.Event().wait(), name="waits-for-godot")

    with pytest.raises(Deadlock, match="every task is blocked") as deadlock:
        run(main())
    assert any("waits-for-godot" in note for note in deadlock.value.__notes__)


def test_a_body_that_waits_for_nothing_is_reported_then_found_dead(caplog: pytest.LogCaptureFixture) -> None:
    async def body(ctx: JobContext) -> None:
        await asyncio.Event().wait()

    async def main() -> None:
        async with Engine(VirtualClock(), Bus()) as engine:
            await (await engine.submit("x-stuck", body, id="stuck")).outcome()

    with pytest.raises(Deadlock) as deadlock:
        run(main())
    assert any("job stuck" in note for note in deadlock.value.__notes__)
    assert "job 'stuck' has not come to a checkpoint for 5 s" in caplog.text


def test_errors_and_results_pass() -> None:
    async def fails() -> None:
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        run(fails())


def test_inline_offload_works_in_virtual_time() -> None:
    async def main() -> int:
        return await InlineOffload().run(pow, 2, 10)

    assert run(main()) == 1024
