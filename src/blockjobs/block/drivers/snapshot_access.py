"""The snapshot-access driver: what a copy-before-write filter has frozen, as a node to read (spec/block-layer.md §2).

What guests have overwritten since comes from the filter's target, the rest from its source, which nobody overwrites
while it is being read. It is no filter, as it shows other bytes than its child.
"""

import errno
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from blockjobs.base.buffers import Buffer
from blockjobs.base.errors import IoFailure, UsageError
from blockjobs.base.span import Span
from blockjobs.block.claims import Perm
from blockjobs.block.driver import Child, FilterDriver, OpenContext, ProtocolDriver
from blockjobs.block.drivers.copy_before_write import CopyBeforeWrite
from blockjobs.block.options import BlockRef, NodeOptions, driver
from blockjobs.block.vocabulary import NO_PERMS, Kind, Segment, ZeroMode

if TYPE_CHECKING:
    from blockjobs.block.node import Node


class SnapshotAccessOptions(NodeOptions, frozen=True, kw_only=True, tag="snapshot-access"):
    """Reads what the copy-before-write node `file` has frozen."""

    file: BlockRef


@driver(SnapshotAccessOptions)
@dataclass(eq=False, kw_only=True)
class SnapshotAccess(ProtocolDriver):
    """Takes no rights: the filter has all that are needed. Any other child can be neither read nor written."""

    open_ended: bool = False

    children: dict[str, Child]
    name: str
    _opened_on: CopyBeforeWrite | None = None

    @classmethod
    async def open(
        cls, options: SnapshotAccessOptions, children: dict[str, Child], context: OpenContext
    ) -> "SnapshotAccess":
        """Hold the filter to its view. A child that is no such filter is found out by the first read, as in QEMU."""
        del options
        below = cast("Node", children["file"]).driver
        opened = cls(children=children, name=context.node_name)
        if isinstance(below, CopyBeforeWrite):
            opened._opened_on = below
            below.viewers += 1
        return opened

    async def close(self) -> None:
        """See `Driver`."""
        if self._opened_on is not None:
            self._opened_on.viewers -= 1

    @property
    def length(self) -> int:
        """The child's."""
        return self.children["file"].length

    def child_perms(self, child: str, needs: Perm, shares: Perm) -> tuple[Perm, Perm]:
        """See `Driver`: nothing; guests below go on writing."""
        del child, needs, shares
        return NO_PERMS

    async def read_into(self, at: int, buffer: memoryview) -> None:
        """See `ProtocolDriver`.

        Raises:
            IoFailure: EACCES for what does not belong to the view, or if the view is lost; ENOTSUP without a filter.
        """
        view = self._view(Span(at, len(buffer)))
        async with view.reads.shared(Span(at, len(buffer))):
            for child, part in view.frozen(Span(at, len(buffer))):
                await child.read_into(part.at, buffer[part.at - at : part.end - at])

    async def status(self, span: Span) -> list[Segment]:
        """See `ProtocolDriver`. Raises: as `read_into`."""
        segments: list[Segment] = []
        view = self._view(span)
        async with view.reads.shared(span):
            for child, part in view.frozen(span):
                for extent in await cast("Node", child).block_status(part):
                    kind = Kind.ZERO if extent.kind is Kind.ZERO else Kind.DATA
                    segments.append(Segment(extent.at, extent.length, kind, "", extent.at))
        return segments

    async def discard(self, span: Span) -> None:
        """See `ProtocolDriver`: the user is done with these clusters, which then take no space on the target."""
        await self._view(span).give_up(span)

    async def write(self, at: int, content: Buffer, *, fua: bool) -> None:
        """See `ProtocolDriver`: refused."""
        del fua
        raise self._failure(errno.EOPNOTSUPP, Span(at, len(content)))

    async def zero(self, span: Span, mode: ZeroMode) -> None:
        """See `ProtocolDriver`: refused."""
        del mode
        raise self._failure(errno.EOPNOTSUPP, span)

    async def flush(self) -> None:
        """See `ProtocolDriver`: there is nothing to flush."""

    async def resize(self, length: int) -> None:
        """See `ProtocolDriver`: refused."""
        del length
        raise UsageError("Image format driver does not support resize")

    def _view(self, span: Span) -> CopyBeforeWrite:
        """The filter this was opened on, also when a job has put another filter between; else the one right below."""
        found: list[CopyBeforeWrite] = []
        node = first = cast("Node", self.children["file"])
        while isinstance(driver := node.driver, FilterDriver):
            if driver is self._opened_on:
                return self._opened_on
            if isinstance(driver, CopyBeforeWrite) and node is first:
                found.append(driver)
            node = node.children[driver.filtered]
        if not found:
            raise self._failure(errno.EOPNOTSUPP, span)
        return found[0]

    def _failure(self, code: int, span: Span) -> IoFailure:
        return IoFailure(code, f"node '{self.name}' at {span.at}+{span.length}")
