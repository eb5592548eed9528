"""A file beside an image, replaced as a whole so that a crash leaves the old one or the new one."""

import errno
import fcntl
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from typing import Final, Protocol

_SUFFIX: Final = ".new"


class SideFile(Protocol):
    """Blocking calls for worker threads.

    Attributes:
        name: for messages.

    Raises:
        OSError: from every call.
    """

    name: str

    def read(self, length_max: int) -> bytes | None:
        """All of it, None if there is no such file; EFBIG if it is longer than that."""
        ...

    def replace(self, content: bytes) -> None:
        """Make it this, durably; on an error it may be either."""
        ...

    def remove(self) -> None:
        """Make it be gone, durably."""
        ...

    def image_state(self) -> list[int]:
        """What changes whenever the image does, as far as it is durable."""
        ...


class HostSideFile:
    """See `SideFile`: a file of this host.

    Args:
        name: its path.
        descriptor: gives that of the image, which a reopen may replace.
    """

    def __init__(self, name: str, descriptor: Callable[[], int]) -> None:
        self.name = name
        self._descriptor = descriptor

    def read(self, length_max: int) -> bytes | None:
        """See `SideFile`."""
        try:
            descriptor = os.open(self.name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            if status.st_size > length_max:
                raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
            return file.read()

    def replace(self, content: bytes) -> None:
        """See `SideFile`: a new file ▷, its name ▷. Only the holder of the image's locks does this."""
        new = self.name + _SUFFIX
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(new, flags, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                os.fchmod(descriptor, stat.S_IMODE(os.fstat(self._descriptor()).st_mode) & 0o666)
                file.write(content)
                file.flush()
                os.fsync(descriptor)
            os.rename(new, self.name)
        except BaseException:
            with suppress(OSError):
                os.unlink(new)
            raise
        self._sync_directory()

    def remove(self) -> None:
        """See `SideFile`."""
        with suppress(FileNotFoundError):
            os.unlink(self.name)
        self._sync_directory()

    def _sync_directory(self) -> None:
        directory = os.open(os.path.dirname(self.name) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def image_state(self) -> list[int]:
        """See `SideFile`. The change time cannot be set by any program, so a copy, or a file put back, is another."""
        descriptor = self._descriptor()
        if not self._is_read_only():
            os.fsync(descriptor)  # a data sync may leave the times in memory
        status = os.fstat(descriptor)
        return [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]

    def _is_read_only(self) -> bool:
        return fcntl.fcntl(self._descriptor(), fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
