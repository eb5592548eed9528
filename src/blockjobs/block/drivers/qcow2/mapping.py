"""The active L1 table and its L2 tables: where each guest cluster is.

L2 tables that only the active state uses are changed in place in memory. One that a snapshot shares (the L1 entry lacks
the copied flag) is copied first, and an absent one is created; either way the new table stays `is_new` until a commit
has written it, and the L1 entry follows in that commit's last step.
"""

import asyncio
from array import array
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Final, NamedTuple

from blockjobs.base.errors import ImageCorrupt
from blockjobs.base.span import Span
from blockjobs.block.drivers.qcow2.allocate import Allocator, leading_zero_bytes
from blockjobs.block.drivers.qcow2.entries import is_stored, runs_of
from blockjobs.block.drivers.qcow2.geometry import Geometry
from blockjobs.block.drivers.qcow2.pending import PendingFrees
from blockjobs.block.drivers.qcow2.refcounts import Refcounts
from blockjobs.block.drivers.qcow2.roots import RootTable
from blockjobs.block.drivers.qcow2.tables import Table, TableCache
from blockjobs.wire.qcow2_tables import COPIED, OFFSET, decode_table, encode_table

TABLES_PER_STEP: Final = 16
"""How many L2 tables one step of a long request looks at: bounds the memory that a request pins."""

_SCANNED_ENTRIES: Final = 4096


class Stretch(NamedTuple):
    """The part of a request that one L2 table maps: entries `first` to `end` of the table of L1 entry `l1_index`."""

    l1_index: int
    first: int
    end: int
    at: int
    """Guest offset of entry `first`."""


class Mapping:
    """The active mapping of one open image.

    Attributes:
        l1: the active L1 table; it may be longer than the virtual size needs.
        l2: the L2 tables.
        trusts_flags: whether "copied" flags are believed. With internal snapshots they are checked against refcounts:
            a writer that died while it made a snapshot may have left flags that are not true (durability I4).
    """

    def __init__(
        self,
        geometry: Geometry,
        l1: RootTable,
        *,
        cache_bytes: int,
        read: Callable[[int, int], Awaitable[bytes]],
        allocator: Allocator,
        pending: PendingFrees,
        refcounts: Refcounts,
        trusts_flags: bool,
    ) -> None:
        self._geometry = geometry
        self._allocator = allocator
        self._pending = pending
        self.l1 = l1
        self.l2 = TableCache(
            table_bytes=geometry.cluster_size,
            item_bits=64,
            budget_bytes=cache_bytes,
            decode=decode_table,
            encode=encode_table,
            read=read,
        )
        self.trusts_flags = trusts_flags
        self._refcounts = refcounts
        self._trusted: set[int] = set()
        self._changing_l1 = asyncio.Lock()

    def stretches(self, span: Span) -> Iterator[Stretch]:
        """Cut a run of guest bytes, widened to clusters, at the borders of L2 tables."""
        size, l2_span = self._geometry.cluster_size, self._geometry.l2_span
        for part in span.widen(size).split(l2_span):
            index, offset = divmod(part.at, l2_span)
            first = offset // size
            yield Stretch(index, first, first + part.length // size, part.at)

    def by_table(self, spans: Iterable[Span]) -> Iterator[tuple[int, list[Span]]]:
        """Many runs of guest bytes, ascending, cut at the borders of L2 tables: L1 index, and what its table maps."""
        l2_span = self._geometry.l2_span
        index, end = -1, 0
        group: list[Span] = []
        for span in spans:
            for part in (span,) if span.end <= end else span.split(l2_span):
                if part.at >= end:
                    if group:
                        yield index, group
                    index, group = part.at // l2_span, []
                    end = (index + 1) * l2_span
                group.append(part)
        if group:
            yield index, group

    def steps(self, span: Span) -> Iterator[tuple[Span, bool]]:
        """Cut a long run into parts that are looked at in one go: (part, whether it has no L2 tables at all).

        The L1 table may have millions of empty entries, which make one part.
        """
        l2_span = self._geometry.l2_span
        at = span.at
        while at < span.end:
            index = at // l2_span
            absent = self._absent_from(index, -(-span.end // l2_span))
            end = min(span.end, (index + (absent or TABLES_PER_STEP)) * l2_span)
            yield Span.between(at, end), absent > 0
            at = end

    def _absent_from(self, index: int, end: int) -> int:
        """How many L1 entries from `index` on, before `end`, are empty."""
        start = index
        while index < end:
            raw = self.l1.words[index : min(end, index + _SCANNED_ENTRIES)].tobytes()
            index += leading_zero_bytes(raw) // 8
            if not raw or leading_zero_bytes(raw) < len(raw):
                break
        return index - start

    def table_at(self, index: int) -> int:
        """Place of an L2 table, 0 if there is none.

        Raises:
            ImageCorrupt: the L1 entry points at nonsense.
        """
        at = self.l1.words[index] & OFFSET
        if at % self._geometry.cluster_size:
            raise ImageCorrupt(self._geometry.name, f"L2 table offset {at:#x} unaligned (L1 index: {index:#x})")
        return at

    async def table(self, index: int) -> Table | None:
        """The L2 table of an L1 entry, for reading; None if there is none.

        Raises:
            ImageCorrupt, IoFailure: it could not be read.
        Waits: one read. Checkpoint: no.
        """
        while at := self.table_at(index):
            table = self.l2.peek(at)
            if table is not None:
                return table
            table = await self.l2.load(at)
            if self.table_at(index) == at:
                return table
        return None

    async def prefetch(self, first: int, end: int) -> None:
        """Bring the L2 tables of L1 entries `first` to `end` into memory in few reads. Raises and waits as `table`."""
        if end - first > 1:
            await self.l2.prefetch(at for at in map(self.table_at, range(first, end)) if at)

    async def writable_table(self, index: int) -> Table:
        """The L2 table of an L1 entry, for changing: the active state's own, created or copied if need be.

        Raises:
            ImageCorrupt, IoFailure: no space, or tables could not be read; nothing changed.
        Waits: reads of tables. Checkpoint: no.
        """
        if (table := await self._own_table(index)) is not None:
            return table
        async with self._changing_l1:
            if (table := await self._own_table(index)) is not None:
                return table
            shared = await self.table(index)
            [run] = await self._allocator.take(1)
            words = self._copy_of(shared) if shared is not None else array("Q", bytes(self._geometry.cluster_size))
            if shared is not None:
                self._pending.add(shared.at // self._geometry.cluster_size, 1, is_table=True)
            table = self.l2.create(run.cluster * self._geometry.cluster_size, words)
            self._allocator.guarded.add(run.cluster)
            self.l1.words[index] = table.at | COPIED
            self._trusted.add(index)
            self.l1.mark(index)
            return table

    async def _own_table(self, index: int) -> Table | None:
        """The L2 table of an L1 entry if it exists and no snapshot shares it."""
        if not self.l1.words[index] & COPIED:
            return None
        if not self.trusts_flags and index not in self._trusted:
            cluster = self.table_at(index) // self._geometry.cluster_size
            if await self._refcounts.count(cluster) != 1:
                return None
            self._allocator.check_not_inactive(cluster)
            self._trusted.add(index)
        table = await self.table(index)
        return table if self.l1.words[index] & COPIED else None

    async def clear_false_flags(self, table: Table, stretch: Stretch) -> None:
        """Take the copied flag from entries of a writable table whose clusters are not referred to exactly once.

        Raises:
            ImageCorrupt, IoFailure: refcounts could not be read; nothing is wrong then, but nothing is known.
        Waits: reads of refcount blocks. Checkpoint: no.
        """
        step, size = self._geometry.entry_words, self._geometry.cluster_size
        for run in runs_of(table.items[stretch.first * step : stretch.end * step], self._geometry):
            if not run.word & COPIED or not is_stored(run, self._geometry):
                continue
            first, length = run.offset // size, run.end - run.start
            true = {
                cluster
                for at, count in await self._refcounts.last_uses(first, length)
                for cluster in range(at, at + count)
            }
            for number in range(length):
                if first + number not in true:
                    index = (stretch.first + run.start + number) * step
                    table.items[index] &= ~COPIED
                    self.l2.touch(table, index, index + 1)

    def flags_may_be_false(self) -> None:
        """Every copied flag is to be checked from now on."""
        self.trusts_flags = False
        self._trusted.clear()

    def _copy_of(self, shared: Table) -> "array[int]":
        """The words of a table that a snapshot shares: what it maps is shared too, whatever it says (I4)."""
        words = shared.items[:]
        step = self._geometry.entry_words
        words[::step] = array("Q", [word & ~COPIED for word in words[::step]])
        return words
