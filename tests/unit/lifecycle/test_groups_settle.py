"""Groups: one fate, prepared together, settled newest first (spec/lifecycle.md §6 and the txn_* transcripts)."""

import asyncio
from typing import Any

import pytest
from stage import Stage, lines, play

from blockjobs.base.errors import IoFailure, VerbRefused
from blockjobs.lifecycle.context import JobContext
from blockjobs.lifecycle.handle import JobHandle
from blockjobs.lifecycle.status import JobStatus
from blockjobs.testing.jobs import ToyJob

S = JobStatus


def pair(stage: Stage, a: dict[str, Any], b: dict[str, Any]) -> tuple[JobHandle, JobHandle]:
    """Two backups as `transaction` starts them: created in order, b the newer, born drained."""
    group = stage.engine.new_group()
    older, newer = stage.create("a", group=group, **a), stage.create("b", group=group, **b)
    for job in (older, newer):
        job.quiesce_begin()
    for job in (older, newer):
        job.start()
    for job in (older, newer):
        job.quiesce_end()
    return older, newer


def visible(told: list[str]) -> list[str]:
    """Without prepare, commit, abort and clean, which no client sees."""
    return [line for line in told if line.partition(": ")[2] not in ("prepare", "commit", "abort", "clean")]


def test_grouped_success() -> None:
    async def scenario(stage: Stage) -> None:
        older, _ = pair(stage, {"ticks": 3}, {"ticks": 2})
        assert stage.take() == lines(
            "a created, b created, a running, a paused, b running, b paused, a running, b running"
        )
        await older.outcome()
        assert stage.take() == lines(
            "b waiting, a waiting, b pending, a pending, b: prepare, a: prepare,"
            "b: commit, b: clean, b: completed, b concluded, b null,"
            "a: commit, a: clean, a: completed, a concluded, a null"
        )

    play(scenario)


def test_the_newer_fails() -> None:
    async def scenario(stage: Stage) -> None:
        flags = {"auto_dismiss": False}
        older, newer = pair(stage, {"ticks": 50, **flags}, {"fails": IoFailure(5), **flags})
        stage.take()
        await older.outcome()
        assert visible(stage.take()) == lines(
            "b aborting, b: completed, b concluded, a aborting, a: cancelled, a concluded"
        )
        assert (older.error, newer.error) == ("Operation canceled", "Input/output error")

    play(scenario)


def test_the_older_fails() -> None:
    async def scenario(stage: Stage) -> None:
        older, _ = pair(stage, {"fails": IoFailure(5)}, {"ticks": 50})
        stage.take()
        await older.outcome()
        assert visible(stage.take()) == lines(
            "a aborting, b aborting, b: cancelled, b concluded, b null, a: completed, a concluded, a null"
        )

    play(scenario)


def test_the_newer_fails_after_the_older_waits() -> None:
    async def scenario(stage: Stage) -> None:
        older, _ = pair(stage, {}, {"ticks": 5, "fails": IoFailure(5)})
        stage.take()
        await older.outcome()
        assert visible(stage.take()) == lines(
            "a waiting, b aborting, b: completed, b concluded, b null, a aborting, a: cancelled, a concluded, a null"
        )

    play(scenario)


def test_cancelling_one_takes_the_paused_other_along() -> None:
    async def scenario(stage: Stage) -> None:
        older, newer = pair(stage, {"ticks": 50}, {"ticks": 50})
        await asyncio.sleep(0.35)
        older.pause()
        stage.take()
        await newer.cancel()
        await older.outcome()
        assert visible(stage.take()) == lines(
            "b aborting, b: cancelled, b concluded, b null, a running, a aborting, a: cancelled, a concluded, a null"
        )

    play(scenario)


def test_cancelling_a_pending_or_waiting_member_settles_before_it_returns() -> None:
    async def scenario(stage: Stage) -> None:
        flags = {"auto_finalize": False, "auto_dismiss": False}
        older, newer = pair(stage, flags, flags)
        await newer.reached(S.PENDING)
        assert visible(stage.take())[-4:] == lines("b pending, b: pending, a pending, a: pending")
        await older.cancel()
        both = lines("b aborting, b: cancelled, b concluded, a aborting, a: cancelled, a concluded")
        assert visible(stage.take()) == both
        older.dismiss()
        newer.dismiss()
        older, newer = pair(stage, {**flags}, {"ticks": 50, **flags})
        await older.reached(S.WAITING)
        stage.take()
        async with stage.engine.control:
            await older.cancel()
        assert visible(stage.take()) == both

    play(scenario)


def test_mixed_finalize_and_dismiss() -> None:
    async def scenario(stage: Stage) -> None:
        older, newer = pair(stage, {"auto_finalize": False}, {"auto_dismiss": False})
        await older.reached(S.PENDING)
        assert visible(stage.take())[-3:] == lines("b pending, a pending, a: pending")
        await newer.finalize()
        assert visible(stage.take()) == lines("b: completed, b concluded, a: completed, a concluded, a null")
        assert newer.status is S.CONCLUDED

    play(scenario)


def test_the_first_failing_prepare_stops_the_others() -> None:
    async def scenario(stage: Stage) -> None:
        older, _ = pair(stage, {}, {"fails_to_prepare": IoFailure(5)})
        stage.take()
        await older.outcome()
        assert stage.take() == lines(
            "a waiting, b waiting, b pending, a pending, b: prepare, b aborting,"
            "b: abort, b: clean, b: completed, b concluded, b null,"
            "a aborting, a: abort, a: clean, a: cancelled, a concluded, a null"
        )

    play(scenario)


def test_unstarted_members_vanish_when_a_later_action_fails() -> None:
    async def scenario(stage: Stage) -> None:
        group = stage.engine.new_group()
        jobs = [stage.create(id, group=group) for id in ("a", "b")]
        stage.take()
        async with stage.engine.control:
            await jobs[0].cancel()
        assert visible(stage.take()) == lines("b aborting, b concluded, b null, a aborting, a concluded, a null")

    play(scenario)


class SlowHooks(ToyJob):
    async def prepare(self, ctx: JobContext) -> None:
        await super().prepare(ctx)
        await ctx.clock.sleep_until(ctx.clock.now_ns() + 10**9)

    async def commit(self, ctx: JobContext) -> None:
        await ctx.clock.sleep_until(ctx.clock.now_ns() + 10**9)
        await super().commit(ctx)


def test_commands_wait_for_a_settlement_and_never_see_half_of_it() -> None:
    async def scenario(stage: Stage) -> None:
        group = stage.engine.new_group()
        jobs = [stage.create(id, group=group, toy=SlowHooks, auto_dismiss=False) for id in ("a", "b")]
        for job in jobs:
            job.start()
        await asyncio.sleep(0.2)
        assert stage.engine.control.locked()
        async with stage.engine.control:
            assert {job.status for job in jobs} == {S.CONCLUDED}
        assert stage.now_s == pytest.approx(4.1)

    play(scenario)


def test_a_client_that_goes_away_does_not_stop_a_settlement() -> None:
    async def scenario(stage: Stage) -> None:
        job = stage.start(toy=SlowHooks, auto_finalize=False)
        await job.reached(S.PENDING)

        async def command() -> None:
            async with stage.engine.control:
                await job.finalize()

        async with asyncio.TaskGroup() as clients:
            client = clients.create_task(command())
            await asyncio.sleep(0.5)
            client.cancel()
            await asyncio.sleep(0.1)
            assert stage.engine.control.locked(), "the lock goes with the settlement"
        assert client.cancelled()
        assert stage.take()[-4:] == lines("j: clean, j: completed, j concluded, j null")

    play(scenario)


def test_a_second_finalize_waits_and_is_then_refused() -> None:
    async def scenario(stage: Stage) -> None:
        job = stage.start(toy=SlowHooks, auto_finalize=False, auto_dismiss=False)
        await job.reached(S.PENDING)

        async def again() -> None:
            with pytest.raises(VerbRefused, match="in state 'concluded' cannot accept command verb 'finalize'"):
                await job.finalize()

        async with asyncio.TaskGroup() as clients:
            clients.create_task(job.finalize())
            await asyncio.sleep(0)
            clients.create_task(again())

    play(scenario)


class DrainsAnother(ToyJob):
    other: JobHandle

    async def prepare(self, ctx: JobContext) -> None:
        self.other.quiesce_begin()
        await self.other.quiet()
        await ctx.clock.sleep_until(ctx.clock.now_ns() + 10**9)
        self.other.quiesce_end()


def test_a_hook_may_drain_a_running_job() -> None:
    async def scenario(stage: Stage) -> None:
        busy = stage.start("busy", ticks=200)
        job = stage.create(toy=DrainsAnother)
        job.job.other = busy
        job.start()
        stage.take()
        await job.outcome()
        told = [line for line in stage.take() if line.startswith("busy")]
        assert told == lines("busy paused, busy running")

    play(scenario)


class CancelsAnother(ToyJob):
    other: JobHandle

    async def commit(self, ctx: JobContext) -> None:
        await self.other.cancel()


def test_a_hook_may_settle_another_group() -> None:
    async def scenario(stage: Stage) -> None:
        pending = stage.start("p", auto_finalize=False)
        await pending.reached(S.PENDING)
        job = stage.create(toy=CancelsAnother)
        job.job.other = pending
        job.start()
        await job.outcome()
        assert (await pending.outcome()).error == "Operation canceled"

    play(scenario)


class BreaksItsPromise(ToyJob):
    async def commit(self, ctx: JobContext) -> None:
        raise RuntimeError("too late")


def test_a_failing_commit_is_logged_and_the_group_settles(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(stage: Stage) -> None:
        outcome = await stage.start(toy=BreaksItsPromise).outcome()
        assert outcome.error is None

    play(scenario)
    assert "commit of job 'j' must not fail: too late" in caplog.text
