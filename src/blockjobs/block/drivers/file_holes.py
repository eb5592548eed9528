"""Where a host file has bytes, as the kernel tells by SEEK_DATA and SEEK_HOLE."""

import errno
import os

from blockjobs.block.drivers.host_syscalls import UNSUPPORTED


class FileHoles:
    """The holes of one file.

    The last run of bytes is remembered: a file system may have to walk through all of it to find its end (tmpfs does,
    page by page), and a copy asks again for each of its batches. Holes are not remembered, because anybody may fill
    them; and a run that has become a hole since, by another program, still reads as what it is.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._can_seek = True
        self._changes = 0
        self._known = 0, 0, 0  # the changes before it was asked for, where it begins and ends

    def forget(self) -> None:
        """What was bytes may be a hole now; call it after the change, from any thread."""
        self._changes += 1

    def data_runs(self, at: int, length: int, enough_bytes: int) -> tuple[list[int], list[int]]:
        """See `Medium.data_runs`. Past the end of the file there is a hole."""
        starts: list[int] = []
        lengths: list[int] = []
        end, found = at + length, 0
        while at < end and found <= enough_bytes:
            start, at = self._next(at, end)
            if at > start:
                starts.append(start)
                lengths.append(at - start)
                found += at - start
        return starts, lengths

    def _next(self, at: int, end: int) -> tuple[int, int]:
        """Where the next run of bytes begins and ends, both `end` if there is none before."""
        changes, start, stop = self._known
        if start <= at < stop and changes == self._changes:
            return at, min(stop, end)
        if not self._can_seek:
            return at, end
        changes = self._changes
        try:
            start = os.lseek(self._descriptor, at, os.SEEK_DATA)
            if start >= end:
                return end, end
            stop = os.lseek(self._descriptor, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return end, end  # only holes up to the end of the file, or beyond it
            if error.errno not in UNSUPPORTED:
                raise
            self._can_seek = False
            return at, end
        if stop > end:
            self._known = changes, start, stop
        return start, min(stop, end)
