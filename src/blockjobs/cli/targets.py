"""Files that are being made: nothing that looks complete appears under the final name before it is."""

import errno
import os
import stat
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from blockjobs.base.errors import UsageError
from blockjobs.block.nbd_uri import is_export
from blockjobs.cli.formats import local_name

if TYPE_CHECKING:
    from blockjobs.host import ImageHost

PARTIAL: Final = ".partial"
Identity = tuple[int, int]


class Partial:
    """`TARGET.partial` while work runs; `TARGET` once `complete` was called; else removed, or kept on request.

    Whoever makes the image there need not make it durable: `complete` does, and nobody looks at it before.

    The final name is taken in one step of the file system, after everything is on disk: a crash leaves the partial
    file, never a target that only looks complete.

    Attributes:
        path: where to write.
        final: where it will be; links are followed, so a link keeps pointing to the new image.
    """

    def __init__(self, target: str, *, replace: bool, keep: bool = False) -> None:
        """Refuse what cannot end well, before any work.

        Args:
            target: the final name.
            replace: an existing file may be replaced.
            keep: leave the partial file behind if the work fails.

        Raises:
            UsageError: the target exists, is no regular file, or cannot be made there.
        """
        self._target, self._replace, self._keep = target, replace, keep
        self.final = os.path.realpath(local_name(target))
        self.path = self.final + PARTIAL
        self._mine: Identity | None = None
        self._data_file: tuple[str, Identity] | None = None
        self._is_complete = False
        folder = os.path.dirname(self.final)
        if not target or target.endswith("/"):
            raise UsageError(f"'{target}' is not the name of a file")
        if not os.path.isdir(folder):
            raise UsageError(f"Could not create '{target}': there is no folder '{folder}'")
        with suppress(FileNotFoundError):
            kind = os.stat(self.final)
            if not stat.S_ISREG(kind.st_mode):
                raise UsageError(f"'{target}' exists and is not a regular file: choose another name")
            if not replace:
                raise UsageError(f"'{target}' exists: choose another name, or replace it with --force")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_complete or self._mine is None or identity(self.path) != self._mine:
            return
        if self._data_file is not None and identity(self._data_file[0]) == self._data_file[1] and not self._keep:
            with suppress(OSError):
                os.unlink(self._data_file[0])
        if self._keep:
            print(f"blockjobs: the incomplete image is kept as '{self.path}'", file=sys.stderr)
            return
        with suppress(OSError):
            os.unlink(self.path)

    def demand_other_than(self, sources: set[Identity]) -> None:
        """Refuse to replace a file that is being read.

        Raises:
            UsageError: the target is one of `sources`, perhaps by another name.
        """
        if identity(self.final) in sources:
            raise UsageError(f"'{self._target}' is the source itself, or a file that it is based on")
        if identity(self.path) in sources:
            raise UsageError(f"'{self.path}' is the source itself, or a file that it is based on")

    async def demand_unused(self, host: "ImageHost") -> None:
        """Refuse to replace an image that another program has open for writing, as file locks tell.

        Raises:
            UsageError: it is in use.
        """
        for path in (self.final, self.path):
            if not os.path.exists(path):
                continue
            try:
                node = await host.blockdev_add({"driver": "file", "node-name": "existing", "filename": path})
                try:
                    async with host.access(node, write=True):
                        pass
                finally:
                    await host.close_nodes(node)
            except UsageError as error:
                raise UsageError(f"'{path}' cannot be replaced, another program may be using it: {error}") from error

    def claim_name(self, *, mode: int = 0o666) -> None:
        """Remove what an earlier run left under the partial name, and take the name; call `demand_unused` before.

        Args:
            mode: permission bits of the new file, before the umask.

        Raises:
            UsageError: a file cannot be made there.
        """
        with suppress(FileNotFoundError):
            os.unlink(self.path)
        self._mine = _new_file(self.path, mode)

    def claim_data_file(self, name: str, *, mode: int = 0o666) -> None:
        """Make the file that is to hold the image's data, unless it is there; it goes if the image does not come to be.

        Args:
            name: as the user says, so it counts from the working directory.
            mode: permission bits of the new file, before the umask.

        Raises:
            UsageError: a file cannot be made there.
        """
        path = local_name(name)
        if not os.path.lexists(path):
            self._data_file = os.path.abspath(path), _new_file(path, mode)

    def complete(self, *, durably: bool = True) -> None:
        """Give the finished file its final name.

        Args:
            durably: it is on disk under that name when this returns; else whenever the kernel pleases.

        Raises:
            UsageError: another program made a file of that name meanwhile; the partial file stays ours to remove.
            OSError: the file system refused.
        """
        if durably:
            _sync(self.path)
        if self._replace:
            os.replace(self.path, self.final)
        else:
            self._take_free_name()
        self._is_complete = True
        if durably:
            _sync(os.path.dirname(self.final))
            if self._data_file is not None:
                _sync(os.path.dirname(self._data_file[0]))

    def _take_free_name(self) -> None:
        try:
            os.link(self.path, self.final)  # unlike a rename, it never replaces
        except FileExistsError as error:
            raise UsageError(f"'{self._target}' was made by another program meanwhile") from error
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                raise
            os.rename(self.path, self.final)  # a file system without hard links
        else:
            os.unlink(self.path)


def _new_file(path: str, mode: int) -> Identity:
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, mode)
    except OSError as error:
        raise UsageError(f"Could not create '{path}': {error.strerror}") from error
    status = os.fstat(descriptor)
    os.close(descriptor)
    return status.st_dev, status.st_ino


def mode_like(sources: Sequence[str]) -> int:
    """Permission bits for a file that tells what `sources` (paths or URIs) hold: no more people may read it."""
    mode = 0o666
    for path in sources:
        mode &= 0o600 if is_export(path) else os.stat(path).st_mode
    return mode


def identity(path: str) -> Identity | None:
    """What makes two names the same file; None if there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
