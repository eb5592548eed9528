"""A node that reads where the one below it cannot: what is unreadable there is zeroes here (`convert --salvage`).

Only `convert` makes it; users cannot.
"""

import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, cast

from blockjobs.base.buffers import Buffer, zeroes
from blockjobs.base.errors import ImageCorrupt, IoFailure, UsageError
from blockjobs.base.span import Span
from blockjobs.base.units import KiB
from blockjobs.block.driver import Child, OpenContext, ProtocolDriver
from blockjobs.block.options import BlockRef, NodeOptions, hidden_driver
from blockjobs.block.vocabulary import Kind, Segment, ZeroMode

if TYPE_CHECKING:
    from blockjobs.block.node import Node

SECTOR: Final = 512
STATUS_BYTES_MIN: Final = 64 * KiB
"""Where metadata cannot be read, what it describes counts as data in pieces of this length."""


class SalvageOptions(NodeOptions, frozen=True, kw_only=True, tag="salvage"):
    """The node below."""

    file: BlockRef


@hidden_driver(SalvageOptions)
@dataclass(eq=False)
class Salvage(ProtocolDriver):
    """Reads what can be read, to the sector.

    Attributes:
        on_loss: told the offset of each sector that was not readable, and why.
    """

    open_ended = False

    children: dict[str, Child]
    on_loss: Callable[[int, str], None] = lambda at, reason: None

    @classmethod
    async def open(cls, options: SalvageOptions, children: dict[str, Child], context: OpenContext) -> "Salvage":
        """See `Driver`."""
        del options
        assert context.read_only, "who writes here would not know what is there"
        return cls(children)

    @property
    def _below(self) -> Child:
        return self.children["file"]

    @property
    def length(self) -> int:
        """The child's."""
        return self._below.length

    async def read_into(self, at: int, buffer: memoryview) -> None:
        """See `ProtocolDriver`: halves until the unreadable sectors are found."""
        try:
            await self._below.read_into(at, buffer)
        except (IoFailure, ImageCorrupt) as error:
            if len(buffer) <= SECTOR:
                buffer[:] = zeroes(len(buffer))
                self.on_loss(at, str(error))
                return
            middle = -(-len(buffer) // (2 * SECTOR)) * SECTOR
            await self.read_into(at, buffer[:middle])
            await self.read_into(at + middle, buffer[middle:])

    async def status(self, span: Span) -> list[Segment]:
        """See `ProtocolDriver`: where nobody can tell it is data, and reads will show."""
        try:
            extents = await cast("Node", self._below).block_status(span)
        except (IoFailure, ImageCorrupt):
            if span.length <= STATUS_BYTES_MIN:
                return [Segment(span.at, span.length, Kind.DATA, "", span.at)]
            middle = span.at + -(-span.length // (2 * STATUS_BYTES_MIN)) * STATUS_BYTES_MIN
            first, second = Span.between(span.at, middle), Span.between(middle, span.end)
            return [*await self.status(first), *await self.status(second)]
        return [Segment(each.at, each.length, each.kind, "", each.at) for each in extents]

    async def write(self, at: int, content: Buffer, *, fua: bool) -> None:
        """See `ProtocolDriver`: refused."""
        del at, content, fua
        raise IoFailure(errno.EROFS)

    async def zero(self, span: Span, mode: ZeroMode) -> None:
        """See `ProtocolDriver`: refused."""
        del span, mode
        raise IoFailure(errno.EROFS)

    async def discard(self, span: Span) -> None:
        """See `ProtocolDriver`: refused."""
        del span
        raise IoFailure(errno.EROFS)

    async def flush(self) -> None:
        """See `ProtocolDriver`: nothing was written."""

    async def resize(self, length: int) -> None:
        """See `ProtocolDriver`: refused."""
        del length
        raise UsageError("Image format driver does not support resize")
