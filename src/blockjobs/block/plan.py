"""Planning a copy: where the bytes of both nodes are, and which plain steps move them (design §1.6).

`trace` follows a span of the source down to media; `Placing` (placing.py) finds host space for spans of the target.
`pair` joins the two into the steps that a worker executes. Whatever a plain step cannot do (a filter that must see the
bytes, compressed clusters, a protocol without a medium) is OPAQUE and goes through the nodes' ordinary doors instead.
"""

from collections.abc import Iterable, Iterator, Sequence
from enum import Enum, auto
from typing import TYPE_CHECKING, Final, NamedTuple

from blockjobs.base.span import Span
from blockjobs.base.units import MiB
from blockjobs.block.columns import Unpacked
from blockjobs.block.driver import FilterDriver, FormatDriver, ProtocolDriver
from blockjobs.block.execute import Copy, Step, Zero
from blockjobs.block.medium import HOLES_SOUGHT_BYTES_MIN, Medium, is_mostly_holes
from blockjobs.block.placing import UNREACHABLE, Placed, fits, medium_of
from blockjobs.block.vocabulary import Kind, Segment, Watch

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
        unpacked: Medium | None = None
        below = iter(await self._below(node, segments, shift, watched=watched) if has_backing else ())
        for segment in segments:
            segment_at, length, kind, child_name, child_at, _ = segment
            here = segment_at + shift
            if kind is Kind.DATA:
                medium, align = media.get(child_name, UNREACHABLE)
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
                medium, align = media.get(child_name, UNREACHABLE)
                if isinstance(driver, Unpacked) and medium is not None and align == 1:
                    if unpacked is None:
                        unpacked = driver.unpacked([each for each in segments if each.kind is Kind.SPECIAL], medium)
                    self._add(here, length, RunKind.DATA, unpacked, segment_at)
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
            elif driver.medium is None or watched or not fits(driver, segment.at, segment.length):
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
