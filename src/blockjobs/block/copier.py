"""The one copy engine: under backup, and under every guest write that meets the copy-before-write filter.

`BlockCopy` owns a map of what is still to be copied and the list of what is being copied. A piece of work is a
`Flight`: taken synchronously (its bits are cleared, so nobody takes it twice), prepared (planned against the graph as
it is now), then moved in a worker. If anything fails, the bits of what did not arrive are set again: nothing is lost,
and whoever comes next tries anew.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractAsyncContextManager, ExitStack
from itertools import islice
from typing import TYPE_CHECKING, Final

from blockjobs.base.clock import Clock
from blockjobs.base.errors import ImageCorrupt
from blockjobs.base.offload import Offload
from blockjobs.base.span import Span, coalesce, without
from blockjobs.base.units import KiB, MiB
from blockjobs.block.bitmap import DirtyBitmap
from blockjobs.block.compress_batch import CompressedWriter
from blockjobs.block.doors import move_through_doors
from blockjobs.block.flight import Batch, CopyFailed, Flight
from blockjobs.block.known_zero import known_zero
from blockjobs.block.layers import trace_pieces
from blockjobs.block.options import DetectZeroes
from blockjobs.block.pace import BATCH_BYTES_MAX, REACH_BYTES_MAX, RUNS_MAX, Pace
from blockjobs.block.pieces import Pieces, place
from blockjobs.block.placing import Placing
from blockjobs.block.plain_move import Moved, move_plainly
from blockjobs.block.plan import Run, RunKind, clip, pair, trace
from blockjobs.block.zero_runs import zero_runs
from blockjobs.block.zero_search import pieces_without_zeroes, without_zeroes

if TYPE_CHECKING:
    from blockjobs.block.node import Node

CLUSTER_BYTES_MIN: Final = 64 * KiB
"""Copy clusters are at least so long (spec/jobs.md §4, Run)."""
CHUNK_BYTES_MAX: Final = 1 * MiB
"""Longest request through a node's ordinary doors, and longest batch of a throttled job (spec/jobs.md §4)."""
CHUNKS_IN_FLIGHT_MAX: Final = 16
"""Requests through the doors at once."""
DOORS_BYTES_MAX: Final = 16 * MiB
"""And their buffers: images with clusters of 2 MiB copy in chunks of that size."""
CLUSTERS_MAX: Final = 1 << 32
"""Clusters of one copy: 512 MiB of bits, 256 TiB in clusters of 64 KiB; for more choose larger clusters."""

assert BATCH_BYTES_MAX % CHUNK_BYTES_MAX == 0 and CHUNK_BYTES_MAX % CLUSTER_BYTES_MIN == 0


_FREE: Final = (RunKind.ZERO, RunKind.ABSENT)
"""What costs no transfer; a tuple, since the members of an enumeration are slow to hash."""


class BlockCopy:
    """State of one point-in-time copy from one node to another.

    The nodes are looked up at each use, since graph edits may replace them. Coroutines here end by themselves and must
    not be cancelled: they own reservations.

    Attributes:
        dirty: what is still to be copied and not in flight.
        own_layer_only: leave out what the source's own layer does not hold (`sync=top`).
        pace: how much to look at and to move at once.
        on_arrived: called with the bytes that are now right on the target.
        on_skipped: called with the bytes that turned out not to need copying.
        on_guest_moved: called with the bytes that a guest's write made us transfer.
    """

    def __init__(
        self,
        *,
        source: "Callable[[], Node]",
        target: "Callable[[], Node]",
        offload: Offload,
        clock: Clock,
        cluster_size: int,
        dirty: DirtyBitmap | None = None,
    ) -> None:
        self._source, self._target = source, target
        self._offload, self._clock = offload, clock
        self.cluster_size = cluster_size
        self.length = source().length
        self.dirty = dirty or DirtyBitmap(self.length, cluster_size)
        self.compressed: CompressedWriter | None = None
        self.own_layer_only = False
        self.chunk_bytes_max = max(CHUNK_BYTES_MAX, cluster_size)
        self.chunks_in_flight_max = CHUNKS_IN_FLIGHT_MAX
        self.on_arrived: Callable[[int], None] = _ignore
        self.on_skipped: Callable[[int], None] = _ignore
        self.on_guest_moved: Callable[[int], None] = _ignore
        self._flights: list[Flight] = []
        self._rooms = source().graph.rooms
        self.pace = Pace(cluster_size)

    def take(self, at: int = 0, *, length_max: int | None = None, end: int | None = None) -> Flight | None:
        """Claim what is dirty at or after `at` for the caller, who must then call `prepare`: as far as it reaches.

        Args:
            length_max: the first run only, and at most so many bytes of it, but one cluster at least.
            end: look no further; to be given with `length_max`.
        """
        first = self.next_free(at, length_max=length_max, end=end)
        if first is None:
            return None
        if length_max is not None:
            return self._begin(first, [first])
        reach = self.pace.reach_bytes // self.cluster_size * self.cluster_size
        window = Span(first.at, max(first.length, reach)).intersect(Span(0, self.length))
        if (obstacle := self._first_in_the_way(window)) is not None:
            window = Span.between(first.at, max(first.end, obstacle.span.at // self.cluster_size * self.cluster_size))
        parts = list(islice(self.dirty.runs(window), RUNS_MAX))
        if len(parts) == RUNS_MAX:
            window = Span.between(window.at, parts[-1].end)
        if self.cluster_size > self.dirty.granularity:
            parts = coalesce(part.widen(self.cluster_size).intersect(window) for part in parts)
        return self._begin(window, parts)

    def next_free(self, at: int = 0, *, length_max: int | None = None, end: int | None = None) -> Span | None:
        """The first dirty range at or after `at` that could be taken now, in whole clusters; what flies is not dirty.

        Args:
            length_max: at most so many bytes, but one cluster at least; as far as it reaches if None.
            end: look no further.
        """
        return self.dirty.next_run(at, self.pace.reach_bytes if length_max is None else length_max, end)

    def _in_the_way(self) -> Iterable[Flight]:
        """What no flight may go across."""
        return self._flights

    def _first_in_the_way(self, span: Span) -> Flight | None:
        """What keeps a flight from covering `span`: the first one, by its place."""
        ways = [other for other in self._in_the_way() if other.span.overlaps(span)]
        return min(ways, key=lambda other: other.span.at, default=None)

    def _begin(self, span: Span, parts: list[Span]) -> Flight:
        """Begin a flight over all that is dirty in `span`: its `parts`."""
        assert parts[-1].end <= span.end, (span, parts[-1])
        self.dirty.clear(span)
        leave = ExitStack()
        for node in (self._source(), self._target()):
            leave.enter_context(node.in_flight.request("copy", span.at, span.length))
        flight = Flight(span, parts, leave)
        self._flights.append(flight)
        return flight

    async def prepare(self, flight: Flight, *, moved_max: int | None = None) -> Batch:
        """Plan a flight, shortening it where it holds more than one batch should.

        Zeroes are written already here, or skipped where the target reads as zeroes for sure.

        Args:
            moved_max: transfer at most so many bytes, but one cluster at least; the engine's own choice if None.

        Raises:
            CopyFailed: planning failed, or zeroes could not be written. The flight is over.
        Waits: metadata I/O, and earlier requests on the same bytes. Checkpoint: no.
        """
        reading = True
        moved_max = self.batch_bytes if moved_max is None else moved_max
        try:
            pieces = await self._find_pieces(flight, moved_max) if self._takes_pieces else None
            runs = [] if pieces is not None else await self._find_runs(flight, moved_max)
            reading = False
            if pieces is None and self._takes_pieces:
                pieces = Pieces.of(runs, self.cluster_size)
            if pieces is not None:
                if (batch := await self._plan_pieces(flight, pieces)) is not None:
                    return batch
                runs = runs or clip(pieces.runs(flight.span), flight.parts)
            return await self._plan(flight, runs)
        except (OSError, ImageCorrupt) as error:
            self._land(flight, left=flight.parts)
            raise CopyFailed(error, reading=reading) from error
        except BaseException:
            self._land(flight, left=flight.parts)
            raise

    async def move(
        self,
        batch: Batch,
        *,
        lane: AbstractAsyncContextManager[object] | None = None,
        discard_source: bool = False,
        goes_on: Callable[[], bool] | None = None,
    ) -> list[Span]:
        """Transfer a prepared batch and make it visible. The flight is over afterwards, whatever happens.

        When plain steps fail, their runs are tried again through the nodes' doors, in chunks: that tells which side is
        at fault and saves what can be saved.

        Args:
            lane: entered while the worker moves plain steps. A batch takes all that one file can be given, so a job
                that has the next one planned meanwhile passes a lock.
            discard_source: give back on the source what has arrived.
            goes_on: see `move_plainly`; also asked between chunks that go through doors.

        Returns:
            What did not travel, because the batch had to end early: it is dirty again. Ascending.

        Raises:
            CopyFailed: some of it did not arrive; the first failure.
        Waits: for I/O of the batch. Checkpoint: no.
        """
        began_ns = self._clock.now_ns()
        left = [*batch.copied, *batch.doors, *batch.packed]
        failure: CopyFailed | None = None
        try:
            stopped: tuple[Span, ...] = ()
            if batch.copied:
                began_ns, failed, stopped = await self._move_plainly(batch, lane, goes_on)
                if failed:
                    batch.doors = coalesce([*batch.doors, *batch.copied])
            left = [*stopped, *batch.doors, *batch.packed]
            if not stopped and batch.packed:
                from blockjobs.block.packed_move import move_packed

                assert self.compressed is not None
                failure = await move_packed(batch, self.compressed, self._source(), self._target())
                if failure is None:
                    left = list(batch.doors)
            if not stopped and batch.doors and failure is None:
                left, failure = await self._move_through_doors(batch.doors, goes_on)
        finally:
            await batch.placing.release()
            left = coalesce(left)
            if discard_source:
                await self._discard_source(without(batch.flight.parts, left))
            self._land(batch.flight, left=left)
        if failure is not None:
            raise failure
        moved_bytes = batch.moved_bytes - sum(span.length for span in left)
        self.pace.learn(moved_bytes, self._clock.now_ns() - began_ns)
        return left

    async def _move_plainly(
        self, batch: Batch, lane: AbstractAsyncContextManager[object] | None, goes_on: Callable[[], bool] | None
    ) -> Moved:
        return await move_plainly(
            batch.steps,
            batch.copied,
            batch.placing,
            unit=max(self.cluster_size, self._target().cluster_size or 1),
            offload=self._offload,
            clock=self._clock,
            lane=lane,
            goes_on=goes_on,
        )

    async def _move_through_doors(
        self, spans: list[Span], goes_on: Callable[[], bool] | None
    ) -> tuple[list[Span], CopyFailed | None]:
        return await move_through_doors(
            self._source(),
            self._target(),
            spans,
            chunk_bytes_max=self.chunk_bytes_max,
            carriers=max(1, min(self.chunks_in_flight_max, DOORS_BYTES_MAX // self.chunk_bytes_max)),
            rooms=self._rooms,
            goes_on=goes_on,
        )

    async def copy_before_write(self, span: Span, *, is_wanted: Callable[[], bool] = lambda: True) -> None:
        """Return once the old content of all of `span` is on the target, or need not be there.

        Args:
            span: what is about to change.
            is_wanted: asked before each piece of work; once it says no, nothing new is begun.

        Raises:
            CopyFailed: it could not be copied; a write must not go on.
        Waits: for copies of the same clusters under way, then for its own. Checkpoint: no.
        """
        span = span.intersect(Span(0, self.length)).widen(self.cluster_size)
        while is_wanted():
            flight = next((flight for flight in self._flights if flight.copies_any(span)), None)
            if flight is not None:
                await flight.landed.wait()
                continue
            if not self.dirty.any(span):
                return
            if self.own_layer_only:
                await self.skip_absent(span)
            mine = self.take(span.at, length_max=BATCH_BYTES_MAX, end=span.end)
            if mine is not None:
                batch = await self.prepare(mine, moved_max=BATCH_BYTES_MAX)
                await self.move(batch)
                self.on_guest_moved(batch.moved_bytes)

    def forget(self, span: Span) -> None:
        """Whole clusters need not be copied any more."""
        skipped = self.dirty.dirty_bytes(span)
        self.dirty.clear(span)
        if skipped:
            self.on_skipped(skipped)

    async def landed(self) -> None:
        """Wait until nothing is in flight. Waits: for guests' copies under way. Checkpoint: no."""
        while self._flights:
            await self._flights[0].landed.wait()

    async def skip_absent(self, span: Span) -> None:
        """Drop whole clusters that the source's own layer does not hold; one held in part is copied (spec/jobs.md §4).

        Raises:
            CopyFailed: the allocation could not be read; nothing is dropped.
        Waits: metadata reads. Checkpoint: no.
        """
        try:
            runs = await trace(self._source(), span.intersect(Span(0, self.length)), through_backing=False)
        except (OSError, ImageCorrupt) as error:
            raise CopyFailed(error, reading=True) from error
        for run in runs:
            if run.kind is RunKind.ABSENT:
                self.forget(self._whole_clusters(run))

    @property
    def batch_bytes(self) -> int:
        """What a batch transfers at most, given how fast the last ones were."""
        writer = self.compressed
        if writer is None:
            return self.pace.batch_bytes
        return max(writer.batch_bytes_min, min(self.pace.batch_bytes, writer.batch_bytes_max))

    def _shorten(self, flight: Flight, runs: list[Run], moved_max: int) -> bool:
        """Give back the part of the flight behind the first `moved_max` bytes that must be transferred, if any."""
        moved = 0
        for index, run in enumerate(runs):
            if run.kind not in _FREE:
                moved += run.length
            if moved > moved_max or index >= RUNS_MAX:
                return self._cut(flight, min(run.end, run.end - max(0, moved - moved_max)), moved_max)
        self._reach_further(flight, moved, moved_max)
        return False

    def _cut(self, flight: Flight, end: int, moved_max: int) -> bool:
        """Give back whole clusters of the flight from about `end` on, if any; `moved_max` was what ended it."""
        cut = max(end // self.cluster_size * self.cluster_size, flight.span.at + self.cluster_size)
        # What is looked at and given back is looked at again: a little more than what was of use.
        self.pace.reach_bytes = max(moved_max, (cut - flight.span.at) * 9 // 8)
        if cut >= flight.span.end:
            return False
        kept = [Span.between(flight.span.at, cut)]
        for part in without(flight.parts, kept):
            self.dirty.set(part)
        flight.parts = without(flight.parts, [Span.between(cut, flight.span.end)])
        flight.span = kept[0]
        return True

    def _reach_further(self, flight: Flight, moved: int, moved_max: int) -> None:
        """All of the flight has only so many bytes to transfer: look at more the next time if that was why it ended."""
        looked_at, reach = flight.span.length, self.pace.reach_bytes
        if moved < moved_max and looked_at + self.cluster_size > reach:  # else the reach was not what ended it
            wanted = looked_at * moved_max // moved * 9 // 8 if moved else 8 * looked_at
            self.pace.reach_bytes = max(reach, min(wanted, 8 * reach, REACH_BYTES_MAX))

    @property
    def _searches(self) -> bool:
        """Whether stored zeroes are looked for here, as the target asks for; compressing finds them anyway."""
        return self.compressed is None and self._target().settings.detect_zeroes is DetectZeroes.UNMAP

    @property
    def _takes_pieces(self) -> bool:
        """Whether what is between pieces of data is zero, and goes to a target that has nothing yet."""
        return self.compressed is None

    async def _find_runs(self, flight: Flight, moved_max: int) -> list[Run]:
        """What the flight consists of, once it is shortened to what may be moved at once."""
        runs = await self._trace(flight)
        if self._shorten(flight, runs, moved_max):
            runs = clip(runs, [flight.span])
        return await self._offload.run(without_zeroes, runs, self.cluster_size) if self._searches else runs

    async def _find_pieces(self, flight: Flight, moved_max: int) -> Pieces | None:
        """The same in pieces, zeroes left out; None if the source is not that simple."""
        is_whole = flight.parts == [flight.span]  # else what is found need not be copied, and more is looked for
        enough_bytes = moved_max if is_whole else flight.span.length
        pieces = await self._trace_pieces(flight, enough_bytes)
        if pieces is None or not pieces.is_aligned(self.cluster_size):
            return None
        if not is_whole:
            pieces = pieces.within(flight.parts)
        end = pieces.end_of(moved_max)
        if end is None:
            self._reach_further(flight, pieces.total_bytes, moved_max)
        elif self._cut(flight, end, moved_max):
            pieces = pieces.before(flight.span.end)
        if self._searches and pieces.at:
            pieces = await self._offload.run(pieces_without_zeroes, pieces, self.cluster_size)
        return pieces

    async def _plan_pieces(self, flight: Flight, pieces: Pieces) -> Batch | None:
        """`_plan` with next to no work for a cluster; None, nothing held, if the target is not that simple."""
        target = self._target()
        placing = Placing(has_searched=self._searches)
        batch = Batch(flight=flight, runs=[], moved_bytes=pieces.total_bytes, placing=placing)
        has_zeroes = pieces.rest is RunKind.ZERO and batch.moved_bytes < flight.length
        if has_zeroes and await self._known_zero(flight.span) != [flight.span]:
            return None
        if pieces.at:
            steps = await place(pieces, target, placing)
            if steps is None:
                return None
            batch.copied, batch.steps = pieces.spans(), steps
        return batch

    async def _known_zero(self, span: Span) -> list[Span]:
        """Where the target is proven to read as zeroes. Raises and waits as `known_zero`. Checkpoint: no."""
        return await known_zero(self._target(), span)

    async def _trace(self, flight: Flight) -> list[Run]:
        """What the source is made of there. Raises and waits as `plan.trace`. Checkpoint: no."""
        return clip(await trace(self._source(), flight.span, through_backing=True), flight.parts)

    async def _trace_pieces(self, flight: Flight, enough_bytes: int) -> Pieces | None:
        """The same in pieces. Raises and waits as `trace_pieces`. Checkpoint: no."""
        return await trace_pieces(self._source(), flight.span, self.cluster_size, enough_bytes)

    async def _plan(self, flight: Flight, runs: list[Run]) -> Batch:
        """Sort the flight's clusters by how they travel, write the zeroes, and reserve room for the copies."""
        span, target = flight.span, self._target()
        zeroes = [whole for run in runs if run.kind is RunKind.ZERO and (whole := self._whole_clusters(run))]
        rest = without(flight.parts, zeroes)
        placing = Placing(has_searched=self._searches)
        batch = Batch(flight=flight, runs=runs, moved_bytes=sum(part.length for part in rest), placing=placing)
        if zeroes:
            batch.known_zeroes = await self._known_zero(span)
            await zero_runs(target, without(zeroes, batch.known_zeroes))
        if self.compressed is not None:
            batch.packed = rest
            return batch
        opaque = coalesce(
            Span(run.at, run.length).widen(self.cluster_size).intersect(span)
            for run in runs
            if run.kind is RunKind.OPAQUE
        )
        copied = without(rest, opaque)
        if copied and await batch.placing.reserve(target, copied):
            batch.copied, batch.doors = copied, opaque
            batch.steps = pair(clip(runs, copied), batch.placing.placed)
        else:
            batch.doors = rest
        return batch

    async def _discard_source(self, arrived: list[Span]) -> None:
        """Give back what is on the target by now, and durable there: at no time is it on neither side.

        A failure costs space only; a target that cannot be flushed fails the job at its end.
        """
        try:
            if arrived:
                await self._target().flush()
            for span in arrived:
                await self._source().discard(span)
        except (OSError, ImageCorrupt):
            return

    def _land(self, flight: Flight, *, left: list[Span]) -> None:
        """End a flight: what is `left` becomes dirty again, the rest counts as arrived, and waiters go on."""
        for span in left:
            self.dirty.set(span)
        self._flights.remove(flight)
        flight.leave.close()
        flight.landed.set()
        if arrived := flight.length - sum(span.length for span in left):
            self.on_arrived(arrived)

    def _whole_clusters(self, run: Run) -> Span:
        """The clusters that lie in `run` as a whole; the last one of the node may be short."""
        size = self.cluster_size
        start = -(-run.at // size) * size
        end = run.end if run.end == self.length else run.end // size * size
        return Span(start, max(0, end - start))


def copy_cluster_size(target_cluster_size: int | None) -> int:
    """The unit of copying onto a target with such clusters (None: it has none)."""
    return max(CLUSTER_BYTES_MIN, target_cluster_size or 0)


def _ignore(count: int) -> None:
    del count
