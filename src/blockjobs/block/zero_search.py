"""Looking for zeroes that are stored as bytes, so that a copy can leave them out (`detect-zeroes` on its target)."""

from typing import Final

from blockjobs.base.buffers import aligned, is_zero
from blockjobs.base.units import KiB
from blockjobs.block.plan import Run, RunKind

LOOK_BYTES: Final = 256 * KiB
"""Read at a time: stays in the processor's cache, where comparing it costs next to nothing."""


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
    room = aligned(max(unit, LOOK_BYTES // unit * unit))
    found: list[Run] = []
    for run in runs:
        if run.kind is RunKind.DATA:
            _search(run, unit, room, found)
        else:
            found.append(run)
    return found


def _search(run: Run, unit: int, room: memoryview, found: list[Run]) -> None:
    """Append the parts of one DATA run."""
    assert run.medium is not None
    at = start = run.at
    first = min(-(-at // unit) * unit, run.end)
    zero_from = -1
    while first < run.end:
        piece = room[: min(len(room), run.end - first)]
        run.medium.read_into(run.medium_at + first - at, piece)
        for offset in range(0, len(piece), unit):
            # Nearly all units of data say so in their first bytes: the slice is short, the answer the same.
            if piece[offset] == 0 and is_zero(piece[offset : offset + unit]):
                if zero_from < 0:
                    zero_from = first + offset
                    _add(run, start, zero_from, found)
            elif zero_from >= 0:
                start = first + offset
                found.append(Run(zero_from, start - zero_from, RunKind.ZERO))
                zero_from = -1
        first += len(piece)
    if zero_from >= 0:
        found.append(Run(zero_from, run.end - zero_from, RunKind.ZERO))
    else:
        _add(run, start, run.end, found)


def _add(run: Run, start: int, end: int, found: list[Run]) -> None:
    """Append the part of `run` between two positions."""
    if end > start:
        found.append(Run(start, end - start, RunKind.DATA, run.medium, run.medium_at + start - run.at))
