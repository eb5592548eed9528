"""Reopening an image: between read-only and read-write, or with other tuning (spec/block-layer.md §1).

What is only in memory is written before anything changes, so that the old state stays good until the new one is in
place. Whoever may write again starts from the file, as after an open: another program may have had it meanwhile.
"""

from typing import TYPE_CHECKING

from blockjobs.block.drivers.qcow2.options import Qcow2Options, tuning_of
from blockjobs.block.switch import Switch

if TYPE_CHECKING:
    from blockjobs.block.driver import OpenContext
    from blockjobs.block.drivers.qcow2.driver import Qcow2


class Qcow2Switch(Switch):
    """See `Switch`. The state of the driver is all its attributes; a new one is made by opening the image again."""

    def __init__(self, driver: "Qcow2", options: Qcow2Options, context: "OpenContext") -> None:
        self._driver, self._options, self._context = driver, options, context
        self._before = dict(vars(driver))
        self._loads = False

    async def prepare(self) -> None:
        """Check the options, and write all that is not in the file yet.

        Raises:
            UsageError: the options contradict each other or the image.
            IoFailure: the image could not be written.
        Waits: commits. Checkpoint: no.
        """
        driver = self._driver
        tuning = tuning_of(self._options, driver.image.header, unmap=self._context.unmap)
        becomes_writable = driver.read_only and not self._context.read_only
        self._loads = becomes_writable or tuning != driver.image.tuning
        if not driver.read_only:
            await driver.write_all()

    def apply(self) -> None:
        """See `Switch`."""
        self._driver.read_only = self._context.read_only
        self._driver.image.is_writable = not self._context.read_only
        self._driver.bitmap_store.set_read_only(self._context.read_only)

    def revert(self) -> None:
        """See `Switch`: all that the old state knows is still true, since nothing was written but a repair's counts,
        which only writers look at.
        """
        vars(self._driver).update(self._before)
        self._driver.image.is_writable = not self._driver.read_only
        self._driver.bitmap_store.set_read_only(self._driver.read_only)

    async def activate(self) -> None:
        """See `Switch`. Waits: as `Qcow2.open`. Checkpoint: no."""
        if self._loads:
            driver, bitmaps = self._driver, self._driver.bitmap_store.bitmaps
            vars(driver).update(vars(await type(driver).open(self._options, driver.children, self._context)))
            if bitmaps is not None:
                await driver.bitmap_store.load(bitmaps)
