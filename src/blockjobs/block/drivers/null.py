"""The `null-co` and `null-aio` drivers: a disk that forgets, for measurements and tests."""

from typing import ClassVar, Self

from blockjobs.base.buffers import Buffer
from blockjobs.base.clock import Clock
from blockjobs.base.errors import ParameterError, UsageError
from blockjobs.base.span import Span
from blockjobs.base.units import GiB
from blockjobs.block.driver import Child, OpenContext, ProtocolDriver
from blockjobs.block.options import NodeOptions, driver
from blockjobs.block.vocabulary import LENGTH_MAX, Kind, Segment, ZeroMode
from blockjobs.schema.types import UInt64


class NullCoOptions(NodeOptions, frozen=True, kw_only=True, tag="null-co"):
    """A disk without a medium."""

    size: int | None = None
    latency_ns: UInt64 | None = None
    read_zeroes: bool | None = None


class NullAioOptions(NodeOptions, frozen=True, kw_only=True, tag="null-aio"):
    """The same under its other name."""

    size: int | None = None
    latency_ns: UInt64 | None = None
    read_zeroes: bool | None = None


@driver(NullCoOptions)
class NullCo(ProtocolDriver):
    """Answers each request after a fixed latency. Reads leave the buffer as it is unless `read-zeroes` is on."""

    open_ended = False
    reopenable: ClassVar[frozenset[str] | None] = frozenset()

    def __init__(self, *, length: int, latency_ns: int, reads_zeroes: bool, clock: Clock) -> None:
        self.children = {}
        self._length, self._latency_ns, self._reads_zeroes, self._clock = length, latency_ns, reads_zeroes, clock

    @classmethod
    async def open(
        cls, options: NullCoOptions | NullAioOptions, children: dict[str, Child], context: OpenContext
    ) -> Self:
        """See `Driver`.

        Raises:
            UsageError: a size or a latency that is no such thing.
        """
        del children
        if options.size is not None and options.size < 0:
            raise ParameterError.expects("size", "a non-negative number below 2^64")  # QEMU 7.2 dies of it
        if options.size is not None and options.size > LENGTH_MAX:
            raise UsageError("Could not refresh total sector count: File too large")
        if options.latency_ns is not None and options.latency_ns >= 1 << 63:
            raise UsageError("latency-ns is invalid")
        length = GiB if options.size is None else -(-options.size // 512) * 512
        latency_ns = options.latency_ns or 0
        return cls(length=length, latency_ns=latency_ns, reads_zeroes=bool(options.read_zeroes), clock=context.clock)

    @property
    def length(self) -> int:
        """As given."""
        return self._length

    async def read_into(self, at: int, buffer: memoryview) -> None:
        """See `ProtocolDriver`."""
        del at
        if self._reads_zeroes:
            buffer[:] = bytes(len(buffer))
        await self._wait()

    async def write(self, at: int, content: Buffer, *, fua: bool) -> None:
        """See `ProtocolDriver`."""
        del at, content, fua
        await self._wait()

    async def zero(self, span: Span, mode: ZeroMode) -> None:
        """See `ProtocolDriver`."""
        del span, mode
        await self._wait()

    async def discard(self, span: Span) -> None:
        """See `ProtocolDriver`."""
        del span
        await self._wait()

    async def flush(self) -> None:
        """See `ProtocolDriver`."""
        await self._wait()

    async def status(self, span: Span) -> list[Segment]:
        """See `ProtocolDriver`: zeroes only if reads promise them."""
        return [Segment(span.at, span.length, Kind.ZERO if self._reads_zeroes else Kind.DATA, "", span.at)]

    async def resize(self, length: int) -> None:
        """See `ProtocolDriver`: there is nothing to resize."""
        del length
        raise UsageError("Image format driver does not support resize")

    def info(self) -> dict[str, object]:
        """See `Driver`."""
        return {"actual-size": 0}

    async def _wait(self) -> None:
        if self._latency_ns:
            await self._clock.sleep_until(self._clock.now_ns() + self._latency_ns)


@driver(NullAioOptions)
class NullAio(NullCo):
    """See `NullCo`."""
