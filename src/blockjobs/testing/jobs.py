"""Tiny jobs for tests of programs that embed a host: each does one thing of the life cycle and nothing to any disk."""

from dataclasses import dataclass, field

from blockjobs.lifecycle.context import JobContext
from blockjobs.lifecycle.effect import Hook, Milestone
from blockjobs.lifecycle.error_policy import Action, OnError, Side
from blockjobs.lifecycle.handle import JobHandle
from blockjobs.lifecycle.job import Job

TICK_NS = 100_000_000


@dataclass(kw_only=True)
class ToyJob(Job):
    """A job that counts down and keeps a diary; its fields say how it behaves.

    Attributes:
        name: for the diary.
        ticks: steps of 100 ms, each a checkpoint and one unit of progress.
        cost_bytes: what each step charges to the rate limit.
        wants_completion: after the steps become READY and wait for `job-complete`.
        soft: a soft cancel of the ready job lets it end well.
        fails: raised after the steps.
        fails_to_prepare: raised in `prepare`.
        is_deaf: the body has no checkpoints, as a `create` job.
        policies: on-error policies by side.
        diary: hooks and milestones as they happen, shared by the jobs of one test: `("name", "prepare")`.
    """

    name: str = "toy"
    ticks: int = 1
    cost_bytes: int = 0
    wants_completion: bool = False
    soft: bool = False
    fails: Exception | None = None
    fails_to_prepare: Exception | None = None
    is_deaf: bool = False
    policies: dict[Side, OnError] = field(default_factory=dict)
    diary: list[tuple[str, str]] = field(default_factory=list)

    is_block_job = True

    async def run(self, ctx: JobContext) -> None:
        """Count down, then succeed, fail or wait, as asked. Checkpoint: unless deaf. Waits: 100 ms a tick."""
        ctx.progress.set_remaining(self.ticks)
        for _ in range(self.ticks):
            if self.is_deaf:
                await ctx.clock.sleep_until(ctx.clock.now_ns() + TICK_NS)
            else:
                await ctx.checkpoint(cost_bytes=self.cost_bytes)
                await ctx.sleep_until(ctx.clock.now_ns() + TICK_NS)
            ctx.progress.advance(1)
        if self.fails:
            raise self.fails
        if self.wants_completion:
            await ctx.ready()
            await ctx.completion()

    async def prepare(self, ctx: JobContext) -> None:
        """Note it, and fail if asked to. Checkpoint: no. Waits: no."""
        self._note(Hook.PREPARE)
        if self.fails_to_prepare:
            raise self.fails_to_prepare

    async def commit(self, ctx: JobContext) -> None:
        """Note it. Checkpoint: no. Waits: no."""
        self._note(Hook.COMMIT)

    async def abort(self, ctx: JobContext) -> None:
        """Note it. Checkpoint: no. Waits: no."""
        self._note(Hook.ABORT)

    async def clean(self, ctx: JobContext) -> None:
        """Note it. Checkpoint: no. Waits: no."""
        self._note(Hook.CLEAN)

    def cancel(self, *, force: bool) -> bool:
        """Stop, unless it is asked softly and may end well."""
        return force or not self.soft

    def policy(self, side: Side) -> OnError:
        """As the field says; `report` otherwise."""
        return self.policies.get(side, OnError.REPORT)

    def announce(self, milestone: Milestone, handle: JobHandle) -> None:
        """Note it."""
        self._note(milestone)

    def announce_error(self, side: Side, action: Action) -> None:
        """Note it as `error source report`."""
        self._note(f"error {side} {action}")

    def _note(self, what: str) -> None:
        self.diary.append((self.name, str(what)))


def countdown(ticks: int = 3) -> ToyJob:
    """A job that succeeds after `ticks` steps of 100 ms."""
    return ToyJob(ticks=ticks)


def failing(error: Exception, *, ticks: int = 1) -> ToyJob:
    """A job that raises `error` after its steps."""
    return ToyJob(ticks=ticks, fails=error)


def ready_then_wait(*, soft: bool = True) -> ToyJob:
    """A job that becomes READY after one step and waits for `job-complete`, as a mirror does."""
    return ToyJob(wants_completion=True, soft=soft)
