"""Which files an image's header may name (spec/durability.md §2): a hostile image must not reach the host's files.

Names that users give are opened as they are. A name that comes from an image (backing file, data file) is resolved
inside the image roots only: directories that were named at start, or else the directories of the images that users
opened. Links and `..` may be used as long as they stay inside.
"""

import errno
import os
import stat
from collections.abc import Iterable
from typing import Final

from msgspec import Struct, field

from blockjobs.base.errors import UsageError
from blockjobs.block.drivers.host_syscalls import open_beneath

CHAIN_DEPTH_MAX: Final = 64
"""Backing images below an image that users open; a longer chain is refused rather than opened for minutes."""


class ChainRefused(UsageError):
    """A chain that must not be opened at all; said once, without naming every image in between."""


class OpenPolicy(Struct, frozen=True):
    """Where names in headers may lead.

    Attributes:
        image_roots: directories; empty means the directory of the image that the user opened.
    """

    image_roots: tuple[str, ...] = ()

    def scope(self, top: str, directories: Iterable[str]) -> "Scope":
        """The rules for the chain below the image `top`, whose files lie in `directories`."""
        roots = self.image_roots or tuple(directories)
        return Scope(top, tuple(dict.fromkeys(os.path.realpath(root) for root in roots)))


class Scope(Struct):
    """One chain being opened from headers.

    Attributes:
        top: name of the image that the user opened, for messages.
        roots: real paths of directories that names may not leave.
        seen: (device, inode) of all files in the chain so far.
        depth: how many images deep.
    """

    top: str
    roots: tuple[str, ...]
    seen: set[tuple[int, int]] = field(default_factory=set)
    depth: int = 0

    def open(self, name: str, flags: int) -> int:
        """Open a regular file below one of the roots; never blocks, never leaves them.

        Raises:
            UsageError: it is not there, or no regular file, or outside.
        """
        path = os.path.join(os.path.realpath(os.path.dirname(name) or "."), os.path.basename(name))
        last: OSError | None = None
        for root in self.roots:
            inside = os.path.relpath(path, root)
            if inside.startswith(".."):
                continue
            try:
                return _open_regular(root, inside, flags, name)
            except OSError as error:
                last = error
        if last is not None and last.errno != errno.EXDEV:
            raise UsageError(f"Could not open '{name}': {last.strerror}") from last
        raise UsageError(
            f"Could not open '{name}': the image names a file outside {_listed(self.roots)}: "
            "allow its directory as an image root, or give the file explicitly"
        )

    def descend(self) -> None:
        """Go one image deeper.

        Raises:
            ChainRefused: the chain is too long.
        """
        self.depth += 1
        if self.depth > CHAIN_DEPTH_MAX:
            raise ChainRefused(f"The backing chain of '{self.top}' is longer than {CHAIN_DEPTH_MAX} images")

    def enter(self, name: str, identity: tuple[int, int] | None) -> None:
        """Note a file of the chain.

        Raises:
            UsageError: it is there already.
        """
        if identity is None:
            return
        if identity in self.seen:
            raise ChainRefused(f"Could not open '{name}': the backing chain leads back to it")
        self.seen.add(identity)


def refuse_protocols(name: str) -> None:
    """Names in headers are file names; QEMU also reads `json:{...}` and `nbd://...` there, which lets images reach out.

    Raises:
        UsageError: `name` is none.
    """
    if "\0" in name or not name.isprintable():
        # Escaped, as such a name is made to play with the reader's terminal or logs.
        raise UsageError(f"Could not open {name!a}: the image names a file with unprintable characters")
    head, colon, _ = name.partition(":")
    if colon and "/" not in head:
        raise UsageError(f"Could not open '{name}': an image may only name files, not protocols ('{head}:')")
    if not name:
        raise UsageError("Could not open '': the image names no file")


def _open_regular(root: str, inside: str, flags: int, name: str) -> int:
    directory = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        place = _find(directory, inside)
    finally:
        os.close(directory)
    try:
        mode = os.fstat(place).st_mode
        if stat.S_ISLNK(mode):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        if not stat.S_ISREG(mode):
            raise UsageError(f"'file' driver requires '{name}' to be a regular file")
        # Only now is the file really opened: opening a device or a fifo may already do something.
        return os.open(f"/proc/self/fd/{place}", flags)
    finally:
        os.close(place)


def _find(directory: int, inside: str) -> int:
    """A descriptor (O_PATH) of a file below `directory`, wherever links lead on the way."""
    try:
        return open_beneath(directory, inside, os.O_PATH)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EPERM):
            raise
    # Kernels before 5.6, and sandboxes without openat2: walk by hand, and let no component be a link.
    current = os.dup(directory)
    for part in inside.split("/"):
        try:
            deeper = os.open(part, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=current)
        finally:
            os.close(current)
        current = deeper
    return current


def _listed(roots: tuple[str, ...]) -> str:
    return " and ".join(f"'{root}'" for root in roots) or "any image root"
