"""Tables that nobody has used for a whole interval leave memory: the option `cache-clean-interval`."""

import asyncio
import weakref
from collections.abc import Sequence

from blockjobs.block.drivers.qcow2.tables import TableCache


class CacheCleaner:
    """Looks through the caches of one image now and then, as long as there is something to throw out.

    Args:
        caches: they live as long as this does.
        interval_s: seconds; 0 for never.
    """

    def __init__(self, caches: Sequence[TableCache], interval_s: int) -> None:
        self._caches = caches
        self._interval_s = interval_s
        self._is_armed = False
        for cache in caches:
            cache.has_more = self._arm

    def _arm(self) -> None:
        """Look after an interval; for those who put tables into a cache, or make clean what is there."""
        if self._is_armed or not self._interval_s:
            return
        self._is_armed = True
        # The timer must not keep an image in memory that was closed, or loaded anew.
        asyncio.get_running_loop().call_later(self._interval_s, _look, weakref.ref(self))

    def look(self) -> None:
        """An interval is over."""
        self._is_armed = False
        left = [cache.drop_unused() for cache in self._caches]
        if any(left):
            self._arm()


def _look(cleaner: weakref.ref[CacheCleaner]) -> None:
    if (living := cleaner()) is not None:
        living.look()
