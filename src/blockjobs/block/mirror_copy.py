"""The copy engine under a mirror: the source goes on changing, and what changed is copied again.

Nobody is held off by a copy in the background. It may therefore see old bytes, half of a write, or even bytes of
somebody else: a guest discards a cluster, the image reuses its place, and a plan made before still reads there. None
of that is ever final, for this reason. A flight clears its bits *before* it looks anything up, and a guest's request
sets them *when it ends*. Whatever a request did to the source or to its mapping after the bits were cleared, it was
still under way then, so its end is yet to come and sets the bits again: the range is copied once more, from a new
plan. A range whose bits stay clear saw no request end since its flight began, and none is under way once the source is
drained; so nothing moved between plan and read, and what the target holds is what the source holds.

Two things could break that. A flight with old bytes that lands after one with new bytes: so flights never overlap. And
a guest's write that goes to both sides (`write-blocking`) and is then covered by the old bytes of a flight: so such
writes and flights keep out of each other's way, each waiting for those that began earlier.

A write to both sides leaves the map as it was where it covers a granule in part, and clean where it covers it whole:
it clears those bits first, as a flight does, so that the end of any other request sets them again. Its own end on the
source is left out of the map (`ChangeMap.passing`), and if either side fails the whole range becomes dirty.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

from msgspec import field

from blockjobs.base.clock import Clock
from blockjobs.base.errors import ImageCorrupt
from blockjobs.base.offload import Offload
from blockjobs.base.span import Span, coalesce, without
from blockjobs.block.bitmap import DirtyBitmap
from blockjobs.block.copier import BlockCopy
from blockjobs.block.flight import Batch, CopyFailed, Flight
from blockjobs.block.layers import trace_pieces
from blockjobs.block.node_bitmap import NodeBitmap
from blockjobs.block.pieces import Pieces
from blockjobs.block.plan import Run, RunKind, clip, pair, trace
from blockjobs.block.zero_runs import zero_runs

if TYPE_CHECKING:
    from blockjobs.block.node import Node


def _ignore() -> None:
    """For callbacks that nobody set."""


class ChangeMap(NodeBitmap, eq=False, kw_only=True):
    """The bitmap of a mirror's source.

    Attributes:
        on_change: called once when something became dirty, or a guest's write to both sides ended, while `awaited`.
        awaited: somebody waits for such news. Guests' writes cost nothing else.
        passing: changes that end on both sides and are not to be recorded.
    """

    on_change: Callable[[], None] = _ignore
    awaited: bool = False
    passing: list[Span] = field(default_factory=list)

    def record(self, span: Span) -> None:
        """See `NodeBitmap`."""
        if span in self.passing:
            self.passing.remove(span)
            return
        NodeBitmap.record(self, span)
        self.tell()

    def tell(self) -> None:
        """There is news."""
        if self.awaited:
            self.awaited = False
            self.on_change()

    @contextmanager
    def let_pass(self, span: Span) -> Iterator[None]:
        """Do not record the next change of exactly `span` that ends inside the block."""
        self.passing.append(span)
        count = self.passing.count(span)
        try:
            yield
        finally:
            if self.passing.count(span) == count:  # it was refused before it began
                self.passing.remove(span)


class MirrorCopy(BlockCopy):
    """State of one mirror.

    Attributes:
        changes: the map of what is to be copied, recorded by the source node.
        base: the target of an active commit; what it or nodes below it provide is not copied.
        zeroed: where the target is promised to read as zeroes, as nothing was written there yet; None: no promise.
        passed_over: a dirty range was left out because a guest was writing there.
        on_target_failed: called when a guest's write could not be repeated on the target.
    """

    def __init__(
        self,
        *,
        source: "Node",
        target: "Node",
        changes: ChangeMap,
        unit: int,
        offload: Offload,
        clock: Clock,
        base: "Node | None" = None,
    ) -> None:
        super().__init__(
            source=lambda: source,
            target=lambda: target,
            offload=offload,
            clock=clock,
            cluster_size=unit,
            dirty=changes.map,
        )
        self.changes, self.base = changes, base
        self.zeroed: DirtyBitmap | None = None
        self.passed_over = False
        self.on_target_failed: Callable[[CopyFailed], None] = lambda failure: None
        self._writes: list[Flight] = []

    # --- what is to be done

    @property
    def is_busy(self) -> bool:
        """Whether something is in flight, in the background or by a guest."""
        return bool(self._flights or self._writes)

    @property
    def in_flight_bytes(self) -> int:
        """Bytes being copied in the background."""
        return sum(flight.length for flight in self._flights)

    def next_free(self, at: int = 0, *, length_max: int | None = None, end: int | None = None) -> Span | None:
        """See `BlockCopy`: guests make dirty what is in flight, or being written to."""
        reach = self.pace.reach_bytes if length_max is None else length_max
        while (span := self.dirty.next_run(at, reach, end)) is not None:
            span = span.widen(self.cluster_size).intersect(Span(0, self.length))
            obstacle = self._first_in_the_way(span)
            if obstacle is None:
                return span
            free = obstacle.span.at // self.cluster_size * self.cluster_size - span.at
            if free > 0:
                return Span(span.at, free)
            self.passed_over = True
            at = -(-obstacle.span.end // self.cluster_size) * self.cluster_size
        return None

    def _in_the_way(self) -> Iterable[Flight]:
        """See `BlockCopy`: guests' writes to both sides too."""
        return (*self._flights, *self._writes)

    def _cut(self, flight: Flight, end: int, moved_max: int) -> bool:
        # Another flight may be on its way behind this one already, so the sweep does not come by here again.
        is_shorter = super()._cut(flight, end, moved_max)
        self.passed_over |= is_shorter
        return is_shorter

    def _copied_there(self, span: Span) -> Flight | None:
        """What keeps a guest from writing `span` to both sides: a copy or another such write of these very bytes."""
        for other in (*self._flights, *self._writes):
            if other.copies_any(span):
                return other
        return None

    # --- guests' writes that go to both sides

    @asynccontextmanager
    async def _alone_at(self, span: Span) -> AsyncIterator[None]:
        while (other := self._copied_there(span)) is not None:
            await other.landed.wait()
        mine = Flight(span, [span], ExitStack())
        self._writes.append(mine)
        try:
            yield
        finally:
            self._writes.remove(mine)
            mine.landed.set()
            self.changes.tell()

    async def change_both(
        self, span: Span, on_source: Callable[[], Awaitable[None]], on_target: Callable[[], Awaitable[None]]
    ) -> None:
        """Do a guest's change on the source, then on the target; both are done on return.

        Args:
            on_source: raises what the guest is to see.
            on_target: a failure leaves the range dirty and is told to `on_target_failed`, not to the guest.

        Waits: for copies of the same bytes under way, then for I/O on both sides. Checkpoint: no.
        """
        async with self._alone_at(span):
            self.dirty.clear(self._whole_units(span, self.dirty.granularity))
            if self.zeroed is not None:
                self.zeroed.clear(span)
            try:
                with self.changes.let_pass(span):
                    await on_source()
                await on_target()
            except BaseException as error:
                self.dirty.set(span)
                if isinstance(error, TargetFailed):
                    self.on_target_failed(error.failure)
                    return
                raise
        self.on_guest_moved(span.length)

    # --- the parts of a copy that differ

    @property
    def _takes_pieces(self) -> bool:
        """See `BlockCopy`. Above a base what is left out is that base's; zeroes must be written there."""
        return self.base is None or not self._searches

    async def _plan_pieces(self, flight: Flight, pieces: Pieces) -> Batch | None:
        batch = await super()._plan_pieces(flight, pieces)
        if batch is not None:
            self._written(batch.copied)
        return batch

    async def _known_zero(self, span: Span) -> list[Span]:
        """See `BlockCopy`. Where nothing was written yet, the target is promised to read as zeroes."""
        promised = list(self.zeroed.runs(span)) if self.zeroed is not None else []
        return promised if promised == [span] else coalesce([*promised, *await super()._known_zero(span)])

    async def _trace(self, flight: Flight) -> list[Run]:
        runs = await trace(self._source(), flight.span, through_backing=True, base=self.base)
        return clip(runs, flight.parts)

    async def _trace_pieces(self, flight: Flight, enough_bytes: int) -> Pieces | None:
        return await trace_pieces(self._source(), flight.span, self.cluster_size, enough_bytes, self.base)

    async def _plan(self, flight: Flight, runs: list[Run]) -> Batch:
        """See `BlockCopy`. Skips what a base provides, and zeroes where the target is proven or promised to be zero."""
        span, target = flight.span, self._target()
        zeroes = [whole for run in runs if run.kind is RunKind.ZERO and (whole := self._whole_clusters(run))]
        absent = [Span(run.at, run.length) for run in runs if run.kind is RunKind.ABSENT]
        rest = without(flight.parts, coalesce([*zeroes, *absent]))
        if zeroes:
            await zero_runs(target, without(zeroes, await self._known_zero(span)))
        self._written(rest)
        batch = Batch(flight=flight, runs=runs, moved_bytes=sum(part.length for part in rest))
        opaque = [Span(run.at, run.length) for run in runs if run.kind is RunKind.OPAQUE]
        # Part of a target cluster may need what is there already around it: the target's own door does that.
        size = target.cluster_size or 1
        copied = [whole for part in without(rest, opaque) if (whole := self._whole_units(part, size))]
        if copied and await batch.placing.reserve(target, copied):
            batch.copied = copied
            batch.steps = pair(clip(runs, copied), batch.placing.placed)
            batch.doors = without(rest, copied)
        else:
            batch.doors = rest
        return batch

    def _whole_units(self, part: Span, size: int) -> Span:
        """The units of `size` bytes that lie in `part` as a whole; the last one of the node may be short."""
        if (part.at | part.length) % size == 0:
            return part
        start = -(-part.at // size) * size
        end = part.end if part.end == self.length else part.end // size * size
        return Span(start, max(0, end - start))

    def _written(self, spans: list[Span]) -> None:
        if self.zeroed is not None:
            self.zeroed.clear_all_of(spans)


class TargetFailed(Exception):
    """A guest's change is on the source and not on the target."""

    def __init__(self, cause: OSError | ImageCorrupt) -> None:
        super().__init__(str(cause))
        self.failure = CopyFailed(cause, reading=False)
