"""Memory for payload: long buffers are used again, since fresh ones cost the kernel as much as the copying."""

from typing import Final

from blockjobs.base.buffers import aligned
from blockjobs.base.units import KiB, MiB

SHORT_BYTES_MAX: Final = 128 * KiB
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

    def lend(self, length: int) -> bytearray | memoryview:
        """A writable buffer; what it holds is unspecified."""
        if length <= SHORT_BYTES_MAX:
            return bytearray(length)
        if length > POOLED_BYTES:
            return aligned(length)
        whole = self._free.pop() if self._free else aligned(POOLED_BYTES)
        return whole[:length]

    def take_back(self, buffer: object) -> None:
        """A buffer that nobody looks at any more; others than those lent are ignored."""
        if not isinstance(buffer, memoryview) or not SHORT_BYTES_MAX < len(buffer) <= POOLED_BYTES:
            return
        if len(self._free) < POOLED_MAX:
            self._free.append(memoryview(buffer.obj)[:POOLED_BYTES])
