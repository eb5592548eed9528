"""A number for each cluster of a file: how often it is referred to, or what its refcount says.

Numbers live in chunks that are made when first needed, so a sparse file costs nothing; a chunk has one byte for each
cluster until a number in it needs more. 1 TiB of 64 KiB clusters costs 16 MiB. Everything works on whole arrays:
numpy's import (0.15 s) is paid back by the first ten thousand clusters, and imported with this module only.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import numpy as np

from blockjobs.base.errors import UsageError

if TYPE_CHECKING:
    from typing import Any

    from numpy.typing import NDArray

    Numbers = NDArray[np.unsignedinteger[Any]]
    Clusters = NDArray[np.int64]

CHUNK_BITS: Final = 18
TALLY_BYTES_MAX: Final = 1 << 30
"""Enough for 16 TiB of 64 KiB clusters twice over; a hostile sparse file gets an error instead of all memory."""
_RUN_MIN: Final = 64
"""Clusters in a row from which on it is cheaper to handle them as a run."""
_WIDER: Final = {1: np.uint16, 2: np.uint32, 4: np.uint64}


class Counts:
    """A number for each cluster of the file, zero unless said otherwise.

    Args:
        clusters: length of the file; whoever adds must stay below, and what is behind has 0.
    """

    def __init__(self, clusters: int) -> None:
        self._clusters = clusters
        self._length = max(1, min(clusters, 1 << CHUNK_BITS))
        self._none: Numbers = np.zeros(self._length, np.uint8)
        self._none.flags.writeable = False
        self._chunks: dict[int, Numbers] = {}
        self.bytes = 0
        """Memory in use."""

    def __getitem__(self, cluster: int) -> int:
        if cluster >= self._clusters:
            return 0
        return int(self._chunks.get(cluster >> CHUNK_BITS, self._none)[cluster & (1 << CHUNK_BITS) - 1])

    def chunks(self) -> list[int]:
        """Numbers of the chunks that may have something else than zeroes, ascending."""
        return sorted(self._chunks)

    def chunk(self, index: int, clusters: int) -> "Numbers":
        """The numbers of a chunk's clusters, of those before `clusters`; to be read only."""
        return self._chunks.get(index, self._none)[: max(0, clusters - (index << CHUNK_BITS))]

    def numbers(self, first: int, count: int) -> "Numbers":
        """The numbers of a run of clusters; those behind the end of the file are left out."""
        parts = [self._chunks.get(index, self._none)[start:stop] for index, start, stop in self._pieces(first, count)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def of(self, clusters: "Clusters") -> "Numbers":
        """The numbers of these clusters."""
        runs = _runs_of(clusters)
        if runs is not None:
            parts = [self.numbers(*run) for run in runs]
            return parts[0] if len(parts) == 1 else np.concatenate(parts)
        low, high = int(clusters.min()) >> CHUNK_BITS, int(clusters.max()) >> CHUNK_BITS
        if low == high:
            return self._chunks.get(low, self._none)[clusters - (low << CHUNK_BITS)]
        found = np.zeros(len(clusters), np.uint64)
        owners = clusters >> CHUNK_BITS
        for index in np.unique(owners):
            chosen = owners == index
            found[chosen] = self._chunks.get(int(index), self._none)[clusters[chosen] - (index << CHUNK_BITS)]
        return found

    def put(self, first: int, numbers: "Numbers") -> None:
        """Enter the numbers of a run of clusters."""
        done = 0
        for index, start, stop in self._pieces(first, len(numbers)):
            part = numbers[done : done + stop - start]
            self._writable(index, int(part.max(initial=0)))[start:stop] = part
            done += stop - start

    def add_run(self, first: int, count: int) -> None:
        """Add 1 to each cluster of a run."""
        for index, start, stop in self._pieces(first, count):
            part = self._writable(index, 1)[start:stop]
            highest = int(part.max()) + 1
            self._writable(index, highest)[start:stop] += np.uint8(1)

    def add(self, clusters: "Clusters") -> None:
        """Add 1 to each of these clusters, as often as it is named."""
        if not len(clusters):
            return
        runs = _runs_of(clusters)
        if runs is not None:
            for run in runs:
                self.add_run(*run)
            return
        clusters = np.sort(clusters)
        ends = np.flatnonzero(np.diff(clusters >> CHUNK_BITS)) + 1
        for part in np.split(clusters, ends):
            index = int(part[0]) >> CHUNK_BITS
            places, times = np.unique(part - (index << CHUNK_BITS), return_counts=True)
            highest = int(self._writable(index, 1)[places].max()) + int(times.max())
            chunk = self._writable(index, highest)
            chunk[places] += times.astype(chunk.dtype)

    def take_back(self, cluster: int) -> None:
        """Subtract 1."""
        self._writable(cluster >> CHUNK_BITS, 0)[cluster & (1 << CHUNK_BITS) - 1] -= np.uint8(1)

    def used_groups(self, size: int) -> set[int]:
        """Numbers of the groups of `size` clusters in which not all numbers are zero."""
        used: set[int] = set()
        for index, chunk in self._chunks.items():
            places = np.flatnonzero(chunk) + (index << CHUNK_BITS)
            used.update(np.unique(places // size).tolist())
        return used

    def first_above(self, most: int) -> int | None:
        """The first cluster whose number exceeds `most`."""
        for index in self.chunks():
            if int(self._chunks[index].max()) > most:
                return (index << CHUNK_BITS) + int(np.argmax(self._chunks[index] > most))
        return None

    def _writable(self, index: int, highest: int) -> "Numbers":
        """A chunk that can hold numbers up to `highest`.

        Raises:
            UsageError: too many chunks are in use.
        """
        chunk = self._chunks.get(index)
        if chunk is None:
            chunk = self._keep(index, np.zeros(self._length, np.uint8))
        while highest >> 8 * chunk.itemsize:
            self.bytes -= chunk.nbytes
            chunk = self._keep(index, chunk.astype(_WIDER[chunk.itemsize]))
        return chunk

    def _keep(self, index: int, chunk: "Numbers") -> "Numbers":
        self.bytes += chunk.nbytes
        if self.bytes > TALLY_BYTES_MAX:
            raise UsageError("The image refers to places too far apart to be checked")
        self._chunks[index] = chunk
        return chunk

    def _pieces(self, first: int, count: int) -> Iterator[tuple[int, int, int]]:
        """Cut a run of clusters at chunk ends: (chunk, first in the chunk, end in the chunk)."""
        end = first + count
        while True:
            index, start = first >> CHUNK_BITS, first & (1 << CHUNK_BITS) - 1
            stop = min(1 << CHUNK_BITS, start + end - first)
            yield index, start, stop
            first += stop - start
            if first >= end:
                return


def _runs_of(clusters: "Clusters") -> list[tuple[int, int]] | None:
    """(first, count) of each run of neighbours; None if there are too many to handle one by one."""
    ends = (np.flatnonzero(np.diff(clusters) != 1) + 1).tolist()
    if len(ends) * _RUN_MIN > len(clusters):
        return None
    starts = [0, *ends]
    firsts = clusters[starts].tolist()
    return [(first, end - start) for first, start, end in zip(firsts, starts, [*ends, len(clusters)], strict=True)]
