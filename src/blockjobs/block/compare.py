"""Comparing what two nodes read as, without reading what both say is zero."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Final

from blockjobs.base.buffers import aligned, is_same, zeroes
from blockjobs.base.span import Span, coalesce
from blockjobs.base.units import GiB, KiB, MiB
from blockjobs.block.plan import RunKind, trace

if TYPE_CHECKING:
    from blockjobs.block.node import Node

LOOK_BYTES_MIN: Final = 1 * GiB
LOOK_BYTES_MAX: Final = 1024 * GiB
FEW_SPANS: Final = 256
"""A look that found no more than this many stored runs lets the next one cover twice as much."""
PIECE_BYTES: Final = 2 * MiB
PIECES_IN_FLIGHT: Final = 3
GAP_BYTES_MAX: Final = 512 * KiB
"""Zeroes between two stored runs that are cheaper to make up than to go round."""


async def first_difference(
    one: "Node", other: "Node", *, advance: Callable[[int], None] = lambda count: None
) -> int | None:
    """Find the first byte that differs; whatever lies past the end of the shorter node counts as zero.

    Args:
        one, other: nodes that the caller may read, and that nobody writes meanwhile.
        advance: told how many more bytes of the longer node are dealt with.

    Returns:
        Its offset, None if there is none.

    Raises:
        IoFailure, ImageCorrupt: one of the nodes could not be read.
    Waits: metadata reads and reads of at most 3 pieces of 2 MiB at once. Checkpoint: no.
    """
    search = _Search(one, other, advance)
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(PIECES_IN_FLIGHT):
                group.create_task(search.work())
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return search.found


class _Search:
    """Workers take pieces in ascending order, so once one has found a difference, only pieces before it matter."""

    def __init__(self, one: "Node", other: "Node", advance: Callable[[int], None]) -> None:
        self.found: int | None = None
        self._one, self._other, self._advance = one, other, advance
        self._pieces = self._spans_to_read()
        self._taking = asyncio.Lock()

    async def work(self) -> None:
        """Compare piece after piece."""
        buffers = aligned(PIECE_BYTES), aligned(PIECE_BYTES)
        while (piece := await self._next()) is not None:
            left, right = (buffer[: piece.length] for buffer in buffers)
            await fill(self._one, piece, left)
            await fill(self._other, piece, right)
            if not is_same(left, right):
                at = piece.at + _mismatch(left, right)
                self.found = at if self.found is None else min(at, self.found)
            self._advance(piece.length)

    async def _next(self) -> Span | None:
        async with self._taking:
            if self.found is not None:
                return None
            return await anext(self._pieces, None)

    async def _spans_to_read(self) -> AsyncIterator[Span]:
        end = max(self._one.length, self._other.length)
        at, look_bytes = 0, LOOK_BYTES_MIN
        while at < end:
            look = Span(at, min(look_bytes, end - at))
            found = coalesce([*await stored(self._one, look), *await stored(self._other, look)])
            spans = _without_small_gaps(found)
            self._advance(look.length - sum(span.length for span in spans))
            for span in spans:
                for piece in span.split(PIECE_BYTES):
                    yield piece
            at = look.end
            look_bytes = min(look_bytes * 2, LOOK_BYTES_MAX) if len(found) <= FEW_SPANS else LOOK_BYTES_MIN


async def stored(node: "Node", look: Span) -> list[Span]:
    """The parts of `look` that are not known to read as zeroes. Waits: metadata reads. Checkpoint: no."""
    inside = look.intersect(Span(0, node.length))
    if not inside:
        return []
    runs = await trace(node, inside, through_backing=True)
    return [Span(run.at, run.length) for run in runs if run.kind is not RunKind.ZERO]


def _without_small_gaps(spans: list[Span]) -> list[Span]:
    joined: list[Span] = []
    for span in spans:
        if joined and span.at - joined[-1].end <= GAP_BYTES_MAX:
            joined[-1] = Span.between(joined[-1].at, span.end)
        else:
            joined.append(span)
    return joined


async def fill(node: "Node | None", piece: Span, view: memoryview) -> None:
    """Read a piece; what lies past the end of the node, or of none, is zero. Waits: a read. Checkpoint: no."""
    inside = 0 if node is None else max(0, min(piece.length, node.length - piece.at))
    if node is not None and inside:
        await node.read_into(piece.at, view[:inside])
    if inside < piece.length:
        view[inside:] = zeroes(piece.length - inside)


def _mismatch(left: memoryview, right: memoryview) -> int:
    """Index of the first byte that differs; there is one."""
    start, end = 0, len(left)
    while end - start > 1:
        middle = (start + end) // 2
        if is_same(left[start:middle], right[start:middle]):
            start = middle
        else:
            end = middle
    return start
