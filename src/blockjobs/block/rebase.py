"""Making an overlay independent of its backing image, so that it reads the same on top of another one.

What both images show is found out from their metadata first: the same bytes of the same file need no look, and zeroes
need one on one side only. Workers compare the rest, and what differs is copied like any other copy. Parts of clusters,
and bytes that only a node itself can read, are carried piece by piece.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

from blockjobs.base.buffers import aligned, is_same, is_zero, zeroes
from blockjobs.base.errors import ImageCorrupt, IoFailure
from blockjobs.base.span import Span, coalesce, without
from blockjobs.base.units import MiB
from blockjobs.block.bitmap import DirtyBitmap
from blockjobs.block.compare import LOOK_BYTES_MIN, PIECE_BYTES, PIECES_IN_FLIGHT, fill
from blockjobs.block.copier import BlockCopy, copy_cluster_size
from blockjobs.block.flight import Flight
from blockjobs.block.medium import Medium
from blockjobs.block.plan import Run, RunKind, clip, trace
from blockjobs.block.requests import ZERO_WRITE_BYTES_MAX
from blockjobs.block.zero_runs import zero_runs
from blockjobs.block.zero_search import without_zeroes

if TYPE_CHECKING:
    from blockjobs.block.node import Node

GROUP_BYTES: Final = 16 * MiB
"""So much is compared by a worker at once."""
BATCHES_IN_FLIGHT: Final = 2
"""One is planned while another is moved."""
_LENGTH: Final = attrgetter("length")


async def keep_differences(
    top: "Node", old: "Node | None", new: "Node | None", *, advance: Callable[[int], None] = lambda count: None
) -> None:
    """Write into `top` what it gets from `old` and would not get from `new`.

    Args:
        top: an overlay that the caller may write, on `old`.
        old: its backing node; None if what it lacks reads as zeroes.
        new: the node that is to take the place of `old`; None likewise.
        advance: told how many more bytes of `top` are dealt with.

    Raises:
        IoFailure, ImageCorrupt: something could not be read or written; `top` reads as before.
    Waits: I/O. Checkpoint: no.
    """
    keeper = _Keeper(top, old, new)
    for look in Span(0, top.length).split(LOOK_BYTES_MIN):
        runs = await trace(top, look, through_backing=False)
        await keeper.keep(look, [Span(run.at, run.length) for run in runs if run.kind is RunKind.ABSENT])
        advance(look.length)


class _Pair(NamedTuple):
    """A run that both images store somewhere."""

    at: int
    length: int
    medium: Medium
    medium_at: int
    other: Medium
    other_at: int


_Item = TypeVar("_Item")
_Stored = TypeVar("_Stored", Run, _Pair)


class _Keeper:
    """Keeps differences in whole units of a copy to `top` where both images are plain bytes and zeroes."""

    def __init__(self, top: "Node", old: "Node | None", new: "Node | None") -> None:
        self._top, self._old, self._new = top, old, new
        self._unit = unit = copy_cluster_size(top.cluster_size)
        self._offload = top.graph.offload
        # What is left of a unit where one of the images ends is carried.
        self._end = top.length // unit * unit
        self._copier: BlockCopy | None = None
        if old is not None:
            self._end = min(self._end, old.length // unit * unit)
            self._copier = BlockCopy(
                source=lambda: old,
                target=lambda: top,
                offload=self._offload,
                clock=top.graph.clock,
                cluster_size=unit,
                dirty=DirtyBitmap(self._end, unit),
            )
            self._copier.length = self._end

    async def keep(self, look: Span, absent: list[Span]) -> None:
        """Deal with what `top` does not have in `look`. Raises and waits as `keep_differences`."""
        inside = Span(0, self._end)
        whole = [unit for span in absent if (unit := span.intersect(inside).narrow(self._unit))]
        ours, theirs = await _shown(self._old, look), await _shown(self._new, look)
        opaque = [Span(run.at, run.length) for run in (*ours, *theirs) if run.kind is RunKind.OPAQUE]
        plain = without(whole, coalesce(span.widen(self._unit) for span in opaque))
        differing = await self._differing(clip(ours, plain), clip(theirs, plain))
        if self._copier is None:
            await self._zero(differing)
        elif differing:
            await _copy(self._copier, differing)
        stored = coalesce(Span(run.at, run.length) for run in (*ours, *theirs) if run.kind is not RunKind.ZERO)
        rest = clip([Run(*span, RunKind.DATA) for span in stored], without(absent, plain))
        await self._carry(Span(run.at, run.length) for run in rest)

    async def _differing(self, ours: list[Run], theirs: list[Run]) -> list[Span]:
        """The units in which two descriptions of the same bytes, without OPAQUE runs, differ."""
        alone: list[Run] = []
        pairs: list[_Pair] = []
        for run, other in _both(ours, theirs):
            if run.medium is None or other.medium is None:
                alone += [each for each in (run, other) if each.medium is not None]
            elif run.medium_at != other.medium_at or not run.medium.is_same_as(other.medium):
                pairs.append(_Pair(run.at, run.length, run.medium, run.medium_at, other.medium, other.medium_at))
        found: list[Span] = []

        async def look(work: Callable[[], list[Span]]) -> None:
            try:
                found.extend(await self._offload.run(work))
            except OSError as error:
                raise IoFailure.wrap(error, f"backing images of node '{self._top.name}'") from error

        works = [partial(_not_zero, group, self._unit) for group in _groups(alone)]
        works += [partial(_unequal, group, self._unit) for group in _groups(pairs)]
        await _few_at_once(look, works, self._offload.cores)
        return coalesce(span.widen(self._unit) for span in found)

    async def _carry(self, spans: Iterable[Span]) -> None:
        """Compare and copy through the nodes' doors: one piece is read while another is written."""
        pieces = [piece for span in spans for piece in span.split(PIECE_BYTES)]
        longest = max(map(_LENGTH, pieces), default=0)
        rooms = self._top.graph.rooms

        async def carry(piece: Span) -> None:
            with rooms.room(longest) as ours, rooms.room(longest) as theirs:
                await self._carry_piece(piece, ours[: piece.length], theirs[: piece.length])

        await _few_at_once(carry, pieces, PIECES_IN_FLIGHT)

    async def _carry_piece(self, piece: Span, ours: memoryview, theirs: memoryview) -> None:
        await fill(self._old, piece, ours)
        await fill(self._new, piece, theirs)
        if is_same(ours, theirs):
            return
        parts = Span(0, piece.length).split(self._unit)
        differing = [part for part in parts if not is_same(ours[part.at : part.end], theirs[part.at : part.end])]
        for part in coalesce(differing):
            content = ours[part.at : part.end]
            if is_zero(content):
                await self._zero([part.shifted(piece.at)])
            else:
                await self._top.write(piece.at + part.at, content)

    async def _zero(self, spans: list[Span]) -> None:
        """Let these runs be zeroes, and not only show such as long as there is nothing below (version 2)."""
        if not spans:
            return
        await zero_runs(self._top, spans)
        runs = await trace(self._top, Span.between(spans[0].at, spans[-1].end), through_backing=False)
        for run in clip([run for run in runs if run.kind is RunKind.ABSENT], spans):
            for piece in Span(run.at, run.length).split(ZERO_WRITE_BYTES_MAX):
                await self._top.write(piece.at, zeroes(piece.length))


async def _copy(copier: BlockCopy, spans: list[Span]) -> None:
    """Copy these whole clusters of the copy."""
    for span in spans:
        copier.dirty.set(span)
    lane = asyncio.Lock()

    async def fly(flight: Flight) -> None:
        await copier.move(await copier.prepare(flight), lane=lane)

    while copier.dirty.any():  # a flight that was shortened when the other had nothing left to take
        await _few_at_once(fly, iter(copier.take, None), BATCHES_IN_FLIGHT)


async def _few_at_once(work: Callable[[_Item], Awaitable[None]], items: Iterable[_Item], width: int) -> None:
    """Do `work` for all items, so many at once. A failure shows when none is in flight."""
    failures: list[OSError | ImageCorrupt] = []
    left = iter(items)

    async def do() -> None:
        for item in left:
            try:
                await work(item)
            except (OSError, ImageCorrupt) as error:
                failures.append(error)  # raised below
            if failures:
                return

    async with asyncio.TaskGroup() as group:
        for _ in range(width):
            group.create_task(do())
    if failures:
        raise failures[0]


async def _shown(node: "Node | None", look: Span) -> list[Run]:
    """What a backing image, or none, shows in all of `look`. Raises and waits as `trace`."""
    inside = Span(look.at, 0) if node is None else look.intersect(Span(0, node.length))
    runs = await trace(node, inside, through_backing=True) if node is not None and inside else []
    end = inside.end if inside else look.at
    return [*runs, Run(end, look.end - end, RunKind.ZERO)]


def _both(ours: list[Run], theirs: list[Run]) -> Iterator[tuple[Run, Run]]:
    """Two descriptions of the same bytes, cut so that each run of one has one of the other."""
    others = iter(theirs)
    other = next(others, None)
    for run in ours:
        at = run.at
        while at < run.end:
            assert other is not None and other.at <= at
            end = min(run.end, other.end)
            yield _cut(run, at, end), _cut(other, at, end)
            if end == other.end:
                other = next(others, None)
            at = end


def _cut(run: Run, at: int, end: int) -> Run:
    return Run(at, end - at, run.kind, run.medium, run.medium_at + at - run.at)


def _groups(runs: list[_Stored]) -> Iterator[list[_Stored]]:
    """The same in lists of some megabytes, or of one that is longer."""
    group: list[_Stored] = []
    total_bytes = 0
    for run in runs:
        group.append(run)
        total_bytes += run.length
        if total_bytes >= GROUP_BYTES:
            yield group
            group, total_bytes = [], 0
    if group:
        yield group


def _not_zero(runs: list[Run], unit: int) -> list[Span]:
    """In a worker: where bytes are that are not zero, more or less."""
    return [Span(run.at, run.length) for run in without_zeroes(runs, unit) if run.kind is RunKind.DATA]


def _unequal(pairs: list[_Pair], unit: int) -> list[Span]:
    """In a worker: the units, as far as a run has them, in which the two sides differ."""
    left, right = aligned(PIECE_BYTES), aligned(PIECE_BYTES)
    found: list[Span] = []
    for at, length, medium, medium_at, other, other_at in pairs:
        for piece in Span(at, length).split(PIECE_BYTES):
            ours, theirs = left[: piece.length], right[: piece.length]
            medium.read_into(medium_at + piece.at - at, ours)
            other.read_into(other_at + piece.at - at, theirs)
            if is_same(ours, theirs):
                continue
            for part in piece.split(unit):
                here = slice(part.at - piece.at, part.end - piece.at)
                if not is_same(ours[here], theirs[here]):
                    found.append(part)
    return found
