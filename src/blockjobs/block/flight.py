"""Pieces of work of the copy engine: what somebody is copying, how it is going to travel, and that it failed."""

import asyncio
import errno
from bisect import bisect_left
from contextlib import ExitStack
from operator import attrgetter
from typing import Final

from msgspec import Struct, field

from blockjobs.base.errors import ImageCorrupt, IoFailure
from blockjobs.base.span import Span
from blockjobs.block.execute import Step
from blockjobs.block.placing import Placing
from blockjobs.block.plan import Run


class CopyFailed(IoFailure):
    """A copy failed; the bits of what did not arrive are set again.

    Attributes:
        reading: whether the source failed; else the target did.
    """

    def __init__(self, cause: OSError | ImageCorrupt, *, reading: bool) -> None:
        # A corrupt image is an I/O error to whoever copies it, as in QEMU; its own event tells the story.
        code = cause.errno if isinstance(cause, OSError) else None
        super().__init__(code or errno.EIO, getattr(cause, "where", ""))
        self.reading = reading


_AT: Final = attrgetter("at")
_LENGTH: Final = attrgetter("length")


class Flight(Struct, eq=False):
    """What somebody is copying; no guest write reaches it on the source until it has landed.

    Attributes:
        span: from the first byte to the last.
        parts: what of it is copied; ascending.
        leave: takes it off the nodes' lists of requests under way, which drains wait for.
    """

    span: Span
    parts: list[Span]
    leave: ExitStack
    landed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def length(self) -> int:
        """Bytes that are copied."""
        return sum(map(_LENGTH, self.parts))

    def copies_any(self, span: Span) -> bool:
        """Whether any of these bytes are copied; `span` is not empty."""
        if not self.span.overlaps(span):
            return False
        behind = bisect_left(self.parts, span.end, key=_AT)
        return behind > 0 and self.parts[behind - 1].end > span.at


class Batch(Struct, kw_only=True):
    """A prepared flight.

    Attributes:
        moved_bytes: what will be transferred; zeroes are free.
        copied: what `steps` carry to where `placing` has made room.
        doors: what goes through the nodes' ordinary doors.
        packed: what is to be compressed, and `known_zeroes`, where the target reads as zeroes already.
    """

    flight: Flight
    runs: list[Run]
    moved_bytes: int
    copied: list[Span] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    placing: Placing = field(default_factory=Placing)
    doors: list[Span] = field(default_factory=list)
    packed: list[Span] = field(default_factory=list)
    known_zeroes: list[Span] = field(default_factory=list)
