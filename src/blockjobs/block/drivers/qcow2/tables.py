"""L2 tables and refcount blocks in memory: loaded on demand, changed at once, written only by a commit.

A table is changed synchronously between two awaits, so a reader never sees half a change. Nothing here decides *when*
a dirty table may be written: `transaction.py` takes copies of the dirty parts and writes those in order.

A table can be thrown out only if the file has, or has durably lost, everything it says: it is clean, no commit holds a
copy on its way to the file, and nobody has pinned it.
"""

import asyncio
from array import array
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from typing import Final, NamedTuple

from blockjobs.base.errors import BlockjobsError, first_failure
from blockjobs.wire.qcow2 import SECTOR

READ_BYTES_MAX: Final = 1 << 20
"""Neighbouring tables are read together up to this: with 512-byte clusters a table is 512 bytes too."""
_EVICTIONS_TRIED_MAX: Final = 16


class Table:
    """One L2 table or refcount block. Change `items` only together with `TableCache.touch`.

    Attributes:
        at: place in the image file.
        items: entries in native byte order.
        is_new: the file has never had it; nothing durable points at it, so a commit writes it whole and early.
        used_in: the round of its cache in which it was looked up last.
    """

    __slots__ = ("_copies", "_dirty_end", "_dirty_start", "at", "is_new", "items", "pins", "used_in")

    def __init__(self, at: int, items: "array[int]", *, is_new: bool) -> None:
        self.at = at
        self.items = items
        self.is_new = is_new
        self.pins = 0
        self.used_in = 0
        self._dirty_start = 0
        self._dirty_end = 0
        self._copies = 0

    @property
    def is_dirty(self) -> bool:
        """Whether memory is ahead of the file."""
        return self._dirty_start < self._dirty_end

    @property
    def is_evictable(self) -> bool:
        """Whether it may be read anew from the file at any time."""
        return not (self.pins or self._copies or self.is_new or self._dirty_start < self._dirty_end)

    def mark(self, start: int, end: int) -> None:
        """Items `start` to `end` differ from the file. Only for `TableCache`."""
        if self._dirty_start < self._dirty_end:
            start, end = min(start, self._dirty_start), max(end, self._dirty_end)
        self._dirty_start, self._dirty_end = start, end

    def take(self) -> tuple[int, int]:
        """The dirty range, which is clean from now on while a copy travels. Only for `TableCache`."""
        taken = self._dirty_start, self._dirty_end
        self._dirty_start = self._dirty_end = 0
        self._copies += 1
        return taken

    def landed(self) -> None:
        """The copy has reached the file, or has failed and was marked again. Only for `TableCache`."""
        self._copies -= 1


class Piece(NamedTuple):
    """A copy of a table's dirty part as the file stores it."""

    table: Table
    start: int
    end: int
    at: int
    content: bytes


class TableCache:
    """Tables of one kind, by place in the file, within a budget of bytes that dirty and pinned tables may exceed.

    Args:
        table_bytes: size of a table in the file.
        item_bits: width of an item in the file.
        budget_bytes: how much is kept in memory; never less than two tables.
        decode: the file's bytes to items.
        encode: items to the file's bytes.
        read: reads bytes of the image file; raises if they are not there.

    Attributes:
        has_more: told of tables that could be thrown out and were not there, or dirty, before.
    """

    def __init__(
        self,
        *,
        table_bytes: int,
        item_bits: int,
        budget_bytes: int,
        decode: "Callable[[bytes | memoryview], array[int]]",
        encode: "Callable[[array[int]], bytes]",
        read: Callable[[int, int], Awaitable[bytes]],
    ) -> None:
        self.table_bytes = table_bytes
        self._bytes_each = table_bytes * 8 // item_bits * max(1, item_bits // 8)  # items narrower than a byte take one
        self.budget_bytes = max(budget_bytes, 2 * self._bytes_each)
        self.has_more: Callable[[], None] = lambda: None
        self._round = 0
        self.dirty: dict[int, Table] = {}
        self._item_bits = item_bits
        self._items_per_sector = SECTOR * 8 // item_bits
        self._tables: OrderedDict[int, Table] = OrderedDict()
        self._loading: dict[int, asyncio.Event] = {}
        self._decode, self._encode, self._read = decode, encode, read

    def peek(self, at: int) -> Table | None:
        """The table if it is in memory."""
        table = self._tables.get(at)
        if table is not None:
            self._tables.move_to_end(at)
            table.used_in = self._round
        return table

    async def load(self, at: int) -> Table:
        """The table, read if need be.

        Whoever waits here must afterwards look up again what led to `at`: it may have changed meanwhile.

        Raises:
            IoFailure, ImageCorrupt: it could not be read; nothing changed.
        Waits: one read. Checkpoint: no.
        """
        while (table := self.peek(at)) is None:
            arriving = self._loading.get(at)
            if arriving is None:
                await self._load_run(at, 1)
            else:
                await arriving.wait()
        return table

    async def prefetch(self, places: Iterable[int]) -> None:
        """Bring tables into memory with as few reads as possible, all at the same time.

        Raises:
            IoFailure, ImageCorrupt: a table could not be read.
        Waits: reads. Checkpoint: no.
        """
        missing = sorted({at for at in places if at not in self._tables and at not in self._loading})
        run_max = max(1, READ_BYTES_MAX // self.table_bytes)
        runs: list[tuple[int, int]] = []
        for at in missing:
            if runs and runs[-1][0] + runs[-1][1] * self.table_bytes == at and runs[-1][1] < run_max:
                runs[-1] = runs[-1][0], runs[-1][1] + 1
            else:
                runs.append((at, 1))
        if len(runs) == 1:
            await self._load_run(*runs[0])
            return
        try:
            async with asyncio.TaskGroup() as tasks:
                for run in runs:
                    tasks.create_task(self._load_run(*run))
        except* BlockjobsError as failures:
            raise first_failure(failures) from None

    async def _load_run(self, at: int, count: int) -> None:
        """Read `count` neighbouring tables in one go."""
        size = self.table_bytes
        arrived = asyncio.Event()
        places = [place for place in range(at, at + count * size, size) if place not in self._loading]
        self._loading.update((place, arrived) for place in places)
        try:
            raw = memoryview(await self._read(at, count * size))
            for place in places:
                # A place that was forgotten or created anew meanwhile is not what these bytes say any more.
                if self._loading.get(place) is arrived and place not in self._tables:
                    self._insert(Table(place, self._decode(raw[place - at : place - at + size]), is_new=False))
        finally:
            for place in places:
                if self._loading.get(place) is arrived:
                    del self._loading[place]
            arrived.set()

    def create(self, at: int, items: "array[int]") -> Table:
        """A table that no file has yet, dirty as a whole."""
        self.forget(at)
        table = Table(at, items, is_new=True)
        self._insert(table)
        self.touch(table, 0, len(items))
        return table

    def forget(self, at: int) -> None:
        """The place is used for something else from now on; what was changed there is void."""
        self._loading.pop(at, None)
        self._tables.pop(at, None)
        self.dirty.pop(at, None)

    def touch(self, table: Table, start: int, end: int) -> None:
        """Items `start` to `end` have been changed."""
        table.mark(start, end)
        self.dirty[table.at] = table

    def _insert(self, table: Table) -> None:
        self._tables[table.at] = table
        table.used_in = self._round
        self.has_more()
        tried = 0
        while self.memory_bytes > self.budget_bytes and tried < _EVICTIONS_TRIED_MAX:
            tried += 1
            oldest = next(iter(self._tables.values()))
            if oldest.is_evictable and oldest is not table:
                del self._tables[oldest.at]
            else:
                self._tables.move_to_end(oldest.at)

    def drop_unused(self) -> bool:
        """Throw out what nobody has looked up since the last call; returns whether there is more that could go."""
        idle = [at for at, table in self._tables.items() if table.used_in < self._round and table.is_evictable]
        for at in idle:
            del self._tables[at]
        self._round += 1
        return any(table.is_evictable for table in self._tables.values())

    @property
    def memory_bytes(self) -> int:
        """How much memory the tables take."""
        return len(self._tables) * self._bytes_each

    @property
    def dirty_bytes(self) -> int:
        """How much of it waits for a commit."""
        return len(self.dirty) * self._bytes_each

    def take_dirty(self) -> list[Piece]:
        """Copies of all that is dirty, by place; it counts as clean until `give_back`."""
        pieces = []
        for at in sorted(self.dirty):
            table = self.dirty[at]
            start, end = table.take()
            step = self._items_per_sector
            start, end = start // step * step, min(-(-end // step) * step, len(table.items))
            content = self._encode(table.items[start:end])
            pieces.append(Piece(table, start, end, at + start * self._item_bits // 8, content))
        self.dirty.clear()
        return pieces

    def give_back(self, pieces: Iterable[Piece]) -> None:
        """The copies did not reach the file: what they say is dirty again."""
        for piece in pieces:
            piece.table.landed()
            if self._tables.get(piece.table.at) is piece.table:
                self.touch(piece.table, piece.start, piece.end)

    def settle(self, pieces: Iterable[Piece]) -> None:
        """The copies are durable."""
        for piece in pieces:
            piece.table.landed()
        self.has_more()
