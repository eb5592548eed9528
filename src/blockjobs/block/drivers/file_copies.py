"""How bytes come from one host file to another: by the kernel alone, or past it where two threads copy at once."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Final

from blockjobs.base.buffers import aligned
from blockjobs.base.units import KiB, MiB
from blockjobs.block.drivers.host_syscalls import UNSUPPORTED, copies_bytes

COPY_RANGE_BYTES_MAX: Final = 16 * MiB
"""One copy_file_range call; the kernel may do less, never more (design §1.6: 4 to 16 MiB steps)."""
BUFFER_BYTES: Final = 256 * KiB
"""What is read fits the processor's own cache, and is written from there."""


class FileCopies:
    """Copies into one file, from any threads.

    A file system lets one writer at a time into a file, and copy_file_range keeps it all the while. So two threads that
    copy at once read into buffers: one reads while the other writes. That takes a third more processor time than
    copy_file_range in one thread, for a third less on the clock (docs/adr/0019-what-bounds-each-copy.md).

    Args:
        descriptor: of the target, open for writing, without O_DIRECT.
        on_copied: told of the place, end and number of bytes that have come, whether the call succeeded or not.
    """

    def __init__(self, descriptor: int, *, on_copied: Callable[[int, int, int], None]) -> None:
        self._descriptor, self._on_copied = descriptor, on_copied
        self._refusing: set[int] = set()
        self._under_way: list[None] = []  # whose changes are whole whatever threads do
        self._buffers: list[memoryview] = []
        self.is_faster_by_two = copies_bytes(descriptor)

    @contextmanager
    def beside_others(self) -> Iterator[None]:
        """Count a thread that copies; threads that meet here at once may take one way or the other."""
        self._under_way.append(None)
        try:
            yield
        finally:
            self._under_way.pop()

    def copy_pieces(self, source: int, pieces: Sequence[tuple[int, int, int]]) -> int:
        """Copy as many of the pieces (place there, place here, length) as go without ado.

        Returns:
            How many of the first ones are copied. What the next one needs, `copy_range` and the caller know; an error
            that is not by chance meets them, too.
        """
        if len(self._under_way) > 1 and self.is_faster_by_two:
            done = self._by_buffer(source, pieces)
        else:
            done = 0 if source in self._refusing else self._by_kernel(source, pieces)
        if done:
            _, last_at, last_length = pieces[done - 1]
            copied = sum([length for _, _, length in pieces[:done]])
            self._on_copied(pieces[0][1], last_at + last_length, copied)
        return done

    def copy_range(self, source: int, source_at: int, at: int, length: int) -> int:
        """Copy one run by copy_file_range.

        Returns:
            How many bytes: fewer if the source ends there, or if this does not work between the two files.

        Raises:
            OSError: any part may be copied.
        """
        if source in self._refusing:
            return 0
        done = count = 0
        try:
            while done < length:
                most = min(length - done, COPY_RANGE_BYTES_MAX)
                count = os.copy_file_range(source, self._descriptor, most, source_at + done, at + done)
                if count == 0:
                    break  # the source ends here: the rest reads as zeroes
                self._on_copied(at + done, at + done + count, count)
                done += count
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            self._refusing.add(source)
        finally:
            self._on_copied(at, at + length, 0)
        return done

    def _by_kernel(self, source: int, pieces: Sequence[tuple[int, int, int]]) -> int:
        copy, target = os.copy_file_range, self._descriptor
        done = 0
        with suppress(OSError):
            for source_at, at, length in pieces:
                if length > COPY_RANGE_BYTES_MAX or copy(source, target, length, source_at, at) != length:
                    break
                done += 1
        return done

    def _by_buffer(self, source: int, pieces: Sequence[tuple[int, int, int]]) -> int:
        try:
            buffer = self._buffers.pop()
        except IndexError:
            buffer = aligned(BUFFER_BYTES)
        done = 0
        try:
            for reads, at, over in fills(pieces, BUFFER_BYTES):
                filled = 0
                for source_at, length in reads:
                    if os.preadv(source, [buffer[filled : filled + length]], source_at) != length:
                        return done
                    filled += length
                if os.pwrite(self._descriptor, buffer[:filled], at) != filled:
                    return done
                done = over
        except OSError:
            pass
        finally:
            if done < len(pieces):
                self._on_copied(pieces[0][1], pieces[-1][1] + pieces[-1][2], 0)
            self._buffers.append(buffer)
        return done


def fills(pieces: Sequence[tuple[int, int, int]], room_bytes: int) -> Iterator[tuple[list[tuple[int, int]], int, int]]:
    """What fills a buffer at once, as (place, length); where that goes; how many of the pieces are over with it."""
    reads: list[tuple[int, int]] = []
    start = filled = 0
    for number, (source_at, at, length) in enumerate(pieces):
        if filled and at != start + filled:
            yield reads, start, number
            reads, filled = [], 0
        offset = 0
        while offset < length:
            if not filled:
                start = at + offset
            count = min(length - offset, room_bytes - filled)
            reads.append((source_at + offset, count))
            offset, filled = offset + count, filled + count
            if filled == room_bytes:
                yield reads, start, number + (offset == length)
                reads, filled = [], 0
    if filled:
        yield reads, start, len(pieces)
