"""The worker's side of a copy: plain steps over media, run in one hop (docs/adr/0005-plan-execute-publish.md).

Nothing here knows a node, a job or the loop. A step is a tuple of media and integers; whoever planned it holds the
requests' tickets and keeps the media open until `execute` has returned.
"""

from collections.abc import Sequence
from typing import NamedTuple

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


def execute(steps: Sequence[Step]) -> None:
    """Run `steps` in order; blocks, so call it in a worker.

    Raises:
        OSError: a step failed. The earlier ones are done, the failed one perhaps in part, the later ones not. Which
            side of a copy failed is not known: `copy_file_range` does not say.
    """
    for step in steps:
        match step:
            case Copy(source, source_at, target, target_at, length):
                target.copy_from(source, source_at, target_at, length)
            case Zero(target, target_at, length):
                target.zero(target_at, length, unmap=False)
