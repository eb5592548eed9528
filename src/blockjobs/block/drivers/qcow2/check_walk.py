"""Walking over all metadata of an image, so often that all clusters of the file are counted in bounded memory.

A file with no more clusters than `Counts` may hold is counted in one walk. For a larger one the first walk only looks
at what is no matter of single clusters, and makes an outline; then each window of the file is counted by a walk of its
own, which leaves out the L2 tables that refer to nothing there. Import it only where a check truly begins: numpy comes
with it.
"""

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

import numpy as np

from blockjobs.base.errors import UsageError
from blockjobs.base.offload import Offload
from blockjobs.base.text import printable
from blockjobs.block.driver import Child
from blockjobs.block.drivers.qcow2 import check_counts
from blockjobs.block.drivers.qcow2.check_counts import PAGE_BITS, NoRoom
from blockjobs.block.drivers.qcow2.check_outline import Outline
from blockjobs.block.drivers.qcow2.check_reads import READ_BYTES, read_clusters, read_padded
from blockjobs.block.drivers.qcow2.check_tally import Tally
from blockjobs.block.drivers.qcow2.records import read_bitmaps, read_snapshots
from blockjobs.wire.qcow2 import CRYPT_LUKS, L1_BYTES_MAX, Header
from blockjobs.wire.qcow2_tables import (
    OFFSET,
    REFCOUNT_BLOCK_OFFSET,
    BitmapEntry,
    SnapshotEntry,
    decode_refcounts,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from blockjobs.block.drivers.qcow2.check import Advance
    from blockjobs.block.drivers.qcow2.check_counts import Clusters

    Words = NDArray[np.uint64]

_COUNTED_BYTES: Final = 64 << 10
"""So much of the tables is counted at once: what that takes stays in the processor's nearest cache."""
_L1_STEP: Final = 1 << 17
"""Entries of an L1 table that are looked at together."""
_NOWHERE: Final = np.uint64(1)
_BITMAP_TABLE_BYTES_MAX: Final = 64 << 20
REPEATED_BYTES_MAX: Final = 64 << 20
"""So much of L2 tables that an L1 table names more than once is counted again for each time, as QEMU does. No writer
makes any; millions of names of one table would keep a reader busy for minutes."""


class MetadataWalk:
    """The metadata of one image, which nobody changes meanwhile but in ways that keep all references.

    Attributes:
        tally: what was found; its counts are those of the window that is being looked at.
    """

    def __init__(self, file: Child, header: Header, *, offload: Offload, advance: "Advance") -> None:
        self.tally = Tally(header, file.length)
        self._file, self._header, self._offload, self._advance = file, header, offload, advance
        self._table: Words = np.empty(0, np.uint64)
        self._snapshots: list[SnapshotEntry] = []
        self._bitmaps: list[BitmapEntry] = []
        self._broken: dict[str, str] = {}
        self._counts_structures = True
        self._is_whole = False
        """Whether the tally has all of the file at once."""
        self._outline: Outline | None = None
        self._pages_max = check_counts.COUNTS_BYTES_MAX >> PAGE_BITS
        # What the first walk found out, in the order of the walk.
        self._verdicts: list[bool] = []
        self._spans: list[tuple[int, int]] = []
        self._verdict = self._span = 0
        self._looks_again = False

    @classmethod
    async def begin(cls, file: Child, header: Header, *, offload: Offload, advance: "Advance") -> "MetadataWalk":
        """Read what the walks are about. Raises and waits as `check_image`."""
        walk = cls(file, header, offload=offload, advance=advance)
        length = header.refcount_table_clusters * header.cluster_size
        walk._table = _words(await read_padded(file, header.refcount_table_at, length))
        try:
            walk._snapshots = await read_snapshots(file, header)
        except UsageError as error:
            walk._broken["snapshot table"] = f"snapshot table: {error}"
        try:
            walk._bitmaps = await read_bitmaps(file, header)
        except UsageError as error:
            walk._broken["bitmap directory"] = f"bitmaps: {error}"
        return walk

    async def each_window(self, use: Callable[[Tally], Awaitable[None]]) -> None:
        """Count the clusters, and call `use` for each window when all is counted in it.

        The first time, the tally also gets what is no matter of single clusters, and keeps what `use` finds.

        Raises, waits: as `check_image`, and whatever `use` does.
        """
        is_first_time = not self._is_whole and self._outline is None
        if is_first_time:
            await self._look()
        if self._is_whole:
            await use(self.tally)
            return
        first = 0
        while first < self.tally.clusters:
            end, is_smallest = self._window_end(first)
            room = None if is_smallest else self._pages_max << PAGE_BITS
            self.tally.begin(first, end, looks=False, bytes_max=room)
            try:
                await self._walk_all()
            except NoRoom:
                self.tally.undo()
                self._pages_max //= 2
                continue
            await use(self.tally)
            if not is_first_time:
                self.tally.undo()
            first = end
        self.tally.begin(first, first, looks=False)  # the last window's memory is not needed any more

    def forget_refcount_structures(self) -> None:
        """Count the references to the refcount table and its blocks no more: they will be free."""
        self._counts_structures = False
        if self._is_whole:
            header, size = self._header, self._header.cluster_size
            first = header.refcount_table_at // size
            end = min(first + header.refcount_table_clusters, self.tally.clusters)
            self.tally.counts.take_back(np.concatenate([np.arange(first, end), self._sound_blocks()[1]]))

    def block_place(self, index: int) -> int:
        """Where refcount block number `index` is, in bytes; it must be one that was counted."""
        return int(self._table[index]) & REFCOUNT_BLOCK_OFFSET

    def is_referred_once(self, cluster: int) -> bool:
        """Whether the cluster of a refcount block has one reference only, so that nobody else's data can be there."""
        if self._outline is None:
            return self.tally.counts[cluster] == 1
        return int(self._outline.numbers(cluster, 1)[0]) == 1

    async def _look(self) -> None:
        """The first walk."""
        tally = self.tally
        if tally.clusters <= self._pages_max << PAGE_BITS:
            tally.begin(0, tally.clusters, looks=True, bytes_max=self._pages_max << PAGE_BITS)
            try:
                await self._walk_all()
            except NoRoom:
                self.tally = tally = Tally(self._header, self._file.length)
                self._verdicts.clear()
                self._looks_again = True
            else:
                self._is_whole = True
                return
        outline = Outline(*self._asked())
        tally.begin_outline(outline)
        await self._walk_all()
        self._outline = outline

    def _asked(self) -> tuple["Clusters", "Clusters"]:
        """Runs of clusters (first, count) about which the walk asks."""
        size = self._header.cluster_size
        tables = [(each.l1_at, each.l1_entries * 8) for each in self._snapshots]
        tables += [(each.table_at, each.table_entries * 8) for each in self._bitmaps]
        inside = [(at // size, min(-(-(at + length) // size), self.tally.clusters)) for at, length in tables]
        runs = [(first, end - first) for first, end in inside if first < end]
        blocks = self._sound_blocks()[1]
        pairs = np.array(runs, np.int64).reshape(-1, 2)
        firsts = np.concatenate([pairs[:, 0], blocks])
        return firsts, np.concatenate([pairs[:, 1], np.ones(len(blocks), np.int64)])

    def _window_end(self, first: int) -> tuple[int, bool]:
        """Where a window ends that begins at a cluster, and whether there can be no smaller one.

        No refcount block belongs to two windows.
        """
        assert self._outline is not None
        pages = self._outline.pages()
        pages = pages[np.searchsorted(pages, first >> PAGE_BITS) :]
        if len(pages) <= self._pages_max:
            return self.tally.clusters, False
        group = max(1 << PAGE_BITS, self._header.refcounts_per_block)
        smallest = ((int(pages[0]) << PAGE_BITS) // group + 1) * group
        end = max(smallest, (int(pages[self._pages_max]) << PAGE_BITS) // group * group)
        return min(end, self.tally.clusters), end == smallest

    async def _walk_all(self) -> None:
        header, tally = self._header, self.tally
        self._verdict = self._span = 0
        await self._load_refcounts()
        tally.add_region(0, header.cluster_size)
        await self._walk_tree(header.l1_at, header.l1_entries, is_active=True)
        await self._walk_snapshots()
        if header.crypt_method == CRYPT_LUKS and header.luks is not None:
            tally.add_region(header.luks.at, header.luks.length)
        await self._walk_bitmaps()
        if self._counts_structures:
            tally.add_region(header.refcount_table_at, header.refcount_table_clusters * header.cluster_size)
            self._walk_refcount_blocks()

    async def _load_refcounts(self) -> None:
        """Read the refcounts of the window."""
        header, tally = self._header, self.tally
        size, per_block = header.cluster_size, header.refcounts_per_block
        places = (self._table & np.uint64(REFCOUNT_BLOCK_OFFSET)).astype(np.int64)
        indexes = np.arange(len(places))
        is_sound = (self._table != 0) & (places % size == 0) & self._is_in_file(places)
        is_sound &= indexes < -(-tally.clusters // per_block)
        if is_sound.any():
            tally.counted_end = (int(np.flatnonzero(is_sound)[-1]) + 1) * per_block
        if isinstance(tally.references, Outline):
            tally.references.add_groups(indexes[is_sound], per_block, tally.clusters)
            return
        first, end = tally.refcounts.first // per_block, -(-tally.refcounts.end // per_block)
        chosen = np.flatnonzero(is_sound[first:end]) + first
        per_step = max(1, READ_BYTES // size)
        for start in range(0, len(chosen), per_step):
            step = chosen[start : start + per_step]
            blocks = await read_clusters(self._file, header, places[step].tolist())
            await self._offload.run(self._set_refcounts, step.tolist(), blocks)

    def _set_refcounts(self, indexes: list[int], blocks: list[bytes]) -> None:
        for index, block in zip(indexes, blocks, strict=True):
            self.tally.set_refcounts(index, decode_refcounts(block, self._header.refcount_bits))

    def _is_in_file(self, places: "Clusters") -> "NDArray[np.bool_]":
        is_in_file: NDArray[np.bool_] = (places >= 0) & (places // self._header.cluster_size < self.tally.clusters)
        return is_in_file

    def _sound_blocks(self) -> tuple["Clusters", "Clusters"]:
        """Numbers of the refcount blocks to which the table refers as it should, and the clusters where they are."""
        indexes = np.flatnonzero(self._table)
        places = self._table[indexes].astype(np.int64)
        is_sound = (places % self._header.cluster_size == 0) & self._is_in_file(places)
        return indexes[is_sound], places[is_sound] // self._header.cluster_size

    def _walk_refcount_blocks(self) -> None:
        is_odd = self._table != 0
        is_odd[self._sound_blocks()[0]] = False
        odd = np.flatnonzero(is_odd).tolist()
        self.tally.corrupt_each(len(odd), map(self._odd_entry, odd))
        self.tally.add_blocks(*self._sound_blocks())

    def _odd_entry(self, index: int) -> str:
        entry = int(self._table[index])
        if entry & ~REFCOUNT_BLOCK_OFFSET:
            return f"refcount table entry {index} has reserved bits set"
        if entry % self._header.cluster_size:
            return f"refcount block {index} is not cluster aligned; refcount table entry corrupted"
        return f"refcount block {index} is outside image"

    async def _walk_tree(self, l1_at: int, l1_entries: int, *, is_active: bool) -> None:
        """Count an L1 table, and all L2 tables below it with what they refer to."""
        tally = self.tally
        tally.add_region(l1_at, l1_entries * 8)
        tables = await self._distinct_tables(l1_at, l1_entries)
        pieces = [(start, min(_L1_STEP, l1_entries - start)) for start in range(0, l1_entries, _L1_STEP)]
        for looks_below in (False, True):
            if tables is not None:
                tables.forget()
            for start, count in pieces:
                words = _words(await read_padded(self._file, l1_at + start * 8, count * 8))
                indexes = np.flatnonzero(words)
                if tables is not None:
                    indexes = indexes[tables.first_named(words[indexes] & np.uint64(OFFSET))]
                words = words[indexes]
                if looks_below:
                    await self._walk_tables((words & np.uint64(OFFSET)).astype(np.int64), is_active=is_active)
                elif len(words):
                    await self._offload.run(self._add_l1_entries, indexes + start, words, is_active)

    def _add_l1_entries(self, indexes: "Clusters", words: "Words", is_active: bool) -> None:
        self.tally.add_l1_entries(indexes, words, is_active=is_active)

    async def _walk_tables(self, places: "Clusters", *, is_active: bool) -> None:
        """Count what the L2 tables at these places refer to; those past the end of the file are zeroes."""
        inside = places[(places > 0) & (places < self._file.length)]
        await self._progress(int(np.count_nonzero(places)) - len(inside))
        per_step = max(1, READ_BYTES // self._header.cluster_size)
        for start in range(0, len(inside), per_step):
            step = inside[start : start + per_step].tolist()
            if self._is_of_interest():
                tables = await read_clusters(self._file, self._header, step)
                await self._offload.run(self._add_l2_tables, tables, is_active)
            await self._progress(len(step))

    async def _progress(self, tables: int) -> None:
        await self._advance(tables if self.tally.looks and not self._looks_again else 0)

    def _is_of_interest(self) -> bool:
        """Whether the next tables may refer to something in the window."""
        if self.tally.looks:
            return True
        low, high = self._spans[self._span]
        self._span += 1
        return low < self.tally.refcounts.end and high >= self.tally.refcounts.first

    def _add_l2_tables(self, tables: list[bytes], is_active: bool) -> None:
        tally = self.tally
        outline = tally.references if isinstance(tally.references, Outline) else None
        if outline is not None:
            outline.forget_span()
        per_step = max(1, _COUNTED_BYTES // self._header.cluster_size)
        for start in range(0, len(tables), per_step):
            tally.add_l2_tables(b"".join(tables[start : start + per_step]), is_active=is_active)
        if outline is not None:
            self._spans.append((outline.low, outline.high))

    async def _distinct_tables(self, l1_at: int, l1_entries: int) -> "_DistinctTables | None":
        """All L2 tables that an L1 table names, if it names too many of them more than once."""
        if l1_entries * self._header.cluster_size <= REPEATED_BYTES_MAX:
            return None
        places = np.zeros(l1_entries, np.uint64)
        for start in range(0, l1_entries, _L1_STEP):
            count = min(_L1_STEP, l1_entries - start)
            words = _words(await read_padded(self._file, l1_at + start * 8, count * 8))
            # Of an entry without a place the flags are named, as if they were one.
            places[start : start + count] = words & np.uint64(OFFSET)
            places[start : start + count][(words != 0) & (words & np.uint64(OFFSET) == 0)] = _NOWHERE
        places.sort()
        is_first = np.diff(places, prepend=np.uint64(0)) != 0
        named, distinct = int(np.count_nonzero(places)), int(np.count_nonzero(is_first))
        if (named - distinct) * self._header.cluster_size <= REPEATED_BYTES_MAX:
            return None
        text = f"L1 table at {l1_at:#x} has {named - distinct} entries for L2 tables that it names already"
        self.tally.corrupt(text)
        self.tally.unread = f"L1 table at {l1_at:#x}"
        places = places[is_first]
        return _DistinctTables(np.where(places == _NOWHERE, np.uint64(0), places))

    def _is_used(self, at: int, length: int) -> bool:
        """Whether something that was counted before lies in these bytes of the file: what the first walk found."""
        if self.tally.looks:
            self._verdicts.append(self.tally.is_used(at, length))
        self._verdict += 1
        return self._verdicts[self._verdict - 1]

    async def _walk_snapshots(self) -> None:
        header, tally = self._header, self.tally
        self._say_broken("snapshot table")
        for snapshot in self._snapshots:
            name = printable(snapshot.name.decode("utf-8", "replace"))
            place = f"snapshot '{name}' l1_offset={snapshot.l1_at:#x}"
            if snapshot.l1_at % header.cluster_size or snapshot.l1_entries * 8 > L1_BYTES_MAX:
                tally.unread = f"snapshot '{name}'"
            if snapshot.l1_at % header.cluster_size:
                tally.corrupt(f"{place}: L1 table is not cluster aligned")
            elif snapshot.l1_entries * 8 > L1_BYTES_MAX:
                tally.corrupt(f"snapshot '{name}' l1_size={snapshot.l1_entries:#x}: L1 table is too large")
            elif self._is_used(snapshot.l1_at, snapshot.l1_entries * 8):
                # Not walked: thousands of snapshots with one long table would keep a reader busy for days.
                tally.corrupt(f"{place}: L1 table lies on other metadata")
                tally.add_region(snapshot.l1_at, snapshot.l1_entries * 8)
                tally.unread = f"snapshot '{name}'"
            else:
                await self._walk_tree(snapshot.l1_at, snapshot.l1_entries, is_active=False)
        tally.add_region(header.snapshots_at, sum(len(snapshot.encode()) for snapshot in self._snapshots))

    def _say_broken(self, part: str) -> None:
        if part in self._broken:
            self.tally.corrupt(self._broken[part])
            self.tally.unread = part

    async def _walk_bitmaps(self) -> None:
        header, tally = self._header, self.tally
        if header.bitmaps is None:
            return
        tally.add_region(header.bitmaps.directory_at, header.bitmaps.directory_bytes)
        self._say_broken("bitmap directory")
        for bitmap in self._bitmaps:
            name = printable(bitmap.name.decode("utf-8", "replace"))
            length = bitmap.table_entries * 8
            if bitmap.table_at % header.cluster_size or length > _BITMAP_TABLE_BYTES_MAX:
                tally.corrupt(f"Bitmap '{name}' doesn't satisfy the constraints")
                tally.unread = f"bitmap '{name}'"
                continue
            is_used = self._is_used(bitmap.table_at, length)
            tally.add_region(bitmap.table_at, length)
            if is_used:
                tally.corrupt(f"bitmap '{name}': table lies on other metadata")
                tally.unread = f"bitmap '{name}'"
                continue
            for start in range(0, length, READ_BYTES):
                raw = await read_padded(self._file, bitmap.table_at + start, min(READ_BYTES, length - start))
                tally.add_bitmap_table(_words(raw), name)


class _DistinctTables:
    """Tells of L2 tables that are named again and again when each is named for the first time."""

    def __init__(self, places: "Words") -> None:
        self._places = np.sort(places)
        self.forget()

    def forget(self) -> None:
        """Nothing was named yet."""
        self._is_named = np.zeros(len(self._places), bool)

    def first_named(self, places: "Words") -> "NDArray[np.intp]":
        """Which of these are named for the first time: their indexes, ascending."""
        found, firsts = np.unique(places, return_index=True)
        known = np.searchsorted(self._places, found)
        firsts = firsts[~self._is_named[known]]
        self._is_named[known] = True
        return np.sort(firsts)


def _words(raw: bytes) -> "Words":
    """A table of 64-bit entries."""
    words: Words = np.frombuffer(raw, ">u8").astype(np.uint64)
    return words
