"""Offload, bus, ids, buffers and entropy."""

import asyncio
import threading
import time

import pytest

from blockjobs.base.buffers import ALIGN, aligned, is_zero, zeroes
from blockjobs.base.bus import Bus
from blockjobs.base.clock import SystemClock
from blockjobs.base.entropy import SeededEntropy, SystemEntropy
from blockjobs.base.ids import NodeNames, is_well_formed
from blockjobs.base.offload import InlineOffload, ThreadOffload


def test_offloaded_work_runs_elsewhere_and_raises_here() -> None:
    async def main() -> None:
        offload = ThreadOffload(2)
        assert await offload.run(threading.get_ident) != threading.get_ident()
        assert await offload.run(divmod, 7, 2) == (3, 1)
        with pytest.raises(ZeroDivisionError):
            await offload.run(divmod, 7, 0)
        offload.close()
        assert await InlineOffload().run(threading.get_ident) == threading.get_ident()

    asyncio.run(main())


def test_submitted_work_ends_even_if_the_waiter_is_cancelled() -> None:
    async def main() -> None:
        offload, ended = ThreadOffload(1), []

        def work() -> None:
            time.sleep(0.05)
            ended.append(True)

        waiter = asyncio.create_task(offload.run(work))
        await asyncio.sleep(0.01)
        waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter
        assert ended == [True]
        offload.close()

    asyncio.run(main())


def test_many_calls_at_once_all_come_back_and_a_second_loop_can_use_the_pool() -> None:
    async def main(offload: ThreadOffload) -> None:
        async def square(number: int) -> int:
            return await offload.run(pow, number, 2)

        assert await asyncio.gather(*map(square, range(500))) == [number**2 for number in range(500)]

    offload = ThreadOffload(4)
    asyncio.run(main(offload))
    asyncio.run(main(offload))
    offload.close()


def test_a_waiter_that_is_cancelled_when_the_work_has_just_ended_is_cancelled_all_the_same() -> None:
    async def main() -> None:
        offload = ThreadOffload(1)
        waiter = asyncio.create_task(offload.run(time.sleep, 0.01))
        await asyncio.sleep(0)
        time.sleep(0.05)  # the work ends, and nobody can be told
        waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter
        assert await offload.run(divmod, 7, 2) == (3, 1)
        offload.close()

    asyncio.run(main())


def test_the_bus_delivers_in_order_to_who_listens() -> None:
    bus, got = Bus(), []
    bus.publish("lost")
    with bus.listening(got.append):
        bus.publish(1)
        bus.publish(2)
    bus.publish(3)
    assert got == [1, 2]


@pytest.mark.parametrize("text", ["a", "Z9", "job-0", "a.b_c", "a" * 200])
def test_good_ids(text: str) -> None:
    assert is_well_formed(text)


@pytest.mark.parametrize("text", ["", "0a", "-a", "#block0", "a b", "ä", "a/b", "a\n"])
def test_bad_ids(text: str) -> None:
    assert not is_well_formed(text)


def test_generated_names_count_up() -> None:
    names = NodeNames(SeededEntropy(7))
    made = [names.next() for _ in range(12)]
    assert all(
        name.startswith(f"#block{index}") and len(name) == len(f"#block{index}") + 2 for index, name in enumerate(made)
    )
    assert [NodeNames(SeededEntropy(7)).next()] == made[:1]


def test_buffers() -> None:
    view = aligned(5000)
    assert len(view) == 5000
    assert ALIGN in (4096, 16384, 65536)
    assert is_zero(bytes(view))
    assert len(aligned(0)) == 0
    assert is_zero(b"")
    assert not is_zero(b"\0\0\1")
    assert bytes(zeroes(3)) == b"\0\0\0"
    assert len(zeroes(5 << 20)) == 5 << 20
    assert is_zero(bytes(5 << 20))
    assert not is_zero(bytes(5 << 20) + b"x")


def test_clock_and_entropy() -> None:
    async def main() -> None:
        clock = SystemClock()
        start = clock.now_ns()
        await clock.sleep_until(start + 2_000_000)
        assert clock.now_ns() - start >= 2_000_000
        await clock.sleep_until(start)
        assert clock.wall_ns() > 1_600_000_000 * 10**9

    asyncio.run(main())
    assert not SystemEntropy().rarely("x")
    assert 0 <= SystemEntropy().below(3) < 3
