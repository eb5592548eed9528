"""The job author's side: what a job type implements, and nothing it does not need to know."""

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec

from blockjobs.base.errors import UsageError
from blockjobs.lifecycle.effect import Milestone
from blockjobs.lifecycle.error_policy import Action, OnError, Side

if TYPE_CHECKING:
    from blockjobs.lifecycle.context import JobContext
    from blockjobs.lifecycle.handle import JobHandle

JsonObject = dict[str, object]


class Job(ABC):
    """A long-running piece of work with a life cycle.

    `run` works; when every job of the group has run well, all are prepared, then each is committed and cleaned. If any
    fails or is cancelled, each is aborted and cleaned instead. Exactly one of `commit` and `abort` is called, then
    `clean`, exactly once, also for a job that never started. The control lock is held from the first `prepare` to the
    last `clean`.
    """

    is_block_job: ClassVar[bool] = False
    """Whether `block-job-*` and `query-block-jobs` know the type (spec/lifecycle.md §1)."""

    @abstractmethod
    async def run(self, ctx: "JobContext") -> None:
        """Do the work; an exception fails the whole group. Checkpoint: yes. Waits: for anything."""

    async def prepare(self, ctx: "JobContext") -> None:
        """Take the last chance to fail; all members are prepared before any commits. Checkpoint: no. Waits: for I/O."""

    async def commit(self, ctx: "JobContext") -> None:
        """Make the result stand; must not fail. Checkpoint: no. Waits: for I/O."""

    async def abort(self, ctx: "JobContext") -> None:
        """Undo what can be undone; must not fail. Checkpoint: no. Waits: for I/O."""

    async def clean(self, ctx: "JobContext") -> None:
        """Give back nodes and memory, whatever happened; must not fail. Checkpoint: no. Waits: for I/O."""

    def forgotten(self) -> Coroutine[Any, Any, None] | None:
        """Told when the concluded job is dismissed: what users must find free at once is given up here.

        Returns:
            What is left to do and may take its time; the engine runs it.
        """
        return None

    def cancel(self, *, force: bool) -> bool:
        """Told when the job is to stop early, while its body runs.

        Asked with `force=False` only while the job is ready: return False to finish normally instead (a mirror that
        ends in sync, without its pivot; `JobContext.soft_cancelled` tells the body). With `force=True` the answer does
        not matter; release the body's requests in flight here if the nodes below can.
        """
        return True

    def complete(self) -> None:
        """Told when `job-complete` was allowed by the status.

        Raises:
            UsageError: completing is impossible; the user sees the text and nothing changes.
        """

    def change(self, options: msgspec.Struct) -> None:
        """Apply the verb `change` (spec/since-7.2.md, 8.2).

        Raises:
            UsageError: the type cannot change, or not in this way; nothing has changed.
        """
        raise UsageError("Job type does not support change")

    def policy(self, side: Side) -> OnError:
        """What to do about I/O errors on that side."""
        return OnError.REPORT

    def announce(self, milestone: Milestone, handle: "JobHandle") -> None:
        """Publish the type's own event (BLOCK_JOB_READY and so on); called exactly where it belongs in the order."""

    def announce_error(self, side: Side, action: Action) -> None:
        """Publish BLOCK_JOB_ERROR; called once per error and before anything is done about it."""

    def savepoint(self) -> JsonObject | None:
        """What a restarted host may resume from; none if the job cannot be resumed."""
        return None


Body = Callable[["JobContext"], Awaitable[None]]


class CoroutineJob(Job):
    """A job that is only a body, for programs that embed a host."""

    def __init__(self, body: Body) -> None:
        self._body = body

    async def run(self, ctx: "JobContext") -> None:
        """Run the coroutine function. Checkpoint: as it likes. Waits: as it likes."""
        await self._body(ctx)
