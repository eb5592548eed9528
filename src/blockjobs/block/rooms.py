"""Memory for the chunks of copies that go by ordinary requests."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

KEPT_BYTES_MAX: Final = 32 << 20


class Rooms:
    """Keeps chunks for the next time, because fresh memory costs a page fault every four KiB.

    All copies of a graph share them: a thousand jobs that wait for their rate limits must not hold a chunk each.
    """

    def __init__(self) -> None:
        self._kept: list[memoryview] = []  # newest last
        self._kept_bytes = 0

    @contextmanager
    def room(self, length: int) -> Iterator[memoryview]:
        """Memory of `length` bytes inside the block, with anything in it."""
        room = self._take(length)
        try:
            yield room
        finally:
            self._kept.append(room)
            self._kept_bytes += length
            while self._kept_bytes > KEPT_BYTES_MAX:
                self._kept_bytes -= len(self._kept.pop(0))

    def _take(self, length: int) -> memoryview:
        for index in range(len(self._kept) - 1, -1, -1):
            if len(self._kept[index]) == length:
                self._kept_bytes -= length
                return self._kept.pop(index)
        return memoryview(bytearray(length))
