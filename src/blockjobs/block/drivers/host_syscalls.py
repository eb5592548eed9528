"""System calls that Python's os module lacks, by ctypes: fallocate with modes, early writeback, openat2, OFD locks."""

import ctypes
import errno
import fcntl
import os
import resource
import stat
import struct
from enum import IntFlag
from typing import Final

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong]
_libc.sync_file_range.argtypes = [ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong, ctypes.c_uint]
_libc.fstatfs.argtypes = [ctypes.c_int, ctypes.c_char_p]
_libc.syscall.restype = ctypes.c_long

SYS_OPENAT2: Final = 437  # the same on every architecture, as all calls added since Linux 5.0
SYNC_FILE_RANGE_WRITE: Final = 2
_STATFS_BYTES: Final = 256  # more than struct statfs has anywhere; it begins with the type, a long
_TMPFS: Final = 0x01021994
_EXT4: Final = 0xEF53
_BTRFS: Final = 0x9123683E
_CLOSES_AT_ONCE: Final = frozenset({_TMPFS, _EXT4, _BTRFS})
F_OFD_GETLK: Final = getattr(fcntl, "F_OFD_GETLK", 36)
F_OFD_SETLK: Final = getattr(fcntl, "F_OFD_SETLK", 37)


class Fallocate(IntFlag):
    """Modes of fallocate(2)."""

    KEEP_SIZE = 1
    PUNCH_HOLE = 2
    ZERO_RANGE = 16


class Resolve(IntFlag):
    """How openat2(2) may walk."""

    NO_MAGICLINKS = 2
    BENEATH = 8


UNSUPPORTED: Final = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY, errno.EINVAL, errno.EPERM, errno.EXDEV})
"""Answers by which a kernel or file system says that it does not know a call or cannot do it here."""


def fallocate(descriptor: int, mode: Fallocate, at: int, length: int) -> None:
    """Allocate, punch or zero a run of a file, as the system call of that name does.

    Raises:
        OSError: with the system's errno.
    """
    while _libc.fallocate(descriptor, int(mode), at, length) != 0:
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def start_writeback(descriptor: int, at: int, length: int) -> None:
    """Let the kernel begin to write the dirty pages of a run, without waiting for them; a hint that may fail unseen.

    It makes nothing durable: that remains fdatasync's work, which then finds less to do.
    """
    _libc.sync_file_range(descriptor, at, length, SYNC_FILE_RANGE_WRITE)


def is_in_memory(descriptor: int) -> bool:
    """Whether a regular file lives in a tmpfs: nothing of it is ever written to a disk by a sync."""
    return stat.S_ISREG(os.fstat(descriptor).st_mode) and _file_system(descriptor) == _TMPFS


def is_simple_to_close(descriptor: int) -> bool:
    """Whether a regular file has a name, so that its content stays, and its file system does nothing at close(2)."""
    status = os.fstat(descriptor)
    return stat.S_ISREG(status.st_mode) and status.st_nlink > 0 and _file_system(descriptor) in _CLOSES_AT_ONCE


def copies_bytes(descriptor: int) -> bool:
    """Whether a regular file's file system copies byte by byte: no extents shared, no server that copies for us."""
    return stat.S_ISREG(os.fstat(descriptor).st_mode) and _file_system(descriptor) in (_TMPFS, _EXT4)


def _file_system(descriptor: int) -> int:
    """The type of the file system that has a file, as statfs(2) tells it; 0 if it does not."""
    status = ctypes.create_string_buffer(_STATFS_BYTES)
    return 0 if _libc.fstatfs(descriptor, status) != 0 else ctypes.c_long.from_buffer(status).value


def thread_waits() -> int:
    """How often the calling thread has given its processor up of itself, to sleep until something happens."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw


def open_beneath(directory: int, path: str, flags: int) -> int:
    """Open `path` inside `directory` and never outside, whatever links and `..` it contains (openat2).

    Raises:
        OSError: EXDEV if the path leads outside, ENOSYS before Linux 5.6, else as open(2).
    """
    how = struct.pack("=QQQ", flags | os.O_CLOEXEC, 0, Resolve.BENEATH | Resolve.NO_MAGICLINKS)
    while True:
        descriptor = _libc.syscall(
            ctypes.c_long(SYS_OPENAT2),
            ctypes.c_int(directory),
            ctypes.c_char_p(os.fsencode(path)),
            ctypes.c_char_p(how),
            ctypes.c_size_t(len(how)),
        )
        if descriptor >= 0:
            return int(descriptor)
        code = ctypes.get_errno()
        if code not in (errno.EINTR, errno.EAGAIN):
            raise OSError(code, os.strerror(code), path)


_FLOCK: Final = struct.Struct("hhqqi4x")  # l_type, l_whence, l_start, l_len, l_pid


def set_shared_lock(descriptor: int, at: int) -> None:
    """Put a shared lock of this open file description on one byte.

    Raises:
        OSError: EAGAIN if somebody holds the byte exclusively; EINVAL where such locks do not exist.
    """
    fcntl.fcntl(descriptor, F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, at, 1, 0))


def clear_lock(descriptor: int, at: int) -> None:
    """Remove this open file description's lock from one byte."""
    fcntl.fcntl(descriptor, F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, at, 1, 0))


def is_locked_by_others(descriptor: int, at: int, length: int = 1) -> bool:
    """Whether any other open file description has a lock, even a shared one, on any of these bytes."""
    answer = fcntl.fcntl(descriptor, F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, at, length, 0))
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)
