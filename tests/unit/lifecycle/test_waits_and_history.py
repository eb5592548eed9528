"""Race-free waits, outcomes after dismissal, and the rest of what a handle shows."""

import asyncio

import msgspec
import pytest
from stage import Stage, play

from blockjobs.base.bus import Bus
from blockjobs.base.errors import BlockJobNotFound, IoFailure, JobNotFound, UsageError, VerbRefused
from blockjobs.lifecycle.engine import Engine
from blockjobs.lifecycle.events import JobStatusChange
from blockjobs.lifecycle.handle import StatusUnreachable
from blockjobs.lifecycle.history import Fate, History, Outcome
from blockjobs.lifecycle.info import JobInfo
from blockjobs.lifecycle.progress import Progress
from blockjobs.lifecycle.registry import QAPI_TYPES, class_of, job_type, type_names
from blockjobs.lifecycle.status import JobStatus
from blockjobs.lifecycle.stimulus import Start, Stimulus
from blockjobs.testing.clock import EPOCH_NS, VirtualClock, run
from blockjobs.testing.jobs import ToyJob, countdown

S = JobStatus


def test_reached_looks_back_except_at_what_comes_and_goes() -> None:
    async def scenario(stage: Stage) -> None:
        job = stage.start(ticks=10, wants_completion=True)
        await job.reached(S.RUNNING)
        async with asyncio.TaskGroup() as waits:
            paused = waits.create_task(job.reached(S.PAUSED))
            await asyncio.sleep(0.05)
            job.pause()
            job.resume()  # gone again before the waiter runs
        assert paused.done()
        await job.reached(S.READY)
        job.complete()
        await job.outcome()
        for passed in (S.CREATED, S.RUNNING, S.READY, S.WAITING, S.PENDING, S.CONCLUDED, S.NULL):
            await job.reached(passed)
        for gone in (S.PAUSED, S.STANDBY, S.ABORTING):
            with pytest.raises(StatusUnreachable, match=f"Job 'j' in state 'null' can no longer become '{gone}'"):
                await job.reached(gone)

    play(scenario)


def test_reached_gives_up_as_soon_as_there_is_no_way() -> None:
    async def scenario(stage: Stage) -> None:
        job = stage.start(auto_finalize=False)
        with pytest.raises(StatusUnreachable) as refusal:
            await job.reached(S.READY)
        assert refusal.value.status is S.PENDING
        assert stage.now_s == pytest.approx(0.1)

    play(scenario)


def test_many_wait_for_one_outcome() -> None:
    async def scenario(stage: Stage) -> None:
        job = stage.start(fails=IoFailure(5))
        async with asyncio.TaskGroup() as waits:
            tasks = [waits.create_task(job.outcome()) for _ in range(10)]
        outcomes = {task.result() for task in tasks} | {await job.outcome()}
        assert outcomes == {stage.engine.history.latest("j")}

    play(scenario)


def test_history_outlives_dismissal_and_is_bounded() -> None:
    async def main() -> None:
        async with Engine(VirtualClock(), Bus(), history_max=3) as engine:
            for number in range(5):
                await (await engine.submit("x-count", countdown(number), id=f"n{number}")).outcome()
            await (await engine.submit("x-count", countdown(7), id="n4")).outcome()
            assert engine.jobs() == []
            assert [outcome.id for outcome in engine.history] == ["n3", "n4", "n4"]
            assert len(engine.history) == 3
            latest = engine.history.latest("n4")
            assert latest == Outcome(
                id="n4",
                type="x-count",
                status=S.CONCLUDED,
                fate=Fate.COMPLETED,
                error=None,
                errno=None,
                current=7,
                total=7,
                created_ns=EPOCH_NS + 1_000_000_000,
                started_ns=EPOCH_NS + 1_000_000_000,
                ended_ns=EPOCH_NS + 1_700_000_000,
            )
            assert engine.history.latest("n0") is None

    run(main())


def test_history_alone() -> None:
    assert list(History()) == []


def test_a_dismissed_handle_refuses_verbs_and_its_id_is_free() -> None:
    async def scenario(stage: Stage) -> None:
        old = stage.start()
        await old.outcome()
        new = stage.start(ticks=5)
        assert stage.engine.get("j") is new
        with pytest.raises(VerbRefused, match="Job 'j' in state 'null' cannot accept command verb 'pause'"):
            old.pause()
        with pytest.raises(UsageError, match="Can't resume a job that was not paused"):
            old.resume()
        with pytest.raises(VerbRefused):
            await old.cancel()
        old.quiesce_begin()
        old.quiesce_end()
        assert new.life.pause_count == 0
        assert old.is_quiet()

    play(scenario)


def test_a_drain_that_outlives_its_job() -> None:
    async def scenario(stage: Stage) -> None:
        job = stage.start(ticks=100)
        await asyncio.sleep(0.05)
        job.quiesce_begin()
        assert job.status is S.PAUSED
        await job.cancel()
        await job.outcome()
        job.quiesce_end()

    play(scenario)


def test_drained_and_user_paused() -> None:
    async def scenario(stage: Stage) -> None:
        job = stage.start(ticks=100)
        await asyncio.sleep(0.05)
        stage.take()
        job.quiesce_begin()
        job.pause()
        job.quiesce_begin()
        assert (job.life.pause_count, stage.take()) == (3, ["j paused"])
        job.resume()
        job.quiesce_end()
        assert stage.take() == []
        job.quiesce_end()
        assert stage.take() == ["j running"]

    play(scenario)


@pytest.mark.parametrize("bad", ["", "1a", "a b", "-", "#internal1", "ä"])
def test_malformed_ids(bad: str) -> None:
    async def scenario(stage: Stage) -> None:
        with pytest.raises(UsageError) as refusal:
            stage.create(bad)
        assert str(refusal.value) == f"Invalid job ID '{bad}'"
        assert stage.take() == []

    play(scenario)


def test_an_id_in_use_stays_so_until_dismissed() -> None:
    async def scenario(stage: Stage) -> None:
        job = stage.start("a" * 300, auto_dismiss=False)
        await job.outcome()
        with pytest.raises(UsageError, match=f"Job ID '{job.id}' already in use"):
            stage.create("a" * 300)
        job.dismiss()
        stage.create("a" * 300).discard()

    play(scenario)


def test_lookups() -> None:
    class Plain(ToyJob):
        is_block_job = False

    async def scenario(stage: Stage) -> None:
        first, second = stage.start("first"), stage.start("second", type="create", toy=Plain)
        assert stage.engine.jobs() == [second, first]
        assert stage.engine.block_job("first") is first
        for unknown in ("second", "third"):
            with pytest.raises(BlockJobNotFound, match=f"Block job '{unknown}' not found"):
                stage.engine.block_job(unknown)
        with pytest.raises(JobNotFound):
            stage.engine.get("third")
        assert (first.spec.type, first.type, first.is_block_job) == ("backup", "backup", True)
        assert repr(first) == "<job first backup running>"

    play(scenario)


def test_info_is_the_wire_form() -> None:
    async def scenario(stage: Stage) -> None:
        job = stage.start(ticks=2, fails=IoFailure(5), auto_dismiss=False)
        info = job.info()
        assert msgspec.to_builtins(info) == {
            "id": "j",
            "type": "backup",
            "status": "running",
            "current-progress": 0,
            "total-progress": 0,
        }
        await job.outcome()
        assert job.info() == JobInfo(
            id="j", type="backup", status=S.CONCLUDED, current_progress=2, total_progress=2, error="Input/output error"
        )

    play(scenario)


def test_the_event_is_the_wire_form() -> None:
    event = JobStatusChange(id="j", status=S.NULL)
    assert event.event_name == "JOB_STATUS_CHANGE"
    assert msgspec.to_builtins(event) == {"id": "j", "status": "null"}


def test_change_is_refused_by_most_types_and_by_late_statuses() -> None:
    class Options(msgspec.Struct):
        copy_mode: str

    class Changeable(ToyJob):
        def change(self, options: msgspec.Struct) -> None:
            self.changed_to = options

    async def scenario(stage: Stage) -> None:
        job = stage.start(auto_finalize=False)
        with pytest.raises(UsageError, match="Job type does not support change"):
            job.change(Options("write-blocking"))
        await job.reached(S.PENDING)
        with pytest.raises(VerbRefused, match="in state 'pending' cannot accept command verb 'change'"):
            job.change(Options("write-blocking"))
        other = stage.start("k", toy=Changeable)
        other.change(Options("write-blocking"))
        assert isinstance(other.job, Changeable)
        assert other.job.changed_to == Options("write-blocking")

    play(scenario)


def test_a_type_may_refuse_to_complete() -> None:
    class NodeGone(ToyJob):
        def complete(self) -> None:
            raise UsageError("Node name 'n' not found")

    async def scenario(stage: Stage) -> None:
        job = stage.start(toy=NodeGone, wants_completion=True)
        with pytest.raises(VerbRefused):
            job.complete()
        await job.reached(S.READY)
        with pytest.raises(UsageError, match="Node name 'n' not found"):
            job.complete()
        assert not job.life.completion_requested

    play(scenario)


def test_job_types_are_qapis_or_start_with_x() -> None:
    async def scenario(stage: Stage) -> None:
        for name in ("drill", "x", "x drill", "BACKUP", ""):
            with pytest.raises(UsageError, match=f"Invalid job type '{name}'"):
                stage.create(type=name)

    play(scenario)
    assert len(QAPI_TYPES) == 9

    @job_type("x-lifecycle-test")
    class Registered(ToyJob):
        pass

    assert class_of("x-lifecycle-test") is Registered
    assert type_names()[:9] == QAPI_TYPES
    assert "x-lifecycle-test" in type_names()
    with pytest.raises(AssertionError):
        job_type("x-lifecycle-test")(Registered)


def test_progress_never_goes_back() -> None:
    meter = Progress()
    meter.set_remaining(10)
    meter.advance(4)
    assert (meter.current, meter.total) == (4, 10)
    meter.grow(5)
    meter.set_remaining(1)
    assert (meter.current, meter.total) == (4, 5)
    for step in (meter.advance, meter.grow, meter.set_remaining):
        with pytest.raises(ValueError, match="progress cannot count -1"):
            step(-1)
    assert (meter.current, meter.total) == (4, 5)


def test_no_jobs_before_or_after_the_engine_runs() -> None:
    async def main() -> None:
        engine = Engine(VirtualClock(), Bus())
        with pytest.raises(UsageError, match="the host is not running"):
            await engine.submit("x-count", countdown(), id="j")
        async with engine:
            pass
        with pytest.raises(UsageError, match="the host is not running"):
            await engine.submit("x-count", countdown(), id="j")

    run(main())


def test_the_journal_hears_what_was_accepted() -> None:
    async def main() -> None:
        heard: list[Stimulus] = []
        async with Engine(VirtualClock(), Bus(), journal=heard.append) as engine:
            job = await engine.submit("x-count", countdown(), id="j")
            with pytest.raises(UsageError):
                job.resume()
            await job.outcome()
        assert Start("j") in heard
        assert len(heard) == 6  # create, start, returned, and three hooks

    run(main())


def test_two_engines_in_one_loop() -> None:
    async def main() -> None:
        async with Engine(VirtualClock(), Bus()) as one, Engine(VirtualClock(), Bus()) as two:
            jobs = [await engine.submit("x-count", countdown(), id="j") for engine in (one, two)]
            assert all([(await job.outcome()).fate is Fate.COMPLETED for job in jobs])

    run(main())


def test_what_the_block_raises_comes_out_as_it_is() -> None:
    async def main() -> None:
        async with Engine(VirtualClock(), Bus()) as engine:
            await engine.submit("x-count", countdown(1000), id="j")
            raise LookupError("the user's own")

    with pytest.raises(LookupError, match="the user's own"):
        run(main())


def test_a_bug_of_ours_is_not_swallowed() -> None:
    class Broken(ToyJob):
        def announce(self, milestone: object, handle: object) -> None:
            raise AssertionError("a bug")

    async def main() -> None:
        async with Engine(VirtualClock(), Bus()) as engine:
            job = await engine.submit("x-count", Broken(), id="j")
            await job.outcome()

    with pytest.raises(BaseExceptionGroup) as bug:
        run(main())
    assert bug.value.subgroup(AssertionError)


def test_a_host_that_is_cancelled_still_ends_its_jobs() -> None:
    outcomes: list[Outcome | None] = []

    async def host() -> None:
        async with Engine(VirtualClock(), Bus()) as engine:
            try:
                job = await engine.submit("x-count", countdown(1000), id="j")
                await job.outcome()
            finally:
                outcomes.append(None)
        raise AssertionError

    async def main() -> None:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(host())
            await asyncio.sleep(1)
            task.cancel()
        assert task.cancelled()

    run(main())
    assert outcomes == [None]
