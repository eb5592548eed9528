"""What runs of a node are, seen through its chain of backing nodes."""

from collections.abc import Iterable
from typing import NamedTuple

from blockjobs.block.vocabulary import Kind, Segment


class Extent(NamedTuple):
    """A run of one status.

    Attributes:
        kind: DATA (bytes are stored somewhere) or ZERO (reads as zeroes for sure).
        depth: 1 for the node asked, 2 for its backing node, ...; 0 if no node down to the base says anything.
    """

    at: int
    length: int
    kind: Kind
    depth: int


def join_extents(extents: Iterable[Extent]) -> list[Extent]:
    """Merge neighbours of the same status; empty ones vanish."""
    joined: list[Extent] = []
    for extent in extents:
        if not extent.length:
            continue
        if joined and joined[-1].kind is extent.kind and joined[-1].depth == extent.depth:
            last = joined[-1]
            joined[-1] = last._replace(length=last.length + extent.length)
        else:
            joined.append(extent)
    return joined


def clip(segments: Iterable[Segment], at: int, end: int) -> list[Segment]:
    """The parts of `segments` between two positions; places in the child move along."""
    parts = []
    for segment in segments:
        start, stop = max(segment.at, at), min(segment.at + segment.length, end)
        if start < stop:
            shift = start - segment.at
            parts.append(segment._replace(at=start, length=stop - start, child_at=segment.child_at + shift))
    return parts
