import asyncio
import random
from dataclasses import dataclass

import pytest
from stage import Stage, play

from blockjobs.lifecycle import watchdog
from blockjobs.lifecycle.context import JobContext
from blockjobs.lifecycle.limiter import CREDIT_NS, Limiter
from blockjobs.lifecycle.runner import Runner
from blockjobs.lifecycle.status import JobStatus
from blockjobs.testing.jobs import ToyJob

S = 10**9


def test_the_first_request_goes_at_once_and_the_next_when_it_is_due() -> None:
    limiter = Limiter(1000, 0)
    assert limiter.due_ns(0) <= 0
    limiter.charge(250, 0)
    assert limiter.due_ns(0) == S // 4
    assert limiter.due_ns(S // 8) == S // 4
    assert limiter.due_ns(S // 4) == S // 4


def test_unlimited_is_free() -> None:
    limiter = Limiter(0, 0)
    limiter.charge(10**12, 0)
    assert limiter.due_ns(5) == 5


def test_late_wakeups_are_made_up_for_but_idle_time_is_not_saved() -> None:
    limiter = Limiter(1000, 0)
    limiter.charge(1000, 0)
    late = S + CREDIT_NS // 2
    limiter.charge(1000, late)
    assert limiter.due_ns(late) == 2 * S
    limiter.charge(1000, 60 * S)
    assert limiter.due_ns(60 * S) == 61 * S - CREDIT_NS
    limiter.forfeit(99 * S)
    limiter.charge(1000, 99 * S)
    assert limiter.due_ns(99 * S) == 100 * S


def test_a_new_speed_applies_to_what_is_owed() -> None:
    limiter = Limiter(1000, 0)
    limiter.charge(4000, 0)
    limiter.set_speed(3000, S)
    assert limiter.due_ns(S) == 2 * S
    limiter.set_speed(0, S)
    assert limiter.due_ns(S) == S
    limiter.set_speed(1000, 5 * S)
    assert limiter.due_ns(5 * S) == 5 * S


def test_a_batch_sent_at_a_high_rate_holds_nobody_up_at_a_low_one() -> None:
    limiter = Limiter(1 << 30, 0)
    limiter.charge(64 << 20, 0)
    limiter.set_speed(1 << 20, S // 32)
    assert limiter.due_ns(S // 32) == pytest.approx(S // 16, abs=1000)
    limiter.charge(1 << 20, S // 16)
    assert limiter.due_ns(S // 16) == pytest.approx(S // 16 + S, abs=1000)


def test_no_rounding_adds_up() -> None:
    limiter, now_ns = Limiter(3, 0), 0
    for _ in range(10_000):
        limiter.charge(1, now_ns)
        now_ns = limiter.due_ns(now_ns)
    assert now_ns == pytest.approx(10_000 * S / 3, abs=1)


@pytest.mark.parametrize("speed", [1 << 20, 16 << 20, 128 << 20, 1 << 30])
@pytest.mark.parametrize("late_ns", [0, CREDIT_NS // 10, CREDIT_NS])
def test_sleepers_that_wake_late_keep_the_rate_within_two_percent(speed: int, late_ns: int) -> None:
    chance, now_ns = random.Random(speed + late_ns), 0
    limiter = Limiter(1 << 24, 0)
    limiter.charge(1 << 20, 0)
    limiter.set_speed(speed, 0)
    steps = []
    while now_ns < 21 * S:
        now_ns = limiter.due_ns(now_ns) + chance.randrange(late_ns + 1)
        chunk = max(1 << 20, min(speed // 10, 64 << 20))
        limiter.charge(chunk, now_ns)
        steps.append((now_ns, chunk))
    for first, (began_ns, _) in enumerate(steps):
        moved = 0
        for at_ns, chunk in steps[first:]:
            if at_ns >= began_ns + 5 * S:
                assert moved * S / (at_ns - began_ns) / speed == pytest.approx(1, abs=0.02 if late_ns else 1e-9)
                break
            moved += chunk


@dataclass(kw_only=True)
class Copier(ToyJob):
    """Moves chunks as fast as it may, and notes when."""

    chunk: int = 1 << 20
    chunks: int = 10
    io_s: float = 0.0

    async def run(self, ctx: JobContext) -> None:
        self.began: list[float] = []
        for _ in range(self.chunks):
            await ctx.checkpoint(cost_bytes=self.chunk)
            self.began.append(ctx.clock.now_ns() / 1e9)
            if self.io_s:
                await asyncio.sleep(self.io_s)


@pytest.mark.parametrize("speed", [1, 333, 64 << 10, 1 << 20, (1 << 30) + 7])
@pytest.mark.parametrize("io_s", [0.0, 0.0001])
def test_the_rate_is_exact(speed: int, io_s: float) -> None:
    async def scenario(stage: Stage) -> None:
        chunk = max(1, speed // 4)
        job = stage.start(toy=Copier, chunk=chunk, chunks=401, io_s=io_s, speed_bytes_per_s=speed)
        await job.outcome()
        assert stage.now_s - io_s == pytest.approx(400 * chunk / speed, rel=0.0001)

    play(scenario)


def test_speed_changes_and_pauses_are_reckoned_with() -> None:
    async def scenario(stage: Stage) -> None:
        job = stage.start(toy=Copier, chunk=1000, chunks=6, speed_bytes_per_s=100)
        copier = job.job
        assert isinstance(copier, Copier)
        await asyncio.sleep(5)
        job.set_speed(1000)  # 500 bytes are owed: half a second
        await asyncio.sleep(0.6)
        assert copier.began == pytest.approx([0, 5.5])
        job.set_speed(1)  # 900 bytes are owed, which stay due when they were
        await asyncio.sleep(100)
        assert copier.began == pytest.approx([0, 5.5, 6.5])
        job.set_speed(800)  # of 1000 bytes 99.1 are paid off
        await asyncio.sleep(1.2)
        assert copier.began == pytest.approx([0, 5.5, 6.5, 106.726125])
        job.pause()
        assert job.status is JobStatus.PAUSED
        await asyncio.sleep(1000)
        job.resume()
        await asyncio.sleep(0.1)
        assert len(copier.began) == 5, "what was owed was paid off meanwhile"
        assert job.status is JobStatus.RUNNING, "but a pause earns no burst"
        with stage.only():
            job.set_speed(0)
            await job.outcome()
        assert copier.began[-1] == pytest.approx(1106.9, abs=0.11)

    play(scenario)


def test_resume_does_not_let_a_chunk_slip_through() -> None:
    async def scenario(stage: Stage) -> None:
        job = stage.start(toy=Copier, chunk=1000, chunks=3, speed_bytes_per_s=100)
        await asyncio.sleep(3)
        for _ in range(5):
            job.pause()
            job.resume()
            await asyncio.sleep(0)
        await job.outcome()
        assert isinstance(job.job, Copier)
        assert job.job.began == pytest.approx([0, 10, 20])

    play(scenario)


def test_cancel_ends_the_wait() -> None:
    async def scenario(stage: Stage) -> None:
        job = stage.start(toy=Copier, speed_bytes_per_s=1)
        await asyncio.sleep(3)
        await job.cancel()
        await job.outcome()
        assert stage.now_s == 3

    play(scenario)


def test_a_wake_up_of_one_job_does_not_look_at_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0

    def look(runner: Runner) -> bool:
        nonlocal looks
        looks += 1
        return at_work(runner)

    at_work = watchdog._is_at_work
    monkeypatch.setattr(watchdog, "_is_at_work", look)

    async def scenario(stage: Stage) -> None:
        for number in range(100):
            stage.start(id=f"j{number}", toy=Copier, chunk=1 << 20, chunks=1000, speed_bytes_per_s=(1 << 20) + number)
        await asyncio.sleep(20)
        copiers = [job.job for job in stage.engine.jobs()]
        assert 2000 < sum(len(each.began) for each in copiers if isinstance(each, Copier)) < 2300
        await stage.engine.cancel_all()

    play(scenario)
    assert looks < 10_000, "at most a few for each of the 2,000 wake-ups"
