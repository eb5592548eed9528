"""Reopening a host file with another access mode, cache mode or locks (spec/block-layer.md §1, §4).

The new descriptor is opened through the old one (`/proc/self/fd`), so it is the same file whatever has become of the
name. Requests find the new descriptors at once; locks move without a gap.
"""

import os
from typing import TYPE_CHECKING, Final

from blockjobs.base.errors import UsageError
from blockjobs.block.claims import ALL, NONE
from blockjobs.block.drivers.file_medium import FileMedium
from blockjobs.block.drivers.locks import ImageLock
from blockjobs.block.switch import Switch

if TYPE_CHECKING:
    from blockjobs.block.driver import OpenContext
    from blockjobs.block.drivers.file import File

_FLAGS: Final = os.O_CLOEXEC | os.O_NONBLOCK


class FileSwitch(Switch):
    """See `Switch`.

    Args:
        locks: whether image locks are wanted.
    """

    def __init__(self, driver: "File", context: "OpenContext", *, locks: bool) -> None:
        self._driver, self._context, self._locks = driver, context, locks
        self._old_medium, self._old_lock = driver.medium, driver.lock
        self._new_medium, self._new_lock = driver.medium, driver.lock
        self._was_flushed = not isinstance(driver.medium, FileMedium) or driver.medium.writeback.is_wanted

    async def prepare(self) -> None:
        """Write what the kernel still keeps from us, and open the file once more if need be.

        Raises:
            UsageError: the file cannot be opened like that.
            IoFailure: written data may be lost.
        Waits: a data sync. Checkpoint: no.
        """
        old = self._old_medium
        if not isinstance(old, FileMedium):
            return
        if not old.read_only:
            await self._driver.flush()
        if (old.read_only, old.is_direct) != (self._context.read_only, self._context.direct):
            self._new_medium = self._open(old)
        if self._locks is not (self._old_lock is not None):
            self._new_lock = ImageLock(self._descriptor) if self._locks else None

    def _open(self, old: FileMedium) -> FileMedium:
        path = f"/proc/self/fd/{old.descriptor}"
        mode = os.O_RDONLY if self._context.read_only else os.O_RDWR
        opened: list[int] = []
        try:
            opened.append(os.open(path, mode | _FLAGS))
            if self._context.direct:
                opened.append(os.open(path, mode | _FLAGS | os.O_DIRECT))
        except OSError as error:
            for descriptor in opened:
                os.close(descriptor)
            raise UsageError(f"Could not reopen file: {error.strerror}") from error
        is_flushed = not self._context.no_flush
        direct = opened[1] if self._context.direct else None
        return FileMedium(opened[0], direct=direct, is_flushed=is_flushed, start=self._context.offload.start)

    @property
    def _descriptor(self) -> int:
        assert isinstance(self._new_medium, FileMedium)
        return self._new_medium.descriptor

    def apply(self) -> None:
        """See `Switch`.

        Raises:
            UsageError: the system refused to move the locks; nothing changed.
        """
        if self._new_medium is not self._old_medium and self._old_lock is not None:
            _move(self._old_lock, self._descriptor)
        self._driver.medium, self._driver.lock = self._new_medium, self._new_lock
        self._want_writeback(not self._context.no_flush)

    def _want_writeback(self, is_wanted: bool) -> None:
        medium = self._driver.medium
        if isinstance(medium, FileMedium):
            medium.writeback.is_wanted = is_wanted

    def revert(self) -> None:
        """See `Switch`."""
        if isinstance(self._old_medium, FileMedium) and self._old_lock is not None:
            _move(self._old_lock, self._old_medium.descriptor)
        self._driver.medium, self._driver.lock = self._old_medium, self._old_lock
        self._want_writeback(self._was_flushed)

    async def activate(self) -> None:
        """See `Switch`: locks that were not wanted before are taken, those not wanted any more are given up.

        Raises:
            UsageError: somebody else is in the way.
        """
        if self._new_lock is not None and self._old_lock is None:
            self._new_lock.change(*self._driver.rights)

    async def close(self, *, applied: bool) -> None:
        """See `Switch`. Waits: nothing that lasts. Checkpoint: no."""
        if applied and self._new_lock is None and self._old_lock is not None:
            self._old_lock.change(NONE, ALL)
        if self._new_medium is not self._old_medium:
            await self._driver.close_medium(self._old_medium if applied else self._new_medium)


def _move(lock: ImageLock, descriptor: int) -> None:
    try:
        lock.move_to(descriptor)
    except OSError as error:
        raise UsageError(f"Could not reopen file: {error.strerror}") from error
