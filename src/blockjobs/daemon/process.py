"""Being a daemon: the pid file, the background, and the exit that the shell sees."""

import fcntl
import os
import pwd
from contextlib import suppress
from typing import NoReturn

from blockjobs.base.errors import UsageError


class PidFile:
    """Holds the process id, locked while the process lives, so that a second daemon notices.

    Raises:
        UsageError: it cannot be written, or another process holds it.
    """

    def __init__(self, path: str) -> None:
        self._path = os.path.abspath(path)
        try:
            self._descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise UsageError(f"cannot create PID file: Could not create '{path}': {error.strerror}") from error
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._descriptor)
            raise UsageError(f"cannot create PID file: Cannot lock pid file: {error.strerror}") from error
        os.ftruncate(self._descriptor, 0)
        os.write(self._descriptor, f"{os.getpid()}\n".encode())

    def remove(self) -> None:
        """Delete the file and give up the lock."""
        with suppress(FileNotFoundError):
            os.unlink(self._path)
        os.close(self._descriptor)


class Background:
    """The process that goes on after its parent has told the shell that start-up is complete.

    `enter()` must come before threads and event loops exist. The parent exits with 0 at `ready()`, and with 1 if the
    child ends before that.
    """

    def __init__(self) -> None:
        self._pipe: int | None = None

    def enter(self) -> None:
        """Fork; only the child returns."""
        reader, writer = os.pipe()
        if os.fork():
            os.close(writer)
            _exit(0 if os.read(reader, 1) else 1)
        os.close(reader)
        os.setsid()
        self._pipe = writer

    def ready(self) -> None:
        """Let the parent exit, and leave its terminal and folder; does nothing in the foreground."""
        if self._pipe is None:
            return
        os.chdir("/")
        null = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(null, standard)
        os.write(self._pipe, b"1")
        os.close(self._pipe)
        self._pipe = None


def user_number(text: str) -> int:
    """The number of a user given by number or by name.

    Raises:
        UsageError: there is no such user.
    """
    if text.isdecimal():
        return int(text)
    try:
        return pwd.getpwnam(text).pw_uid
    except KeyError:
        raise UsageError(f"there is no user '{text}'") from None


def _exit(status: int) -> NoReturn:
    # The child goes on with everything this process had opened: nothing may be flushed or removed here.
    os._exit(status)
