"""Looking for zeroes that are stored as bytes, so that a copy can leave them out (`detect-zeroes` on its target)."""

from typing import Final

from blockjobs.base.buffers import aligned, is_zero
from blockjobs.block.medium import Medium
from blockjobs.block.pieces import Pieces
from blockjobs.block.plan import Run, RunKind

GLANCE_BYTES: Final = 512
"""Read first if they are in memory: nearly all units of data say so in their first bytes."""


def without_zeroes(runs: list[Run], unit: int) -> list[Run]:
    """Read the DATA runs and tell which of their units hold only zeroes. Blocks, so call it in a worker.

    Args:
        runs: of a node, ascending, not in each other's way.
        unit: what is looked at as a whole, in bytes; units begin at multiples of it. Parts of units are left as they
            are, but for the short one at the end of a run.

    Returns:
        The same bytes; whole units of zeroes have become ZERO runs.

    Raises:
        OSError: a medium could not be read.
    """
    found: list[Run] = []
    look = _Look(unit)
    for run in runs:
        if run.kind is not RunKind.DATA:
            found.append(run)
            continue
        assert run.medium is not None
        done = run.at
        for start, end in look.zeroes(run.medium, run.at, run.length, run.medium_at):
            _add(run, done, start, found)
            found.append(Run(start, end - start, RunKind.ZERO))
            done = end
        _add(run, done, run.end, found)
    return found


def pieces_without_zeroes(pieces: Pieces, unit: int) -> Pieces:
    """The same for pieces; those of zeroes are left out."""
    left: list[tuple[int, int, int, Medium]] = []
    look = _Look(unit)
    for at, length, medium_at, medium in pieces.rows:
        done = at
        for start, end in (*look.zeroes(medium, at, length, medium_at), (at + length, at + length)):
            if start > done:
                left.append((done, start - done, medium_at + done - at, medium))
            done = end
    return pieces.with_rows(left)


class _Look:
    """A search in units, with the memory for it."""

    def __init__(self, unit: int) -> None:
        self._unit = unit
        self._room = aligned(unit)
        self._glance = self._room[: min(GLANCE_BYTES, unit)]

    def zeroes(self, medium: Medium, at: int, length: int, medium_at: int) -> list[tuple[int, int]]:
        """The stretches (start, end) of whole units of zeroes in a run that begins at `at`, ascending."""
        unit, end = self._unit, at + length
        found: list[tuple[int, int]] = []
        shift, glance, read_cached = medium_at - at, self._glance, medium.read_cached
        for first in range(-(-at // unit) * unit, end, unit):
            # In a full disk nearly all there is to do is this.
            if end - first >= unit and read_cached(first + shift, glance) and glance[0]:
                continue
            stop = min(first + unit, end)
            if self._is_zero(medium, first + shift, stop - first):
                if found and found[-1][1] == first:
                    found[-1] = found[-1][0], stop
                else:
                    found.append((first, stop))
        return found

    def _is_zero(self, medium: Medium, at: int, length: int) -> bool:
        glance = self._room[: min(GLANCE_BYTES, length)]
        if medium.is_surely_data(at, length) or (medium.read_cached(at, glance) and not is_zero(glance)):
            return False
        piece = self._room[:length]
        medium.read_into(at, piece)
        return piece[0] == 0 and is_zero(piece)


def _add(run: Run, start: int, end: int, found: list[Run]) -> None:
    """Append the part of `run` between two positions."""
    if end > start:
        found.append(Run(start, end - start, RunKind.DATA, run.medium, run.medium_at + start - run.at))
