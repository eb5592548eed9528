"""The event sequences of spec/lifecycle.md §7, as far as jobs without disks can show them."""

import asyncio

import pytest
from stage import Stage, lines, play

from blockjobs.base.errors import IoFailure, ParameterError, UsageError, VerbRefused
from blockjobs.lifecycle.handle import StatusUnreachable
from blockjobs.lifecycle.history import Fate
from blockjobs.lifecycle.status import JobStatus

S = JobStatus
SETTLED = "j: prepare, j: commit, j: clean, j: completed, j concluded, j null"
CANCELLED = "j aborting, j: abort, j: clean, j: cancelled, j concluded, j null"


def test_success() -> None:
    async def scenario(stage: Stage) -> None:
        await stage.start().outcome()
        assert stage.take() == lines(f"j created, j running, j waiting, j pending, {SETTLED}")

    play(scenario)


def test_success_of_a_job_born_in_a_drained_section() -> None:
    async def scenario(stage: Stage) -> None:
        job = stage.create()
        job.quiesce_begin()
        job.start()
        assert stage.take() == lines("j created, j running, j paused")
        assert job.is_quiet()
        await asyncio.sleep(60)
        job.quiesce_end()
        assert stage.take() == ["j running"]
        outcome = await job.outcome()
        assert outcome.fate is Fate.COMPLETED
        assert stage.now_s == pytest.approx(60.1), "no work was done while drained"

    play(scenario)


def test_manual_finalize_and_dismiss() -> None:
    async def scenario(stage: Stage) -> None:
        job = stage.start(auto_finalize=False, auto_dismiss=False)
        await job.reached(S.PENDING)
        assert stage.take() == lines("j created, j running, j waiting, j pending, j: pending")
        await job.finalize()
        assert stage.take() == lines("j: prepare, j: commit, j: clean, j: completed, j concluded")
        assert stage.engine.get("j") is job
        job.dismiss()
        assert stage.take() == ["j null"]
        with pytest.raises(UsageError, match="Job not found"):
            stage.engine.get("j")

    play(scenario)


@pytest.mark.parametrize("auto_dismiss", [True, False])
@pytest.mark.parametrize("auto_finalize", [True, False])
def test_every_mix_of_the_flags(auto_finalize: bool, auto_dismiss: bool) -> None:
    async def scenario(stage: Stage) -> None:
        job = stage.start(auto_finalize=auto_finalize, auto_dismiss=auto_dismiss)
        if not auto_finalize:
            await job.reached(S.PENDING)
            assert "j: pending" in stage.diary
            await job.finalize()
        await job.outcome()
        assert ("j null" in stage.diary) is auto_dismiss
        assert ("j: pending" in stage.diary) is not auto_finalize
        assert job.status is (S.NULL if auto_dismiss else S.CONCLUDED)

    play(scenario)


def test_failure_in_run() -> None:
    async def scenario(stage: Stage) -> None:
        outcome = await stage.start(fails=IoFailure(28), auto_dismiss=False).outcome()
        assert (outcome.fate, outcome.error, outcome.errno) == (Fate.FAILED, "No space left on device", 28)
        assert stage.take() == lines("j created, j running, j aborting, j: abort, j: clean, j: completed, j concluded")
        assert stage.engine.get("j").info().error == "No space left on device"

    play(scenario)


def test_failure_in_prepare_does_not_fail_the_command() -> None:
    async def scenario(stage: Stage) -> None:
        job = stage.start(fails_to_prepare=IoFailure(22), auto_finalize=False, auto_dismiss=False)
        await job.reached(S.PENDING)
        with stage.only() as told:
            await job.finalize()
        assert told == lines("j: prepare, j aborting, j: abort, j: clean, j: completed, j concluded")
        assert job.error == "Invalid argument"

    play(scenario)


def test_cancel_while_running_and_while_paused() -> None:
    async def scenario(stage: Stage) -> None:
        job = stage.start(ticks=100)
        await asyncio.sleep(1.05)
        with stage.only() as told:
            await job.cancel()
            outcome = await job.outcome()
        assert told == lines(CANCELLED)
        assert (outcome.fate, outcome.error, outcome.current, outcome.total) == (
            Fate.CANCELLED,
            "Operation canceled",
            10,
            100,
        )
        job = stage.start(ticks=100)
        await asyncio.sleep(1.05)
        job.pause()
        assert job.status is S.PAUSED, "a body at rest is parked without a turn of the loop"
        with stage.only() as told:
            await job.cancel()
            assert job.status is S.RUNNING
            await job.outcome()
        assert told == lines(f"j running, {CANCELLED}")

    play(scenario)


def test_ready_and_complete() -> None:
    async def scenario(stage: Stage) -> None:
        job = stage.start(wants_completion=True)
        await job.reached(S.READY)
        assert stage.take() == lines("j created, j running, j ready, j: ready")
        job.complete()
        assert stage.take() == []
        await job.outcome()
        assert stage.take() == lines(f"j waiting, j pending, {SETTLED}")

    play(scenario)


def test_soft_and_forced_cancel_of_a_ready_job() -> None:
    async def scenario(stage: Stage) -> None:
        job = stage.start(wants_completion=True, soft=True)
        await job.reached(S.READY)
        with stage.only() as told:
            await job.block_cancel()
            await job.outcome()
        assert told == lines(f"j waiting, j pending, {SETTLED}")
        job = stage.start(wants_completion=True, soft=True)
        await job.reached(S.READY)
        with stage.only() as told:
            await job.block_cancel(force=True)
            await job.outcome()
        assert told == lines(CANCELLED)
        job = stage.start(wants_completion=True, soft=False)
        await job.reached(S.READY)
        with stage.only() as told:
            await job.block_cancel()
            await job.outcome()
        assert told == lines(CANCELLED), "a type without a soft mode is cancelled"

    play(scenario)


def test_standby_and_back_and_completion_in_standby() -> None:
    async def scenario(stage: Stage) -> None:
        job = stage.start(wants_completion=True, soft=True)
        await job.reached(S.READY)
        with stage.only() as told:
            job.pause()
            assert job.status is S.STANDBY
            with pytest.raises(UsageError, match="The block job for device 'j' is currently paused"):
                await job.block_cancel()
            job.resume()
            job.pause()
            job.complete()
            await asyncio.sleep(10)
        assert told == lines("j standby, j ready, j standby"), "no second READY, nothing before resume"
        with stage.only() as told:
            job.resume()
            await job.outcome()
        assert told == lines(f"j ready, j waiting, j pending, {SETTLED}")

    play(scenario)


def test_cancel_in_standby() -> None:
    async def scenario(stage: Stage) -> None:
        job = stage.start(wants_completion=True)
        await job.reached(S.READY)
        job.pause()
        with stage.only() as told:
            await job.cancel()
            await job.outcome()
        assert told == lines(f"j ready, {CANCELLED}")

    play(scenario)


@pytest.mark.parametrize("force", [True, False])
def test_cancel_while_pending_settles_before_it_returns(force: bool) -> None:
    async def scenario(stage: Stage) -> None:
        job = stage.start(auto_finalize=False, wants_completion=True, soft=True)
        await job.reached(S.READY)
        job.complete()
        await job.reached(S.PENDING)
        with stage.only() as told:
            await job.block_cancel(force=force)
        assert told == lines(CANCELLED), "a pending mirror is no longer ready, so even soft is forced"

    play(scenario)


def test_deaf_bodies_run_to_their_end_and_are_cancelled_then() -> None:
    async def scenario(stage: Stage) -> None:
        job = stage.start(type="create", ticks=5, is_deaf=True, auto_dismiss=False)
        await asyncio.sleep(0.05)
        job.pause()
        job.resume()
        with pytest.raises(VerbRefused, match="in state 'running' cannot accept command verb 'complete'"):
            job.complete()
        await job.cancel()
        assert stage.take() == lines("j created, j running")
        outcome = await job.outcome()
        assert (outcome.current, outcome.total, outcome.error) == (5, 5, "Operation canceled")
        assert stage.take() == lines("j aborting, j: abort, j: clean, j: cancelled, j concluded")

    play(scenario)


def test_a_refused_start_and_an_unstarted_member() -> None:
    async def scenario(stage: Stage) -> None:
        job = stage.create()
        job.discard()
        assert stage.take() == lines("j created, j null")
        with pytest.raises(StatusUnreachable):
            await job.outcome()
        job = stage.create(auto_dismiss=False)
        await job.cancel()
        assert stage.take() == lines("j created, j aborting, j: abort, j: clean, j concluded, j null")
        with pytest.raises(ParameterError, match="Parameter 'speed' expects a non-negative value"):
            stage.create(speed_bytes_per_s=-1)
        assert stage.take() == lines("j created, j null")
        assert stage.engine.jobs() == []

    play(scenario)


def test_leaving_the_engine_cancels_newest_first() -> None:
    async def scenario(stage: Stage) -> None:
        await stage.start("m", wants_completion=True).reached(S.READY)
        stage.start("b", ticks=1000)
        stage.start("d", ticks=3, is_deaf=True)
        await stage.start("c", auto_dismiss=False).outcome()
        pending = stage.start("p", auto_finalize=False)
        await pending.reached(S.PENDING)
        stage.take()

    told = play(scenario).take()
    ends = [line for line in told if ":" not in line]
    assert ends == lines(
        "m standby, b paused, p aborting, p concluded, p null, d aborting, d concluded, d null,"
        "b running, b aborting, b concluded, b null, m ready, m aborting, m concluded, m null"
    )


def test_quit_may_be_called_with_the_lock_held() -> None:
    async def scenario(stage: Stage) -> None:
        stage.start("a", ticks=50)
        stage.start("b", ticks=50)
        await asyncio.sleep(0.25)
        async with stage.engine.control:
            await stage.engine.cancel_all()
            assert stage.engine.jobs() == []

    play(scenario)


def test_internal_jobs_are_neither_listed_nor_heard() -> None:
    async def scenario(stage: Stage) -> None:
        async def nothing(ctx: object) -> None:
            assert stage.engine.jobs() == []

        outcome = await (await stage.engine.submit("x-inner", nothing, id=None)).outcome()
        assert outcome.id is None
        assert stage.take() == []
        with pytest.raises(UsageError, match="Job not found"):
            stage.engine.get("#internal1")

    play(scenario)
