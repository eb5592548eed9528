"""What the first walk over a large image remembers, since it cannot count everything: which parts are referred to.

From it follow the windows in which the clusters are counted afterwards. Of few clusters it knows at once how often they
are referred to: those that the walk itself asks about.
"""

from typing import TYPE_CHECKING, Final

import numpy as np

from blockjobs.base.errors import UsageError
from blockjobs.block.drivers.qcow2.check_counts import PAGE_BITS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from blockjobs.block.drivers.qcow2.check_counts import Clusters

PAGES_MAX: Final = 1 << 17
"""128 TiB of 64 KiB clusters. A hostile sparse file gets an error, not hundreds of walks."""
_WATCHED_MAX: Final = 1 << 26
_PENDING_MAX: Final = 1 << 18


class Outline:
    """Takes the place of the counted references (`Counts`) in the first walk.

    Args:
        firsts, counts: runs of clusters of which must be known how often they are referred to; they may overlap.

    Attributes:
        low, high: the first and the last cluster that was added since somebody set them back with `forget_span`.

    Raises:
        UsageError: the image refers to too many places, here and in all that adds.
    """

    def __init__(self, firsts: "Clusters", counts: "Clusters") -> None:
        self._starts, self._ends = _joined(firsts, counts)
        lengths = self._ends - self._starts
        self._shifts = np.cumsum(lengths) - lengths - self._starts
        total = int(lengths.sum())
        _check(total <= _WATCHED_MAX)
        self._times = np.zeros(total, np.uint8)
        self._pages: Clusters = np.empty(0, np.int64)
        self._pending: list[Clusters] = []
        self._pending_pages = 0
        self.forget_span()

    def forget_span(self) -> None:
        """Begin to look anew where the added clusters are."""
        self.low, self.high = 1 << 62, -1

    def pages(self) -> "Clusters":
        """Numbers of the pages (of `Counts`) of all clusters that were added, ascending."""
        self._settle()
        return self._pages

    def numbers(self, first: int, count: int) -> "NDArray[np.uint8]":
        """How often clusters of a watched run were added; 2 may be more than that."""
        index = int(np.searchsorted(self._starts, first, side="right")) - 1
        at = first + int(self._shifts[index])
        return self._times[at : at + count]

    def add_run(self, first: int, count: int) -> None:
        """Each cluster of a run is referred to."""
        self._extend(first, first + count - 1)
        first_page, last_page = first >> PAGE_BITS, first + count - 1 >> PAGE_BITS
        _check(last_page - first_page < PAGES_MAX)
        self._note(np.arange(first_page, last_page + 1))
        start = int(np.searchsorted(self._ends, first, side="right"))
        stop = int(np.searchsorted(self._starts, first + count))
        for index in range(start, stop):
            low, high = max(first, int(self._starts[index])), min(first + count, int(self._ends[index]))
            shift = int(self._shifts[index])
            part = self._times[low + shift : high + shift]
            np.minimum(part + 1, 2, out=part)

    def add(self, clusters: "Clusters") -> None:
        """Each of these clusters is referred to, as often as it is named."""
        if not len(clusters):
            return
        self._extend(int(clusters.min()), int(clusters.max()))
        pages = clusters >> PAGE_BITS
        self._note(pages[np.flatnonzero(np.diff(pages, prepend=-1))])
        index = np.searchsorted(self._ends, clusters, side="right")
        is_before_end = index < len(self._ends)
        clusters, index = clusters[is_before_end], index[is_before_end]
        is_watched = clusters >= self._starts[index]
        if is_watched.any():
            places, times = np.unique((clusters + self._shifts[index])[is_watched], return_counts=True)
            self._times[places] = np.minimum(self._times[places] + times, 2)

    def add_groups(self, indexes: "Clusters", size: int, end: int) -> None:
        """Groups of `size` clusters, the first at 0, matter before the cluster `end`: those with these numbers."""
        pages_each = max(1, size >> PAGE_BITS)
        _check(len(indexes) * pages_each <= 2 * PAGES_MAX)
        pages = (indexes * size >> PAGE_BITS)[:, None] + np.arange(pages_each)
        self._note(np.unique(pages[pages <= end - 1 >> PAGE_BITS]))

    def _extend(self, low: int, high: int) -> None:
        self.low, self.high = min(self.low, low), max(self.high, high)

    def _note(self, pages: "Clusters") -> None:
        self._pending.append(pages)
        self._pending_pages += len(pages)
        if self._pending_pages > _PENDING_MAX:
            self._settle()

    def _settle(self) -> None:
        self._pages = np.unique(np.concatenate([self._pages, *self._pending]))
        self._pending, self._pending_pages = [], 0
        _check(len(self._pages) <= PAGES_MAX)


def _check(is_little_enough: bool) -> None:
    if not is_little_enough:
        raise UsageError("The image refers to places too far apart to be checked")


def _joined(firsts: "Clusters", counts: "Clusters") -> tuple["Clusters", "Clusters"]:
    """Runs as starts and ends, ascending, those that overlap or touch made one."""
    order = np.argsort(firsts, kind="stable")
    starts = firsts[order]
    ends = np.maximum.accumulate(starts + counts[order])
    is_start = np.ones(len(starts), bool)
    is_start[1:] = starts[1:] > ends[:-1]
    is_end = np.append(is_start[1:], True)[: len(ends)]
    return starts[is_start], ends[is_end]
