"""One job as its users see it: the verbs, the waits and the view."""

import copy
from typing import TYPE_CHECKING

import msgspec

from blockjobs.base.errors import UsageError
from blockjobs.lifecycle.history import Outcome
from blockjobs.lifecycle.info import JobInfo
from blockjobs.lifecycle.job import Job
from blockjobs.lifecycle.life import Life
from blockjobs.lifecycle.progress import Progress
from blockjobs.lifecycle.runner import Runner
from blockjobs.lifecycle.spec import JobSpec
from blockjobs.lifecycle.status import PARKED, REACHABLE, JobStatus, JobVerb
from blockjobs.lifecycle.stimulus import (
    Change,
    Discard,
    Dismiss,
    Pause,
    QuiesceBegin,
    QuiesceEnd,
    Resume,
    Start,
)

if TYPE_CHECKING:
    from blockjobs.lifecycle.engine import Engine


class StatusUnreachable(UsageError):
    """A wait for a status that the job can no longer get to."""

    def __init__(self, job: str, status: JobStatus, wanted: JobStatus) -> None:
        self.job, self.status, self.wanted = job, status, wanted
        super().__init__(f"Job '{job}' in state '{status}' can no longer become '{wanted}'")


class JobHandle:
    """A job, from its creation until after it is dismissed. It is `Quiescable`, which is how drains pause it.

    The verbs follow spec/lifecycle.md §3: the order of their checks and their texts are QEMU's. A refused verb changes
    nothing. `finalize`, and `cancel` of a job whose body is over, return after the whole group has settled.
    """

    def __init__(self, engine: "Engine", runner: Runner) -> None:
        self._engine = engine
        self._runner = runner
        self._outcome: Outcome | None = None

    def __repr__(self) -> str:
        return f"<job {self._runner.spec.key} {self.type} {self.status}>"

    # The view

    @property
    def spec(self) -> JobSpec:
        """What the job was asked to be."""
        return self._runner.spec

    @property
    def id(self) -> str | None:
        """What users call it; none for an internal job."""
        return self._runner.spec.id

    @property
    def type(self) -> str:
        """The job type's name."""
        return self._runner.spec.type

    @property
    def job(self) -> Job:
        """The author's object."""
        return self._runner.job

    @property
    def status(self) -> JobStatus:
        """Where it is in its life."""
        return self._runner.life.status

    @property
    def is_block_job(self) -> bool:
        """Whether `block-job-*` knows it."""
        return self._runner.spec.is_block_job

    @property
    def is_busy(self) -> bool:
        """Whether the body is at work right now."""
        return self._runner.is_busy

    @property
    def life(self) -> Life:
        """A copy of the machine's record: pause counts, cancel mode, io-status, speed."""
        return copy.copy(self._runner.life)

    @property
    def progress(self) -> Progress:
        """The meter."""
        return self._runner.progress

    @property
    def error(self) -> str | None:
        """Why it failed, as soon as that is known to others."""
        failure = self._runner.life.failure
        return failure.text if failure else None

    def info(self) -> JobInfo:
        """What `query-jobs` shows."""
        runner = self._runner
        spec, life, meter = runner.spec, runner.life, runner.progress
        return JobInfo(
            id=spec.key,
            type=spec.type,
            status=life.status,
            current_progress=meter.current,
            total_progress=meter.total,
            error=life.failure.text if life.failure else None,
        )

    # Beginning

    def start(self) -> None:
        """Let the body run. In a drained section it parks at once, before any work, with both events.

        Raises:
            UsageError: it was started before, or its group is ending.
        """
        self._engine.feed(Start(self._runner.life.key))

    def discard(self) -> None:
        """Drop a created job whose start was refused: CREATED to NULL, no hooks, no further event.

        Raises:
            UsageError: it was started before, or its group is ending.
        """
        self._engine.feed(Discard(self._runner.life.key))

    # Verbs

    def pause(self) -> None:
        """Hold the job at its next checkpoint; a READY job becomes STANDBY.

        Raises:
            VerbRefused: the status does not allow it.
            UsageError: the user has paused it already.
        """
        self._engine.check(self._runner, JobVerb.PAUSE)
        self._engine.feed(Pause(self._runner.life.key))

    def resume(self) -> None:
        """Take the user's pause away and reset the io-status; a drain may still hold the job.

        Raises:
            UsageError: the user has not paused it (checked first, in every status).
            VerbRefused: the status does not allow it.
        """
        if not self._runner.life.user_paused:
            raise UsageError("Can't resume a job that was not paused")
        self._engine.check(self._runner, JobVerb.RESUME)
        self._engine.feed(Resume(self._runner.life.key))

    async def cancel(self, *, force: bool = True) -> None:
        """Cancel: forced as `job-cancel`, or softly, which a ready job of a type that can takes as "end well".

        Raises:
            VerbRefused: the status does not allow it.
        Checkpoint: no. Waits: for the group to settle if the body is over (or never began), else not at all.
        """
        self._engine.check(self._runner, JobVerb.CANCEL)
        await self._engine.cancel(self._runner, force=force)

    async def block_cancel(self, *, force: bool = False) -> None:
        """Cancel with the words of `block-job-cancel`.

        Raises:
            UsageError: the user has paused it and `force` is not set.
            VerbRefused: the status does not allow it.
        Checkpoint: no. Waits: as `cancel`.
        """
        if self._runner.life.user_paused and not force:
            raise UsageError(f"The block job for device '{self.id}' is currently paused")
        await self.cancel(force=force)

    def complete(self) -> None:
        """Ask a ready job to finish; in STANDBY it does so when resumed. May be repeated.

        Raises:
            VerbRefused: the job is not ready.
            UsageError: it is being cancelled, or the type cannot complete now.
        """
        self._engine.check(self._runner, JobVerb.COMPLETE)
        self._engine.complete(self._runner)

    async def finalize(self) -> None:
        """Settle the whole group of a pending job; a failing `prepare` fails the jobs, not this call.

        Raises:
            VerbRefused: the job is not pending.
        Checkpoint: no. Waits: for all hooks of the group.
        """
        self._engine.check(self._runner, JobVerb.FINALIZE)
        await self._engine.finalize(self._runner)

    def dismiss(self) -> None:
        """Forget a concluded job and free its id; its outcome stays in the history.

        Raises:
            VerbRefused: the job is not concluded.
        """
        self._engine.check(self._runner, JobVerb.DISMISS)
        self._engine.feed(Dismiss(self._runner.life.key))

    def set_speed(self, bytes_per_s: int) -> None:
        """Change the rate limit; 0 lifts it. A throttled job looks at once.

        Raises:
            VerbRefused: the status does not allow it.
            ParameterError: the speed is negative.
        """
        self._engine.check(self._runner, JobVerb.SET_SPEED)
        self._engine.set_speed(self._runner, bytes_per_s)

    def change(self, options: msgspec.Struct) -> None:
        """Hand type-specific options to the job (`block-job-change`).

        Raises:
            VerbRefused: the status does not allow it.
            UsageError: the type cannot change, or not in this way.
        """
        self._engine.check(self._runner, JobVerb.CHANGE)
        self._runner.job.change(options)
        self._engine.feed(Change(self._runner.life.key))

    # Waits

    async def reached(self, status: JobStatus) -> None:
        """Wait until the job gets to `status`; returns at once if it has been there.

        PAUSED and STANDBY come and go, so only the present and the future count for them.

        Raises:
            StatusUnreachable: the job has ended, or gone where no way leads to `status`.
        Checkpoint: no. Waits: for the job.
        """
        runner = self._runner
        seen = runner.entered[status] if status in PARKED else 0
        while not (self.status is status or runner.entered[status] > seen):
            if status not in REACHABLE[self.status]:
                raise StatusUnreachable(runner.life.key, self.status, status)
            await runner.changed.wait()

    async def outcome(self) -> Outcome:
        """Wait until the job has concluded and say how; works after it was dismissed, too.

        Raises:
            StatusUnreachable: the job was discarded before it started.
        Checkpoint: no. Waits: for the job. Do not call it while holding `engine.control`: the job needs that to end.
        """
        await self.reached(JobStatus.CONCLUDED)
        assert self._outcome is not None
        return self._outcome

    def conclude(self, outcome: Outcome) -> None:
        """The engine's note of how the job ended."""
        self._outcome = outcome

    # Quiescable

    def quiesce_begin(self) -> None:
        """Hold the job for a drained section; a body at rest is parked before this returns."""
        if not self._runner.forgotten:
            self._engine.feed(QuiesceBegin(self._runner.life.key))

    def is_quiet(self) -> bool:
        """Whether the job issues nothing while it is held: parked, not started, or over."""
        return self._runner.is_quiet

    async def quiet(self) -> None:
        """Wait until `is_quiet()`. Checkpoint: no. Waits: for the body's I/O in flight and its next checkpoint."""
        await self._runner.until_quiet()

    def quiesce_end(self) -> None:
        """Let go; the job goes on when nothing else holds it."""
        if not self._runner.forgotten:
            self._engine.feed(QuiesceEnd(self._runner.life.key))
