"""The blkdebug filter: limits and errors on purpose, so that users and tests see what failures do."""

import errno
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, Final

from blockjobs.base.buffers import Buffer
from blockjobs.base.errors import IoFailure, ParameterError, UsageError
from blockjobs.base.span import Span
from blockjobs.block.claims import NONE, Perm
from blockjobs.block.driver import Child, FilterDriver, Forward, OpenContext
from blockjobs.block.drivers.blkdebug_rules import DebugEvent, InjectError, IoType, Rules, SetState
from blockjobs.block.options import BlockRef, NodeOptions, driver
from blockjobs.block.vocabulary import Limits, Watch, ZeroMode

_WATCHES: Final = {
    IoType.READ: Watch.READ,
    IoType.WRITE: Watch.WRITE,
    IoType.WRITE_ZEROES: Watch.ZERO,
    IoType.DISCARD: Watch.DISCARD,
    IoType.FLUSH: Watch.FLUSH,
    IoType.BLOCK_STATUS: Watch.STATUS,
}
_INT32_MAX: Final = 2**31 - 1


class BlockPermission(StrEnum):
    """The rights on an edge, as options name them."""

    CONSISTENT_READ = "consistent-read"
    WRITE = "write"
    WRITE_UNCHANGED = "write-unchanged"
    RESIZE = "resize"


class BlkdebugOptions(NodeOptions, frozen=True, kw_only=True, tag="blkdebug"):
    """Injects errors into its child and narrows the requests that it takes; sizes are bytes, 0 is not given."""

    image: BlockRef
    align: int | None = None
    max_transfer: int | None = None
    opt_write_zero: int | None = None
    max_write_zero: int | None = None
    opt_discard: int | None = None
    max_discard: int | None = None
    inject_error: list[InjectError] | None = None
    set_state: list[SetState] | None = None
    take_child_perms: list[BlockPermission] | None = None
    unshare_child_perms: list[BlockPermission] | None = None


@driver(BlkdebugOptions)
@dataclass(eq=False, kw_only=True)
class Blkdebug(FilterDriver):
    """Watches what its rules may fail, and nothing else."""

    filtered = "image"
    reopenable: ClassVar[frozenset[str] | None] = frozenset()

    children: dict[str, Child]
    name: str
    limits: Limits
    rules: Rules
    watches: Watch
    takes: Perm
    unshares: Perm

    @classmethod
    async def open(cls, options: BlkdebugOptions, children: dict[str, Child], context: OpenContext) -> "Blkdebug":
        """Check the limits and arm the rules.

        Raises:
            UsageError: limits that are out of range or do not fit each other.
        """
        rules = Rules(options.inject_error or (), options.set_state or (), errno=errno.EIO)
        watches = Watch.NONE
        for kind in rules.kinds():
            watches |= _WATCHES[kind]
        if rules.listens_to(DebugEvent.PWRITEV, DebugEvent.PWRITEV_ZERO, DebugEvent.PWRITEV_DONE):
            watches |= Watch.WRITE | Watch.ZERO
        return cls(
            children=children,
            name=context.node_name,
            limits=_limits(options),
            rules=rules,
            watches=watches,
            takes=_perms(options.take_child_perms),
            unshares=_perms(options.unshare_child_perms),
        )

    def child_perms(self, child: str, needs: Perm, shares: Perm) -> tuple[Perm, Perm]:
        """As a filter's, plus what the options take and refuse."""
        del child
        return needs | self.takes, shares & ~self.unshares

    def debug_event(self, event: str) -> None:
        """See `Driver`: arms rules."""
        self.rules.happens(event)

    async def read_into(self, at: int, buffer: memoryview, forward: Forward) -> None:
        """See `FilterDriver`."""
        self._fail_if_armed(IoType.READ, Span(at, len(buffer)))
        await forward.read_into(at, buffer)

    async def write(self, at: int, content: Buffer, forward: Forward, *, fua: bool) -> None:
        """See `FilterDriver`."""
        self.rules.happens(DebugEvent.PWRITEV)
        self._fail_if_armed(IoType.WRITE, Span(at, len(content)))
        await forward.write(at, content, fua=fua)
        self.rules.happens(DebugEvent.PWRITEV_DONE)

    async def zero(self, span: Span, mode: ZeroMode, forward: Forward) -> None:
        """See `FilterDriver`."""
        self.rules.happens(DebugEvent.PWRITEV_ZERO)
        self._fail_if_armed(IoType.WRITE_ZEROES, span)
        await forward.zero(span, mode=mode)
        self.rules.happens(DebugEvent.PWRITEV_DONE)

    async def discard(self, span: Span, forward: Forward) -> None:
        """See `FilterDriver`."""
        self._fail_if_armed(IoType.DISCARD, span)
        await forward.discard(span)

    async def flush(self, forward: Forward) -> None:
        """See `FilterDriver`."""
        self._fail_if_armed(IoType.FLUSH, Span(0, 0))
        await forward.flush()

    async def status(self, span: Span) -> None:
        """See `FilterDriver`."""
        self._fail_if_armed(IoType.BLOCK_STATUS, span)

    def _fail_if_armed(self, kind: IoType, span: Span) -> None:
        code = self.rules.failure(kind, span)
        if code > 0:
            raise IoFailure(code, f"node '{self.name}', {kind} at {span.at}+{span.length}, injected")


def _perms(words: list[BlockPermission] | None) -> Perm:
    perms = NONE
    for word in words or ():
        perms |= Perm[word.name]
    return perms


def _limits(options: BlkdebugOptions) -> Limits:
    align = _not_negative("align", options.align)
    if align >= _INT32_MAX or align & (align - 1):
        raise _unmet("align", align)
    align = align or 1
    transfer = _multiple("max-transfer", options.max_transfer, align)
    zero_align = _multiple("opt-write-zero", options.opt_write_zero, align) or align
    zero_max = _multiple("max-write-zero", options.max_write_zero, max(align, zero_align))
    discard_align = _multiple("opt-discard", options.opt_discard, align) or align
    discard_max = _multiple("max-discard", options.max_discard, max(align, discard_align))
    open_ended = Limits()
    return Limits(
        request_align=align,
        zero_align=zero_align,
        discard_align=discard_align,
        transfer_bytes_max=transfer or open_ended.transfer_bytes_max,
        zero_bytes_max=zero_max or open_ended.zero_bytes_max,
        discard_bytes_max=discard_max or open_ended.discard_bytes_max,
    )


def _multiple(name: str, size: int | None, of: int) -> int:
    given = _not_negative(name, size)
    if given > _INT32_MAX:
        raise ParameterError.expects(name, "int32_t")
    if given == _INT32_MAX or given % of:
        raise _unmet(name, given)
    return given


def _not_negative(name: str, size: int | None) -> int:
    if size is not None and size < 0:
        raise ParameterError.expects(name, "a non-negative number below 2^64")
    return size or 0


def _unmet(name: str, size: int) -> UsageError:
    return UsageError(f"Cannot meet constraints with {name} {size}")
