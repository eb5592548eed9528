"""Copying by ordinary requests to both nodes, for what plain steps cannot move, or when they have failed."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING

from blockjobs.base.errors import ImageCorrupt
from blockjobs.base.span import Span, coalesce
from blockjobs.block.flight import CopyFailed
from blockjobs.block.rooms import Rooms

if TYPE_CHECKING:
    from blockjobs.block.node import Node


async def move_through_doors(
    source: "Node",
    target: "Node",
    spans: list[Span],
    *,
    chunk_bytes_max: int,
    carriers: int,
    rooms: Rooms,
    goes_on: Callable[[], bool] | None = None,
) -> tuple[list[Span], CopyFailed | None]:
    """Copy in chunks.

    Args:
        chunk_bytes_max: of one request.
        carriers: chunks in flight at once.
        rooms: where their buffers come from.
        goes_on: asked after each chunk; once it says no nothing new is begun. None: it always does.

    Returns:
        What did not arrive, and the first failure.
    Waits: for I/O. Checkpoint: no.
    """
    pieces = [chunk for span in spans for chunk in span.split(chunk_bytes_max)]
    longest = max((chunk.length for chunk in pieces), default=0)
    chunks = iter(pieces)
    left: list[Span] = []
    failures: list[CopyFailed] = []

    async def carry() -> None:
        with rooms.room(longest) as room:
            await carry_through(room)

    async def carry_through(room: memoryview) -> None:
        for chunk in chunks:
            reading = True
            try:
                await source.read_into(chunk.at, room[: chunk.length])
                reading = False
                await target.write(chunk.at, room[: chunk.length])
            except (OSError, ImageCorrupt) as error:
                left.append(chunk)
                failures.append(CopyFailed(error, reading=reading))
            if failures or (goes_on is not None and not goes_on()):
                return  # as QEMU: what is in flight ends, nothing new starts

    await side_by_side(carry() for _ in range(carriers))
    return coalesce([*left, *chunks]), failures[0] if failures else None


async def side_by_side(works: Iterable[Awaitable[None]]) -> None:
    """Run `works` side by side until all are done. They do not raise."""

    async def run(work: Awaitable[None]) -> None:
        await work

    async with asyncio.TaskGroup() as group:
        for work in works:
            group.create_task(run(work))
