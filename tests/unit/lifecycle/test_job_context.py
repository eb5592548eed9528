"""What a body can ask for: checkpoints, windows, foreign waits, and how its exceptions end."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

import pytest
from stage import Stage, lines, play

from blockjobs.base.errors import ImageCorrupt, IoFailure, JobCancelled, UsageError
from blockjobs.lifecycle.context import JobContext
from blockjobs.lifecycle.error_policy import OnError, Side
from blockjobs.lifecycle.handle import JobHandle
from blockjobs.lifecycle.history import Fate
from blockjobs.lifecycle.job import Body, Job
from blockjobs.lifecycle.status import JobStatus
from blockjobs.testing.jobs import ToyJob

S = JobStatus


async def submit(stage: Stage, body: Body, **flags: bool) -> JobHandle:
    return await stage.engine.submit("x-body", body, id="j", **flags)


@pytest.mark.parametrize(
    ("error", "text", "errno"),
    [
        (IoFailure(5, "node 'disk'"), "Input/output error", 5),
        (OSError(28, "whatever"), "No space left on device", 28),
        (OSError("no code"), "Input/output error", 5),
        (ImageCorrupt("disk", "bad L1"), "Image 'disk' is corrupt: bad L1", None),
        (UsageError("no"), "no", None),
        (ZeroDivisionError("oops"), "oops", None),
        (KeyError(), "KeyError", None),
        (ExceptionGroup("two", [IoFailure(5), ExceptionGroup("in", [ValueError("x")])]), "Input/output error", 5),
        (BaseExceptionGroup("mixed", [JobCancelled(), IoFailure(5)]), "Input/output error", 5),
        (BaseExceptionGroup("cancelled", [JobCancelled()]), "Operation canceled", 125),
        (JobCancelled(), "Operation canceled", 125),
        (asyncio.CancelledError(), "Operation canceled", 125),
    ],
)
def test_how_exceptions_end(error: BaseException, text: str, errno: int | None) -> None:
    async def scenario(stage: Stage) -> None:
        async def body(ctx: JobContext) -> None:
            raise error

        outcome = await (await submit(stage, body)).outcome()
        assert (outcome.fate, outcome.error, outcome.errno) == (Fate.FAILED, text, errno)

    play(scenario)


def test_only_surprises_are_logged_with_their_traceback(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(stage: Stage) -> None:
        async def expected(ctx: JobContext) -> None:
            raise IoFailure(5)

        async def surprise(ctx: JobContext) -> None:
            raise ZeroDivisionError("oops")

        await (await submit(stage, expected)).outcome()
        assert not caplog.records
        await (await submit(stage, surprise)).outcome()

    play(scenario)
    assert "ZeroDivisionError: oops" in caplog.text


def test_an_except_exception_does_not_eat_the_cancellation() -> None:
    async def scenario(stage: Stage) -> None:
        async def body(ctx: JobContext) -> None:
            while True:
                try:
                    await ctx.sleep_until(ctx.clock.now_ns() + 10**9)
                except Exception:  # what a careless author writes
                    logging.getLogger(__name__).info("eaten")

        job = await submit(stage, body)
        await asyncio.sleep(3)
        await job.cancel()
        assert (await job.outcome()).fate is Fate.CANCELLED

    play(scenario)


def test_a_body_that_never_waits_still_lets_others_run() -> None:
    async def scenario(stage: Stage) -> None:
        async def body(ctx: JobContext) -> None:
            while True:
                await ctx.checkpoint()
                ctx.progress.advance(1)

        job = await submit(stage, body)
        for _ in range(5):
            await asyncio.sleep(0)
        job.pause()
        await job.quiet()
        assert job.status is S.PAUSED
        done = job.progress.current
        for _ in range(5):
            await asyncio.sleep(0)
        assert job.progress.current == done
        job.resume()
        await asyncio.sleep(0)
        await job.cancel()
        assert (await job.outcome()).current > done

    play(scenario)


def piece(log: list[str], name: str, seconds: float, error: Exception | None = None) -> Callable[[], Awaitable[None]]:
    async def io() -> None:
        log.append(f"+{name}")
        await asyncio.sleep(seconds)
        log.append(f"-{name}")
        if error:
            raise error

    return io


def test_a_window_is_bounded_and_drained() -> None:
    log: list[str] = []

    async def scenario(stage: Stage) -> None:
        async def body(ctx: JobContext) -> None:
            async with ctx.window(max_in_flight=2) as window:
                for name in "abc":
                    await window.submit(piece(log, name, 1.0 if name == "a" else 0.3))
            log.append("drained")

        assert (await (await submit(stage, body)).outcome()).error is None

    play(scenario)
    assert log == ["+a", "+b", "-b", "+c", "-c", "-a", "drained"]


def test_a_window_finishes_its_io_before_a_failure_is_raised() -> None:
    log: list[str] = []

    async def scenario(stage: Stage) -> None:
        async def body(ctx: JobContext) -> None:
            async with ctx.window(max_in_flight=3) as window:
                await window.submit(piece(log, "slow", 5))
                await window.submit(piece(log, "bad", 1, IoFailure(5)))
                await window.submit(piece(log, "worse", 2, IoFailure(28)))
                await ctx.sleep_until(3 * 10**9)
                await window.submit(piece(log, "never", 1))

        assert (await (await submit(stage, body)).outcome()).errno == 5
        assert stage.now_s == 5

    play(scenario)
    assert log == ["+slow", "+bad", "+worse", "-bad", "-worse", "-slow"]


def test_a_window_finishes_its_io_when_the_body_is_cancelled() -> None:
    log: list[str] = []

    async def scenario(stage: Stage) -> None:
        async def body(ctx: JobContext) -> None:
            async with ctx.window(max_in_flight=2) as window:
                await window.submit(piece(log, "io", 5))
                while True:
                    await ctx.checkpoint()
                    await asyncio.sleep(0.1)

        job = await submit(stage, body)
        await asyncio.sleep(1)
        await job.cancel()
        assert (await job.outcome()).fate is Fate.CANCELLED
        assert stage.now_s == 5

    play(scenario)
    assert log == ["+io", "-io"]


@pytest.mark.parametrize("where", ["checkpoint", "submit", "drain", "exit"])
def test_a_job_parks_only_when_its_windows_are_empty(where: str) -> None:
    async def scenario(stage: Stage) -> None:
        log: list[str] = []

        async def body(ctx: JobContext) -> None:
            async with ctx.window(max_in_flight=1) as window:
                await window.submit(piece(log, "io", 5))
                if where == "checkpoint":
                    await asyncio.sleep(1.5)
                    await ctx.checkpoint()
                elif where == "submit":
                    await window.submit(piece(log, "next", 1))
                elif where == "drain":
                    await window.drain()

        job = await submit(stage, body)
        await asyncio.sleep(1)
        job.quiesce_begin()
        assert (job.is_quiet(), job.is_busy) == (False, True)
        await job.quiet()
        if where == "submit":
            assert log == ["+io", "-io"], "what was not begun waits"
        assert job.is_quiet()
        assert not job.is_busy
        assert stage.now_s == 5
        if where != "exit":
            assert job.status is S.PAUSED
        job.quiesce_end()
        assert (await job.outcome()).error is None

    play(scenario)


def test_a_window_of_nothing_is_refused() -> None:
    async def scenario(stage: Stage) -> None:
        async def body(ctx: JobContext) -> None:
            ctx.window(max_in_flight=0)

        assert "can carry nothing" in str((await (await submit(stage, body)).outcome()).error)

    play(scenario)


def test_interruptible_returns_raises_and_gives_up() -> None:
    async def scenario(stage: Stage) -> None:
        told: list[object] = []

        async def number() -> int:
            await asyncio.sleep(1)
            return 7

        async def broken() -> None:
            raise IoFailure(5)

        async def forever() -> None:
            try:
                await asyncio.sleep(10**6)
            finally:
                told.append("cleaned up")

        async def body(ctx: JobContext) -> None:
            told.append(await ctx.interruptible(number()))
            with pytest.raises(IoFailure):
                await ctx.interruptible(broken())
            try:
                await ctx.interruptible(forever())
            except JobCancelled:
                with pytest.raises(JobCancelled):
                    await ctx.interruptible(forever())
                raise

        job = await submit(stage, body)
        await asyncio.sleep(5)
        await job.cancel()
        assert (await job.outcome()).fate is Fate.CANCELLED
        assert told == [7, "cleaned up"]
        assert stage.now_s == 5

    play(scenario)


def test_idle_waits_for_a_condition_of_the_jobs_own() -> None:
    async def scenario(stage: Stage) -> None:
        dirty: list[int] = []
        contexts: list[JobContext] = []

        async def body(ctx: JobContext) -> None:
            contexts.append(ctx)
            await ctx.idle(lambda: bool(dirty))
            await ctx.idle(lambda: False)

        job = await submit(stage, body)
        await asyncio.sleep(1)
        job.pause()
        assert job.status is S.PAUSED
        dirty.append(1)
        contexts[0].nudge()
        await asyncio.sleep(1)
        job.resume()
        await asyncio.sleep(1)
        await job.cancel()
        assert (await job.outcome()).fate is Fate.CANCELLED
        assert contexts[0].is_stopping

    play(scenario)


def test_the_body_learns_how_it_is_asked_to_end() -> None:
    async def scenario(stage: Stage) -> None:
        ends: list[tuple[bool, bool, bool]] = []

        async def body(ctx: JobContext) -> None:
            await ctx.ready()
            completed = await ctx.completion()
            ends.append((completed, ctx.completion_requested, ctx.soft_cancelled))

        job = await submit(stage, body)
        await job.reached(S.READY)
        job.complete()
        await job.outcome()
        assert ends == [(True, True, False)]

    play(scenario)


def test_ready_of_a_cancelled_job_raises() -> None:
    async def scenario(stage: Stage) -> None:
        async def body(ctx: JobContext) -> None:
            await asyncio.sleep(1)
            await ctx.ready()

        job = await submit(stage, body)
        await job.cancel()
        assert (await job.outcome()).fate is Fate.CANCELLED
        assert stage.take() == lines("j created, j running, j aborting, j concluded, j null")

    play(scenario)


def test_bytes_may_be_charged_after_the_fact() -> None:
    async def scenario(stage: Stage) -> None:
        async def body(ctx: JobContext) -> None:
            ctx.charge(500)
            await ctx.checkpoint()

        await (await stage.engine.submit("x-body", body, id="j", speed_bytes_per_s=100)).outcome()
        assert stage.now_s == 5
        await (await stage.engine.submit("x-body", body, id="j")).outcome()
        assert stage.now_s == 5

    play(scenario)


def test_what_a_job_type_need_not_say() -> None:
    class Bare(Job):
        async def run(self, ctx: JobContext) -> None:
            assert self.policy(Side.TARGET) is OnError.REPORT
            assert self.savepoint() is None
            await ctx.ready()
            await ctx.completion()

    async def scenario(stage: Stage) -> None:
        job = await stage.engine.submit("x-bare", Bare(), id="j")
        await job.reached(S.READY)
        job.complete()
        assert (await job.outcome()).error is None
        job = await stage.engine.submit("x-bare", Bare(), id="j")
        await job.reached(S.READY)
        await job.cancel(force=False)
        assert (await job.outcome()).fate is Fate.CANCELLED, "without a soft mode, cancelled is cancelled"

    play(scenario)


def test_a_piece_of_a_task_group_of_the_jobs_own_may_attempt() -> None:
    async def scenario(stage: Stage) -> None:
        failures = [IoFailure(5)]

        async def io() -> None:
            if failures:
                raise failures.pop()

        class Parallel(ToyJob):
            async def run(self, ctx: JobContext) -> None:
                async with asyncio.TaskGroup() as pieces:
                    pieces.create_task(ctx.attempt(io))

        job = stage.start(toy=Parallel, policies={Side.SOURCE: OnError.STOP})
        await asyncio.sleep(1)
        assert (job.status, job.life.user_paused) == (S.RUNNING, True), "only windows let a job park meanwhile"
        job.resume()
        assert (await job.outcome()).error is None

    play(scenario)


def test_a_context_names_its_job() -> None:
    async def scenario(stage: Stage) -> None:
        async def body(ctx: JobContext) -> None:
            assert (ctx.id, ctx.speed_bytes_per_s) == ("j", 0)
            assert ctx.log.extra == {"job": "j"}

        assert (await (await submit(stage, body)).outcome()).error is None

    play(scenario)


def test_the_watchdog_reports_each_silence_once(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(stage: Stage) -> None:
        async def body(ctx: JobContext) -> None:
            await asyncio.sleep(60)
            await ctx.checkpoint()
            await ctx.sleep_until(ctx.clock.now_ns() + 60 * 10**9)
            await asyncio.sleep(60)

        await (await submit(stage, body)).outcome()

    play(scenario)
    silences = [record.getMessage() for record in caplog.records]
    assert silences == ["job 'j' has not come to a checkpoint for 5 s"] * 2


def test_a_job_that_comes_by_is_no_silence(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(stage: Stage) -> None:
        await stage.start(ticks=600).outcome()

    play(scenario)
    assert not caplog.records
