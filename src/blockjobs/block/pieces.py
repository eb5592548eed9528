"""The frequent copy, planned with next to no work for a cluster: pieces of data between zeroes, onto nothing.

A disk with scattered clusters has thousands of runs, and a tuple for each of them at each stage of planning costs as
much as copying them. So these are columns of integers from the table that maps them to the call that copies them.
Everything else is planned run by run (`plan.py`).
"""

from bisect import bisect_left, bisect_right
from functools import reduce
from itertools import accumulate, chain, repeat
from operator import or_
from typing import TYPE_CHECKING, NamedTuple

from blockjobs.base.span import Span
from blockjobs.block.columns import Columnar
from blockjobs.block.driver import FormatDriver
from blockjobs.block.execute import Copy, Gather, Step
from blockjobs.block.medium import HOLES_SOUGHT_BYTES_MIN, Medium, is_mostly_holes
from blockjobs.block.pace import RUNS_MAX
from blockjobs.block.plan import Placing, Run, RunKind, medium_of
from blockjobs.block.vocabulary import Watch

if TYPE_CHECKING:
    from blockjobs.block.node import Node


class Pieces(NamedTuple):
    """Runs of a node, ascending, whose bytes are plain bytes of one medium; all else that was asked for is zero.

    Args:
        medium: where the bytes are.
        at: where each run begins on the node, in bytes.
        length: its bytes.
        medium_at: where it begins on the medium.
    """

    medium: Medium
    at: list[int]
    length: list[int]
    medium_at: list[int]

    @classmethod
    def of(cls, runs: list[Run], unit: int) -> "Pieces | None":
        """The same as `runs`; None if they are anything else than such pieces, in whole units, and zeroes."""
        data = [run for run in runs if run.kind is RunKind.DATA]
        medium = data[0].medium if data else None
        if medium is None or any(
            run.medium is not medium if run.kind is RunKind.DATA else run.kind is not RunKind.ZERO for run in runs
        ):
            return None
        at, length, _, _, medium_at = zip(*data, strict=True)
        pieces = cls(medium, list(at), list(length), list(medium_at))
        return pieces if pieces.is_aligned(unit) else None

    @property
    def total_bytes(self) -> int:
        """What is to be transferred."""
        return sum(self.length)

    def is_aligned(self, unit: int) -> bool:
        """Whether the runs are whole units, of a power of two bytes, of the node."""
        return reduce(or_, chain(self.at, self.length), 0) % unit == 0

    def end_of(self, moved_max: int) -> int | None:
        """Where on the node the first `moved_max` bytes, or RUNS_MAX runs, end; None if there are no more."""
        totals = list(accumulate(self.length))
        index = bisect_right(totals, moved_max)
        if index >= RUNS_MAX and len(totals) > RUNS_MAX:
            return self.at[RUNS_MAX]
        if index == len(totals):
            return None
        return self.at[index] + moved_max - (totals[index - 1] if index else 0)

    def before(self, end: int) -> "Pieces":
        """What lies before `end` on the node."""
        count = bisect_left(self.at, end)
        at, length, medium_at = self.at[:count], self.length[:count], self.medium_at[:count]
        if count:
            length[-1] = min(length[-1], end - at[-1])
        return Pieces(self.medium, at, length, medium_at)

    def spans(self) -> list[Span]:
        """The runs on the node."""
        return list(map(Span, self.at, self.length))


async def trace_pieces(node: "Node", span: Span) -> Pieces | None:
    """As `plan.trace`, through all backing nodes, for an image that has none and keeps plain bytes in one file.

    Returns:
        None if it is not like that; whoever asked asks `trace` then.

    Raises:
        IoFailure, ImageCorrupt: metadata could not be read.
    Waits: metadata reads. Checkpoint: no.
    """
    node = node.route(Watch.READ)
    driver = node.driver
    if not isinstance(driver, FormatDriver) or not isinstance(driver, Columnar) or "backing" in node.children:
        return None
    if driver.shows_holes or driver.encipherment is not None:
        return None
    medium, align = medium_of(node.children["file"])
    if medium is None:
        return None
    columns = await driver.pieces(span)
    if columns is None:
        return None
    pieces = Pieces(medium, *columns)
    if reduce(or_, chain(*columns), 0) % align:
        return None
    if max(pieces.length, default=0) >= HOLES_SOUGHT_BYTES_MIN and is_mostly_holes(medium):
        return None  # holes in the file are looked for there
    return pieces


async def place(pieces: Pieces, target: "Node", placing: Placing) -> list[Step] | None:
    """Find room for the pieces on a target that has none of them, and say what is to be done.

    Args:
        pieces: one at least, in whole allocation units of the target.
        placing: new; it holds what has been reserved.

    Returns:
        None if the target is not that simple; nothing is held then.

    Raises:
        IoFailure, ImageCorrupt: no space, or tables unreadable; nothing is held then.
    Waits: for earlier requests on the same bytes, and metadata I/O. Checkpoint: no.
    """
    goes = await placing.reserve_pieces(target, pieces.at, pieces.length)
    if goes is None:
        return None
    medium, first_at = goes
    source, at, length, medium_at = pieces
    if first_at is not None:
        return [Gather(source, list(zip(medium_at, length, strict=True)), medium, first_at)]
    return list(map(Copy, repeat(source), medium_at, repeat(medium), at, length))
