"""The mirror job: the target becomes the source and stays it, until the users move over (spec/jobs.md §3).

It goes over what is dirty in sweeps, at full speed and without holding anybody. Each sweep leaves what guests wrote
meanwhile, so sweeps shrink; once one leaves little, the job is ready. To end, the guests are held, the little that is
left is copied, the target is flushed, and the guests stay held until the job is finalized: its last step moves them.
"""

import asyncio
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Final

import msgspec

from blockjobs.base.errors import ImageCorrupt, UsageError
from blockjobs.base.units import MiB
from blockjobs.block.copier import CHUNK_BYTES_MAX, CHUNKS_IN_FLIGHT_MAX
from blockjobs.block.drivers.mirror_top import MirrorTop
from blockjobs.block.flight import CopyFailed, Flight
from blockjobs.block.gate import Gate
from blockjobs.block.mirror_copy import MirrorCopy
from blockjobs.block.node import Node
from blockjobs.block.users import Root
from blockjobs.jobs.backup_options import MirrorSyncMode
from blockjobs.jobs.block_job import BlockJob, JobHost
from blockjobs.jobs.mirror_begin import mark_what_to_copy
from blockjobs.jobs.mirror_options import MirrorCopyMode
from blockjobs.jobs.mirror_pivot import Backing, move_users, replaceable
from blockjobs.lifecycle.context import JobContext
from blockjobs.lifecycle.error_policy import OnError, Side
from blockjobs.lifecycle.handle import JobHandle
from blockjobs.lifecycle.registry import job_type
from blockjobs.lifecycle.window import Window

BUFFER_BYTES: Final = 16 * MiB
"""The default of buf-size, and what a job under a limit copies at once at most (spec/jobs.md §0)."""
BATCHES_IN_FLIGHT: Final = 2
"""One is planned while the other moves."""
LEFT_BYTES_MAX: Final = 4 * MiB
"""So little left over by a sweep counts as in sync: guests can be held for as long as it takes to copy it."""
LINGER_NS: Final = 20_000_000
"""A ready job collects changes for so long before it copies them, or each small write would cost a plan."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MirrorSetup:
    """What a mirror is to do, checked.

    Attributes:
        base: the target of an active commit.
        replaces: name of the node that the target takes the place of; None for the source.
        is_target_zero: the target reads as zeroes, by its maker's or the user's word.
        backing: what becomes of the target's backing node in the end.
    """

    source: Node
    target: Node
    sync: MirrorSyncMode
    granularity: int
    buffer_bytes: int = 0
    base: Node | None = None
    replaces: str | None = None
    copy_mode: MirrorCopyMode = MirrorCopyMode.BACKGROUND
    is_target_zero: bool = False
    backing: Backing = Backing.AS_IS
    on_source_error: OnError = OnError.REPORT
    on_target_error: OnError = OnError.REPORT


@job_type("mirror")
class MirrorJob(BlockJob):
    """Copies below the filter that was put above the source for it."""

    type_name: ClassVar[str] = "mirror"

    def __init__(self, host: JobHost, setup: MirrorSetup, filter_node: Node, copy: MirrorCopy) -> None:
        super().__init__(host, on_source_error=setup.on_source_error, on_target_error=setup.on_target_error)
        self.setup, self._filter_node, self._copy = setup, filter_node, copy
        driver = filter_node.driver
        assert isinstance(driver, MirrorTop)
        self._filter = driver
        self.copy_mode = setup.copy_mode
        self.claim: Root | None = None
        """The rights to write to the target."""
        self.handle: JobHandle | None = None
        self._failures: list[CopyFailed] = []
        self._ctx: JobContext | None = None
        self._lane = asyncio.Lock()
        self._at = 0
        self._is_settled = self._pivots = self.has_pivoted = False
        self._gate = Gate()
        self._hold = AsyncExitStack()

    # --- what others ask

    @property
    def is_actively_synced(self) -> bool | None:
        """Whether both sides are the same, and stay so by guests' writes going to both (`actively-synced`)."""
        return self._filter.watches != 0 and not (self._copy.dirty.any() or self._copy.in_flight_bytes)

    def cancel(self, *, force: bool) -> bool:
        """See `Job`: a ready mirror that is asked softly ends in sync."""
        return super().cancel(force=force) and force

    def written(self) -> Iterable[Node]:
        """See `BlockJob`."""
        return () if self.claim is None else [self.claim.node]

    def complete(self) -> None:
        """See `Job`."""
        if self.setup.replaces is not None:
            names = [node.name for node in self.graph.nodes()]
            if self.setup.replaces not in names:
                raise UsageError(f"Node name '{self.setup.replaces}' not found")

    def change(self, options: msgspec.Struct) -> None:
        """See `Job`: a mirror in the background may become write-blocking."""
        wanted = getattr(options, "copy_mode", None)
        assert isinstance(wanted, MirrorCopyMode)
        if wanted is self.copy_mode:
            return
        if wanted is MirrorCopyMode.BACKGROUND:
            raise UsageError("Change to copy mode 'background' is not implemented")
        self.copy_mode = wanted
        self._follow_copy_mode()

    # --- the body

    async def run(self, ctx: JobContext) -> None:
        """See `Job`. The target is flushed before the job is ready and before this returns (durability §1)."""
        self._ctx = ctx
        setup, copy = self.setup, self._copy
        await self._settle_lengths(ctx)
        copy.on_target_failed = self._note_failure
        copy.changes.on_change = ctx.nudge
        copy.on_arrived = ctx.progress.advance
        copy.on_guest_moved = self._count_guest
        await mark_what_to_copy(ctx, copy, setup.source, setup.target, setup.sync, is_zero=setup.is_target_zero)
        self._is_settled = True
        self._follow_copy_mode()
        while True:
            await self._work(ctx)
            if await self._ends_in_sync(ctx):
                return

    async def _work(self, ctx: JobContext) -> None:
        """Sweep until the job is asked to end and little is left."""
        copy = self._copy
        in_flight_max = BATCHES_IN_FLIGHT if self._chunk(ctx) is None else 1
        async with ctx.window(max_in_flight=in_flight_max) as window:
            while True:
                await self._pass_by(ctx)
                self._show(ctx)
                if self._failures:
                    await window.drain()
                    await self._apply_policy(ctx)
                elif copy.next_free(self._at) is not None:
                    await window.submit(partial(self._copy_next, ctx))
                    if ctx.speed_bytes_per_s:
                        await window.drain()
                elif await self._is_sweep_over(ctx, window):
                    if self._is_ready and self._is_asked:
                        return
                    await self._be_ready(ctx)

    async def _pass_by(self, ctx: JobContext) -> None:
        """A checkpoint. A ready job that nobody asked to end copies without a limit (spec/jobs.md §0)."""
        if self._copy.dirty.any() and not (self._is_ready and not self._is_asked):
            await ctx.checkpoint()
        else:
            await ctx.idle(lambda: True)

    async def _is_sweep_over(self, ctx: JobContext, window: Window) -> bool:
        """Begin again at the start; True if the sweep has been everywhere and left little."""
        copy = self._copy
        await window.drain()
        if self._failures:
            return False
        whole, self._at, copy.passed_over = not copy.passed_over, 0, False
        left = copy.dirty.dirty_bytes()
        if left and not whole and copy.next_free() is None:
            await ctx.idle(
                lambda: self._awaits_news(bool(self._failures) or not copy.is_busy or copy.next_free() is not None)
            )
        return not left or (whole and left <= LEFT_BYTES_MAX)

    async def _be_ready(self, ctx: JobContext) -> None:
        """Both sides are nearly the same: become ready, or wait for changes and for a user's wish."""
        if not self._is_ready:
            await ctx.attempt(self.setup.target.flush, side=Side.TARGET)
            if not self._failures:
                await ctx.settle_debt()
                self._show(ctx)
                await ctx.ready()
            return

        def is_called() -> bool:
            return bool(self._failures) or self._is_asked

        await ctx.idle(lambda: self._awaits_news(is_called() or self._copy.dirty.any()))
        if not is_called():
            await ctx.idle(is_called, due_ns=ctx.clock.now_ns() + LINGER_NS)

    async def _copy_next(self, ctx: JobContext) -> None:
        """Plan and move the next batch. The flight begins and ends here: a parked job holds no guest's write up."""
        if not ctx.goes_on():
            return
        chunk = self._chunk(ctx)
        flight = self._copy.take(self._at, length_max=chunk)
        if flight is not None:
            self._at = flight.span.end
            await self._carry(flight, chunk, limited=not self._is_ready or self._is_asked, goes_on=ctx.goes_on)

    async def _carry(
        self, flight: Flight, chunk: int | None, *, limited: bool, goes_on: Callable[[], bool] | None = None
    ) -> None:
        try:
            batch = await self._copy.prepare(flight, moved_max=chunk)
            self._at = flight.span.end
            if limited and self._ctx is not None:
                self._ctx.charge(batch.moved_bytes)
            left = await self._copy.move(batch, lane=self._lane, goes_on=goes_on)
            if left:
                self._at, self._copy.passed_over = min(self._at, left[0].at), True
            if limited and self._ctx is not None:
                self._ctx.refund(sum(part.length for part in left))
        except CopyFailed as failure:
            self._note_failure(failure)

    def _chunk(self, ctx: JobContext) -> int | None:
        """What to transfer at once: as much as the buffer takes if that is small, or if there is a limit."""
        size = self.setup.buffer_bytes or BUFFER_BYTES
        return size if ctx.speed_bytes_per_s or size < BUFFER_BYTES else None

    # --- the end of the body

    async def _ends_in_sync(self, ctx: JobContext) -> bool:
        """Hold the guests and copy what is left; True if both sides are the same then, and durable."""
        assert self.handle is not None
        self._hold, self._gate = AsyncExitStack(), Gate()
        self._hold.callback(self._gate.open)
        drained = self.graph.drained(self.setup.source, apart_from=self.handle, gate=self._gate)
        try:
            await self._hold.enter_async_context(drained)
            if await self._copies_the_rest(ctx):
                self._pivots = ctx.completion_requested and not ctx.soft_cancelled
                # The guests are held until `clean`, and users see that as a pause.
                self.handle.quiesce_begin()
                self._hold.callback(self.handle.quiesce_end)
                return True
        except BaseException:
            await self._hold.aclose()
            raise
        await self._hold.aclose()
        return False

    async def _copies_the_rest(self, ctx: JobContext) -> bool:
        copy = self._copy
        if copy.dirty.dirty_bytes() > LEFT_BYTES_MAX:
            return False
        while not (ctx.is_stopping or self._failures) and (flight := copy.take()) is not None:
            await self._carry(flight, None, limited=False)
        self._show(ctx)
        if ctx.is_stopping or self._failures or copy.dirty.any():
            return False
        try:
            await self.setup.target.flush()
        except (OSError, ImageCorrupt) as error:
            self._note_failure(CopyFailed(error, reading=False))
            return False
        return not (ctx.is_stopping or self._failures)

    # --- hooks

    async def prepare(self, ctx: JobContext) -> None:
        """See `Job`: attach the backing node and, if the job was completed, let the users use the target."""
        await self._release_claim()
        await move_users(
            self.graph,
            filter_node=self._filter_node,
            source=self.setup.source,
            target=self.setup.target,
            replaced=replaceable(self.graph, self.setup.source, self.setup.replaces) if self._pivots else None,
            backing=self.setup.backing,
            sync=self.setup.sync,
            gate=self._gate,
        )
        self.has_pivoted = self._pivots

    async def clean(self, ctx: JobContext) -> None:
        """See `Job`."""
        await self.dismantle()

    async def dismantle(self) -> None:
        """Take the filter out, let go of the nodes, then of the guests; a target that only the job used is closed."""
        self._filter.write_one()
        async with self.graph.edit() as edit:
            self._filter.guards = False
            await edit.drop(self._filter_node)
            # Not earlier: until the filter is drained, a guest may be half way between the two sides.
            await self._release_claim()
        self._gate.leads_to.setdefault(self._filter_node, self.setup.source)
        self.setup.source.detach_bitmap(self._copy.changes)
        await self.let_go()
        await self._tidy_up()
        await self._hold.aclose()

    async def _tidy_up(self) -> None:
        """What else is to be done before the guests go on; must not fail."""

    async def _release_claim(self) -> None:
        if self.claim is not None:
            claim, self.claim = self.claim, None
            await self.graph.release(claim)

    # --- small parts

    async def _settle_lengths(self, ctx: JobContext) -> None:
        if self.setup.source.length != self.setup.target.length:
            raise UsageError("Source and target image have different sizes")

    @property
    def _is_ready(self) -> bool:
        return self.handle is not None and self.handle.life.is_ready

    @property
    def _is_asked(self) -> bool:
        ctx = self._ctx
        return ctx is not None and (ctx.completion_requested or ctx.soft_cancelled)

    def _awaits_news(self, is_met: bool) -> bool:
        """Be told of the next change if a condition is not met yet."""
        self._copy.changes.awaited = not is_met
        return is_met

    def _follow_copy_mode(self) -> None:
        # Before the map is complete a guest's write could be covered by the zeroes that the target begins with.
        if self._is_settled and self.copy_mode is MirrorCopyMode.WRITE_BLOCKING:
            self._filter.write_both(self._copy, self.setup.target)

    def _note_failure(self, failure: CopyFailed) -> None:
        self._failures.append(failure)
        if self._ctx is not None:
            self._ctx.nudge()

    async def _apply_policy(self, ctx: JobContext) -> None:
        """Announce an error and do as its policy says; returns if the work is to be tried again."""
        failure, self._failures = self._failures[0], []
        self._at = 0
        pending = [failure]
        self._show(ctx)

        async def fail_once() -> None:
            if pending:
                raise pending.pop()

        await ctx.attempt(fail_once, side=Side.SOURCE if failure.reading else Side.TARGET)

    def _count_guest(self, count: int) -> None:
        if self._ctx is not None:
            self._ctx.progress.grow(count)
            self._ctx.progress.advance(count)

    def _show(self, ctx: JobContext) -> None:
        """The total is what was done, is dirty and is in flight (spec/jobs.md §0, Progress)."""
        ctx.progress.set_remaining(self._copy.dirty.dirty_bytes() + self._copy.in_flight_bytes)


def set_chunks(copy: MirrorCopy, buffer_bytes: int) -> None:
    """Bytes of a request through the nodes' doors, and how many at once, so that buffers stay within their limit."""
    size = buffer_bytes or BUFFER_BYTES
    chunk = max(copy.cluster_size, min(CHUNK_BYTES_MAX, size))
    copy.chunk_bytes_max = chunk // copy.cluster_size * copy.cluster_size
    copy.chunks_in_flight_max = max(1, min(CHUNKS_IN_FLIGHT_MAX, size // copy.chunk_bytes_max))
