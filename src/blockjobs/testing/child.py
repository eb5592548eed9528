"""A node's worth of memory, for tests of one driver without a graph."""

from blockjobs.base.buffers import Buffer
from blockjobs.base.span import Span
from blockjobs.block.vocabulary import ZeroMode


class MemoryChild:
    """A `Child` over a growing bytearray. `log` has every change in order: ("write", at, bytes), ("flush",), ...

    Attributes:
        fail_at: raise `error` at the change with this number (counted as in `log`), once.
    """

    open_ended = True
    filename = "memory"

    def __init__(self, content: bytes = b"", name: str = "file") -> None:
        self.name = name
        self.content = bytearray(content)
        self.log: list[tuple[object, ...]] = []
        self.fail_at: int | None = None
        self.error: Exception = OSError(5, "Input/output error")

    @property
    def length(self) -> int:
        """Bytes stored so far."""
        return len(self.content)

    def _record(self, *change: object) -> None:
        if self.fail_at == len(self.log):
            self.fail_at = None
            raise self.error
        self.log.append(change)

    async def read(self, at: int, length: int) -> bytes:
        """What lies past the end is zeroes."""
        return bytes(self.content[at : at + length]).ljust(length, b"\0")

    async def read_into(self, at: int, buffer: memoryview) -> None:
        """See `read`."""
        buffer[:] = await self.read(at, len(buffer))

    async def write(self, at: int, content: Buffer, *, fua: bool = False) -> None:
        """Grows where needed."""
        del fua
        self._record("write", at, bytes(content))
        self.content.extend(bytes(max(0, at + len(content) - len(self.content))))
        self.content[at : at + len(content)] = content

    async def zero(self, span: Span, *, mode: ZeroMode = ZeroMode.UNMAP) -> None:
        """Grows where needed."""
        del mode
        self._record("zero", span.at, span.length)
        self.content.extend(bytes(max(0, span.end - len(self.content))))
        self.content[span.at : span.end] = bytes(span.length)

    async def discard(self, span: Span) -> None:
        """Only recorded: the content stays."""
        self._record("discard", span.at, span.length)

    async def flush(self) -> None:
        """Only recorded."""
        self._record("flush")

    async def resize(self, length: int) -> None:
        """Cut off, or append zeroes."""
        self._record("resize", length)
        del self.content[length:]
        self.content.extend(bytes(length - len(self.content)))

    def debug_event(self, event: str) -> None:
        """Nobody listens."""
        del event
