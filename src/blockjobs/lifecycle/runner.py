"""One job's body from the outside: where it stands still, who may wake it, and whether it is quiet.

The body waits for the life cycle in one way only, `rest`: a pause, the rate limit, a full window and a completion all
are conditions that it rests for. A body at rest with no I/O in flight is parked by whoever asks, at once, without
being run: that is why `job-pause` of an idle job and a drain need no turn of the loop.
"""

import asyncio
from collections.abc import Callable, Coroutine

from blockjobs.base.clock import Clock
from blockjobs.lifecycle.failure import Failure
from blockjobs.lifecycle.job import Job
from blockjobs.lifecycle.life import Life
from blockjobs.lifecycle.limiter import Limiter
from blockjobs.lifecycle.progress import Progress
from blockjobs.lifecycle.signal import Signal
from blockjobs.lifecycle.spec import JobSpec
from blockjobs.lifecycle.status import JobStatus
from blockjobs.lifecycle.stimulus import Parked, Stimulus

Condition = Callable[[], bool]
DueNs = Callable[[], int]


class Runner:
    """The engine's record of one job. Everything here is the engine's and the context's; users have `JobHandle`.

    Attributes:
        life: the machine's record; read only.
        working: called when the body goes on, after a rest or after something foreign.
        checkpoints: how many times the body came by; the watchdog compares, and notes in `silence_reported_at`.
        at_rest: the body waits in `rest` (or has not begun).
        body: the task that runs it.
        flying: tasks of the body's windows whose I/O is in flight.
        is_interruptible: the body waits for something foreign that a cancel ends; the watchdog lets it be silent.
        body_done: the body has returned, though perhaps nobody has told the machine yet.
        delivered: the machine was told.
        forgotten: the job is NULL, and its key may belong to another.
        entered: how often each status was entered, for waiters.
        changed: a status changed, or the job became quiet.
    """

    def __init__(
        self,
        *,
        spec: JobSpec,
        job: Job,
        life: Life,
        clock: Clock,
        feed: Callable[[Stimulus], None],
        spawn: Callable[[Coroutine[None, None, None]], asyncio.Task[None]],
        working: "Callable[[Runner], None]",
    ) -> None:
        self.spec, self.job, self.life, self.clock, self.feed, self.spawn = spec, job, life, clock, feed, spawn
        self.working = working
        self.progress = Progress()
        self.limiter = Limiter(life.speed_bytes_per_s, clock.now_ns())
        self.changed = Signal()
        self.checkpoints = 0
        self.silence_reported_at = -1
        self.at_rest = True
        self.body: asyncio.Task[None] | None = None
        self.flying: set[asyncio.Task[None] | None] = set()
        self.is_interruptible = False
        self.body_done = False
        self.delivered = False
        self.forgotten = False
        self.failure: Failure | None = None
        self.started_ns: int | None = None
        self.entered: dict[JobStatus, int] = dict.fromkeys(JobStatus, 0)
        self._kick = Signal()

    @property
    def is_quiet(self) -> bool:
        """Whether no request is in flight and none will come while the job is held."""
        return self.body_done or self.life.is_parked or not self.life.started

    @property
    def is_busy(self) -> bool:
        """Whether the body is at work, as `query-block-jobs` shows it."""
        return self.life.started and not self.body_done and not (self.at_rest and not self.flying)

    async def until_quiet(self) -> None:
        """Wait for `is_quiet`. Checkpoint: no. Waits: for the body's current requests."""
        while not self.is_quiet:
            await self.changed.wait()

    async def until_done(self) -> None:
        """Wait for the body to return. Checkpoint: no. Waits: for the body, however long."""
        while not self.body_done:
            await self.changed.wait()

    def finish(self, failure: Failure | None) -> None:
        """Note that the body has returned."""
        self.failure, self.body_done = failure, True
        self.changed.notify()

    def land(self) -> None:
        """The calling task's I/O is done."""
        self.flying -= {asyncio.current_task()}
        self.nudge()

    def nudge(self) -> None:
        """Something the body may rest for has changed: park it if it must, else let it look."""
        self._park_if_due()
        self._kick.notify()

    async def rest(self, until: Condition, *, due_ns: DueNs | None = None) -> None:
        """Stand still until the condition holds and nothing holds the body; parks meanwhile whenever it must.

        Args:
            until: looked at after each nudge, and when `due_ns` has come.
            due_ns: when the passing of time alone may make `until` true; asked anew after each wake-up.

        Checkpoint: parks, never raises `JobCancelled`: let `until` look at `life.is_stopping`. Waits: for `until`.
        """
        self.at_rest = True
        was_parked = False
        try:
            while True:
                self._park_if_due()
                if self.life.is_parked:
                    was_parked = True
                    await self._kick.wait()
                elif until():
                    break
                else:
                    # A body that must park but still has I/O in flight waits for that, not for the time.
                    await self._kicked(None if self.life.should_park else due_ns)
        finally:
            self.at_rest = False
            self.working(self)
            if was_parked:
                self.limiter.forfeit(self.clock.now_ns())

    async def hold(self, until: Condition, *, due_ns: DueNs | None = None) -> None:
        """`rest`, for the body or for one piece of I/O in a window, which counts as not in flight meanwhile.

        Checkpoint: as `rest`. Waits: for `until`, and for the job to be unparked.
        """
        task = asyncio.current_task()
        if task is self.body:
            await self.rest(until, due_ns=due_ns)
            return
        landed = self.flying & {task}
        self.flying -= landed
        self.nudge()
        try:
            while self.life.is_parked or not until():
                await self._kicked(None if self.life.should_park else due_ns)
        finally:
            self.flying |= landed

    async def until_finished(self, task: asyncio.Task[None], finished: Condition) -> None:
        """Wait for `finished`, which `task` announces by `nudge`; a forced cancel ends the task instead.

        Checkpoint: no. Waits: for the condition, or for the task to react to its cancellation.
        """
        self.is_interruptible = True
        try:
            while not (finished() or self.life.is_stopping):
                await self._kick.wait()
            if not finished():
                task.cancel()
                await asyncio.wait((task,))
        finally:
            self.is_interruptible = False
            self.working(self)

    def _park_if_due(self) -> None:
        life = self.life
        if not (life.started and self.at_rest and not self.flying and life.should_park):
            return
        if not (life.is_parked or self.body_done):
            self.feed(Parked(life.key))

    async def _kicked(self, due_ns: DueNs | None) -> None:
        if due_ns is None:
            await self._kick.wait()
            return
        alarm = self.spawn(self._ring(due_ns()))
        try:
            await self._kick.wait()
        finally:
            alarm.cancel()

    async def _ring(self, deadline_ns: int) -> None:
        await self.clock.sleep_until(deadline_ns)
        self._kick.notify()
