"""The worker's side of a copy: plain steps over media, run in one hop (design §1.6, docs/adr/0005-batches.md).

Nothing here knows a node, a job or the loop. A step is a tuple of media and integers; whoever planned it holds the
requests' tickets and keeps the media open until `execute` has returned.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

from blockjobs.base.buffers import Buffer
from blockjobs.base.units import MiB
from blockjobs.block.medium import Medium

COPY_STEP_BYTES: Final = 8 * MiB
"""Longest single kernel copy: long enough to cost nothing, short enough that others get at the file in between."""


class Copy(NamedTuple):
    """Copy `length` bytes from one medium to another."""

    source: Medium
    source_at: int
    target: Medium
    target_at: int
    length: int


class Write(NamedTuple):
    """Write `content`."""

    target: Medium
    target_at: int
    content: Buffer


class Zero(NamedTuple):
    """Make `length` bytes read as zeroes, deallocated where possible."""

    target: Medium
    target_at: int
    length: int


Step = Copy | Write | Zero


def execute(steps: Sequence[Step]) -> None:
    """Run `steps` in order; blocks, so call it in a worker.

    Raises:
        OSError: a step failed. The earlier ones are done, the failed one perhaps in part, the later ones not. Which
            side of a copy failed is not known: `copy_file_range` does not say.
    """
    for step in steps:
        match step:
            case Copy(source, source_at, target, target_at, length):
                done = 0
                while done < length:
                    count = min(COPY_STEP_BYTES, length - done)
                    target.copy_from(source, source_at + done, target_at + done, count)
                    done += count
            case Write(target, target_at, content):
                target.write(target_at, content)
            case Zero(target, target_at, length):
                target.zero(target_at, length, unmap=True)
