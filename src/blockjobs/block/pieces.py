"""The frequent copy, planned with next to no work for a cluster: pieces of data between zeroes, onto nothing.

A disk with scattered clusters has thousands of runs, and a tuple for each of them at each stage of planning costs as
much as copying them. So these are columns of integers from the table that maps them to the call that copies them.
Those of a chain of images are found image by image (`layers.py`). Everything else is planned run by run (`plan.py`).
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from functools import reduce
from itertools import accumulate, chain, count, repeat
from operator import or_
from typing import TYPE_CHECKING, NamedTuple

from blockjobs.base.span import Span
from blockjobs.block.execute import Gather, Patch, Scatter, Step
from blockjobs.block.medium import NEVER_AT, Medium
from blockjobs.block.pace import RUNS_MAX
from blockjobs.block.placing import Landing, Placing
from blockjobs.block.plan import Run, RunKind

if TYPE_CHECKING:
    from blockjobs.block.node import Node


class Pieces(NamedTuple):
    """Runs of a node, ascending, whose bytes are plain bytes of a medium; all else that was asked for is zero.

    Args:
        medium: where the bytes are; of several media, any.
        at: where each run begins on the node, in bytes.
        length: its bytes.
        medium_at: where it begins on the medium.
        rest: what all else is, if not ZERO: ABSENT, because a base below provides it.
        media: of each run, if there are several.
    """

    medium: Medium
    at: list[int]
    length: list[int]
    medium_at: list[int]
    rest: RunKind = RunKind.ZERO
    media: list[Medium] | None = None

    @property
    def columns(self) -> tuple[list[int], list[int], list[int]]:
        """Place, length and place on the medium."""
        return self[1:4]

    @property
    def rows(self) -> Iterator[tuple[int, int, int, Medium]]:
        """Of each run the place, the length, the place on its medium, and that."""
        return zip(*self.columns, repeat(self.medium) if self.media is None else self.media, strict=False)

    def with_rows(self, rows: Iterable[tuple[int, int, int, Medium]]) -> "Pieces":
        """The same with other runs, ascending: their places, lengths, places on a medium, and media."""
        columns = list(zip(*rows, strict=True))
        if not columns:
            return Pieces(self.medium, [], [], [], self.rest)
        at, length, medium_at, media = map(list, columns)
        is_one = media.count(media[0]) == len(media)
        return Pieces(media[0], at, length, medium_at, self.rest, None if is_one else media)

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
        return Pieces(self.medium, at, length, medium_at, self.rest, self.media and self.media[:count])

    def within(self, parts: list[Span]) -> "Pieces":
        """What lies in `parts`, which are ascending."""
        found: list[tuple[int, int, int, Medium]] = []
        rest = iter(parts)
        start, part_length = next(rest, (NEVER_AT, 0))
        stop = start + part_length
        for at, length, medium_at, medium in self.rows:
            end = at + length
            while stop <= at:
                start, part_length = next(rest, (NEVER_AT, 0))
                stop = start + part_length
            while start < end:
                first, last = max(start, at), min(stop, end)
                found.append((first, last - first, medium_at + first - at, medium))
                if stop > end:
                    break  # it may reach into the next run too
                start, part_length = next(rest, (NEVER_AT, 0))
                stop = start + part_length
        return self.with_rows(found)

    def spans(self) -> list[Span]:
        """The runs on the node."""
        return list(map(Span, self.at, self.length))

    def runs(self, span: Span) -> list[Run]:
        """The same as `trace` gives for what was asked for, `span` of the node."""
        runs: list[Run] = []
        done = span.at
        for at, length, medium_at, medium in self.rows:
            if at > done:
                runs.append(Run(done, at - done, self.rest))
            runs.append(Run(at, length, RunKind.DATA, medium, medium_at))
            done = at + length
        if span.end > done:
            runs.append(Run(done, span.end - done, self.rest))
        return runs

    def without_holes(self, length_min: int, unit: int, enough_bytes: int) -> "Pieces":
        """The same without what is a hole of the only medium. Blocks, so call it in a worker.

        Args:
            length_min: holes are looked for in runs of this length, in bytes.
            unit: a unit of the node is left out or kept as a whole, as far as its run has it.
            enough_bytes: it need not look behind the run with which there is more than this.

        Raises:
            OSError: the medium could not be asked.
        """
        found = Pieces(self.medium, [], [], [])
        left = enough_bytes
        for at, length, medium_at in zip(*self.columns, strict=True):
            if left < 0:
                break
            if length < length_min:
                found._add(at, length, medium_at)
                left -= length
                continue
            starts, lengths = self.medium.data_runs(medium_at, length, left)
            shift, end = at - medium_at, at + length
            done = at
            for start, data_bytes in zip(starts, lengths, strict=True):
                left -= data_bytes
                first = max(done, (start + shift) // unit * unit)
                last = min(end, -(-(start + shift + data_bytes) // unit) * unit)
                if last > first:
                    found._add(first, last - first, first - shift)
                    done = last
        return found

    def _add(self, at: int, length: int, medium_at: int) -> None:
        """Append a run, to the last one if it goes on there."""
        if self.at and self.at[-1] + self.length[-1] == at and self.medium_at[-1] + self.length[-1] == medium_at:
            self.length[-1] += length
        else:
            self.at.append(at)
            self.length.append(length)
            self.medium_at.append(medium_at)


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
    landing = await placing.reserve_pieces(target, pieces.at, pieces.length)
    return None if landing is None else steps_to(pieces, landing)


def steps_to(pieces: Pieces, landing: Landing) -> list[Step]:
    """What is to be done for the pieces, one at least, where room has been found for them."""
    medium, start, in_a_row = landing
    source, at, length, medium_at, _, media = pieces
    if in_a_row and media is None:
        return [Gather(source, list(zip(medium_at, length, strict=True)), medium, start)]
    shift = start - at[0]
    places = list(accumulate(length[:-1], initial=start)) if in_a_row else [place + shift for place in at]
    if media is None:
        return [Scatter(source, list(zip(medium_at, places, length, strict=True)), medium)]
    sources = list(dict.fromkeys(media))
    numbers = dict(zip(sources, count(), strict=False))
    patches = zip(medium_at, places, map(numbers.__getitem__, media), length, strict=True)
    return [Patch(sources, list(patches), medium)]
