"""Where each run of a node is stored: in which image of its chain, and at which offset of which file."""

from bisect import bisect_right
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Final, NamedTuple

from blockjobs.base.span import Span
from blockjobs.base.units import GiB
from blockjobs.block.driver import FilterDriver, FormatDriver, ProtocolDriver
from blockjobs.block.sparse import shows_holes
from blockjobs.block.vocabulary import PLACED, Kind, Segment

if TYPE_CHECKING:
    from blockjobs.block.node import Node

LOOK_BYTES_MIN: Final = 1 * GiB
LOOK_BYTES_MAX: Final = 1024 * GiB
FEW_RUNS: Final = 256
"""A look that found no more than this many runs lets the next one cover twice as much."""


class MapRun(NamedTuple):
    """A run of one status, with the members of QAPI's `MapEntry`.

    Attributes:
        at, length: in bytes of the node asked.
        depth: 0 for the node asked, 1 for its backing node, ...
        present: some image of the chain says something about it.
        zero: reads as zeroes for sure.
        is_data: bytes are stored for it.
        compressed: stored compressed: there is no offset at which it lies as it is.
        offset: where it is in the file as it is; None if nowhere in particular.
        filename: of the file that `offset` counts in, or of the image of that depth.
    """

    at: int
    length: int
    depth: int
    present: bool
    zero: bool
    is_data: bool
    compressed: bool
    offset: int | None
    filename: str


async def map_chain(node: "Node") -> AsyncIterator[MapRun]:
    """All of `node` in order and without gaps, neighbours joined; whole chain, data of files looked into for holes.

    Raises:
        IoFailure, ImageCorrupt: metadata could not be read.
    Waits: metadata reads. Checkpoint: no.
    """
    async for batch in map_in_batches(node):
        for run in batch:
            yield run


async def map_in_batches(node: "Node") -> AsyncIterator[list[MapRun]]:
    """The same, many runs at a time, for whoever has work for each. Raises and waits as `map_chain`."""
    walk = _Walk()
    left: list[MapRun] = []
    at, look_bytes = 0, LOOK_BYTES_MIN
    while at < node.length:
        look = Span(at, min(look_bytes, node.length - at))
        runs = await walk.follow(node, look, 0)
        joined = _joined(left, runs)
        left = [joined.pop()]
        if joined:
            yield joined
        at = look.end
        look_bytes = min(look_bytes * 2, LOOK_BYTES_MAX) if len(runs) <= FEW_RUNS else LOOK_BYTES_MIN
    if left:
        yield left


def _joined(before: list[MapRun], runs: list[MapRun]) -> list[MapRun]:
    """Both lists as one, in which runs that only continue the one before are part of it."""
    joined = before
    at = length = depth = -1
    is_present = is_zero = is_data = is_compressed = False
    offset: int | None = None
    filename = ""
    if before:
        at, length, depth, is_present, is_zero, is_data, is_compressed, offset, filename = before[-1]
    for run in runs:
        if (
            run[5] is is_data
            and run[7] == (None if offset is None else offset + length)
            and run[2:7] == (depth, is_present, is_zero, is_data, is_compressed)
            and run[8] == filename
            and at + length == run[0]
        ):
            length += run[1]
            joined[-1] = MapRun(at, length, depth, is_present, is_zero, is_data, is_compressed, offset, filename)
            continue
        joined.append(run)
        at, length, depth, is_present, is_zero, is_data, is_compressed, offset, filename = run
    return joined


class _PlainData(NamedTuple):
    """How data of a format is found that lies in a file as it is.

    Attributes:
        filename: of that file.
        starts, ends, are_zero: its parts, if they are looked at: data and holes by turns; else empty.
        is_data_too: whether bytes of a hole count as stored.
    """

    filename: str
    starts: list[int]
    ends: list[int]
    are_zero: list[bool]
    is_data_too: bool


class _Walk:
    """Follows chains; remembers the holes of each file, since an image's clusters lie in its file in any order."""

    def __init__(self) -> None:
        self._files: dict[str, list[Segment]] = {}
        self._filenames: dict[str, str] = {}
        self._looks: dict[str, bool] = {}
        self._plain: dict[tuple[str, str], _PlainData | None] = {}

    async def follow(self, node: "Node", span: Span, depth: int) -> list[MapRun]:
        """What `span` of `node` is; offsets of the result are those of `node`."""
        node = node.storage
        runs: list[MapRun] = []
        absent = self._name_of(node) if node.backing is None else None
        child, plain = None, None
        # A scattered image has a million of these, nearly all of them plain data or nothing at all.
        for segment in await node.status(span):
            at, length, kind, edge, child_at, token = segment
            if kind is Kind.BACKING:
                if absent is None:
                    runs.extend(await self._follow_backing(node, Span(at, length), depth))
                else:
                    runs.append(MapRun(at, length, depth, False, True, False, False, None, absent))
            elif kind is Kind.DATA:
                if edge != child:
                    child, plain = edge, await self._plain_data(node, edge)
                run = None if plain is None else _plain_run(plain, segment, depth)
                if run is None:
                    runs.extend(await self._follow_data(node, segment, depth))
                else:
                    runs.append(run)
            elif kind is Kind.ZERO:
                where, offset = node, at if isinstance(node.driver, ProtocolDriver) else None
                if token is PLACED:
                    where, offset = node.children[edge].storage, child_at
                runs.append(self._run(where, Span(at, length), depth, zero=True, offset=offset))
            else:
                runs.append(self._run(node, Span(at, length), depth, is_data=True, compressed=True))
        return runs

    async def _plain_data(self, node: "Node", edge: str) -> _PlainData | None:
        """How data in a child is found; None if it must be followed run by run."""
        key = node.name, edge
        if key not in self._plain:
            self._plain[key] = await self._look_at_child(node, edge)
        return self._plain[key]

    async def _look_at_child(self, node: "Node", edge: str) -> _PlainData | None:
        driver, child = node.driver, node.children.get(edge)
        if not isinstance(driver, FormatDriver) or driver.encipherment is not None or child is None:
            return None
        child = child.storage
        if not isinstance(child.driver, ProtocolDriver):
            return None
        parts = await self._known_parts(child) if await self._looks_for_holes(node) else []
        starts, ends = [part.at for part in parts], [part.at + part.length for part in parts]
        are_zero = [part.kind is Kind.ZERO for part in parts]
        return _PlainData(self._name_of(child), starts, ends, are_zero, not driver.shows_holes)

    async def _follow_backing(self, node: "Node", span: Span, depth: int) -> list[MapRun]:
        backing = node.backing
        inside = Span(span.at, 0) if backing is None else span.intersect(Span(0, backing.length))
        runs = await self.follow(backing, inside, depth + 1) if backing is not None and inside else []
        beyond = span.length - inside.length
        if beyond:
            runs.append(self._run(node, Span(span.end - beyond, beyond), depth, present=False, zero=True))
        return runs

    async def _follow_data(self, node: "Node", segment: Segment, depth: int) -> list[MapRun]:
        if isinstance(node.driver, FormatDriver) and node.driver.encipherment is not None:
            return [self._run(node, Span(segment.at, segment.length), depth, is_data=True)]
        child, at = node.children.get(segment.child, node), segment.child_at
        while isinstance(child.driver, FilterDriver):
            child = child.storage
        shift = segment.at - at
        place = Span(at, segment.length)
        looks = await self._looks_for_holes(node)
        if isinstance(child.driver, FormatDriver):
            below = await self.follow(child, place, depth)
            return [
                run._replace(at=run.at + shift, depth=depth, zero=run.zero and looks, is_data=run.is_data or not looks)
                for run in below
            ]
        if not looks:
            return [self._run(child, Span(segment.at, segment.length), depth, is_data=True, offset=at)]
        is_raw = isinstance(node.driver, FormatDriver) and node.driver.shows_holes
        return [
            self._run(
                child,
                Span(part.at + shift, part.length),
                depth,
                zero=part.kind is Kind.ZERO,
                is_data=part.kind is not Kind.ZERO or not is_raw,
                offset=part.at,
            )
            for part in await self._parts_of_file(child, place)
        ]

    async def _looks_for_holes(self, node: "Node") -> bool:
        if node.name not in self._looks:
            self._looks[node.name] = await shows_holes(node)
        return self._looks[node.name]

    async def _known_parts(self, file: "Node") -> list[Segment]:
        if file.name not in self._files:
            self._files[file.name] = await file.status(Span(0, file.length)) if file.length else []
        return self._files[file.name]

    async def _parts_of_file(self, file: "Node", place: Span) -> list[Segment]:
        known = await self._known_parts(file)
        parts = []
        at = place.at
        index = max(0, bisect_right(known, at, key=lambda segment: segment.at) - 1)
        while at < place.end and index < len(known):
            end = min(place.end, known[index].at + known[index].length)
            if end > at:
                parts.append(Segment(at, end - at, known[index].kind))
                at = end
            index += 1
        if at < place.end:
            parts.append(Segment(at, place.end - at, Kind.ZERO))
        return parts

    def _run(
        self,
        node: "Node",
        span: Span,
        depth: int,
        *,
        present: bool = True,
        zero: bool = False,
        is_data: bool = False,
        compressed: bool = False,
        offset: int | None = None,
    ) -> MapRun:
        filename = self._name_of(node)
        return MapRun(span.at, span.length, depth, present, zero, is_data, compressed, offset, filename)

    def _name_of(self, node: "Node") -> str:
        filename = self._filenames.get(node.name)
        if filename is None:
            filename = self._filenames[node.name] = node.filename
        return filename


def _plain_run(plain: _PlainData, segment: Segment, depth: int) -> MapRun | None:
    """A run of plain data; None if it lies in several parts of its file, or behind them."""
    at, length, _, _, place, _ = segment
    if not plain.starts:
        return MapRun(at, length, depth, True, False, True, False, place, plain.filename)
    index = bisect_right(plain.starts, place) - 1
    if index < 0 or place + length > plain.ends[index]:
        return None
    is_zero = plain.are_zero[index]
    is_data = plain.is_data_too or not is_zero
    return MapRun(at, length, depth, True, is_zero, is_data, False, place, plain.filename)
