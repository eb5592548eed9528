"""Planning a copy: where the bytes of both nodes are, and which plain steps move them (design §1.6).

`trace` follows a span of the source down to media. `place` finds host space for a span of the target. `pair` joins the
two into the steps that a worker executes. Whatever a plain step cannot do (a filter that must see the bytes, compressed
clusters, a protocol without a medium) is OPAQUE and goes through the nodes' ordinary doors instead.
"""

from collections.abc import Awaitable, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack
from enum import Enum, auto
from functools import reduce
from itertools import chain, groupby
from operator import attrgetter, or_
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

from blockjobs.base.span import Span
from blockjobs.base.units import MiB
from blockjobs.block.columns import Columnar
from blockjobs.block.driver import FilterDriver, FormatDriver, ProtocolDriver
from blockjobs.block.encipherment import Encipherment
from blockjobs.block.execute import Copy, Step, Zero
from blockjobs.block.medium import HOLES_SOUGHT_BYTES_MIN, Medium, is_mostly_holes
from blockjobs.block.vocabulary import Kind, Placement, Reservation, Segment, Watch

if TYPE_CHECKING:
    from blockjobs.block.node import Node


GAPS_APART_BYTES_MIN: Final = 1 * MiB
"""Gaps of an image that are closer together are asked for at once: a question costs about as much as 16 clusters."""


class RunKind(Enum):
    """What a copy can do with a run."""

    DATA = auto()
    """Plain bytes on a medium."""
    ZERO = auto()
    """Reads as zeroes for sure."""
    ABSENT = auto()
    """Not in the node's own layer; only when backing nodes are not followed."""
    OPAQUE = auto()
    """Bytes, but only the node itself can read or write them."""


class Run(NamedTuple):
    """Bytes of a node that are all of one kind; `medium` and `medium_at` are only set for DATA."""

    at: int
    length: int
    kind: RunKind
    medium: Medium | None = None
    medium_at: int = 0

    @property
    def end(self) -> int:
        """The first byte after the run."""
        return self.at + self.length


async def trace(node: "Node", span: Span, *, through_backing: bool, base: "Node | None" = None) -> list[Run]:
    """Find out what `span` of `node` is made of, down to media.

    Args:
        through_backing: look into backing nodes; otherwise what they provide is ABSENT.
        base: a node of the chain; what it and those below provide is ABSENT.

    Returns:
        Runs in order, without gaps, neighbours joined. What lies past the end of a shorter backing node is ZERO.

    Raises:
        IoFailure, ImageCorrupt: metadata could not be read.
    Waits: metadata reads, and one look at the holes of a file per span. Checkpoint: no.
    """
    tracer = _Tracer(through_backing, None if base is None else base.storage, {})
    await tracer.follow(node, span, span.at, watched=False)
    return tracer.runs


class _Tracer:
    """One walk down the graph. Positions `at` are those of the node where the walk began.

    No tickets are taken: whoever copies keeps writers away from these bytes, and what a writer beside them moves leaves
    the old place as it is.
    """

    def __init__(self, through_backing: bool, base: "Node | None", sparse: dict[Medium, bool]) -> None:
        self.runs: list[Run] = []
        self._through_backing = through_backing
        self._base = base
        self._sparse = sparse

    async def follow(self, node: "Node", span: Span, at: int, *, watched: bool) -> None:
        """Append what `span` of `node` is; `watched`: a filter above must see its bytes."""
        node = node.route(Watch.READ)
        driver = node.driver
        if isinstance(driver, FilterDriver):
            await self.follow(node.children[driver.filtered], span, at, watched=True)
        elif isinstance(driver, FormatDriver):
            await self._follow_format(node, driver, span, at, watched=watched)
        elif isinstance(driver, ProtocolDriver):
            await self._follow_protocol(driver, span, at, watched=watched)
        else:
            self._add(at, span.length, RunKind.OPAQUE)

    async def _follow_format(self, node: "Node", driver: FormatDriver, span: Span, at: int, *, watched: bool) -> None:
        shift = at - span.at
        skips_file = not (driver.shows_holes or watched)
        absent = RunKind.ZERO if self._through_backing else RunKind.ABSENT
        has_backing = self._through_backing and "backing" in node.children
        if has_backing and node.children["backing"].storage is self._base:
            absent, has_backing = RunKind.ABSENT, False
        # The format knows what is allocated: asking the file for holes costs a hop, so only where it may be worth it.
        cipher = driver.encipherment
        media = {name: medium_of(child) for name, child in node.children.items()} if skips_file else {}
        segments = await driver.resolve(span)
        below = iter(await self._below(node, segments, shift, watched=watched) if has_backing else ())
        for segment_at, length, kind, child_name, child_at, _ in segments:
            here = segment_at + shift
            if kind is Kind.DATA:
                medium, align = media.get(child_name, _UNREACHABLE)
                may_be_hole = False
                if medium is not None and cipher is not None:
                    medium, align = cipher.placed(segment_at, child_at).over(medium), max(align, cipher.unit)
                elif medium is not None:
                    may_be_hole = length >= HOLES_SOUGHT_BYTES_MIN and self._is_sparse(medium)
                if medium is not None and (child_at | length) % align == 0 and not may_be_hole:
                    self._add(here, length, RunKind.DATA, medium, child_at)
                elif cipher is not None:
                    self._add(here, length, RunKind.OPAQUE)
                else:
                    await self.follow(node.children[child_name], Span(child_at, length), here, watched=watched)
            elif kind is Kind.ZERO:
                self._add(here, length, RunKind.ZERO)
            elif kind is Kind.BACKING:
                if has_backing:
                    self._take(below, here + length)
                else:
                    self._add(here, length, absent)
            else:
                self._add(here, length, RunKind.OPAQUE)

    async def _below(self, node: "Node", segments: Sequence[Segment], shift: int, *, watched: bool) -> list[Run]:
        """What the backing node of `node` provides for the segments that are not its own.

        The backing node is asked for many of them at once and the answer cut up: a question for each would be one for
        each cluster and layer of a long chain.
        """
        gaps = [Span(segment.at, segment.length) for segment in segments if segment.kind is Kind.BACKING]
        if not gaps:
            return []
        backing = node.children["backing"]
        tracer = _Tracer(self._through_backing, self._base, self._sparse)
        for hull in _hulls(gaps):
            inside = hull.intersect(Span(0, backing.length))
            if inside:
                await tracer.follow(backing, inside, inside.at + shift, watched=watched)
            tracer._add(inside.end + shift, hull.length - inside.length, RunKind.ZERO)
        return clip(tracer.runs, [Span(gap.at + shift, gap.length) for gap in gaps])

    def _take(self, below: Iterator[Run], end: int) -> None:
        """Append what comes from below, which is cut at the borders of this image's segments, up to `end`."""
        for at, length, kind, medium, medium_at in below:
            self._add(at, length, kind, medium, medium_at)
            if at + length >= end:
                return

    def _is_sparse(self, medium: Medium) -> bool:
        if medium not in self._sparse:
            self._sparse[medium] = is_mostly_holes(medium)
        return self._sparse[medium]

    async def _follow_protocol(self, driver: ProtocolDriver, span: Span, at: int, *, watched: bool) -> None:
        shift = at - span.at
        inside = span.intersect(Span(0, driver.length))
        for segment in await driver.status(inside) if inside else ():
            here = segment.at + shift
            if segment.kind is Kind.ZERO:
                self._add(here, segment.length, RunKind.ZERO)
            elif driver.medium is None or watched or not _fits(driver, segment.at, segment.length):
                self._add(here, segment.length, RunKind.OPAQUE)
            else:
                self._add(here, segment.length, RunKind.DATA, driver.medium, segment.at)
        self._add(at + inside.length, span.length - inside.length, RunKind.ZERO)

    def _add(self, at: int, length: int, kind: RunKind, medium: Medium | None = None, medium_at: int = 0) -> None:
        if not length:
            return
        runs = self.runs
        if runs and runs[-1].kind is kind and runs[-1].end == at:
            last_at, last_length, _, last_medium, last_medium_at = runs[-1]
            if kind is not RunKind.DATA or (last_medium is medium and last_medium_at + last_length == medium_at):
                runs[-1] = Run(last_at, last_length + length, kind, medium, last_medium_at)
                return
        runs.append(Run(at, length, kind, medium, medium_at))


def _hulls(gaps: Sequence[Span]) -> list[Span]:
    """Spans that hold all the gaps, and not much in between; ascending."""
    hulls = [gaps[0]]
    for gap in gaps[1:]:
        if gap.at - hulls[-1].end < GAPS_APART_BYTES_MIN:
            hulls[-1] = Span.between(hulls[-1].at, gap.end)
        else:
            hulls.append(gap)
    return hulls


_UNREACHABLE: Final[tuple[Medium | None, int]] = (None, 1)


def medium_of(node: "Node") -> tuple[Medium | None, int]:
    """The medium that plain calls may use in place of a node, if any, and what they must be multiples of."""
    driver = node.driver
    if not isinstance(driver, ProtocolDriver) or driver.medium is None:
        return _UNREACHABLE
    return driver.medium, driver.limits.request_align


def _fits(driver: ProtocolDriver, at: int, length: int) -> bool:
    """Whether the run needs no padding for direct I/O."""
    return (at | length) % driver.limits.request_align == 0


_CHILD: Final = attrgetter("child")
_Result = TypeVar("_Result")


class Placed(NamedTuple):
    """Where bytes of the target go."""

    at: int
    length: int
    medium: Medium
    medium_at: int


class Landing(NamedTuple):
    """Where many pieces go: from `medium_at` on, one after another, or as far from each other as on the node."""

    medium: Medium
    medium_at: int
    in_a_row: bool


class Placing:
    """Host space for one batch, reserved in the formats on the way down and not yet visible.

    Use it as a context: leaving without `publish` gives the space back.

    Attributes:
        has_searched: whoever copies has left out stored zeroes, so that nodes need not detect them.
    """

    def __init__(self, *, has_searched: bool = False) -> None:
        self.has_searched = has_searched
        self.placed: list[Placed] = []
        self._reservations: list[tuple[FormatDriver, Reservation]] = []
        self._changing: list[tuple[Node, list[Span]]] = []
        self._tickets = AsyncExitStack()

    async def reserve(self, node: "Node", spans: list[Span]) -> bool:
        """Find a place for every span, holding the nodes' tickets from now on.

        Args:
            node: the target.
            spans: ascending; whole allocation units of the target, or up to its end.

        Returns:
            False if plain steps cannot write there; nothing is held then.

        Raises:
            IoFailure: no space or tables unreadable; nothing is held then.
        Waits: for earlier requests on the same bytes, and metadata I/O. Checkpoint: no.
        """
        return await self._all_or_nothing(self._descend(node, spans))

    async def reserve_in(self, node: "Node", driver: FormatDriver, spans: list[Span]) -> bool:
        """As `reserve`, for a format whose tickets the caller holds, and who changes nothing that the node shows."""
        return await self._all_or_nothing(self._descend_format(node, driver, spans))

    async def reserve_pieces(self, node: "Node", at: list[int], length: list[int]) -> Landing | None:
        """As `reserve`, for many runs of a node that has none of them, described by columns.

        Returns:
            None if it is not that simple: nothing is held then.
        """
        return await self._all_or_nothing(self._descend_pieces(node, at, length))

    async def _descend_pieces(self, node: "Node", at: list[int], length: list[int]) -> Landing | None:
        node = node.route(Watch.WRITE)
        driver, hull = node.driver, Span.between(at[0], at[-1] + length[-1])
        places = reduce(or_, chain(at, length))
        if isinstance(driver, ProtocolDriver):
            medium = self._medium_for(node, places)
            node.tally.reached(hull.end)
            return None if medium is None else Landing(medium, hull.at, False)
        in_a_row = isinstance(driver, Columnar)
        if not isinstance(driver, FormatDriver) or not (in_a_row or driver.shows_holes):
            return None
        if driver.encipherment is not None or not self._may_pass(node):
            return None
        node.tally.reached(hull.end)
        await self._tickets.enter_async_context(node.tracker.exclusive(hull.widen(driver.write_align)))
        reservation = await (
            driver.reserve_in_one(at, length) if isinstance(driver, Columnar) else driver.reserve(hull)
        )
        if reservation is None:
            return None
        self._reservations.append((driver, reservation))
        [(_, total, child, child_at)] = reservation.placements
        below = node.children[child].route(Watch.WRITE)
        # Of a raw node each place is (child_at - hull.at) further on.
        medium = self._medium_for(below, child_at | (reduce(or_, length) if in_a_row else places | hull.at))
        if medium is None:
            return None
        below.tally.reached(child_at + total)
        return Landing(medium, child_at, in_a_row)

    def _may_pass(self, node: "Node") -> bool:
        """Whether the node has no part of its own in a write."""
        return not node.bitmaps and (self.has_searched or not node.detects_zeroes)

    def _medium_for(self, node: "Node", places: int) -> Medium | None:
        """Where plain calls may write in place of `node`; `places`: all positions and lengths, or-ed."""
        medium, align = medium_of(node)
        return medium if self._may_pass(node) and places % align == 0 else None

    async def _all_or_nothing(self, descent: Awaitable[_Result]) -> _Result:
        try:
            fits = await descent
        except BaseException:
            await self.release()
            raise
        if not fits:
            await self.release()
        return fits

    async def publish(self) -> None:
        """Make it visible after the bytes are in place, inner formats first, and let go of the tickets.

        Raises:
            IoFailure, ImageCorrupt: metadata could not be written; what was not published is given back.
        """
        try:
            while self._reservations:
                driver, reservation = self._reservations.pop()
                await driver.publish(reservation)
        finally:
            await self.release()

    async def release(self) -> None:
        """Give back what is not published, and the tickets. Harmless after `publish`. Never raises."""
        while self._reservations:
            driver, reservation = self._reservations.pop()
            await driver.release(reservation)
        while self._changing:
            node, spans = self._changing.pop()
            for span in spans:
                node.record(span)
        await self._tickets.aclose()

    async def _descend(self, node: "Node", spans: list[Span]) -> bool:
        """`reserve` for the part of the graph from `node` on."""
        node = node.route(Watch.WRITE)
        driver = node.driver
        if node.detects_zeroes and not self.has_searched:
            return False
        if node.bitmaps:
            self._changing.append((node, spans))
        node.tally.reached(spans[-1].end)
        if isinstance(driver, ProtocolDriver):
            return self._land(driver, spans)
        if not isinstance(driver, FormatDriver):
            return False
        hull = Span.between(spans[0].at, spans[-1].end).widen(driver.write_align)
        await self._tickets.enter_async_context(node.tracker.exclusive(hull))
        return await self._descend_format(node, driver, spans)

    async def _descend_format(self, node: "Node", driver: FormatDriver, spans: list[Span]) -> bool:
        """The same below a format, whose ticket is held."""
        reservations = await driver.reserve_many(spans)
        self._reservations.extend((driver, reservation) for reservation in reservations)
        if any(reservation.fills for reservation in reservations):
            return False
        for reservation in reservations:
            for name, group in groupby(reservation.placements, key=_CHILD):
                if not await self._place(node.children[name], list(group), driver.encipherment):
                    return False
        return True

    async def _place(self, child: "Node", placements: list[Placement], encipherment: Encipherment | None) -> bool:
        """Go on with placements in a child."""
        below = child.route(Watch.WRITE)
        medium, align = medium_of(below)
        if medium is None or (below.detects_zeroes and not self.has_searched) or below.bitmaps:
            if encipherment is not None:
                return False
            for placement in placements:
                if not await self._place_below(child, placement):
                    return False
            return True
        if encipherment is None:
            self.placed.extend([Placed(at, length, medium, child_at) for at, length, _, child_at in placements])
        else:
            align = max(align, encipherment.unit)
            for at, length, _, child_at in placements:
                self.placed.append(Placed(at, length, encipherment.placed(at, child_at).over(medium), child_at))
        below.tally.reached(max([child_at + length for _, length, _, child_at in placements]))
        return align == 1 or not any((child_at | length) % align for _, length, _, child_at in placements)

    async def _place_below(self, child: "Node", placement: Placement) -> bool:
        at, length, _, child_at = placement
        first = len(self.placed)
        if not await self._descend(child, [Span(child_at, length)]):
            return False
        self.placed[first:] = [place._replace(at=place.at + at - child_at) for place in self.placed[first:]]
        return True

    def _land(self, driver: ProtocolDriver, spans: list[Span]) -> bool:
        if driver.medium is None or not all(_fits(driver, span.at, span.length) for span in spans):
            return False
        self.placed.extend(Placed(span.at, span.length, driver.medium, span.at) for span in spans)
        return True


def clip(runs: list[Run], spans: Sequence[Span]) -> list[Run]:
    """The parts of `runs` that lie in `spans`; both ascending."""
    parts: list[Run] = []
    index, count = 0, len(runs)
    for start, span_length in spans:
        end = start + span_length
        while index < count:
            run = runs[index]
            at, length, kind, medium, medium_at = run
            stop = at + length
            if at >= end:
                break
            if start <= at and stop <= end:
                parts.append(run)
            elif stop > start:
                cut = max(at, start)
                parts.append(Run(cut, min(stop, end) - cut, kind, medium, medium_at + cut - at))
            if stop > end:
                break  # it may reach into the next span too
            index += 1
    return parts


def pair(runs: Iterable[Run], placed: list[Placed]) -> list[Step]:
    """Join runs and places of the same bytes into steps, as few and as long as possible.

    Args:
        runs: of DATA, and of ZERO in between; ascending.
        placed: places, ascending; they cover at least the runs.
    """
    steps: list[Step] = []
    last: Copy | None = None
    for source, source_at, medium, medium_at, length in _overlaps(runs, placed):
        if source is None:
            last = None
            steps.append(Zero(medium, medium_at, length))
        elif (
            last is not None
            and last.source is source
            and last.target is medium
            and last.source_at + last.length == source_at
            and last.target_at + last.length == medium_at
        ):
            last = steps[-1] = Copy(source, last.source_at, medium, last.target_at, last.length + length)
        else:
            last = Copy(source, source_at, medium, medium_at, length)
            steps.append(last)
    return steps


def _overlaps(runs: Iterable[Run], placed: list[Placed]) -> Iterator[tuple[Medium | None, int, Medium, int, int]]:
    """What lies in one run and one place: source (None for zeroes), position, target, position, length."""
    if not placed:
        return
    places = iter(placed)
    place_at, place_length, medium, medium_at = next(places)
    for at, run_length, _, source, source_at in runs:
        left = run_length
        while left:
            while place_at + place_length <= at:
                place_at, place_length, medium, medium_at = next(places)
            assert place_at <= at, (at, placed)
            length = min(left, place_at + place_length - at)
            yield source, source_at, medium, medium_at + at - place_at, length
            at, source_at, left = at + length, source_at + length, left - length
