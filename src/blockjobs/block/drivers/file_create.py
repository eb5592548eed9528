"""Creating host files: locks first, then the old content goes, then the size is made (spec/jobs.md §5)."""

import errno
import fcntl
import os
import stat
import struct
from contextlib import suppress
from enum import StrEnum
from typing import Final

from blockjobs.base.buffers import zeroes
from blockjobs.base.errors import IoFailure, UsageError
from blockjobs.base.units import MiB
from blockjobs.block.claims import ALL, Perm
from blockjobs.block.drivers.locks import ImageLock, are_supported

EXTENT_SIZE_HINT: Final = 1 * MiB
"""As QEMU's default: XFS then allocates in runs of this length, and images fragment less."""

_FS_IOC_GETFLAGS: Final = 0x80086601
_FS_IOC_SETFLAGS: Final = 0x40086602
_FS_NOCOW: Final = 0x00800000
_FS_IOC_FSGETXATTR: Final = 0x801C581F
_FS_IOC_FSSETXATTR: Final = 0x401C5820
_XATTR: Final = struct.Struct("=IIIII8x")
_XFLAG_EXTSIZE: Final = 0x800


class PreallocMode(StrEnum):
    """How much of a file or an image is made when it is created."""

    OFF = "off"
    METADATA = "metadata"
    FALLOC = "falloc"
    FULL = "full"


def create_file(
    filename: str,
    size: int,
    *,
    preallocation: PreallocMode = PreallocMode.OFF,
    nocow: bool = False,
    extent_size_hint: int = EXTENT_SIZE_HINT,
    durably: bool = True,
) -> None:
    """Make a file of `size` bytes of zeroes; an existing one loses its content. Blocks: run it in a worker.

    A file that did not exist before is removed again if
    anything fails.

    Args:
        filename: a path, taken as it is.
        size: in bytes, any number.
        preallocation: `metadata` means nothing for files and is refused.
        nocow: ask the file system (btrfs) not to copy on write; ignored where it cannot.
        extent_size_hint: bytes for the file system (XFS) to allocate at once, 0 for no hint; ignored where it cannot.
        durably: the file and its directory entry are on disk on return.

    Raises:
        UsageError: with QEMU's text. Without a lock, or for a size or mode that is impossible, an existing file is
            unchanged.
        IoFailure: the file could not be made durable.
    """
    if extent_size_hint >= 1 << 32:
        raise UsageError("Extent size hint is too large")
    descriptor, is_new = _open(filename)
    try:
        if not is_new:
            _demand_regular(filename, descriptor)
        if are_supported(descriptor):
            ImageLock(descriptor).change(Perm.WRITE | Perm.RESIZE, ALL & ~Perm.RESIZE)
        _check_size(size, preallocation)
        if not is_new:
            _resize(descriptor, 0)
        if nocow:
            _set_nocow(descriptor)
        if extent_size_hint:
            _set_extent_size_hint(descriptor, extent_size_hint)
        _make(descriptor, size, preallocation)
        if durably:
            _sync(filename, descriptor)
    except BaseException:
        if is_new:
            with suppress(OSError):
                os.unlink(filename)
        raise
    finally:
        os.close(descriptor)


def _open(filename: str) -> tuple[int, bool]:
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK  # not to wait on a fifo
    try:
        try:
            return os.open(filename, flags | os.O_CREAT | os.O_EXCL, 0o644), True
        except FileExistsError:
            return os.open(filename, flags | os.O_CREAT, 0o644), False
    except OSError as error:
        raise UsageError(f"Could not create '{filename}': {error.strerror}") from error


def _demand_regular(filename: str, descriptor: int) -> None:
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise UsageError(f"'file' driver requires '{filename}' to be a regular file")


def _check_size(size: int, preallocation: PreallocMode) -> None:
    if preallocation is not PreallocMode.OFF and size < 0:
        raise UsageError("Cannot use preallocation for shrinking files")
    if preallocation is PreallocMode.METADATA:
        raise UsageError("Unsupported preallocation mode: metadata")
    if size < 0:
        raise UsageError(f"Could not resize file: {os.strerror(errno.EINVAL)}")


def _resize(descriptor: int, size: int) -> None:
    try:
        os.ftruncate(descriptor, size)
    except OSError as error:
        raise UsageError(f"Could not resize file: {error.strerror}") from error


def _make(descriptor: int, size: int, preallocation: PreallocMode) -> None:
    if preallocation is PreallocMode.FALLOC and size:
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            raise UsageError(f"Could not preallocate new data: {os.strerror(error.errno or errno.EIO)}") from error
    elif preallocation is PreallocMode.FULL:
        try:
            for at in range(0, size, MiB):
                _write_all(descriptor, at, min(MiB, size - at))
        except OSError as error:
            raise UsageError(f"Could not write zeros for preallocation: {error.strerror}") from error
    else:
        _resize(descriptor, size)


def _write_all(descriptor: int, at: int, length: int) -> None:
    done = 0
    while done < length:
        done += os.pwrite(descriptor, zeroes(length - done), at + done)


def _set_nocow(descriptor: int) -> None:
    with suppress(OSError):
        flags = bytearray(8)
        fcntl.ioctl(descriptor, _FS_IOC_GETFLAGS, flags)
        (before,) = struct.unpack_from("=I", flags)
        struct.pack_into("=I", flags, 0, before | _FS_NOCOW)
        fcntl.ioctl(descriptor, _FS_IOC_SETFLAGS, flags)


def _set_extent_size_hint(descriptor: int, hint: int) -> None:
    with suppress(OSError):
        attributes = bytearray(_XATTR.size)
        fcntl.ioctl(descriptor, _FS_IOC_FSGETXATTR, attributes)
        flags, _, extents, project, cow_hint = _XATTR.unpack(attributes)
        _XATTR.pack_into(attributes, 0, flags | _XFLAG_EXTSIZE, hint, extents, project, cow_hint)
        fcntl.ioctl(descriptor, _FS_IOC_FSSETXATTR, attributes)


def _sync(filename: str, descriptor: int) -> None:
    try:
        os.fsync(descriptor)
        _sync_directory(filename)
    except OSError as error:
        raise IoFailure.wrap(error, f"sync of new file '{filename}'") from error


def _sync_directory(filename: str) -> None:
    directory = os.open(os.path.dirname(filename) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
