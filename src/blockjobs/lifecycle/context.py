"""What a running job may ask of its engine."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final, Literal, TypeVar, assert_never

from blockjobs.base.clock import Clock
from blockjobs.base.errors import JobCancelled
from blockjobs.lifecycle.error_policy import Action, Side, action_for, io_status_for
from blockjobs.lifecycle.failure import Failure, failure_of
from blockjobs.lifecycle.life import CancelMode
from blockjobs.lifecycle.progress import Progress
from blockjobs.lifecycle.runner import Runner
from blockjobs.lifecycle.status import JobStatus
from blockjobs.lifecycle.stimulus import BecameReady, ErrorStopped
from blockjobs.lifecycle.window import Io, Window

T = TypeVar("T")
_LOG: Final = logging.getLogger(__name__)

YIELD_EVERY: Final = 64
"""Checkpoints between two turns of the loop for a body that never waits: others must run, a turn costs ~10 µs."""

RETRY_PAUSE_NS: Final = 10_000_000
"""Between two tries of a range whose errors are ignored: a dead disk must not take the whole loop."""


class JobContext:
    """A job's view of its own life. All methods belong to the body, except `attempt`, which windows may call too.

    Attributes:
        progress: the meter that `query-jobs` reads.
        clock: time, as the job should see it.
        log: a logger that names the job.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._life = runner.life
        self.progress: Progress = runner.progress
        self.clock: Clock = runner.clock
        self.log = logging.LoggerAdapter(_LOG, {"job": runner.life.key})

    @property
    def id(self) -> str | None:
        """The job's id; none for an internal job."""
        return self._runner.spec.id

    @property
    def is_stopping(self) -> bool:
        """Whether a forced cancel was asked for; the next checkpoint raises."""
        return self._life.is_stopping

    @property
    def soft_cancelled(self) -> bool:
        """Whether the job is to end well, but without its last step (`Job.cancel` returned False)."""
        return self._life.cancel is CancelMode.SOFT

    @property
    def completion_requested(self) -> bool:
        """Whether `job-complete` was accepted."""
        return self._life.completion_requested

    @property
    def speed_bytes_per_s(self) -> int:
        """The rate limit now; 0 is unlimited. For sizing batches: `checkpoint` does the waiting."""
        return self._life.speed_bytes_per_s

    async def checkpoint(self, *, cost_bytes: int = 0) -> None:
        """Park, be throttled or be cancelled: the only place where that happens.

        Call it when no metadata is half updated, and before the bytes it is told of are moved.

        Args:
            cost_bytes: what the body is about to move; it waits until the bytes of earlier calls are due.

        Raises:
            JobCancelled: the job must stop.
        Checkpoint: yes. Waits: for a pause to end, for I/O in flight before parking, for the rate limit.
        """
        runner, life = self._runner, self._life
        runner.checkpoints += 1
        if life.is_stopping:
            raise JobCancelled
        if (life.pause_count or life.speed_bytes_per_s) and not self._may_go():
            await runner.rest(self._may_go, due_ns=lambda: runner.limiter.due_ns(self.clock.now_ns()))
        elif runner.checkpoints % YIELD_EVERY == 0:
            await asyncio.sleep(0)
        if life.is_stopping:
            raise JobCancelled
        if life.speed_bytes_per_s:
            runner.limiter.charge(cost_bytes, self.clock.now_ns())

    def charge(self, cost_bytes: int) -> None:
        """Count bytes against the rate limit without waiting: the next `checkpoint` waits until they are due.

        For work whose size is known only after planning, and for what a guest's write makes the job copy.
        """
        if self._life.speed_bytes_per_s:
            self._runner.limiter.charge(cost_bytes, self.clock.now_ns())

    def refund(self, cost_bytes: int) -> None:
        """Take bytes back that were charged and did not travel."""
        self.charge(-cost_bytes)

    def goes_on(self) -> bool:
        """Whether nobody has asked the job to stand still or to end.

        For I/O that can be left half done: it asks between two steps, perhaps in a worker.
        """
        return not (self._life.should_park or self._life.is_stopping)

    async def ready(self) -> None:
        """Become READY: from now on the job can be completed, and cancelled softly if its type can.

        Raises:
            JobCancelled: the job must stop.
        Checkpoint: yes. Waits: for a pause to end; not for the rate limit, see `settle_debt`.
        """
        await self.idle(lambda: True)
        self._runner.feed(BecameReady(self._life.key))

    async def completion(self) -> bool:
        """Wait for `job-complete`, parking as needed.

        Returns:
            True when completed, False when cancelled softly.

        Raises:
            JobCancelled: the job must stop.
        Checkpoint: yes. Waits: for a user.
        """
        life = self._life
        await self.idle(lambda: life.completion_requested or life.cancel is CancelMode.SOFT)
        return life.completion_requested and life.cancel is not CancelMode.SOFT

    async def idle(self, until: Callable[[], bool], *, due_ns: int | None = None) -> None:
        """Wait, at rest and parkable, for a condition of the job's own; `nudge` makes it look again.

        Args:
            until: the condition.
            due_ns: do not wait longer than until `clock.now_ns()` is this.

        Raises:
            JobCancelled: the job must stop.
        Checkpoint: yes. Waits: for the condition.
        """
        life = self._life
        self._runner.checkpoints += 1
        if due_ns is None:
            await self._runner.rest(lambda: life.is_stopping or until())
        else:
            clock = self.clock
            await self._runner.rest(
                lambda: life.is_stopping or until() or clock.now_ns() >= due_ns, due_ns=lambda: due_ns
            )
        if life.is_stopping:
            raise JobCancelled

    async def settle_debt(self) -> None:
        """Wait until everything charged so far is due. A pause meanwhile ends the wait: there is nothing to hurry.

        Raises:
            JobCancelled: the job must stop.
        Checkpoint: yes. Waits: for the rate limit.
        """
        runner, life = self._runner, self._life
        runner.checkpoints += 1
        before = runner.entered[JobStatus.PAUSED]
        await runner.rest(
            lambda: runner.entered[JobStatus.PAUSED] > before or self._may_go(),
            due_ns=lambda: runner.limiter.due_ns(self.clock.now_ns()),
        )
        if life.is_stopping:
            raise JobCancelled

    def nudge(self) -> None:
        """Make `idle` look at its condition again."""
        self._runner.nudge()

    async def sleep_until(self, deadline_ns: int) -> None:
        """Wait, at rest and parkable, until `clock.now_ns()` reaches the deadline.

        Raises:
            JobCancelled: the job must stop.
        Checkpoint: yes. Waits: for the time, and for a pause to end.
        """
        life, clock = self._life, self.clock
        self._runner.checkpoints += 1
        await self._runner.rest(lambda: life.is_stopping or clock.now_ns() >= deadline_ns, due_ns=lambda: deadline_ns)
        if life.is_stopping:
            raise JobCancelled

    async def interruptible(self, thing: Awaitable[T]) -> T:
        """Wait for something foreign, but give it up when the job must stop. It is cancelled then, and awaited.

        Raises:
            JobCancelled: the job must stop.
            Exception: whatever `thing` raises.
        Checkpoint: raises on cancel, does not park. Waits: for `thing`.
        """
        runner, life = self._runner, self._life
        runner.checkpoints += 1
        if life.is_stopping:
            if asyncio.iscoroutine(thing):
                thing.close()
            raise JobCancelled
        results: list[T] = []
        errors: list[BaseException] = []

        async def carry() -> None:
            try:
                results.append(await thing)
            except BaseException as error:
                errors.append(error)  # raised below, in the body
            finally:
                runner.nudge()

        await runner.until_finished(runner.spawn(carry()), lambda: bool(results or errors))
        if results:
            return results[0]
        if life.is_stopping:
            raise JobCancelled
        raise errors[0]

    async def attempt(self, io: Io, *, side: Side = Side.SOURCE, ignore: Literal["retry", "skip"] = "retry") -> bool:
        """Do I/O under the job's on-error policy (spec/jobs.md §0, Error policy).

        Args:
            io: called again for each try.
            side: whose policy applies.
            ignore: what this type does about an ignored error; `skip` leaves it to the job to fail in the end.

        Returns:
            False if the error was skipped.

        Raises:
            OSError: the policy says `report`.
            JobCancelled: the job must stop; a failure then is nobody's interest.
        Checkpoint: parks and raises on cancel after an error. Waits: for the I/O, for a user's resume.
        """
        while True:
            try:
                await io()
            except OSError as error:
                if await self._is_skipped(error, side, ignore):
                    return False
            else:
                return True

    def window(self, *, max_in_flight: int) -> Window:
        """I/O in flight that the job parks and ends after: `async with ctx.window(...) as window`.

        Raises:
            ValueError: room for less than one.
        """
        return Window(self._runner, max_in_flight)

    async def _is_skipped(self, error: OSError, side: Side, ignore: Literal["retry", "skip"]) -> bool:
        runner, life = self._runner, self._life
        if life.is_stopping:
            raise JobCancelled
        errno = _errno_of(failure_of(error))
        action = action_for(runner.job.policy(side), errno)
        runner.job.announce_error(side, action)
        match action:
            case Action.REPORT:
                raise error
            case Action.IGNORE if ignore == "skip":
                return True
            case Action.IGNORE:
                retry_ns = self.clock.now_ns() + RETRY_PAUSE_NS
                await self._stand_still(
                    lambda: life.is_stopping or (not life.should_park and self.clock.now_ns() >= retry_ns),
                    due_ns=lambda: retry_ns,
                )
            case Action.STOP:
                runner.feed(ErrorStopped(life.key, io_status_for(errno)))
                await self._stand_still(lambda: not life.should_park)
            case _:
                assert_never(action)
        return False

    async def _stand_still(self, until: Callable[[], bool], due_ns: Callable[[], int] | None = None) -> None:
        """Rest, in the body or in one of its windows; raises if the job must stop."""
        self._runner.checkpoints += 1
        await self._runner.hold(until, due_ns=due_ns)
        if self._life.is_stopping:
            raise JobCancelled

    def _may_go(self) -> bool:
        life = self._life
        if life.is_stopping:
            return True
        now_ns = self.clock.now_ns()
        return not life.should_park and self._runner.limiter.due_ns(now_ns) <= now_ns


def _errno_of(failure: Failure) -> int:
    assert failure.errno is not None
    return failure.errno
