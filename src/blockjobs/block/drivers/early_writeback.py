"""Bytes of a copy are written to the disk while the rest is copied, so that the last flush finds little to do."""

from functools import partial
from typing import Final

from blockjobs.base.offload import Started, Starter
from blockjobs.base.units import MiB
from blockjobs.block.drivers.host_syscalls import start_writeback

WRITEBACK_BYTES: Final = 16 * MiB
"""So much copied, the kernel is told to begin writing: the flush at the end of a copy takes half as long as without."""


class EarlyWriteback:
    """Hints about one file.

    Args:
        has_disk: there is something behind the page cache.
        start: has a hint given in another thread. A disk whose queue is full holds whoever gives it up, for a third of
            a second at times, and the copy must not stand still meanwhile. Without it the copying thread gives it.

    Attributes:
        is_wanted: somebody will wait for the bytes to be on disk. Whoever drops flushes will not, and would only wait
            for the disk at the hints.
    """

    def __init__(self, descriptor: int, *, has_disk: bool, is_wanted: bool, start: Starter | None = None) -> None:
        self.is_wanted = is_wanted
        self._start_hint = start
        self._under_way: Started | None = None
        self._descriptor, self._has_disk = descriptor, has_disk
        self._bytes = self._start = self._end = 0

    def copied(self, at: int, end: int, count_bytes: int) -> None:
        """So many bytes were copied to places between `at` and `end`: have them written soon.

        Threads that meet here only make the hint less exact.
        """
        if not (self.is_wanted and self._has_disk):
            return
        if not self._bytes or at < self._start:
            self._start = at
        if not self._bytes or end > self._end:
            self._end = end
        self._bytes += count_bytes
        if self._bytes < WRITEBACK_BYTES or (self._under_way is not None and not self._under_way.done()):
            return
        self._bytes = 0
        hint = partial(start_writeback, self._descriptor, self._start, self._end - self._start)
        if self._start_hint is None:
            hint()
        else:
            self._under_way = self._start_hint(hint)

    def end(self) -> None:
        """Return when no hint is under way: call it before the file is closed. Blocks, so call it in a worker."""
        if self._under_way is not None and not self._under_way.cancel():
            self._under_way.exception()
