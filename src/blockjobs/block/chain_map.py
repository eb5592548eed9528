"""Where each run of a node is stored: in which image of its chain, and at which offset of which file."""

from bisect import bisect_right
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Final, NamedTuple

from blockjobs.base.span import Span
from blockjobs.base.units import GiB
from blockjobs.block.driver import FilterDriver, FormatDriver, ProtocolDriver
from blockjobs.block.sparse import shows_holes
from blockjobs.block.vocabulary import Kind, Segment

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

    def is_followed_by(self, other: "MapRun") -> bool:
        """Whether `other` only continues this run."""
        if self.at + self.length != other.at or self[2:7] != other[2:7] or self.filename != other.filename:
            return False
        return other.offset == (None if self.offset is None else self.offset + self.length)


async def map_chain(node: "Node") -> AsyncIterator[MapRun]:
    """All of `node` in order and without gaps, neighbours joined; whole chain, data of files looked into for holes.

    Raises:
        IoFailure, ImageCorrupt: metadata could not be read.
    Waits: metadata reads. Checkpoint: no.
    """
    walk = _Walk()
    last: MapRun | None = None
    at, look_bytes = 0, LOOK_BYTES_MIN
    while at < node.length:
        look = Span(at, min(look_bytes, node.length - at))
        runs = await walk.follow(node, look, 0)
        for run in runs:
            if last is not None and last.is_followed_by(run):
                last = last._replace(length=last.length + run.length)
                continue
            if last is not None:
                yield last
            last = run
        at = look.end
        look_bytes = min(look_bytes * 2, LOOK_BYTES_MAX) if len(runs) <= FEW_RUNS else LOOK_BYTES_MIN
    if last is not None:
        yield last


class _Walk:
    """Follows chains; remembers the holes of each file, since an image's clusters lie in its file in any order."""

    def __init__(self) -> None:
        self._files: dict[str, list[Segment]] = {}
        self._filenames: dict[str, str] = {}
        self._looks: dict[str, bool] = {}

    async def follow(self, node: "Node", span: Span, depth: int) -> list[MapRun]:
        """What `span` of `node` is; offsets of the result are those of `node`."""
        node = node.storage
        runs: list[MapRun] = []
        for segment in await node.status(span):
            here = Span(segment.at, segment.length)
            match segment.kind:
                case Kind.ZERO:
                    offset = here.at if isinstance(node.driver, ProtocolDriver) else None
                    runs.append(self._run(node, here, depth, zero=True, offset=offset))
                case Kind.BACKING:
                    runs.extend(await self._follow_backing(node, here, depth))
                case Kind.SPECIAL:
                    runs.append(self._run(node, here, depth, is_data=True, compressed=True))
                case Kind.DATA:
                    runs.extend(await self._follow_data(node, segment, depth))
        return runs

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

    async def _parts_of_file(self, file: "Node", place: Span) -> list[Segment]:
        if file.name not in self._files:
            self._files[file.name] = await file.status(Span(0, file.length)) if file.length else []
        known = self._files[file.name]
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
        filename = self._filenames.get(node.name)
        if filename is None:
            filename = self._filenames[node.name] = node.filename
        return MapRun(span.at, span.length, depth, present, zero, is_data, compressed, offset, filename)
