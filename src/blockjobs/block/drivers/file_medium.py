"""A host file as a medium: positioned system calls, holes, and fallbacks that are remembered."""

import errno
import os
from typing import Final

from blockjobs.base.buffers import ALIGN, Buffer, aligned, zeroes
from blockjobs.base.units import MiB
from blockjobs.block.drivers.host_syscalls import UNSUPPORTED, Fallocate, fallocate
from blockjobs.block.medium import Allocation, Medium

COPY_RANGE_BYTES_MAX: Final = 16 * MiB
"""One copy_file_range call; the kernel may do less, never more (design §1.6: 4 to 16 MiB steps)."""
COPY_BYTES: Final = 1 * MiB
"""Buffer of a copy by reading and writing."""
IOV_MAX: Final = 1024


class FileMedium:
    """See `Medium`. Owns its descriptors.

    Args:
        descriptor: an open regular file or block device.
        direct: a second descriptor of the same file with O_DIRECT, used for whole pages; the rest, and everything that
            has no bytes, goes through the first. The kernel keeps the two coherent, as it flushes and drops cached
            pages around direct requests.
    """

    def __init__(self, descriptor: int, *, direct: int | None = None) -> None:
        self.descriptor = descriptor
        self._direct = direct
        self._dirty = False
        self._poison = 0
        self._can_punch = True
        self._can_zero_range = True
        self._can_seek_holes = True
        self._no_copy_range: set[int] = set()

    def read_into(self, at: int, buffer: memoryview) -> None:
        """See `Medium`."""
        if self._direct is not None and at % ALIGN == 0 and len(buffer) % ALIGN == 0:
            bounce = aligned(len(buffer))
            self._read(self._direct, at, bounce)
            buffer[:] = bounce
        else:
            self._read(self.descriptor, at, buffer)

    def _read(self, descriptor: int, at: int, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            count = os.preadv(descriptor, [buffer[done:]], at + done)
            if count == 0:
                buffer[done:] = bytes(len(buffer) - done)
                return
            done += count
            if descriptor == self._direct and done % ALIGN:
                descriptor = self.descriptor  # the last page of the file is a partial one

    def write(self, at: int, content: Buffer) -> None:
        """See `Medium`."""
        view = memoryview(content)
        if self._direct is not None and at % ALIGN == 0 and len(view) % ALIGN == 0 and len(view):
            bounce = aligned(len(view))
            bounce[:] = view
            self._write(self._direct, at, bounce)
        else:
            self._write(self.descriptor, at, view)

    def _write(self, descriptor: int, at: int, view: memoryview) -> None:
        try:
            done = 0
            while done < len(view):
                done += os.pwrite(descriptor, view[done:] if done else view, at + done)
        finally:
            self._dirty = True

    def writev(self, at: int, contents: list[Buffer]) -> None:
        """See `Medium`."""
        if len(contents) == 1 or self._direct is not None:
            self.write(at, contents[0] if len(contents) == 1 else b"".join(contents))
            return
        views = [memoryview(content) for content in contents if len(content)]
        try:
            while views:
                count = os.pwritev(self.descriptor, views[:IOV_MAX], at)
                at += count
                while views and count >= len(views[0]):
                    count -= len(views.pop(0))
                if count:
                    views[0] = views[0][count:]
        finally:
            self._dirty = True

    def zero(self, at: int, length: int, *, unmap: bool) -> None:
        """See `Medium`."""
        if not length:
            return
        self._dirty = True
        if unmap and self._punch(at, length):
            if at + length > self.size():
                self.truncate(at + length)
            return
        if self._zero_range(at, length):
            return
        end = at + length
        while at < end:
            piece = min(COPY_BYTES, end - at)
            self.write(at, zeroes(piece))
            at += piece

    def _punch(self, at: int, length: int) -> bool:
        if not self._can_punch:
            return False
        try:
            fallocate(self.descriptor, Fallocate.PUNCH_HOLE | Fallocate.KEEP_SIZE, at, length)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            self._can_punch = False
            return False
        return True

    def _zero_range(self, at: int, length: int) -> bool:
        if not self._can_zero_range:
            return False
        try:
            fallocate(self.descriptor, Fallocate.ZERO_RANGE, at, length)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            self._can_zero_range = False
            return False
        return True

    def discard(self, at: int, length: int) -> None:
        """See `Medium`."""
        length = min(length, self.size() - at)
        if length > 0:
            self._dirty = True
            self._punch(at, length)

    def copy_from(self, source: Medium, source_at: int, at: int, length: int) -> None:
        """See `Medium`. By copy_file_range between files where the kernel can, else through a buffer."""
        if isinstance(source, FileMedium) and source.descriptor not in self._no_copy_range and self._direct is None:
            copied = self._copy_range(source, source_at, at, length)
            source_at, at, length = source_at + copied, at + copied, length - copied
        if not length:
            return
        buffer = aligned(min(length, COPY_BYTES))
        while length:
            piece = buffer[: min(length, COPY_BYTES)]
            source.read_into(source_at, piece)
            self.write(at, piece)
            source_at, at, length = source_at + len(piece), at + len(piece), length - len(piece)

    def _copy_range(self, source: "FileMedium", source_at: int, at: int, length: int) -> int:
        done = 0
        try:
            while done < length:
                count = os.copy_file_range(
                    source.descriptor,
                    self.descriptor,
                    min(length - done, COPY_RANGE_BYTES_MAX),
                    source_at + done,
                    at + done,
                )
                if count == 0:
                    break  # the source ends here: the rest reads as zeroes
                done += count
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            self._no_copy_range.add(source.descriptor)
        finally:
            self._dirty = True
        return done

    def allocations(self, at: int, length: int) -> list[Allocation]:
        """See `Medium`. Past the end of the file there is a hole."""
        end = at + length
        runs: list[Allocation] = []
        while at < end:
            is_data, until = self._run_at(at, end)
            runs.append(Allocation(at, until - at, is_data))
            at = until
        return runs

    def _run_at(self, at: int, end: int) -> tuple[bool, int]:
        if not self._can_seek_holes:
            return True, end
        try:
            data_at = os.lseek(self.descriptor, at, os.SEEK_DATA)
            if data_at > at:
                return False, min(data_at, end)
            return True, min(os.lseek(self.descriptor, at, os.SEEK_HOLE), end)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return False, end  # only holes up to the end of the file, or beyond it
            if error.errno not in UNSUPPORTED:
                raise
            self._can_seek_holes = False
            return True, end

    def sync(self) -> None:
        """See `Medium`. Free if nothing was written since the last one."""
        if self._poison:
            raise OSError(self._poison, os.strerror(self._poison))
        if not self._dirty:
            return
        self._dirty = False
        try:
            os.fdatasync(self.descriptor)
        except OSError as error:
            # The kernel has dropped the pages and the error: a second fdatasync would lie (durability I8).
            self._poison = error.errno or errno.EIO
            raise

    def truncate(self, length: int) -> None:
        """See `Medium`."""
        os.ftruncate(self.descriptor, length)
        self._dirty = True

    def size(self) -> int:
        """See `Medium`."""
        # fstat and not lseek: the file position is shared with SEEK_DATA users in other threads, and this is faster.
        status = os.fstat(self.descriptor)
        if status.st_size or not is_block_device(status.st_mode):
            return status.st_size
        return os.lseek(self.descriptor, 0, os.SEEK_END)

    def allocated_size(self) -> int:
        """See `Medium`."""
        return os.fstat(self.descriptor).st_blocks * 512

    def close(self) -> None:
        """See `Medium`."""
        os.close(self.descriptor)
        if self._direct is not None:
            os.close(self._direct)


def is_block_device(mode: int) -> bool:
    """Whether a mode of stat(2) is that of a block device."""
    return (mode & 0o170000) == 0o060000
