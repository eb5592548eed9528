"""Image locks between processes, byte for byte those of QEMU (spec/block-layer.md §4).

A right that is taken is a shared lock on byte 100 + i of the file, a right that is not shared one on byte 200 + i,
where i is 0 consistent read, 1 write, 2 write unchanged, 3 resize. Whoever takes a right then looks whether anybody
denies it, and the other way round.
"""

import errno
from typing import Final

from blockjobs.base.errors import UsageError
from blockjobs.block.claims import ALL, Perm
from blockjobs.block.drivers import host_syscalls

TAKEN_AT: Final = 100
DENIED_AT: Final = 200
_WHOLE_LENGTH: Final = DENIED_AT + len(Perm) - TAKEN_AT

_BYTES: Final = (
    (int(Perm.CONSISTENT_READ), 0, "consistent read"),
    (int(Perm.WRITE), 1, "write"),
    (int(Perm.WRITE_UNCHANGED), 2, "write unchanged"),
    (int(Perm.RESIZE), 3, "resize"),
)
"""Each right as a plain number, since sets of flags are slow to calculate with; its byte; its name."""


class ImageLock:
    """The locks that one open file description holds on an image.

    Locks belong to the description, so two nodes on the same file conflict even inside one process.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._taken = self._denied = 0

    def change(self, needs: Perm, shares: Perm) -> None:
        """Hold exactly the locks for these rights.

        Raises:
            UsageError: another process (or node) is in the way; the locks are as before.
        """
        taken, denied = int(needs), int(ALL) & ~int(shares)
        before = self._taken, self._denied
        try:
            self._acquire(taken, denied)
        except UsageError:
            self._keep_only(*before)
            raise
        self._keep_only(taken, denied)

    def move_to(self, descriptor: int) -> None:
        """Hold the same locks through another descriptor of the same file, without a gap.

        Raises:
            OSError: the system refused; the locks are where they were.
        """
        if descriptor == self._descriptor:
            return
        before, held = (
            self._descriptor,
            [
                start + index
                for start, perms in ((TAKEN_AT, self._taken), (DENIED_AT, self._denied))
                for perm, index, _ in _BYTES
                if perm & perms
            ],
        )
        for at in held:
            host_syscalls.set_shared_lock(descriptor, at)
        for at in held:
            host_syscalls.clear_lock(before, at)
        self._descriptor = descriptor

    def _acquire(self, taken: int, denied: int) -> None:
        """Set the missing locks first, then look: of two that start at once at least one sees the other."""
        new_taken, new_denied = taken & ~self._taken, denied & ~self._denied
        for perm, index, name in _BYTES:
            if perm & new_taken:
                self._set(TAKEN_AT + index, f'"{name}"')
                self._taken |= perm
            if perm & new_denied:
                self._set(DENIED_AT + index, f'shared "{name}"')
                self._denied |= perm
        if not new_taken | new_denied:
            return
        if not host_syscalls.is_locked_by_others(self._descriptor, TAKEN_AT, _WHOLE_LENGTH):
            return  # nobody has anything, as is the case nearly always
        for perm, index, name in _BYTES:
            if perm & new_taken and host_syscalls.is_locked_by_others(self._descriptor, DENIED_AT + index):
                raise UsageError(f'Failed to get "{name}" lock')
            if perm & new_denied and host_syscalls.is_locked_by_others(self._descriptor, TAKEN_AT + index):
                raise UsageError(f'Failed to get shared "{name}" lock')

    def _set(self, at: int, what: str) -> None:
        try:
            host_syscalls.set_shared_lock(self._descriptor, at)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise UsageError(f"Failed to get {what} lock") from error
            raise UsageError(f"Failed to lock byte {at}: {error.strerror}") from error

    def _keep_only(self, taken: int, denied: int) -> None:
        for perm, index, _ in _BYTES:
            if perm & self._taken & ~taken:
                host_syscalls.clear_lock(self._descriptor, TAKEN_AT + index)
            if perm & self._denied & ~denied:
                host_syscalls.clear_lock(self._descriptor, DENIED_AT + index)
        self._taken, self._denied = taken, denied


def are_supported(descriptor: int) -> bool:
    """Whether the file system of an open file knows locks of this kind."""
    try:
        host_syscalls.is_locked_by_others(descriptor, TAKEN_AT)
    except OSError:
        return False
    return True
