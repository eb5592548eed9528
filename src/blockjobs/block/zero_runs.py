"""Many runs made zero in few steps: what a copy asks for whose target holds something already."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from blockjobs.base.buffers import zeroes
from blockjobs.base.errors import IoFailure
from blockjobs.base.span import Span
from blockjobs.block.columns import Columnar
from blockjobs.block.driver import FormatDriver, ProtocolDriver
from blockjobs.block.medium import Medium
from blockjobs.block.requests import ZERO_WRITE_BYTES_MAX, write_format
from blockjobs.block.vocabulary import NO_LIMITS, Watch, ZeroMode

if TYPE_CHECKING:
    from blockjobs.block.node import Node


async def zero_runs(node: "Node", spans: Sequence[Span], *, mode: ZeroMode = ZeroMode.UNMAP) -> None:
    """As `Node.zero` for each of these runs, which ascend; the node counts them as so many requests.

    Args:
        node: a drain of it waits for the caller, who has told it so.

    Raises:
        IoFailure, ImageCorrupt: any part of them may be zeroed.
    Waits: for overlapping requests, then I/O. Checkpoint: no.
    """
    if len(spans) < 2 or not await _zero_together(node, spans, mode):
        for span in spans:
            await node.zero(span, mode=mode)


async def _zero_together(node: "Node", spans: Sequence[Span], mode: ZeroMode) -> bool:
    """Do it, or nothing if somebody on the way wants to see each of them."""
    target = node.route(Watch.ZERO)
    doors = (node,) if target is node else (node, target)
    if any(each.gate is not None for each in doors) or not _is_simple(target):
        return False
    hull = Span.between(spans[0].at, spans[-1].end)
    for each in doors:
        each.check_write(*hull)
        mode = mode if each.settings.unmap else ZeroMode.KEEP
    began_ns = node.graph.clock.now_ns()
    failed = True
    try:
        await _zero(target, spans, hull, mode)
        failed = False
    finally:
        total_bytes = sum(span.length for span in spans)
        for each in doors:
            each.tally.ended("zero", hull.end, total_bytes, began_ns=began_ns, failed=failed, count=len(spans))
            for span in spans if each.bitmaps else ():
                each.record(span)
    return True


def _is_simple(target: "Node") -> bool:
    driver = target.driver
    if isinstance(driver, ProtocolDriver):
        return driver.medium is not None and driver.limits == NO_LIMITS
    return isinstance(driver, Columnar) or (isinstance(driver, FormatDriver) and driver.shows_holes)


async def _zero(target: "Node", spans: Sequence[Span], hull: Span, mode: ZeroMode) -> None:
    driver = target.driver
    if isinstance(driver, FormatDriver):
        async with target.tracker.exclusive(hull.widen(driver.write_align)):
            if not isinstance(driver, Columnar):
                reservation = await driver.reserve(hull)  # of raw, which keeps nothing for it
                [(_, _, child, child_at)] = reservation.placements
                shifted = [span.shifted(child_at - hull.at) for span in spans]
                await zero_runs(target.children[child], shifted, mode=mode)
                return
            for part in await driver.zero_many(spans, mode):
                for piece in part.split(ZERO_WRITE_BYTES_MAX):
                    await write_format(target, driver, piece.at, zeroes(piece.length))
        return
    assert isinstance(driver, ProtocolDriver) and driver.medium is not None
    try:
        await target.graph.offload.run(_zero_all, driver.medium, spans, mode is ZeroMode.UNMAP)
    except OSError as error:
        raise IoFailure.wrap(error, f"node '{target.name}' at {hull.at}+{hull.length}") from error


def _zero_all(medium: Medium, spans: Sequence[Span], unmap: bool) -> None:
    for span in spans:
        medium.zero(span.at, span.length, unmap=unmap)
