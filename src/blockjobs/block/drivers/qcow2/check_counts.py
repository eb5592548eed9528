"""A number for each cluster of a part of a file: how often it is referred to, or what its refcount says.

Numbers live in pages that are made when first needed, so a sparse file costs nothing. All pages of one set lie in one
array, with one byte for each cluster until some number needs more: 1 TiB of 64 KiB clusters costs 16 MiB. Everything
works on whole arrays: numpy's import (0.15 s) is paid back by the first ten thousand clusters, and imported with this
module only.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from typing import Any

    from numpy.typing import NDArray

    Numbers = NDArray[np.unsignedinteger[Any]]
    Clusters = NDArray[np.int64]

PAGE_BITS: Final = 14
COUNTS_BYTES_MAX: Final = 17 << 20
"""Of one set of numbers: 1 TiB of 64 KiB clusters with its metadata is counted in one go. What has more is counted in
several windows, one after the other (`check_walk`)."""
_RUN_MIN: Final = 64
"""Clusters in a row from which on it is cheaper to handle them as a run."""
_WIDER: Final = {1: np.uint16, 2: np.uint32, 4: np.uint64}


class NoRoom(Exception):
    """The numbers need more memory than they may have; what was counted so far is not all."""


class Counts:
    """A number for each cluster of the window [first, end), zero unless said otherwise. What is outside has 0.

    Args:
        end, first: in clusters; multiples of a page's, but for the end of the file.
        bytes_max: memory that the numbers may take; None if they may not fail.
    """

    def __init__(self, end: int, *, first: int = 0, bytes_max: int | None = None) -> None:
        self.first, self.end = first, end
        self._bytes_max = bytes_max
        self._page = 1 << PAGE_BITS
        # Slot 0 is never written: it stands for all pages that there are not.
        self._cells: Numbers = np.zeros(self._page, np.uint8)
        self._pages: Clusters = np.array([-1], np.int64)
        self._slots: Clusters = np.array([0], np.int64)

    @property
    def bytes(self) -> int:
        """Memory in use."""
        return len(self._pages) * self._page * self._cells.itemsize

    def __getitem__(self, cluster: int) -> int:
        return int(self.of(np.array([cluster], np.int64))[0])

    def holds(self, clusters: "Clusters") -> "NDArray[np.bool_]":
        """Which of these clusters are in the window."""
        is_held: NDArray[np.bool_] = (clusters >= self.first) & (clusters < self.end)
        return is_held

    def pages(self) -> "Clusters":
        """Numbers of the pages that may have something else than zeroes, ascending."""
        return self._pages[1:]

    def of_pages(self, pages: "Clusters") -> "Numbers":
        """The numbers of all clusters of these pages, page after page."""
        return self._cells.reshape(-1, self._page)[self._slots_of(pages)].reshape(-1)

    def numbers(self, first: int, count: int) -> "Numbers":
        """The numbers of a run of clusters; those outside the window are left out."""
        parts = [self._cells[start:stop] for start, stop in self._stretches(first, count)]
        return parts[0] if len(parts) == 1 else np.concatenate([*parts, self._cells[:0]])

    def of(self, clusters: "Clusters") -> "Numbers":
        """The numbers of these clusters."""
        if len(clusters) >= _RUN_MIN and self.holds(clusters).all():
            runs = _runs_of(clusters)
            if runs is not None:
                return np.concatenate([self.numbers(*run) for run in runs])
        return self._cells[self._places(self._slots_of(clusters >> PAGE_BITS), clusters)]

    def put(self, first: int, numbers: "Numbers") -> None:
        """Enter the numbers of a run of clusters.

        Raises:
            NoRoom: they were not entered.
        """
        low = max(first, self.first)
        numbers = numbers[low - first : max(low, self.end) - first]
        highest = int(numbers.max(initial=0))
        if not highest:
            return
        self._widen(highest)
        done = 0
        for start, stop in self._stretches(low, len(numbers), makes=True):
            self._cells[start:stop] = numbers[done : done + stop - start]
            done += stop - start

    def add_run(self, first: int, count: int) -> None:
        """Add 1 to each cluster of a run. Raises NoRoom."""
        for start, stop in self._stretches(first, count, makes=True):
            self._widen(int(self._cells[start:stop].max()) + 1)
            self._cells[start:stop] += np.uint8(1)

    def add(self, clusters: "Clusters") -> None:
        """Add 1 to each of these clusters, as often as it is named. Raises NoRoom."""
        runs = _runs_of(clusters) if len(clusters) else []
        if runs is not None:
            for run in runs:
                self.add_run(*run)
            return
        clusters = clusters[self.holds(clusters)]
        if not len(clusters):
            return
        pages = clusters >> PAGE_BITS
        slots = self._slots_of(pages)
        if not slots.all():
            self._add_pages(np.unique(pages[slots == 0]))
            slots = self._slots_of(pages)
        places, times = np.unique(self._places(slots, clusters), return_counts=True)
        self._widen(int(self._cells[places].max()) + int(times.max()))
        self._cells[places] += times.astype(self._cells.dtype)

    def take_back(self, clusters: "Clusters") -> None:
        """Undo an `add` of what is in the window of these clusters."""
        clusters = clusters[self.holds(clusters)]
        places, times = np.unique(self._places(self._slots_of(clusters >> PAGE_BITS), clusters), return_counts=True)
        self._cells[places] -= times.astype(self._cells.dtype)

    def used_groups(self, size: int) -> set[int]:
        """Numbers of the groups of `size` clusters in which not all numbers are zero."""
        used: set[int] = set()
        for page in self.pages().tolist():
            places = np.flatnonzero(self.numbers(page << PAGE_BITS, self._page)) + (page << PAGE_BITS)
            used.update(np.unique(places // size).tolist())
        return used

    def first_above(self, most: int) -> int | None:
        """The first cluster whose number exceeds `most`."""
        if (most + 1) >> 8 * self._cells.itemsize:
            return None
        for page in self.pages().tolist():
            numbers = self.numbers(page << PAGE_BITS, self._page)
            if int(numbers.max(initial=0)) > most:
                return int(page << PAGE_BITS) + int(np.argmax(numbers > most))
        return None

    def _places(self, slots: "Clusters", clusters: "Clusters") -> "Clusters":
        places: Clusters = (slots << PAGE_BITS) + (clusters & (self._page - 1))
        return places

    def _slots_of(self, pages: "Clusters") -> "Clusters":
        """Where these pages are; 0 for those that there are not."""
        places = np.searchsorted(self._pages, pages, side="right") - 1
        slots: Clusters = np.where(self._pages[places] == pages, self._slots[places], 0)
        return slots

    def _stretches(self, first: int, count: int, *, makes: bool = False) -> Iterator[tuple[int, int]]:
        """Where the numbers of a run are, of what is in the window: (start, stop) of the array, in order.

        Args:
            makes: pages that there are not are made, and they may be written.
        """
        first, end = max(first, self.first), min(first + count, self.end)
        if first >= end:
            return
        pages = np.arange(first >> PAGE_BITS, (end - 1 >> PAGE_BITS) + 1)
        found = self._slots_of(pages)
        if makes and not found.all():
            self._add_pages(pages[found == 0])
            found = self._slots_of(pages)
        slots: list[int] = found.tolist()
        index, left, at = 0, end - first, first & (self._page - 1)
        while left:
            start = slots[index]
            index += 1
            together = 1
            while start and index < len(slots) and slots[index] == start + together:
                index += 1
                together += 1
            length = min(left, together * self._page - at)
            yield start * self._page + at, start * self._page + at + length
            left -= length
            at = 0

    def _add_pages(self, pages: "Clusters") -> None:
        used = len(self._pages)
        needed = (used + len(pages)) * self._page
        self._check_room(needed * self._cells.itemsize)
        if needed > len(self._cells):
            room = self.end - self.first + 2 * self._page
            if self._bytes_max is not None:
                room = min(room, self._bytes_max // self._cells.itemsize + self._page)
            # Zeroes that nobody has touched cost no memory: all that may ever be needed is reserved at once.
            cells = np.zeros(max(needed, room // self._page * self._page), self._cells.dtype)
            cells[: used * self._page] = self._cells[: used * self._page]
            self._cells = cells
        places = np.searchsorted(self._pages, pages)
        self._pages = np.insert(self._pages, places, pages)
        self._slots = np.insert(self._slots, places, np.arange(used, used + len(pages)))

    def _widen(self, highest: int) -> None:
        """Have numbers that can be as high as `highest`."""
        while highest >> 8 * self._cells.itemsize:
            self._check_room(2 * self.bytes)
            self._cells = self._cells[: len(self._pages) * self._page].astype(_WIDER[self._cells.itemsize])

    def _check_room(self, needed: int) -> None:
        if self._bytes_max is not None and needed > self._bytes_max + self._page * self._cells.itemsize:
            raise NoRoom


def _runs_of(clusters: "Clusters") -> list[tuple[int, int]] | None:
    """(first, count) of each run of neighbours; None if there are too many to handle one by one."""
    ends = (np.flatnonzero(np.diff(clusters) != 1) + 1).tolist()
    if len(ends) * _RUN_MIN > len(clusters):
        return None
    starts = [0, *ends]
    firsts = clusters[starts].tolist()
    return [(first, end - start) for first, start, end in zip(firsts, starts, [*ends, len(clusters)], strict=True)]
