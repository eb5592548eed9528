"""The worker's side of a copy: plain steps over media, run in one hop (docs/adr/0005-plan-execute-publish.md).

Nothing here knows a node, a job or the loop. A step is a tuple of media and integers; whoever planned it holds the
requests' tickets and keeps the media open until `execute` has returned.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

from blockjobs.base.units import MiB
from blockjobs.block.medium import Medium


class Copy(NamedTuple):
    """Copy `length` bytes from one medium to another."""

    source: Medium
    source_at: int
    target: Medium
    target_at: int
    length: int


class Zero(NamedTuple):
    """Make `length` bytes read as zeroes; the space stays allocated."""

    target: Medium
    target_at: int
    length: int


class Gather(NamedTuple):
    """Copy pieces of the source (place, length) to one run of the target, from `target_at` on."""

    source: Medium
    pieces: list[tuple[int, int]]
    target: Medium
    target_at: int


class Scatter(NamedTuple):
    """Copy pieces of the source (place there, place here, length) to places on the target, which ascend."""

    source: Medium
    pieces: list[tuple[int, int, int]]
    target: Medium


Step = Copy | Gather | Scatter | Zero

PREALLOCATED_BYTES_MIN: Final = 1 * MiB
"""A file system allocates a run of this length at once for less than it saves in the copies (bench/BASELINE.md)."""


def execute(steps: Sequence[Step]) -> None:
    """Run `steps` in order; blocks, so call it in a worker.

    Raises:
        OSError: a step failed. The earlier ones are done, the failed one perhaps in part, the later ones not. Which
            side of a copy failed is not known: `copy_file_range` does not say.
    """
    gathered: list[tuple[int, int]] = []
    source: Medium | None = None
    target: Medium | None = None
    start = end = 0
    for step in steps:
        if isinstance(step, Zero):
            _gather(source, gathered, target, start, end)
            source = None
            step.target.zero(step.target_at, step.length, unmap=False)
            continue
        if isinstance(step, Scatter):
            _gather(source, gathered, target, start, end)
            source = None
            _scatter(step)
            continue
        if isinstance(step, Gather):
            _gather(source, gathered, target, start, end)
            source = None
            total = sum(length for _, length in step.pieces)
            _gather(step.source, step.pieces, step.target, step.target_at, step.target_at + total)
            continue
        if step.source is not source or step.target is not target or step.target_at != end:
            _gather(source, gathered, target, start, end)
            source, target, start, gathered = step.source, step.target, step.target_at, []
        gathered.append((step.source_at, step.length))
        end = step.target_at + step.length
    _gather(source, gathered, target, start, end)


def _gather(
    source: Medium | None, gathered: list[tuple[int, int]], target: Medium | None, start: int, end: int
) -> None:
    """Fill a run of the target, from `start` to `end`, with pieces of the source."""
    if source is None or target is None:
        return
    if end - start >= PREALLOCATED_BYTES_MIN:
        target.preallocate(start, end - start)
    target.gather_from(source, gathered, start)


def _scatter(step: Scatter) -> None:
    """Announce the long pieces and copy all of them."""
    for _, at, length in step.pieces:
        if length >= PREALLOCATED_BYTES_MIN:
            step.target.preallocate(at, length)
    step.target.scatter_from(step.source, step.pieces)
