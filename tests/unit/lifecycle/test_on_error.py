"""On-error policies (spec/jobs.md §0, and the *_source_stop, *_error_ignore transcripts)."""

import asyncio
import errno
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from stage import Stage, lines, play

from blockjobs.base.errors import IoFailure, UsageError
from blockjobs.lifecycle.context import RETRY_PAUSE_NS, JobContext
from blockjobs.lifecycle.error_policy import Action, IoStatus, OnError, Side, action_for
from blockjobs.lifecycle.status import JobStatus
from blockjobs.testing.jobs import ToyJob

S = JobStatus


@pytest.mark.parametrize(
    ("policy", "on_eio", "on_enospc"),
    [
        (OnError.REPORT, Action.REPORT, Action.REPORT),
        (OnError.IGNORE, Action.IGNORE, Action.IGNORE),
        (OnError.STOP, Action.STOP, Action.STOP),
        (OnError.ENOSPC, Action.REPORT, Action.STOP),
        (OnError.AUTO, Action.REPORT, Action.STOP),
    ],
)
def test_what_a_policy_means(policy: OnError, on_eio: Action, on_enospc: Action) -> None:
    assert action_for(policy, errno.EIO) is on_eio
    assert action_for(policy, errno.ENOSPC) is on_enospc


@dataclass(kw_only=True)
class Reader(ToyJob):
    """Reads, fails with the given errors in order (None: succeeds), and counts."""

    errors: list[int | None] = field(default_factory=list)
    ignore: Literal["retry", "skip"] = "retry"
    side: Side = Side.SOURCE
    in_window: bool = False
    results: list[bool] = field(default_factory=list)

    async def run(self, ctx: JobContext) -> None:
        async def piece() -> None:
            self.results.append(await ctx.attempt(self.read, side=self.side, ignore=self.ignore))

        if self.in_window:
            async with ctx.window(max_in_flight=2) as window:
                await window.submit(piece)
        else:
            await piece()

    async def read(self) -> None:
        await asyncio.sleep(0.001)
        error = self.errors.pop(0) if len(self.errors) > 1 else self.errors[0]
        if error is not None:
            raise IoFailure(error)


def reader(stage: Stage, policy: OnError, errors: list[int | None], **wishes: Any) -> Any:
    side = wishes.get("side", Side.SOURCE)
    return stage.start(toy=Reader, policies={side: policy}, errors=errors, **wishes)


@pytest.mark.parametrize("in_window", [False, True])
def test_report(in_window: bool) -> None:
    async def scenario(stage: Stage) -> None:
        job = reader(stage, OnError.REPORT, [errno.EIO], in_window=in_window)
        outcome = await job.outcome()
        assert outcome.error == "Input/output error"
        assert stage.take()[2:5] == lines("j: error source report, j aborting, j: abort")

    play(scenario)


@pytest.mark.parametrize("in_window", [False, True])
def test_ignore_retries_and_stays_cancellable_and_pausable(in_window: bool) -> None:
    async def scenario(stage: Stage) -> None:
        job = reader(stage, OnError.IGNORE, [errno.EIO, errno.EIO, None], in_window=in_window)
        assert (await job.outcome()).error is None
        assert stage.take().count("j: error source ignore") == 2
        job = reader(stage, OnError.IGNORE, [errno.EIO], in_window=in_window)
        await asyncio.sleep(1)
        assert 50 < len(stage.take()) < 1e9 / RETRY_PAUSE_NS + 5, "a dead disk does not take the whole loop"
        job.pause()
        await job.reached(S.PAUSED)
        stage.take()
        await asyncio.sleep(1)
        assert stage.take() == []
        job.resume()
        await asyncio.sleep(1)
        await job.cancel()
        assert (await job.outcome()).error == "Operation canceled"

    play(scenario)


def test_ignore_may_skip() -> None:
    async def scenario(stage: Stage) -> None:
        job = reader(stage, OnError.IGNORE, [errno.EIO], ignore="skip")
        assert (await job.outcome()).error is None
        assert job.job.results == [False]

    play(scenario)


@pytest.mark.parametrize("in_window", [False, True])
def test_stop_pauses_and_resume_retries(in_window: bool) -> None:
    async def scenario(stage: Stage) -> None:
        job = reader(stage, OnError.STOP, [errno.EIO, None], in_window=in_window)
        await asyncio.sleep(5)
        assert stage.take() == lines("j created, j running, j: error source stop, j paused")
        life = job.life
        assert (life.user_paused, life.pause_count, life.io_status) == (True, 1, IoStatus.FAILED)
        with pytest.raises(UsageError, match="Job is already paused"):
            job.pause()
        job.resume()
        assert stage.take() == ["j running"]
        assert job.life.io_status is IoStatus.OK
        assert (await job.outcome()).error is None
        assert job.job.results == [True]

    play(scenario)


@pytest.mark.parametrize("in_window", [False, True])
def test_cancel_while_stopped(in_window: bool) -> None:
    async def scenario(stage: Stage) -> None:
        job = reader(stage, OnError.STOP, [errno.EIO], in_window=in_window)
        await job.reached(S.PAUSED)
        with pytest.raises(UsageError, match="The block job for device 'j' is currently paused"):
            await job.block_cancel()
        stage.take()
        await job.block_cancel(force=True)
        assert (await job.outcome()).error == "Operation canceled"
        assert stage.take()[:2] == lines("j running, j aborting")

    play(scenario)


def test_enospc_stops_only_for_want_of_space() -> None:
    async def scenario(stage: Stage) -> None:
        job = reader(stage, OnError.ENOSPC, [errno.ENOSPC, errno.EIO], side=Side.TARGET)
        await job.reached(S.PAUSED)
        assert job.life.io_status is IoStatus.NOSPACE
        job.resume()
        assert (await job.outcome()).errno == errno.EIO
        assert [line for line in stage.take() if "error" in line] == lines(
            "j: error target stop, j: error target report"
        )

    play(scenario)


def test_several_pieces_stop_once_and_all_retry() -> None:
    @dataclass(kw_only=True)
    class Wide(Reader):
        async def run(self, ctx: JobContext) -> None:
            async def piece() -> None:
                self.results.append(await ctx.attempt(self.read))

            async with ctx.window(max_in_flight=3) as window:
                for _ in range(6):
                    await window.submit(piece)

    async def scenario(stage: Stage) -> None:
        errors = [errno.ENOSPC, errno.EIO, None]
        job = stage.start(toy=Wide, policies={Side.SOURCE: OnError.STOP}, errors=errors)
        await job.reached(S.PAUSED)
        assert job.life.pause_count == 1
        assert job.life.io_status is IoStatus.NOSPACE, "the first error wins"
        job.resume()
        assert (await job.outcome()).error is None
        assert job.job.results == [True] * 6

    play(scenario)


def test_a_failure_of_a_cancelled_job_is_nobodys_interest() -> None:
    async def scenario(stage: Stage) -> None:
        job = reader(stage, OnError.REPORT, [errno.EIO])
        await asyncio.sleep(0.0005)
        await job.cancel()
        assert (await job.outcome()).error == "Operation canceled"
        assert "j: error source report" not in stage.take()

    play(scenario)
