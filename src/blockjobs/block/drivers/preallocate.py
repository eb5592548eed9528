"""The preallocate filter: lets a file grow far ahead of what is written, and cuts it back in the end.

File systems allocate a long run at once much faster than many short ones. The filter sits between a format and its
file. While somebody above may both write and resize, nobody else may; what it has added to the file is zeroes, is
not shown, and is taken away when that access ends (spec/block-layer.md §2).
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Final

from blockjobs.base.buffers import Buffer
from blockjobs.base.errors import IoFailure, ParameterError, UsageError
from blockjobs.base.span import Span
from blockjobs.base.units import MiB
from blockjobs.block.claims import Perm
from blockjobs.block.driver import Child, FilterDriver, Forward, OpenContext
from blockjobs.block.options import BlockRef, NodeOptions, driver
from blockjobs.block.switch import NewValues, Switch
from blockjobs.block.vocabulary import Watch, ZeroMode

log = logging.getLogger(__name__)

SECTOR: Final = 512
_GROWS: Final = Perm.WRITE | Perm.RESIZE


class PreallocateOptions(NodeOptions, frozen=True, kw_only=True, tag="preallocate"):
    """Grows its child ahead of writes past the end.

    Attributes:
        prealloc_align: the new end is a multiple of this, in bytes.
        prealloc_size: so many bytes beyond the end of the write, at least.
    """

    file: BlockRef
    prealloc_align: int | None = None
    prealloc_size: int | None = None


@driver(PreallocateOptions)
@dataclass(eq=False, kw_only=True)
class Preallocate(FilterDriver):
    """Shows the child without what was added to it.

    Attributes:
        align, ahead: as in the options, in bytes.
    """

    reopenable: ClassVar[frozenset[str] | None] = frozenset({"prealloc-align", "prealloc-size"})

    children: dict[str, Child]
    align: int
    ahead: int
    name: str
    routes_changed: Callable[[], None]
    watches: Watch = Watch.NONE
    tidies = True
    _may_grow: bool = False
    _gave_up: bool = False
    _shown_end: int | None = None
    """Where what is shown ends; None while that is all of the child."""
    _file_end: int = 0
    _growing: asyncio.Lock = field(default_factory=asyncio.Lock)

    @classmethod
    async def open(cls, options: PreallocateOptions, children: dict[str, Child], context: OpenContext) -> "Preallocate":
        """Check the sizes; nothing grows before the first write past the end.

        Raises:
            UsageError: a size is negative or no multiple of a sector.
        """
        align, ahead = _sizes(options)
        routes_changed = context.routes_changed
        return cls(children=children, align=align, ahead=ahead, name=context.node_name, routes_changed=routes_changed)

    async def close(self) -> None:
        """See `Driver`.

        Raises:
            IoFailure: the child could not be cut back to what is shown.
        """
        await self._cut_back()

    async def prepare_reopen(self, options: PreallocateOptions, context: OpenContext) -> Switch:
        """See `Driver`: the file is cut back before, as it may become read-only, or another one may take its place."""
        del context
        align, ahead = _sizes(options)
        await self._cut_back()
        return NewValues(self, align=align, ahead=ahead)

    @property
    def length(self) -> int:
        """What is shown of the child."""
        return self.children["file"].length if self._shown_end is None else self._shown_end

    def child_perms(self, child: str, needs: Perm, shares: Perm) -> tuple[Perm, Perm]:
        """As a filter's, but that nobody else may touch a file that grows or is still to be cut back."""
        del child
        if _GROWS in needs or self._has_tail:
            return needs | _GROWS, shares & ~_GROWS
        return needs, shares

    def permissions_changed(self, needs: Perm, shares: Perm) -> None:
        """See `Driver`: requests need watching only while they can make the file grow."""
        del shares
        self._may_grow = _GROWS in needs
        self._gave_up = False
        watches = Watch.WRITE | Watch.ZERO if self._may_grow else Watch.NONE
        if watches != self.watches:
            self.watches = watches
            self.routes_changed()

    async def tidy(self) -> None:
        """See `Driver`: access has ended, so the file gets its true length. A failure is tried again at the end."""
        if self._may_grow:
            return
        try:
            await self._cut_back()
        except IoFailure as error:
            log.warning("node '%s': the file keeps what was allocated ahead: %s", self.name, error)

    async def write(self, at: int, content: Buffer, forward: Forward, *, fua: bool) -> None:
        """See `FilterDriver`."""
        end = at + len(content)
        if end <= self.length:
            await forward.write(at, content, fua=fua)
            return
        await self._reach(end, forward)
        try:
            await forward.write(at, content, fua=fua)
        finally:  # of a write that failed anything may be in the file
            self._shown_end = max(self.length, end)

    async def zero(self, span: Span, mode: ZeroMode, forward: Forward) -> None:
        """See `FilterDriver`."""
        if span.end <= self.length:
            await forward.zero(span, mode=mode)
            return
        await self._reach(span.end, forward)
        try:
            await forward.zero(span, mode=mode)
        finally:
            self._shown_end = max(self.length, span.end)

    async def resize(self, length: int, forward: Forward) -> None:
        """See `FilterDriver`: to grow within what was added costs nothing."""
        async with self._growing:
            if self._shown_end is None or not self._shown_end <= length <= self._file_end:
                await forward.resize(length)
                self._file_end = length
            if self._shown_end is not None:
                self._shown_end = length

    @property
    def _has_tail(self) -> bool:
        return self._shown_end is not None and self._file_end > self._shown_end

    async def _reach(self, end: int, forward: Forward) -> None:
        """Make the file at least so long, if that is possible; whoever writes beyond its end waits for this."""
        async with self._growing:
            if self._shown_end is None:
                self._shown_end = self._file_end = self.children["file"].length
            if end <= self._file_end:
                return
            if not self._gave_up:
                target = -(-(end + self.ahead) // self.align) * self.align
                try:
                    await forward.zero(Span.between(self._file_end, target), mode=ZeroMode.KEEP)
                    end = target
                except IoFailure as error:
                    log.info("node '%s': cannot allocate ahead: %s", self.name, error)
                    self._gave_up = True
            self._file_end = max(end, self.children["file"].length)

    async def _cut_back(self) -> None:
        async with self._growing:
            if self._has_tail:
                assert self._shown_end is not None
                await self.children["file"].resize(self._shown_end)
            self._shown_end = None


def _sizes(options: PreallocateOptions) -> tuple[int, int]:
    """Unit and reserve, in bytes.

    Raises:
        UsageError: a size is negative or no multiple of a sector.
    """
    sizes = {"prealloc-align": options.prealloc_align, "prealloc-size": options.prealloc_size}
    for name, size in sizes.items():
        if size is not None and size < 0:
            raise ParameterError.expects(name, "a non-negative number below 2^64")
    align = MiB if options.prealloc_align is None else options.prealloc_align
    if align % SECTOR:
        raise UsageError(f"prealloc-align parameter of preallocate filter is not aligned to {SECTOR}")
    return align or 1, 128 * MiB if options.prealloc_size is None else options.prealloc_size
