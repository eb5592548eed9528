"""Memory for the chunks of a copy that goes by ordinary requests."""

from collections.abc import Iterator
from contextlib import contextmanager


class Rooms:
    """Keeps full-size chunks for the next time, because fresh memory costs a page fault every four KiB.

    Short chunks, as of a job with a low rate limit, live as long as their copy: a thousand of those jobs would hold a
    GiB.
    """

    def __init__(self) -> None:
        self._kept: list[memoryview] = []

    @contextmanager
    def room(self, length: int, full_length: int) -> Iterator[memoryview]:
        """Memory of `length` bytes inside the block.

        Args:
            length: what the longest chunk needs.
            full_length: how long chunks of this copy may become.
        """
        self._kept = [room for room in self._kept if len(room) == full_length]
        is_kept = length == full_length
        room = self._kept.pop() if is_kept and self._kept else memoryview(bytearray(length))
        try:
            yield room
        finally:
            if is_kept:
                self._kept.append(room)
