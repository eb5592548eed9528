"""A host file as a medium: positioned system calls, holes, and fallbacks that are remembered."""

import errno
import fcntl
import os
from collections.abc import Callable, Sequence
from functools import cached_property, wraps
from itertools import accumulate
from typing import TYPE_CHECKING, Concatenate, Final, ParamSpec, TypeVar

from blockjobs.base.buffers import ALIGN, Buffer, aligned, zeroes
from blockjobs.base.clock import Clock, SystemClock
from blockjobs.base.offload import Starter
from blockjobs.base.units import MiB
from blockjobs.block.drivers.early_writeback import EarlyWriteback
from blockjobs.block.drivers.file_holes import FileHoles
from blockjobs.block.drivers.host_syscalls import (
    UNSUPPORTED,
    Fallocate,
    fallocate,
    is_in_memory,
    is_simple_to_close,
    thread_waits,
)
from blockjobs.block.medium import Allocation, Medium

PIECES_MAX: Final = 64
"""So many pieces are copied before the loop's thread is told again that somebody is at work."""
if TYPE_CHECKING:
    from blockjobs.block.drivers.file_copies import FileCopies

COPY_BYTES: Final = 1 * MiB
"""Buffer of a copy by reading and writing."""
CACHED_READ_BYTES_MAX: Final = 128 << 10
"""Reads up to this size are first tried without leaving the loop's thread: copying them takes less than a hop."""
PEEKS_MAX: Final = 256
"""Every so many short requests one takes the hop nevertheless, so that the loop turns and others get their share."""
CACHED_WRITE_BYTES_MAX: Final = 64 << 10
"""Writes up to this size are copied into the page cache by the loop's thread itself."""
SLOW_WRITE_NS: Final = 10_000_000
"""A write that takes longer has waited for something: for memory to be cleaned, or for a processor."""
WATCH_NS: Final = 2_000_000_000
"""So long after a slow write it is looked at whether the next slow ones sleep or are only interrupted."""
HOP_NS_MIN: Final = 500_000_000
HOP_NS_MAX: Final = 8_000_000_000
"""So long the loop's thread keeps away from a file after a slow write, and twice as long after the next slow one."""
HUNG_NS: Final = 1_000_000_000
"""While a worker waits longer than this for a file, the loop's thread keeps away: its storage may not answer at all."""
IOV_MAX: Final = 1024

Params = ParamSpec("Params")
Result = TypeVar("Result")


def _watched(
    work: Callable[Concatenate["FileMedium", Params], Result],
) -> Callable[Concatenate["FileMedium", Params], Result]:
    """Let the loop's thread see that a worker is at `work`, and since when."""

    @wraps(work)
    def watched(self: "FileMedium", /, *args: Params.args, **named: Params.kwargs) -> Result:
        mark = object()
        self._at_work[mark] = self._clock.now_ns()
        try:
            return work(self, *args, **named)
        finally:
            del self._at_work[mark]

    return watched


class FileMedium(Medium):
    """See `Medium`. Owns its descriptors, and believes that nobody else changes the file's size.

    Args:
        descriptor: an open regular file or block device.
        direct: a second descriptor of the same file with O_DIRECT, used for whole pages; the rest, and everything that
            has no bytes, goes through the first. The kernel keeps the two coherent, as it flushes and drops cached
            pages around direct requests.
        is_flushed: whether anybody will wait for what is written to be on disk.
        start: see `EarlyWriteback`.
        clock: by which slow writes are noticed.

    Attributes:
        writeback: which is begun while a copy goes on.
    """

    def __init__(
        self,
        descriptor: int,
        *,
        direct: int | None = None,
        is_flushed: bool = True,
        start: Starter | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.descriptor = descriptor
        in_memory = is_in_memory(descriptor)
        self.writeback = EarlyWriteback(descriptor, has_disk=not in_memory, is_wanted=is_flushed, start=start)
        self._holes = FileHoles(descriptor)
        self._clock = clock or SystemClock()
        self._direct = direct
        self._dirty = False
        self._poison = 0
        self._can_punch = True
        self._can_zero_range = True
        self._can_preallocate = not in_memory
        self._can_peek = direct is None
        self._peek_flags = 0 if in_memory else os.RWF_NOWAIT  # tmpfs does not know the flag, and need not
        self._peeks = 0
        self._hop_until_ns = self._watch_until_ns = 0
        self._hop_ns = HOP_NS_MIN
        self._at_work: dict[object, int] = {}
        self._known_copies: FileCopies | None = None
        self._size: int | None = None
        self._growths = 0

    @property
    def read_only(self) -> bool:
        """Whether the descriptor was opened for reading only."""
        return fcntl.fcntl(self.descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY

    @property
    def is_direct(self) -> bool:
        """Whether the page cache is bypassed where possible."""
        return self._direct is not None

    def is_same_as(self, other: Medium) -> bool:
        """See `Medium`: one file, opened twice."""
        return isinstance(other, FileMedium) and self._inode == other._inode

    @cached_property
    def _inode(self) -> tuple[int, int]:
        found = os.fstat(self.descriptor)
        return found.st_dev, found.st_ino

    def read_into(self, at: int, buffer: memoryview) -> None:
        """See `Medium`."""
        if self._direct is not None and at % ALIGN == 0 and len(buffer) % ALIGN == 0:
            bounce = aligned(len(buffer))
            self._read(self._direct, at, bounce)
            buffer[:] = bounce
        else:
            self._read(self.descriptor, at, buffer)

    def read_cached(self, at: int, buffer: memoryview) -> bool:
        """See `Medium`: without ever waiting, if all of it is in the page cache."""
        self._peeks += 1
        if not self._can_peek or self._peeks % PEEKS_MAX == 0:
            return False
        try:
            return os.preadv(self.descriptor, [buffer], at, self._peek_flags) == len(buffer)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno in UNSUPPORTED:
                self._can_peek = False
            return False

    def write_cached(self, at: int, contents: Sequence[Buffer]) -> bool:
        """See `Medium`: a copy into the page cache.

        The kernel may still make the writer sleep, when too much memory is dirty: if that is seen, the next writes take
        the hop for a while, so that the loop rarely stands still.
        """
        length = len(contents[0]) if len(contents) == 1 else sum(map(len, contents))
        self._peeks += 1
        if length > CACHED_WRITE_BYTES_MAX or self._direct is not None or self._peeks % PEEKS_MAX == 0:
            return False
        began_ns = self._clock.now_ns()
        if began_ns < self._hop_until_ns or at + length > self.size():
            return False
        if self._at_work and began_ns - min(list(self._at_work.values()), default=began_ns) > HUNG_NS:
            return False
        waits = thread_waits() if began_ns < self._watch_until_ns else None
        try:
            done = os.pwritev(self.descriptor, contents, at)
            if done < length:  # the disk is full, and what follows will say so
                self._write(self.descriptor, at + done, memoryview(b"".join(contents))[done:])
        finally:
            self._changed(at + length)
        if self._clock.now_ns() - began_ns > SLOW_WRITE_NS:
            self._was_slow(slept=waits is not None and thread_waits() > waits)
        return True

    def _was_slow(self, *, slept: bool) -> None:
        now_ns = self._clock.now_ns()
        if slept:
            self._hop_until_ns = now_ns + self._hop_ns
            self._hop_ns = min(2 * self._hop_ns, HOP_NS_MAX)
        elif now_ns >= self._watch_until_ns:
            self._hop_ns = HOP_NS_MIN
        self._watch_until_ns = max(now_ns, self._hop_until_ns) + WATCH_NS

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

    @_watched
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
            self._changed(at + len(view))

    @_watched
    def writev(self, at: int, contents: list[Buffer]) -> None:
        """See `Medium`."""
        if len(contents) == 1 or self._direct is not None:
            self.write(at, contents[0] if len(contents) == 1 else b"".join(contents))
            return
        views = [memoryview(content) for content in contents if len(content)]
        end = at + sum(len(view) for view in views)
        try:
            while views:
                count = os.pwritev(self.descriptor, views[:IOV_MAX], at)
                at += count
                while views and count >= len(views[0]):
                    count -= len(views.pop(0))
                if count:
                    views[0] = views[0][count:]
        finally:
            self._changed(end)

    def _on_copied(self, at: int, end: int, count_bytes: int) -> None:
        """So many bytes have come to places between `at` and `end`, if any. Called from any thread."""
        self._changed(end)
        if count_bytes:
            self.writeback.copied(at, end, count_bytes)

    def _changed(self, end: int) -> None:
        """Bytes up to `end` may have been written. Called after the fact, from any thread."""
        self._dirty = True
        if self._size is None or end > self._size:
            self._growths += 1
            self._size = None

    @property
    def zeroes_fast(self) -> bool:
        """Whether the file system can zero runs, as far as is known."""
        return self._can_punch or self._can_zero_range

    @_watched
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
            self._changed(at + length)
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
        finally:
            self._holes.forget()
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
        finally:
            self._holes.forget()
        return True

    def discard(self, at: int, length: int) -> None:
        """See `Medium`."""
        length = min(length, self.size() - at)
        if length > 0:
            self._dirty = True
            self._punch(at, length)

    def preallocate(self, at: int, length: int) -> None:
        """See `Medium`. Copying page by page into space that exists costs a fifth less on ext4, and more on tmpfs."""
        if self._can_preallocate:
            try:
                fallocate(self.descriptor, Fallocate.KEEP_SIZE, at, length)
            except OSError:
                self._can_preallocate = False  # not known here, or no space: the writes will tell

    @property
    def _copies(self) -> "FileCopies":
        """How others are copied to it: few files are ever copied to."""
        if self._known_copies is None:
            from blockjobs.block.drivers.file_copies import FileCopies

            self._known_copies = FileCopies(self.descriptor, on_copied=self._on_copied)
        return self._known_copies

    @property
    def is_faster_by_two(self) -> bool:
        """See `Medium`."""
        return self._direct is None and self._copies.is_faster_by_two

    @_watched
    def copy_from(self, source: Medium, source_at: int, at: int, length: int) -> None:
        """See `Medium`. By copy_file_range between files where the kernel can, else through a buffer."""
        if isinstance(source, FileMedium) and self._direct is None:
            copied = self._copies.copy_range(source.descriptor, source_at, at, length)
            source_at, at, length = source_at + copied, at + copied, length - copied
            if not length:
                return
        self._fill_from(source, [(source_at, at, length)])

    def gather_from(self, source: Medium, pieces: Sequence[tuple[int, int]], at: int) -> None:
        """See `Medium`."""
        places = accumulate([length for _, length in pieces], initial=at)
        placed = zip(pieces, places, strict=False)  # there is one more place, behind the last piece
        self.scatter_from(source, [(source_at, place, length) for (source_at, length), place in placed])

    def scatter_from(self, source: Medium, pieces: Sequence[tuple[int, int, int]]) -> None:
        """See `Medium`."""
        if not isinstance(source, FileMedium) or self._direct is not None:
            self._fill_from(source, pieces)
            return
        done = 0
        with self._copies.beside_others():
            while done < len(pieces):
                some = pieces[done : done + PIECES_MAX]
                count = self._copy_pieces(source, some)
                if count < len(some):
                    source_at, at, length = some[count]
                    self.copy_from(source, source_at, at, length)
                    count += 1
                done += count

    def _fill_from(self, source: Medium, pieces: Sequence[tuple[int, int, int]]) -> None:
        """The same from what is no file, or past the page cache: a buffer is filled, and written at once."""
        from blockjobs.block.drivers.file_copies import fills

        # Not kept for the next time: a thousand copies that wait for their limits would keep as many of them. A fresh
        # mapping would cost a page fault every four KiB; the allocator gives memory that has been in use.
        room = memoryview(bytearray(min(COPY_BYTES, sum(length for _, _, length in pieces))))
        for reads, at, _ in fills(pieces, COPY_BYTES):
            part = room[: sum(length for _, length in reads)]
            source.read_many_into(reads, part)
            self.write(at, part)
            self.writeback.copied(at, at + len(part), len(part))

    @_watched
    def _copy_pieces(self, source: "FileMedium", pieces: Sequence[tuple[int, int, int]]) -> int:
        return self._copies.copy_pieces(source.descriptor, pieces)

    def read_ahead(self, pieces: Sequence[tuple[int, int]]) -> None:
        """See `Medium`. From a disk the pieces are read side by side, in the kernel's order, not one after another.

        Unless a sample of them is in the page cache.
        """
        if not self._can_peek:
            return
        byte = bytearray(1)
        try:
            for at, _ in (pieces[0], pieces[len(pieces) // 2], pieces[-1]):
                os.preadv(self.descriptor, [byte], at, self._peek_flags)
        except BlockingIOError:
            for at, length in pieces:
                os.posix_fadvise(self.descriptor, at, length, os.POSIX_FADV_WILLNEED)
        except OSError as error:
            if error.errno in UNSUPPORTED:
                self._can_peek = False

    def allocations(self, at: int, length: int) -> list[Allocation]:
        """See `Medium`. Past the end of the file there is a hole."""
        end = at + length
        runs: list[Allocation] = []
        for start, data_bytes in zip(*self._holes.data_runs(at, length, length), strict=True):
            if start > at:
                runs.append(Allocation(at, start - at, False))
            runs.append(Allocation(start, data_bytes, True))
            at = start + data_bytes
        if end > at:
            runs.append(Allocation(at, end - at, False))
        return runs

    def data_runs(self, at: int, length: int, enough_bytes: int) -> tuple[list[int], list[int]]:
        """See `Medium`."""
        return self._holes.data_runs(at, length, enough_bytes)

    @_watched
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
        try:
            os.ftruncate(self.descriptor, length)
        finally:
            self._holes.forget()
            self._size = None
            self._changed(length)

    def size(self) -> int:
        """See `Medium`."""
        if (known := self._size) is not None:
            return known
        # The answer is kept only if no thread has changed the size since the question (they count afterwards).
        growths = self._growths
        status = os.fstat(self.descriptor)
        length = status.st_size
        if not length and is_block_device(status.st_mode):
            length = os.lseek(self.descriptor, 0, os.SEEK_END)
        if growths == self._growths:
            self._size = length
        return length

    def unwritten_at(self) -> int:
        """See `Medium`: the kernel fills a file with zeroes wherever it grows."""
        return self.size()

    def allocated_size(self) -> int:
        """See `Medium`."""
        return os.fstat(self.descriptor).st_blocks * 512

    @property
    def closes_at_once(self) -> bool:
        """Whether `close` waits for nothing: no server, no dirty page of ours, no deleted content to be freed."""
        return not self._dirty and self._direct is None and is_simple_to_close(self.descriptor)

    def close(self) -> None:
        """See `Medium`."""
        self.writeback.end()
        os.close(self.descriptor)
        if self._direct is not None:
            os.close(self._direct)


def is_block_device(mode: int) -> bool:
    """Whether a mode of stat(2) is that of a block device."""
    return (mode & 0o170000) == 0o060000
