"""Making an overlay independent of its backing image, so that it reads the same on top of another one."""

import asyncio
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from blockjobs.base.buffers import aligned, is_same
from blockjobs.base.errors import ImageCorrupt
from blockjobs.base.span import Span, coalesce
from blockjobs.block.compare import LOOK_BYTES_MIN, PIECE_BYTES, PIECES_IN_FLIGHT, fill, stored
from blockjobs.block.plan import RunKind, trace

if TYPE_CHECKING:
    from blockjobs.block.node import Node

COMPARED_BYTES_MIN = 64 << 10
"""Smaller clusters are compared, and kept, several at a time."""


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
    Waits: I/O, of at most 3 pieces of 2 MiB at once. Checkpoint: no.
    """
    for look in Span(0, top.length).split(LOOK_BYTES_MIN):
        runs = await trace(top, look, through_backing=False)
        absent = [Span(run.at, run.length) for run in runs if run.kind is RunKind.ABSENT]
        pieces = iter([piece for missing in absent for piece in await _spans_to_compare(old, new, missing)])
        await _keep_all(top, old, new, pieces)
        advance(look.length)


async def _keep_all(top: "Node", old: "Node | None", new: "Node | None", pieces: Iterator[Span]) -> None:
    """Carry some pieces at once: one is read while another is written. A failure shows when none is in flight."""
    failures: list[OSError | ImageCorrupt] = []

    async def carry() -> None:
        buffers = aligned(PIECE_BYTES), aligned(PIECE_BYTES)
        for piece in pieces:
            try:
                await _keep(top, old, new, piece, buffers)
            except (OSError, ImageCorrupt) as error:
                failures.append(error)  # raised below
            if failures:
                return

    async with asyncio.TaskGroup() as group:
        for _ in range(PIECES_IN_FLIGHT):
            group.create_task(carry())
    if failures:
        raise failures[0]


async def _spans_to_compare(old: "Node | None", new: "Node | None", missing: Span) -> list[Span]:
    """The parts of `missing` that one of the two does not give as zeroes, in pieces."""
    found = [span for node in (old, new) if node is not None for span in await stored(node, missing)]
    return [piece for span in coalesce(found) for piece in span.split(PIECE_BYTES)]


async def _keep(
    top: "Node", old: "Node | None", new: "Node | None", piece: Span, buffers: tuple[memoryview, memoryview]
) -> None:
    ours, theirs = (buffer[: piece.length] for buffer in buffers)
    await fill(old, piece, ours)
    await fill(new, piece, theirs)
    if is_same(ours, theirs):
        return
    step = max(COMPARED_BYTES_MIN, top.cluster_size or 0)
    parts = Span(0, piece.length).split(step)
    differing = [part for part in parts if not is_same(ours[part.at : part.end], theirs[part.at : part.end])]
    for part in coalesce(differing):
        await top.write(piece.at + part.at, ours[part.at : part.end])
