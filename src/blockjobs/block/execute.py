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


Step = Copy | Zero

PREALLOCATED_BYTES_MIN: Final = 1 * MiB
"""A file system allocates a run of this length at once for less than it saves in the copies (bench/BASELINE.md)."""


def execute(steps: Sequence[Step]) -> None:
    """Run `steps` in order; blocks, so call it in a worker.

    Raises:
        OSError: a step failed. The earlier ones are done, the failed one perhaps in part, the later ones not. Which
            side of a copy failed is not known: `copy_file_range` does not say.
    """
    for target, at, length in _filled_runs(steps):
        target.preallocate(at, length)
    for step in steps:
        match step:
            case Copy(source, source_at, target, target_at, length):
                target.copy_from(source, source_at, target_at, length)
            case Zero(target, target_at, length):
                target.zero(target_at, length, unmap=False)


def _filled_runs(steps: Sequence[Step]) -> list[tuple[Medium, int, int]]:
    """The long runs (target, place, length) that neighbouring copies fill together."""
    runs: list[tuple[Medium, int, int]] = []
    target, start, end = None, 0, 0
    for step in steps:
        if isinstance(step, Copy):
            if step.target is not target or step.target_at != end:
                if target is not None and end - start >= PREALLOCATED_BYTES_MIN:
                    runs.append((target, start, end - start))
                target, start, end = step.target, step.target_at, step.target_at
            end += step.length
    if target is not None and end - start >= PREALLOCATED_BYTES_MIN:
        runs.append((target, start, end - start))
    return runs
