"""The async shell around the machine: it runs bodies, executes effects and settles groups.

Who takes the control lock, `engine.control`:

- A monitor runs each in-band command inside `async with engine.control`, and may call every verb there.
- A program that embeds a host just calls the verbs. Those that settle a group (`finalize`, `cancel` of a job whose
  body is over) take the lock themselves; the lock may be entered again by the task that holds it, so both ways work.
- When a body has returned, its task takes the lock, tells the machine, and settles the group if it is due. Until then
  the job still shows its old status, so no command ever sees a job aborting or a group half settled.
- Bodies never wait for the lock: parking is a plain `feed`. A hook may therefore drain a node whose job must park, and
  a settler or `cancel_all` that holds the lock may wait for a body. For the same reason do not await
  `JobHandle.outcome()` while holding it.
"""

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self, assert_never

from blockjobs.base.bus import Bus
from blockjobs.base.clock import Clock
from blockjobs.base.errors import BlockJobNotFound, JobNotFound, ParameterError, UsageError, VerbRefused
from blockjobs.base.ids import is_well_formed
from blockjobs.base.trace import TracePoint
from blockjobs.lifecycle.context import JobContext
from blockjobs.lifecycle.control import Control
from blockjobs.lifecycle.effect import (
    Announce,
    AwaitBody,
    CallHook,
    Effect,
    Forget,
    Interrupt,
    Launch,
    StatusChanged,
    Wake,
)
from blockjobs.lifecycle.events import JobStatusChange
from blockjobs.lifecycle.failure import CANCELED, Failure
from blockjobs.lifecycle.handle import JobHandle
from blockjobs.lifecycle.history import HISTORY_MAX, Fate, History, Outcome
from blockjobs.lifecycle.job import Body, CoroutineJob, Job
from blockjobs.lifecycle.machine import Machine
from blockjobs.lifecycle.registry import check_type
from blockjobs.lifecycle.runner import Runner
from blockjobs.lifecycle.settler import Settler
from blockjobs.lifecycle.spec import Group, JobSpec
from blockjobs.lifecycle.status import ALLOWED, JobStatus, JobVerb
from blockjobs.lifecycle.stimulus import (
    Cancel,
    Complete,
    Create,
    Finalize,
    QuiesceBegin,
    SetSpeed,
    Stimulus,
)
from blockjobs.lifecycle.verdict import verdict
from blockjobs.lifecycle.watchdog import Watchdog

_trace_status = TracePoint("job_status", "a job enters another status")


class Engine:
    """All jobs of a host. Use it as an async context manager: leaving it cancels what still runs, newest first.

    Attributes:
        control: the lock of the control plane; see the module.
        history: outcomes of concluded jobs, dismissed or not.
    """

    def __init__(
        self,
        clock: Clock,
        bus: Bus,
        *,
        history_max: int = HISTORY_MAX,
        journal: Callable[[Stimulus], None] | None = None,
    ) -> None:
        self.control: Final = Control()
        self.history: Final = History(history_max)
        self._clock, self._bus, self._journal = clock, bus, journal
        self._machine = Machine()
        self._handles: dict[str, JobHandle] = {}
        self._runners: dict[str, Runner] = {}
        self._tasks = asyncio.TaskGroup()
        self._settler = Settler(
            control=self.control, runners=self._runners, feed=self.feed, spawn=self._tasks.create_task
        )
        self._watchdog = Watchdog(clock)
        self._watching: asyncio.Task[None] | None = None
        self._last_group = 0
        self._last_internal = 0
        self._accepting = False

    async def __aenter__(self) -> Self:
        """Begin to accept jobs. Checkpoint: no. Waits: no."""
        await self._tasks.__aenter__()
        self._watching = self._tasks.create_task(self._watchdog.watch())
        self._accepting = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Cancel all jobs and wait for their ends. Checkpoint: no. Waits: for every body and hook."""
        self._accepting = False
        try:
            await self.cancel_all()
        finally:
            if self._watching:
                self._watching.cancel()
            # A task group wraps what the block raised; only its own cancellation of the block is its business.
            theirs = (kind, error, trace) if isinstance(error, asyncio.CancelledError) else (None, None, None)
            await self._tasks.__aexit__(*theirs)

    # Jobs

    def new_group(self) -> Group:
        """A ticket for jobs that are to settle together."""
        self._last_group += 1
        return Group(self._last_group)

    def create(
        self,
        type: str,
        work: Job | Body,
        *,
        id: str | None,
        auto_finalize: bool = True,
        auto_dismiss: bool = True,
        speed_bytes_per_s: int = 0,
        group: Group | None = None,
    ) -> JobHandle:
        """Make a job, CREATED. Then call `start()`, or `discard()` if something else refuses it.

        Args:
            type: one of QAPI's job types, or a name that starts with `x-`.
            work: a `Job`, or a coroutine function that takes the `JobContext`.
            id: unique among live jobs; none makes an internal job that nobody sees.
            auto_finalize: settle without waiting for `job-finalize`.
            auto_dismiss: forget the job once it has concluded.
            speed_bytes_per_s: rate limit, 0 is none.
            group: from `new_group()`; without it the job settles alone.

        Raises:
            UsageError: a bad id, type or speed, or the engine is not running. After a bad speed the events `created`
                and `null` have been sent, as by QEMU; otherwise nothing has happened.
        """
        self._check_new(type, id)
        job = work if isinstance(work, Job) else CoroutineJob(work)
        group = group or self.new_group()
        if id is None:
            self._last_internal += 1
        key = f"#internal{self._last_internal}" if id is None else id
        self._machine_create(
            JobSpec(
                key=key,
                id=id,
                type=type,
                is_block_job=job.is_block_job,
                group=group,
                auto_finalize=auto_finalize,
                auto_dismiss=auto_dismiss,
                created_ns=self._clock.wall_ns(),
            ),
            job,
            speed_bytes_per_s,
        )
        handle = self._handles[key]
        if speed_bytes_per_s < 0:
            handle.discard()
            raise ParameterError.expects("speed", "a non-negative value")
        return handle

    async def submit(
        self,
        type: str,
        work: Job | Body,
        *,
        id: str | None,
        auto_finalize: bool = True,
        auto_dismiss: bool = True,
        speed_bytes_per_s: int = 0,
        group: Group | None = None,
    ) -> JobHandle:
        """`create` and `start` in one, for programs that embed a host. Checkpoint: no. Waits: no."""
        handle = self.create(
            type,
            work,
            id=id,
            auto_finalize=auto_finalize,
            auto_dismiss=auto_dismiss,
            speed_bytes_per_s=speed_bytes_per_s,
            group=group,
        )
        handle.start()
        return handle

    def get(self, id: str) -> JobHandle:
        """The job of that id.

        Raises:
            JobNotFound: none, or dismissed.
        """
        handle = self._handles.get(id)
        if handle is None or handle.id is None:
            raise JobNotFound(id)
        return handle

    def block_job(self, id: str) -> JobHandle:
        """The block job of that id, for `block-job-*`.

        Raises:
            BlockJobNotFound: none, or not a block job.
        """
        handle = self._handles.get(id)
        if handle is None or not handle.is_block_job:
            raise BlockJobNotFound(id)
        return handle

    def jobs(self) -> list[JobHandle]:
        """All jobs that users may see, newest first."""
        return [handle for handle in reversed(self._handles.values()) if handle.id is not None]

    async def cancel_all(self) -> None:
        """What `quit` does: hold everything, then force-cancel each job, newest first, and wait for its end.

        Checkpoint: no. Waits: for every body and hook. May be called while holding `control`.
        """
        async with self.control:
            live = list(self._runners.values())
            for runner in live:
                self.feed(QuiesceBegin(runner.life.key))
            for runner in reversed(live):
                if runner.life.status not in ALLOWED[JobVerb.CANCEL]:
                    continue  # it has ended, or a sibling's cancellation took it along
                await self.cancel(runner, force=True)
                if runner.life.started and not runner.delivered:
                    await runner.until_done()
                    await self._settler.retire(runner)

    # What `JobHandle` asks for

    def check(self, runner: Runner, verb: JobVerb) -> None:
        """Refuse a verb that the job's status does not allow.

        Raises:
            VerbRefused: it does not.
        """
        if runner.life.status not in ALLOWED[verb]:
            raise VerbRefused(runner.life.key, runner.life.status, verb)

    def feed(self, stimulus: Stimulus) -> None:
        """Give the machine a stimulus and execute what it answers, in order, before returning.

        Raises:
            UsageError: refused; nothing has happened.
        """
        effects = self._machine.feed(stimulus)
        if self._journal:
            self._journal(stimulus)
        for effect in effects:
            self._execute(effect)

    def complete(self, runner: Runner) -> None:
        """`job-complete`, with the type's say between the checks and the effect."""
        self._machine.check_complete(runner.life.key)
        runner.job.complete()
        self.feed(Complete(runner.life.key))

    def set_speed(self, runner: Runner, bytes_per_s: int) -> None:
        """`block-job-set-speed`; the limiter knows before the body wakes."""
        if bytes_per_s >= 0:
            runner.limiter.set_speed(bytes_per_s, self._clock.now_ns())
        self.feed(SetSpeed(runner.life.key, bytes_per_s))

    async def cancel(self, runner: Runner, *, force: bool) -> None:
        """Cancel a job that allows it. Checkpoint: no. Waits: for its group to settle, if the body is over."""
        life = runner.life
        if not force and life.is_ready:
            force = runner.job.cancel(force=False)
        if life.started and not life.returned:
            # The body will end by itself; taking the lock would make the caller wait for other people's hooks.
            self.feed(Cancel(life.key, force=force))
            return
        async with self.control:
            self.check(runner, JobVerb.CANCEL)
            self.feed(Cancel(life.key, force=force))
            await self._settler.settle(runner.spec.group)

    async def finalize(self, runner: Runner) -> None:
        """Settle the group of a pending job. Checkpoint: no. Waits: for the hooks."""
        async with self.control:
            self.check(runner, JobVerb.FINALIZE)
            self.feed(Finalize(runner.life.key))
            await self._settler.settle(runner.spec.group)

    # Effects

    def _execute(self, effect: Effect) -> None:
        runner = self._runners[effect.job]
        match effect:
            case StatusChanged(status=status):
                if _trace_status.is_on:
                    _trace_status(id=runner.life.key, type=runner.spec.type, status=status)
                self._status_changed(runner, status)
            case Wake():
                runner.nudge()
            case Announce(milestone=milestone):
                runner.job.announce(milestone, self._handles[effect.job])
            case Launch():
                runner.started_ns = self._clock.wall_ns()
                runner.body = self._tasks.create_task(self._run(runner), name=f"job {effect.job}")
            case Interrupt():
                runner.job.cancel(force=True)
            case CallHook() | AwaitBody():
                self._settler.note(runner.spec.group, effect)
            case Forget():
                runner.forgotten = True
                self._watchdog.forget(runner)
                del self._handles[effect.job], self._runners[effect.job]
                if (rest := runner.job.forgotten()) is not None:
                    self._tasks.create_task(rest, name=f"forget {effect.job}")
            case _:
                assert_never(effect)

    def _status_changed(self, runner: Runner, status: JobStatus) -> None:
        runner.entered[status] += 1
        if status is JobStatus.CONCLUDED:
            self._record(runner, status)
        runner.changed.notify()
        if runner.spec.id is not None:
            self._bus.publish(JobStatusChange(id=runner.spec.id, status=status))

    def _record(self, runner: Runner, status: JobStatus) -> None:
        life, spec, failure = runner.life, runner.spec, runner.life.failure
        fate = Fate.CANCELLED if life.is_stopping else Fate.FAILED if failure else Fate.COMPLETED
        outcome = Outcome(
            id=spec.id,
            type=spec.type,
            status=status,
            fate=fate,
            error=failure.text if failure else None,
            errno=failure.errno if failure else None,
            current=runner.progress.current,
            total=runner.progress.total,
            created_ns=spec.created_ns,
            started_ns=runner.started_ns,
            ended_ns=self._clock.wall_ns(),
        )
        self._handles[spec.key].conclude(outcome)
        self.history.record(outcome)

    # Bodies

    async def _run(self, runner: Runner) -> None:
        failure: Failure | None = CANCELED
        try:
            await runner.rest(lambda: True)  # the first pause point
            failure = await verdict(runner, runner.job.run(JobContext(runner)))
        finally:
            runner.finish(failure)
        await self._settler.retire(runner)

    # Creation

    def _check_new(self, type: str, id: str | None) -> None:
        if not self._accepting:
            raise UsageError("Jobs cannot be created now: the host is not running")
        check_type(type)
        if id is None:
            return
        if not is_well_formed(id):
            raise UsageError(f"Invalid job ID '{id}'")
        if id in self._handles:
            raise UsageError(f"Job ID '{id}' already in use")

    def _machine_create(self, spec: JobSpec, job: Job, speed_bytes_per_s: int) -> None:
        stimulus = Create(
            spec.key,
            group=spec.group.number,
            auto_finalize=spec.auto_finalize,
            auto_dismiss=spec.auto_dismiss,
            speed_bytes_per_s=max(0, speed_bytes_per_s),
        )
        effects = self._machine.feed(stimulus)
        if self._journal:
            self._journal(stimulus)
        runner = Runner(
            spec=spec,
            job=job,
            life=self._machine.life(spec.key),
            clock=self._clock,
            feed=self.feed,
            spawn=self._tasks.create_task,
            working=self._watchdog.look,
        )
        self._runners[spec.key], self._handles[spec.key] = runner, JobHandle(self, runner)
        for effect in effects:
            self._execute(effect)
