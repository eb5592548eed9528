"""Copying up: what a node reads from its backing images becomes its own (copy-on-read, stream; spec/jobs.md §1).

Only clusters that the node does not hold at that moment are written, and while they are being copied no writer reaches
them: a guest's write comes before or after, and stays. Readers are not held up, since what they see does not change.
Two populations of the same clusters wait for each other.
"""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from blockjobs.base.buffers import is_zero, zeroes
from blockjobs.base.clock import Clock
from blockjobs.base.errors import ImageCorrupt
from blockjobs.base.offload import Offload
from blockjobs.base.span import Span, coalesce, subtract
from blockjobs.base.units import KiB, MiB
from blockjobs.block import requests
from blockjobs.block.driver import FormatDriver
from blockjobs.block.execute import Step
from blockjobs.block.layers import trace_pieces
from blockjobs.block.pace import RUNS_MAX, Pace
from blockjobs.block.pieces import Pieces, steps_to
from blockjobs.block.placing import Placing
from blockjobs.block.plain_move import move_plainly
from blockjobs.block.plan import Run, RunKind, clip, pair, trace
from blockjobs.block.tracker import Ticket
from blockjobs.block.vocabulary import Kind, ZeroMode

if TYPE_CHECKING:
    from blockjobs.block.node import Node

CHUNK_BYTES_MAX: Final = 512 * KiB
"""Longest request through the nodes' ordinary doors, and what an error is about (spec/jobs.md §1, Run)."""
ZERO_WRITE_BYTES_MAX: Final = 1 * MiB
"""Zeroes that an old image must store as bytes go in pieces of this size."""


class Missed(NamedTuple):
    """A run that could not be populated, and why."""

    span: Span
    error: OSError


@dataclass(slots=True, kw_only=True)
class Population:
    """A planned piece of work; nobody writes to its clusters until `Populator.move` or `abandon`.

    Attributes:
        span: what is dealt with once it has been moved.
        moved_bytes: what will be transferred; what is there already, and zeroes, are free.
        left: what `move` was stopped from doing.
    """

    span: Span
    held: AsyncExitStack
    tickets: list[Ticket] = field(default_factory=list)
    moved_bytes: int = 0
    zeroed: list[Span] = field(default_factory=list)
    copied: list[Span] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    placing: Placing = field(default_factory=Placing)
    doors: list[Span] = field(default_factory=list)
    left: list[Span] = field(default_factory=list)

    def end_at(self, end: int) -> None:
        """Deal with nothing from `end` on, where writers may go now; that is behind the first unit."""
        self.span = Span.between(self.span.at, max(self.span.at, min(self.span.end, end)))
        for ticket in self.tickets:
            ticket.shorten(end)


class Populator:
    """Populates one node.

    Coroutines here end by themselves and must not be cancelled: they own reservations.

    Attributes:
        pace: how much to look at and to move at once.
        keeps_zeroes: zeroes of the images above `bottom` are put into the node. They must be if something below shows
            through later; if nothing will, what is absent reads as zeroes anyway.
    """

    def __init__(
        self,
        *,
        node: "Callable[[], Node]",
        bottom: "Node | None",
        keeps_zeroes: bool,
        offload: Offload,
        clock: Clock,
    ) -> None:
        """See the class.

        Args:
            node: what to populate, looked up at each use; filters above its image are passed by.
            bottom: the last image to copy from (not a filter); None for all there are.
        """
        self._node, self._bottom, self.keeps_zeroes = node, bottom, keeps_zeroes
        self._offload, self._clock = offload, clock
        self.pace = Pace()

    async def plan(self, span: Span, *, moved_max: int | None = None) -> Population:
        """Find out what must be done for the first part of `span`, and keep writers away from it.

        Args:
            span: inside the node, not empty; the result's `span` begins where this one does.
            moved_max: transfer about so many bytes at most; the pace's own choice if None.

        Raises:
            IoFailure, ImageCorrupt: metadata could not be read, or there is no space; nothing is held.
        Waits: for writes and other populations of the same clusters, and metadata I/O. Checkpoint: no.
        """
        storage = self._node().storage
        driver = storage.driver
        population = Population(span=span, held=AsyncExitStack())
        if not isinstance(driver, FormatDriver) or "backing" not in storage.children:
            return population
        wide = span.widen(driver.write_align)
        try:
            population.held.enter_context(storage.in_flight.request("populate", span.at, span.length))
            for ticket in (storage.populating.exclusive(wide), storage.tracker.shared(wide)):
                population.tickets.append(await population.held.enter_async_context(ticket))
            wide = wide.intersect(Span(0, storage.length))
            await self._find_work(storage, driver, wide, population, moved_max or self.pace.batch_bytes)
        except BaseException:
            await self.abandon(population)
            raise
        return population

    async def move(
        self,
        population: Population,
        *,
        lane: AbstractAsyncContextManager[object] | None = None,
        goes_on: Callable[[], bool] | None = None,
    ) -> list[Missed]:
        """Do what was planned and let writers go on.

        When plain steps fail, their runs are tried again through the nodes' doors, in chunks: what can be saved is.

        Args:
            lane: entered while the worker moves plain steps: two batches into one file are no faster than one.
            goes_on: see `move_plainly`; also asked between chunks. What is not begun then is in `population.left`.

        Returns:
            The chunks that did not arrive; after the first failure nothing new is begun. The node shows what it did.
        Waits: for I/O. Checkpoint: no.
        """
        storage = self._node().storage
        driver = storage.driver
        began_ns = self._clock.now_ns()
        try:
            doors = population.doors
            if population.copied:
                began_ns, failed, left = await move_plainly(
                    population.steps,
                    population.copied,
                    population.placing,
                    unit=driver.write_align if isinstance(driver, FormatDriver) else 1,
                    offload=self._offload,
                    clock=self._clock,
                    lane=lane,
                    goes_on=goes_on,
                )
                population.left.extend(left)
                if failed:
                    doors = coalesce([*doors, *population.copied])
            missed: list[Missed] = []
            assert isinstance(driver, FormatDriver) or not (population.zeroed or doors)
            if isinstance(driver, FormatDriver):
                work = [(part, self._zero) for part in population.zeroed]
                work += [(chunk, self._copy_up) for part in doors for chunk in _chunks(part, driver.write_align)]
                for number, (part, do) in enumerate(work):
                    if population.left or (number and goes_on is not None and not goes_on()):
                        population.left.append(part)
                        continue
                    if missed:  # what is left goes back to whoever asked, to be tried or not
                        missed.append(Missed(part, missed[0].error))
                        continue
                    try:
                        await do(storage, driver, part)
                    except (OSError, ImageCorrupt) as error:
                        missed.append(Missed(part, requests.as_failure(error, storage, part)))
        finally:
            await self.abandon(population)
        if not missed:
            moved_bytes = population.moved_bytes - sum(part.length for part in population.left)
            self.pace.learn(max(0, moved_bytes), self._clock.now_ns() - began_ns)
        return missed

    async def abandon(self, population: Population) -> None:
        """Give back what the plan holds. Harmless after `move`."""
        await population.placing.release()
        await population.held.aclose()

    async def populate(self, span: Span) -> None:
        """Do all of `span` now.

        Raises:
            IoFailure, ImageCorrupt: the first failure; any part may be populated.
        Waits: as `plan` and `move`. Checkpoint: no.
        """
        while span:
            population = await self.plan(span)
            if missed := await self.move(population):
                raise missed[0].error
            span = Span.between(min(population.span.end, span.end), span.end)

    async def _find_work(
        self, storage: "Node", driver: FormatDriver, wide: Span, population: Population, moved_max: int
    ) -> None:
        absent = [
            Span(segment.at, segment.length)
            for segment in await driver.resolve(wide)
            if segment.kind is Kind.BACKING and segment.length
        ]
        if not absent:
            self.pace.found(wide.length, 0, moved_max)
            return
        pieces = await self._find_pieces(storage, driver, absent, moved_max)
        if pieces is not None and await self._plan_pieces(storage, driver, wide, pieces, population, moved_max):
            return
        runs = clip(await self._behind(storage, Span.between(absent[0].at, absent[-1].end)), absent)
        end = self._cut(runs, wide, moved_max, driver.write_align)
        if end < wide.end:
            population.end_at(end)
            below_end = [Span(0, end)]
            runs, absent = clip(runs, below_end), [part for span in absent if (part := span.intersect(Span(0, end)))]
        await self._sort(storage, driver, absent, runs, population)

    async def _find_pieces(
        self, storage: "Node", driver: FormatDriver, absent: list[Span], moved_max: int
    ) -> Pieces | None:
        """What to copy where all that is absent gets plain bytes, or nothing; None if it is not that simple."""
        if self.keeps_zeroes:
            return None
        backing, hull = storage.children["backing"], Span.between(absent[0].at, absent[-1].end)
        inside = hull.intersect(Span(0, backing.length))
        if not inside:
            return None
        is_whole = absent == [hull]  # else what is found need not be copied, and more is looked for
        enough_bytes = moved_max if is_whole else hull.length
        pieces = await trace_pieces(backing, inside, driver.write_align, enough_bytes)
        if pieces is None or not pieces.is_aligned(driver.write_align):
            return None
        return pieces if is_whole else pieces.within(absent)

    async def _plan_pieces(
        self,
        storage: "Node",
        driver: FormatDriver,
        wide: Span,
        pieces: Pieces,
        population: Population,
        moved_max: int,
    ) -> bool:
        """Plan with next to no work for a cluster; False, nothing held, if the image is not that simple."""
        unit, end = driver.write_align, pieces.end_of(moved_max)
        if end is not None:
            end = min(wide.end, max(end // unit * unit, wide.at + unit))
            pieces = pieces.before(end)
        if pieces.at:
            landing = await population.placing.reserve_pieces_in(storage, driver, pieces.at, pieces.length)
            if landing is None:
                return False
            population.copied, population.steps = pieces.spans(), steps_to(pieces, landing)
        population.moved_bytes = pieces.total_bytes
        self.pace.found((end or wide.end) - wide.at, pieces.total_bytes, moved_max)
        if end is not None:
            population.end_at(end)
        return True

    async def _behind(self, storage: "Node", hull: Span) -> list[Run]:
        """What the backing images have there; behind a shorter one are zeroes, whatever is further below."""
        backing = storage.children["backing"]
        if storage is self._bottom:
            return [Run(hull.at, hull.length, RunKind.ABSENT)]
        base = self._bottom.children.get("backing") if self._bottom is not None else None
        inside = hull.intersect(Span(0, backing.length))
        runs = await trace(backing, inside, through_backing=True, base=base) if inside else []
        if inside.length < hull.length:
            runs.append(Run(hull.at + inside.length, hull.length - inside.length, RunKind.ZERO))
        return runs

    def _cut(self, runs: list[Run], wide: Span, moved_max: int, unit: int) -> int:
        """Where to stop, so that not more than `moved_max` bytes, or RUNS_MAX runs, are transferred at once."""
        moved = 0
        for index, run in enumerate(runs):
            if run.kind in _BYTES:
                moved += run.length
            if moved > moved_max or index >= RUNS_MAX:
                cut = min(run.end, run.end - max(0, moved - moved_max)) // unit * unit
                end = min(wide.end, max(cut, wide.at + unit))
                self.pace.found(end - wide.at, min(moved, moved_max), moved_max)
                return end
        self.pace.found(wide.length, moved, moved_max)
        return wide.end

    async def _sort(
        self, storage: "Node", driver: FormatDriver, absent: list[Span], runs: list[Run], population: Population
    ) -> None:
        """Decide how each absent cluster gets its bytes: by plain steps, by a zero entry, by doors, or not at all."""
        unit, length = driver.write_align, storage.length
        has_bytes = coalesce(Span(run.at, run.length).widen(unit) for run in runs if run.kind in _BYTES)
        mixed: list[Span] = []
        if self.keeps_zeroes:
            nothing = [Span(run.at, run.length) for run in runs if run.kind is RunKind.ZERO]
            bare = _outside(nothing, has_bytes)
            whole = [part for span in bare if (part := _whole_units(span, unit, length))]
            population.zeroed = _inside(whole, absent)
            mixed = [part.widen(unit) for part in _outside(bare, whole)]
            # A cluster in part held by the images above `bottom` must show what is below it in the rest.
            below = [Span(run.at, run.length).widen(unit) for run in runs if run.kind is RunKind.ABSENT]
            mixed += _inside(coalesce(below), has_bytes) if has_bytes else []
        mixed += [Span(run.at, run.length).widen(unit) for run in runs if run.kind is RunKind.OPAQUE]
        doors = _inside(coalesce(mixed), absent)
        wanted = _outside(_inside(has_bytes, absent), doors)
        # Two reservations in one cluster would not know of each other: parts (of subclusters) go one after another.
        copied = [part for span in wanted if (part := _whole_units(span, unit, length))]
        doors = coalesce([*doors, *_outside(wanted, copied)])
        population.moved_bytes = sum(span.length for span in (*doors, *copied))
        if copied and await population.placing.reserve_in(storage, driver, copied):
            population.copied, population.doors = copied, doors
            gaps = [run._replace(kind=RunKind.ZERO) if run.kind is RunKind.ABSENT else run for run in runs]
            population.steps = pair(clip(gaps, copied), population.placing.placed)
        else:
            population.doors = coalesce([*doors, *copied])

    async def _copy_up(self, storage: "Node", driver: FormatDriver, span: Span) -> None:
        backing = storage.children["backing"]
        inside = span.intersect(Span(0, backing.length))
        content = bytearray(span.length)
        if inside:
            await backing.read_into(inside.at, memoryview(content)[: inside.length])
        if not is_zero(content):
            await requests.write_format(storage, driver, span.at, content)
        elif self.keeps_zeroes:
            await self._zero(storage, driver, span)

    async def _zero(self, storage: "Node", driver: FormatDriver, span: Span) -> None:
        for part in await driver.zero(span, ZeroMode.UNMAP):
            for piece in part.split(ZERO_WRITE_BYTES_MAX):
                await requests.write_format(storage, driver, piece.at, zeroes(piece.length))


_BYTES: Final = (RunKind.DATA, RunKind.OPAQUE)
"""What must be transferred; a tuple, since the members of an enumeration are slow to hash."""


def _chunks(span: Span, unit: int) -> list[Span]:
    return list(span.split(max(CHUNK_BYTES_MAX // unit, 1) * unit))


def _whole_units(span: Span, unit: int, length: int) -> Span:
    """The units that lie in `span` as a whole; the last one of the node may be short."""
    if (span.at | span.length) % unit == 0:
        return span
    start = -(-span.at // unit) * unit
    end = span.end if span.end == length else span.end // unit * unit
    return Span(start, max(0, end - start))


def _inside(spans: list[Span], frames: list[Span]) -> list[Span]:
    """The parts of `spans` that lie in `frames`; both ascending and disjoint."""
    if len(frames) == 1 and spans and frames[0].contains(Span.between(spans[0].at, spans[-1].end)):
        return spans
    return [Span(run.at, run.length) for run in clip([Run(s.at, s.length, RunKind.DATA) for s in spans], frames)]


def _outside(spans: list[Span], holes: list[Span]) -> list[Span]:
    """The parts of `spans` that lie in none of `holes`; both ascending and disjoint."""
    if not spans or not holes:
        return spans
    hull = Span.between(spans[0].at, max(spans[-1].end, holes[-1].end))
    return _inside(spans, subtract(hull, holes))
