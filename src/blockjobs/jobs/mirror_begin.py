"""How a mirror begins: make the target zero if that is cheap, and mark what is to be copied (spec/jobs.md §3, Run)."""

from typing import Final

from blockjobs.base.span import Span, without
from blockjobs.base.units import GiB
from blockjobs.block.bitmap import DirtyBitmap
from blockjobs.block.driver import FilterDriver
from blockjobs.block.known_zero import known_zero
from blockjobs.block.layers import trace_pieces
from blockjobs.block.mirror_copy import MirrorCopy
from blockjobs.block.node import Node
from blockjobs.block.plan import RunKind, trace
from blockjobs.block.vocabulary import ZeroMode
from blockjobs.jobs.backup_options import MirrorSyncMode
from blockjobs.lifecycle.context import JobContext
from blockjobs.lifecycle.error_policy import Side

LOOK_BYTES: Final = 1 * GiB
"""How much one look covers; a checkpoint follows."""


async def mark_what_to_copy(
    ctx: JobContext, copy: MirrorCopy, source: Node, target: Node, sync: MirrorSyncMode, *, is_zero: bool
) -> None:
    """Fill the map.

    Args:
        is_zero: the target reads as zeroes already.

    Raises:
        OSError: a side failed and its policy says `report`.
        JobCancelled: the job must stop.
    Checkpoint: yes. Waits: for I/O on both sides.
    """
    if sync is MirrorSyncMode.NONE or not copy.length:
        return
    is_full = copy.base is None and (sync is MirrorSyncMode.FULL or source.backing is None)
    if is_full:
        if not is_zero:
            if not can_unmap(target):
                copy.dirty.set_all()
                return
            await _make_zero(ctx, target)
        copy.zeroed = DirtyBitmap(copy.length, copy.dirty.granularity)
        copy.zeroed.set_all()
    skipped = (RunKind.ZERO, RunKind.ABSENT) if is_full else (RunKind.ABSENT,)
    for part in Span(0, copy.length).split(LOOK_BYTES):
        await ctx.checkpoint()

        async def look(part: Span = part) -> None:
            through = is_full or copy.base is not None
            pieces = None
            if through:
                pieces = await trace_pieces(source, part, copy.dirty.granularity, part.length, copy.base)
            if pieces is not None:
                copy.dirty.set_all_of(pieces.spans())
                return
            runs = await trace(source, part, through_backing=through, base=copy.base)
            copy.dirty.set_all_of([Span(run.at, run.length) for run in runs if run.kind not in skipped])

        await ctx.attempt(look, side=Side.SOURCE)


async def _make_zero(ctx: JobContext, target: Node) -> None:
    for part in Span(0, target.length).split(LOOK_BYTES):
        await ctx.checkpoint()

        async def erase(part: Span = part) -> None:
            for rest in without([part], await known_zero(target, part)):
                await target.zero(rest, mode=ZeroMode.UNMAP)

        await ctx.attempt(erase, side=Side.TARGET)


def can_unmap(node: Node) -> bool:
    """Whether zeroing `node` frees its space: it and what it is stored in were opened with discard=unmap."""
    while node.settings.unmap:
        driver = node.driver
        if isinstance(driver, FilterDriver):
            node = node.children[driver.filtered]
        elif node.driver_name == "raw":
            node = node.children["file"]
        else:
            return node.driver_name in ("file", "host_device", "qcow2", "nbd")
    return False
