"""Where bytes finally live: blocking, positioned calls on a file or a simulated disk.

Workers see media, integers and buffers, never a node or a job (design §1.6). A medium is the one place that tests
replace: a simulated disk, a recorder of writes and flushes, and an injector of faults are media too.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple, Protocol

from blockjobs.base.buffers import Buffer
from blockjobs.base.units import MiB

HOLES_SOUGHT_BYTES_MIN: Final = 1 * MiB
"""Clusters in a row, in a file that is mostly holes, that are looked at for holes: preallocated images have such."""


NEVER_AT: Final = 1 << 63
"""Behind the end of anything."""


class Allocation(NamedTuple):
    """A run of a medium: `is_data` False means a hole, which reads as zeroes."""

    at: int
    length: int
    is_data: bool


class Medium(Protocol):
    """Bytes at offsets. Every call blocks, and may come from any worker thread; calls may overlap in time.

    Except for `read_cached` and `write_cached`, which do not block and are there for the loop's own thread: a hop to a
    worker costs more than a small request. Workers may call `read_cached` too.

    Raises:
        OSError: from every call, with the system's errno; the driver above turns it into an `IoFailure`.
    """

    @property
    def is_faster_by_two(self) -> bool:
        """Whether two threads that copy to it, each to places of its own, are faster than one."""
        return False

    def read_cached(self, at: int, buffer: memoryview) -> bool:
        """Fill `buffer` if all of it is in memory. Never raises.

        Returns:
            False leaves the work to `read_into`; what `buffer` holds is unspecified then.
        """
        del at, buffer
        return False

    def write_cached(self, at: int, contents: Sequence[Buffer]) -> bool:
        """Write a short run of bytes that the medium has already, if that takes no longer than copying them.

        Returns:
            False leaves the work to `writev`; nothing was written then.
        """
        del at, contents
        return False

    def read_into(self, at: int, buffer: memoryview) -> None:
        """Fill `buffer` from `at`; what lies past the end reads as zeroes."""
        ...

    def is_same_as(self, other: "Medium") -> bool:
        """Whether both are known to be the same bytes."""
        return self is other

    def read_many_into(self, reads: Sequence[tuple[int, int]], buffer: memoryview) -> None:
        """Fill `buffer` from many runs (place, length), one after another."""
        filled = 0
        for at, length in reads:
            self.read_into(at, buffer[filled : filled + length])
            filled += length

    def is_surely_data(self, at: int, length: int) -> bool:
        """Whether it is known, without reading them, that the bytes are not all zeroes."""
        del at, length
        return False

    def write(self, at: int, content: Buffer) -> None:
        """Write all of `content` at `at`, growing the medium where needed."""
        ...

    def writev(self, at: int, contents: list[Buffer]) -> None:
        """Write the buffers one after another from `at` on."""
        ...

    def zero(self, at: int, length: int, *, unmap: bool) -> None:
        """Make the run read as zeroes: deallocated if `unmap` and possible, else allocated; grows the medium."""
        ...

    def discard(self, at: int, length: int) -> None:
        """Give the run's space back; it reads as zeroes afterwards. A medium that cannot leaves it as it is."""
        ...

    def preallocate(self, at: int, length: int) -> None:
        """A hint: all of the run is about to be written. Nothing that can be read changes, and nothing is raised."""
        del at, length

    def read_ahead(self, pieces: Sequence[tuple[int, int]]) -> None:
        """A hint: all of these runs (place, length) are about to be read, in this order. Nothing is raised."""
        del pieces

    def copy_from(self, source: "Medium", source_at: int, at: int, length: int) -> None:
        """Copy a run from another medium by the fastest means both know; short sources read as zeroes."""
        ...

    def gather_from(self, source: "Medium", pieces: Sequence[tuple[int, int]], at: int) -> None:
        """Copy many short runs (place, length) of another medium one after another to `at`, as `copy_from` does."""
        for source_at, length in pieces:
            self.copy_from(source, source_at, at, length)
            at += length

    def scatter_from(self, source: "Medium", pieces: Sequence[tuple[int, int, int]]) -> None:
        """Copy many short runs (place there, place here, length; ascending here), as `copy_from` does."""
        for source_at, at, length in pieces:
            self.copy_from(source, source_at, at, length)

    def allocations(self, at: int, length: int) -> list[Allocation]:
        """Which parts are data, in order and without gaps; a medium that cannot tell says all is data."""
        ...

    def data_runs(self, at: int, length: int, enough_bytes: int) -> tuple[list[int], list[int]]:
        """Where the parts that are data begin, and their lengths; what lies between is zero.

        Args:
            enough_bytes: it need not look behind the run with which there is more data than this.
        """
        del enough_bytes
        data = [run for run in self.allocations(at, length) if run.is_data]
        return [run.at for run in data], [run.length for run in data]

    def sync(self) -> None:
        """Return when everything written is durable. After a failure every later call fails too (durability I8)."""
        ...

    def truncate(self, length: int) -> None:
        """Set the size; new bytes read as zeroes."""
        ...

    def size(self) -> int:
        """Length in bytes."""
        ...

    def unwritten_at(self) -> int:
        """From where on it reads as zeroes, since nobody has ever written there; what is beyond all it may hold, if
        that cannot be told.
        """
        return NEVER_AT

    def allocated_size(self) -> int:
        """Bytes of storage in use, as `du` counts them."""
        ...

    def close(self) -> None:
        """Give the descriptor and its locks back."""
        ...


def is_mostly_holes(medium: Medium) -> bool:
    """Whether it is worth while to look for holes among clusters that a format has allocated."""
    return medium.allocated_size() < medium.size() // 4 * 3
