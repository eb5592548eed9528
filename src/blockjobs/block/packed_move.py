"""Carrying out what of a batch is to be compressed: in groups that workers take side by side."""

from typing import TYPE_CHECKING

from blockjobs.base.errors import ImageCorrupt
from blockjobs.block.compress_batch import CompressedWriter, Packed, Piece
from blockjobs.block.doors import side_by_side
from blockjobs.block.flight import Batch, CopyFailed
from blockjobs.block.plan import Run, RunKind, clip

if TYPE_CHECKING:
    from blockjobs.base.span import Span
    from blockjobs.block.node import Node


async def move_packed(batch: Batch, writer: CompressedWriter, source: "Node", target: "Node") -> CopyFailed | None:
    """Compress and store the batch's `packed` runs.

    Returns:
        Why nothing of it counts as arrived; None if all does.

    Waits: for reads, workers and the store. Checkpoint: no.
    """
    groups = [group for span in batch.packed for group in span.split(writer.group_bytes)]
    packed: list[list[Packed]] = [[] for _ in groups]
    failures: list[CopyFailed] = []

    async def compress(index: int, group: "Span") -> None:
        try:
            packed[index] = await writer.pack(group.at, await _pieces(clip(batch.runs, [group]), source))
        except (OSError, ImageCorrupt) as error:
            failures.append(CopyFailed(error, reading=True))

    await side_by_side(compress(index, group) for index, group in enumerate(groups))
    if failures:
        return failures[0]
    try:
        clusters = [cluster for group in packed for cluster in group]
        await writer.store(target, clusters, batch.known_zeroes)
    except (OSError, ImageCorrupt) as error:
        return CopyFailed(error, reading=False)
    return None


async def _pieces(runs: list[Run], source: "Node") -> list[Piece]:
    """What a worker needs to read `runs`; opaque ones are read here, through the node."""
    pieces: list[Piece] = []
    for run in runs:
        if run.kind is RunKind.OPAQUE:
            pieces.append(Piece(run.length, content=await source.read(run.at, run.length)))
        else:
            pieces.append(Piece(run.length, run.medium, run.medium_at))
    return pieces
