"""Memory for payload: long buffers are used again, since fresh ones cost the kernel as much as the copying."""

from typing import Final

from blockjobs.base.buffers import aligned
from blockjobs.base.units import KiB, MiB

SHORT_BYTES_MAX: Final = 128 * KiB
COPY_ALIGN: Final = 64
"""Where the kernel copies to should begin at a multiple of this: on common processors that is three times as fast."""
POOLED_BYTES: Final = 1 * MiB + 4 * KiB
"""A mebibyte and the header in front of it: what programs that copy disks ask for."""
POOLED_MAX: Final = 8
REPLIES_BYTES: Final = 256 * KiB
"""Of the replies to short requests that are sent in one piece."""


class Buffers:
    """Lends buffers to all clients of a server; those of ordinary length come back.

    Attributes:
        replies: for whoever fills it and sends it off within one step of the loop.
    """

    def __init__(self) -> None:
        self.replies = aligned(REPLIES_BYTES)
        self._free: list[memoryview] = []

    def lend(self, length: int, *, head: int = 0) -> bytearray | memoryview:
        """A writable buffer; what it holds is unspecified.

        Args:
            length: of the payload, in bytes.
            head: so many bytes more in front of it, fewer than `COPY_ALIGN`.
        """
        assert head < COPY_ALIGN
        if length <= SHORT_BYTES_MAX:
            return bytearray(head + length)
        start = COPY_ALIGN - head if head else 0
        behind = start + head + length
        if behind > POOLED_BYTES:
            return aligned(behind)[start:]
        whole = self._free.pop() if self._free else aligned(POOLED_BYTES)
        return whole[start:behind]

    def take_back(self, buffer: object) -> None:
        """A buffer that nobody looks at any more; others than those lent are ignored."""
        if not isinstance(buffer, memoryview) or not SHORT_BYTES_MAX < len(buffer) <= POOLED_BYTES:
            return
        if len(self._free) < POOLED_MAX:
            self._free.append(memoryview(buffer.obj)[:POOLED_BYTES])
