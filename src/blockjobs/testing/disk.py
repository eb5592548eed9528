"""A disk in memory that can lose power (design §3.7, spec/durability.md §1: the medium model).

`Pages` is the bytes, cheap to copy; `Change` is one thing done to them; `SimDisk` is a medium that knows what has not
been synced yet and may lose any part of it.
"""

import random
import threading
from collections.abc import Iterable, Iterator
from enum import StrEnum
from typing import Final, NamedTuple

from blockjobs.base.buffers import Buffer
from blockjobs.block.medium import Allocation, Medium

SECTOR: Final = 512
_PAGE: Final = 4096
_COPY_BYTES: Final = 1 << 20


class Pages:
    """Sparse bytes. Pages are immutable, so that `copy` costs a dict of references."""

    def __init__(self, content: bytes = b"") -> None:
        self._pages: dict[int, bytes] = {}
        self.size = 0
        if content:
            self.write(0, content)

    def copy(self) -> "Pages":
        """An independent twin."""
        twin = Pages()
        twin._pages, twin.size = dict(self._pages), self.size
        return twin

    def read(self, at: int, length: int) -> bytes:
        """Bytes of a run; holes and what lies past the end read as zeroes."""
        pieces = []
        for page, start, stop in _cut(at, length):
            pieces.append(self._pages.get(page, bytes(_PAGE))[start:stop])
        return b"".join(pieces)

    def write(self, at: int, content: bytes) -> None:
        """Put bytes, growing the size where needed."""
        done = 0
        for page, start, stop in _cut(at, len(content)):
            piece = content[done : done + stop - start]
            if stop - start < _PAGE:
                old = self._pages.get(page, bytes(_PAGE))
                piece = old[:start] + piece + old[stop:]
            self._pages[page] = piece
            done += stop - start
        self.size = max(self.size, at + len(content))

    def erase(self, at: int, length: int) -> None:
        """Make a run a hole; the size stays."""
        for page, start, stop in _cut(at, length):
            if stop - start == _PAGE:
                self._pages.pop(page, None)
            elif page in self._pages:
                old = self._pages[page]
                self._pages[page] = old[:start] + bytes(stop - start) + old[stop:]

    def truncate(self, size: int) -> None:
        """Set the size; what is cut off is gone for good."""
        if size < self.size:
            end = max(self.size, (max(self._pages, default=-1) + 1) * _PAGE)
            self.erase(size, end - size)
        self.size = size

    def holds(self, page_at: int) -> bool:
        """Whether the page around an offset is allocated."""
        return page_at // _PAGE in self._pages

    def allocated(self) -> int:
        """Bytes of allocated pages."""
        return len(self._pages) * _PAGE

    def save(self, path: str) -> None:
        """Write the content to a sparse file, for tools."""
        with open(path, "wb") as file:
            for page, content in sorted(self._pages.items()):
                file.seek(page * _PAGE)
                file.write(content)
            file.truncate(self.size)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Pages) or self.size != other.size:
            return False
        return all(
            self._pages.get(page, bytes(_PAGE)) == other._pages.get(page, bytes(_PAGE))
            for page in self._pages.keys() | other._pages.keys()
        )

    __hash__ = None  # type: ignore[assignment]  # mutable


def _cut(at: int, length: int) -> Iterator[tuple[int, int, int]]:
    """(page, start in it, stop in it) of each page that a run touches."""
    end = at + length
    while at < end:
        page, start = divmod(at, _PAGE)
        stop = min(_PAGE, start + end - at)
        yield page, start, stop
        at += stop - start


class Act(StrEnum):
    """What was done to a medium."""

    WRITE = "write"
    ZERO = "zero"
    DISCARD = "discard"
    TRUNCATE = "truncate"
    SYNC = "sync"
    MARK = "mark"


class Change(NamedTuple):
    """One act: `content` for writes, `length` for runs (the size for TRUNCATE), `label` for marks of a test."""

    act: Act
    at: int = 0
    length: int = 0
    content: bytes = b""
    disk: str = ""
    label: object = None

    def apply(self, pages: Pages, sectors: frozenset[int] | None = None) -> None:
        """Do it again; with `sectors` only those 512-byte sectors (by number) of it: the torn part that survived."""
        if self.act is Act.TRUNCATE:
            pages.truncate(self.length)
            return
        for start, stop in self._runs(sectors):
            if self.act is Act.WRITE:
                pages.write(start, self.content[start - self.at : stop - self.at])
            else:
                pages.erase(start, stop - start)
                if self.act is Act.ZERO:
                    pages.size = max(pages.size, stop)

    def sectors(self) -> range:
        """Numbers of the sectors touched."""
        if self.act is Act.TRUNCATE or not self.length:
            return range(0)
        return range(self.at // SECTOR, -(-(self.at + self.length) // SECTOR))

    def _runs(self, sectors: frozenset[int] | None) -> Iterator[tuple[int, int]]:
        end = self.at + self.length
        if sectors is None:
            yield self.at, end
            return
        for sector in sorted(sectors):
            yield max(self.at, sector * SECTOR), min(end, (sector + 1) * SECTOR)


def survive(pages: Pages, pending: Iterable[Change], chance: random.Random) -> None:
    """Apply what a power cut leaves of unsynced changes: any of them, each possibly torn at sector boundaries."""
    for change in pending:
        fate = chance.randrange(3)
        if fate == 0:
            change.apply(pages)
        elif fate == 1:
            kept = frozenset(sector for sector in change.sectors() if chance.random() < 0.5)
            if kept:
                change.apply(pages, kept)


class SimDisk(Medium):
    """A medium in memory. What was not synced may be lost in a power cut."""

    def __init__(self, content: bytes | Pages = b"") -> None:
        self.pages = content.copy() if isinstance(content, Pages) else Pages(content)
        self._durable = self.pages.copy()
        self._pending: list[Change] = []
        self._lock = threading.Lock()
        self.closed = False

    def cut_power(self, seed: int) -> None:
        """Lose what was not synced, or parts of it: the same parts for the same seed."""
        with self._lock:
            survive(self._durable, self._pending, random.Random(seed))
            self.pages, self._pending = self._durable.copy(), []

    def after_power_cut(self, seed: int) -> Pages:
        """What `cut_power` would leave; nothing changes."""
        with self._lock:
            left = self._durable.copy()
            survive(left, self._pending, random.Random(seed))
            return left

    def _do(self, change: Change) -> None:
        with self._lock:
            change.apply(self.pages)
            self._pending.append(change)

    def read_into(self, at: int, buffer: memoryview) -> None:
        """See `Medium`."""
        with self._lock:
            buffer[:] = self.pages.read(at, len(buffer))

    def write(self, at: int, content: Buffer) -> None:
        """See `Medium`."""
        self._do(Change(Act.WRITE, at, len(content), bytes(content)))

    def writev(self, at: int, contents: list[Buffer]) -> None:
        """See `Medium`."""
        self.write(at, b"".join(bytes(piece) for piece in contents))

    def zero(self, at: int, length: int, *, unmap: bool) -> None:
        """See `Medium`; always makes a hole."""
        del unmap
        self._do(Change(Act.ZERO, at, length))

    def discard(self, at: int, length: int) -> None:
        """See `Medium`."""
        self._do(Change(Act.DISCARD, at, length))

    def copy_from(self, source: Medium, source_at: int, at: int, length: int) -> None:
        """See `Medium`."""
        copy_through_memory(self, source, source_at, at, length)

    def allocations(self, at: int, length: int) -> list[Allocation]:
        """See `Medium`; in units of 4 KiB."""
        runs: list[Allocation] = []
        with self._lock:
            for page, start, stop in _cut(at, length):
                is_data = self.pages.holds(page * _PAGE)
                if runs and runs[-1].is_data == is_data:
                    runs[-1] = runs[-1]._replace(length=runs[-1].length + stop - start)
                else:
                    runs.append(Allocation(page * _PAGE + start, stop - start, is_data))
        return runs

    def sync(self) -> None:
        """See `Medium`."""
        with self._lock:
            self._durable, self._pending = self.pages.copy(), []

    def truncate(self, length: int) -> None:
        """See `Medium`."""
        self._do(Change(Act.TRUNCATE, length=length))

    def size(self) -> int:
        """See `Medium`."""
        return self.pages.size

    def unwritten_at(self) -> int:
        """See `Medium`: as in a file, what is new is zero."""
        return self.size()

    def allocated_size(self) -> int:
        """See `Medium`."""
        return self.pages.allocated()

    def close(self) -> None:
        """See `Medium`; the bytes stay, for whoever opens the disk again."""
        self.closed = True


def copy_through_memory(target: Medium, source: Medium, source_at: int, at: int, length: int) -> None:
    """`Medium.copy_from` for media that know no faster way."""
    done = 0
    while done < length:
        buffer = bytearray(min(_COPY_BYTES, length - done))
        source.read_into(source_at + done, memoryview(buffer))
        target.write(at + done, buffer)
        done += len(buffer)
