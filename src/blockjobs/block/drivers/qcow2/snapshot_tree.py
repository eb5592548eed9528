"""Everything that an L1 table refers to, as a whole: counted once more, counted once less, copied flags set or cleared.

That is what making, applying and deleting an internal snapshot come down to. Work goes by L2 tables and runs of
clusters; memory is bounded, since commits are made on the way: a count that is too high, or a flag that is clear, does
no harm at any time (spec/durability.md §1, I1 and I4).
"""

from array import array
from bisect import bisect_left
from collections.abc import AsyncIterator, Sequence
from typing import Final

from blockjobs.base.errors import ImageCorrupt
from blockjobs.block.drivers.qcow2.entries import Mapped, check, is_stored, runs_of
from blockjobs.block.drivers.qcow2.image import Image, compressed_clusters
from blockjobs.block.drivers.qcow2.mapping import TABLES_PER_STEP
from blockjobs.block.drivers.qcow2.tables import Table
from blockjobs.wire.qcow2_tables import COMPRESSED, COPIED, OFFSET

_ROOM_PART: Final = 8
"""Nearly every table is changed here, and a commit holds copies of what it writes."""


async def tables(image: Image, words: Sequence[int]) -> AsyncIterator[tuple[int, Table]]:
    """(L1 index, L2 table) for every entry of an L1 table that has one, in order.

    Room for changes is made before each table. Tables come through the cache of the active ones.

    Raises:
        ImageCorrupt, IoFailure: a table could not be read, or the commit that makes room failed.
    Waits: reads, commits. Checkpoint: no.
    """
    used = [index for index, word in enumerate(words) if word & OFFSET]
    for start in range(0, len(used), TABLES_PER_STEP):
        step = used[start : start + TABLES_PER_STEP]
        await image.mapping.l2.prefetch([place_of(image, words[index]) for index in step])
        for index in step:
            await image.transaction.make_room(_ROOM_PART)
            yield index, await image.mapping.l2.load(place_of(image, words[index]))


def place_of(image: Image, word: int) -> int:
    """Place of the L2 table that an L1 entry names.

    Raises:
        ImageCorrupt: there can be none.
    """
    at = word & OFFSET
    if at % image.geometry.cluster_size:
        raise ImageCorrupt(image.geometry.name, f"L2 table offset {at:#x} unaligned")
    return at


class Metadata:
    """What the tables of a snapshot never refer to, unless somebody wants to have it counted down and given away."""

    def __init__(self, image: Image) -> None:
        self._name = image.geometry.name
        self._roots = sorted(image.metadata_clusters(l2_too=False))
        self._all = sorted(image.metadata_clusters())

    def check(self, cluster: int, length: int, *, is_table: bool) -> None:
        """Refuse a run of clusters with metadata in it. An L2 table may be an active one, too.

        Raises:
            ImageCorrupt: there is some.
        """
        known = self._roots if is_table else self._all
        place = bisect_left(known, cluster)
        if place < len(known) and known[place] < cluster + length:
            raise ImageCorrupt(self._name, f"A snapshot's tables refer to metadata (cluster {known[place]})")


def _clusters(image: Image, index: int, table: Table, metadata: Metadata) -> list[tuple[int, int]]:
    """Runs (cluster, length) of what the table of an L1 entry refers to, and last the table itself.

    Raises:
        ImageCorrupt: some of it is metadata, or no writer may have made it.
    """
    size, geometry = image.geometry.cluster_size, image.geometry
    found: list[tuple[int, int]] = []
    for run in runs_of(table.items, geometry):
        check(run, geometry, index * geometry.l2_span + run.start * size)
        if run.word & COMPRESSED:
            touched = compressed_clusters(run.word, geometry)
            found.append((touched.start, len(touched)))
        elif not geometry.has_data_file and is_stored(run, geometry):
            found.append((run.offset // size, run.end - run.start))
    for cluster, length in found:
        metadata.check(cluster, length, is_table=False)
    metadata.check(table.at // size, 1, is_table=True)
    found.append((table.at // size, 1))
    return found


async def add_references(image: Image, words: Sequence[int]) -> None:
    """Count everything below an L1 table once more, but not the table itself.

    Raises:
        ImageCorrupt, IoFailure: a count would not fit (ERANGE), or tables could not be read or written; what was
            counted is taken back, or leaks if that fails too.
    Waits: reads, commits. Checkpoint: no.
    """
    whole = 0
    part: list[tuple[int, int]] = []
    metadata = Metadata(image)
    try:
        async for index, table in tables(image, words):
            part = []
            table.pins += 1
            try:
                for cluster, length in _clusters(image, index, table, metadata):
                    await image.refcounts.add_run(cluster, length, least=1)
                    part.append((cluster, length))
            finally:
                table.pins -= 1
            whole += 1
            part = []
    except BaseException:
        await _take_back(image, words, whole, part, metadata)
        raise


async def _take_back(
    image: Image, words: Sequence[int], whole: int, part: list[tuple[int, int]], metadata: Metadata
) -> None:
    try:
        for cluster, length in part:
            await image.refcounts.drop(cluster, length)
        async for index, table in tables(image, words):
            if whole == 0:
                return
            whole -= 1
            for cluster, length in _clusters(image, index, table, metadata):
                await image.refcounts.drop(cluster, length)
    except (OSError, ImageCorrupt):
        return


async def drop_references(image: Image, words: Sequence[int]) -> None:
    """Count everything below an L1 table once less, after the next commit; nothing durable refers to the table.

    Raises:
        ImageCorrupt, IoFailure: tables could not be read, or a commit failed; what was not counted leaks.
    Waits: reads, commits. Checkpoint: no.
    """
    discards = image.tuning.discard_snapshots
    metadata = Metadata(image)
    async for index, table in tables(image, words):
        for cluster, length in _clusters(image, index, table, metadata)[:-1]:
            image.pending.add(cluster, length, discards=discards)
        image.pending.add(table.at // image.geometry.cluster_size, 1, discards=discards, is_table=True)


async def drop_past(image: Image, disk_bytes: int) -> None:
    """Take from the active state all L2 tables past the end of a disk of that length, with what they refer to.

    There is machine state: of a snapshot that is being made, of one that QEMU has applied, or from before a crash. A
    disk that grows over it would show it. The L1 entries go first, so that a commit on the way frees nothing that the
    file still refers to (I3).

    Raises, waits: `drop_references`.
    """
    l1, first = image.mapping.l1, -(-disk_bytes // image.geometry.l2_span)
    if not any(l1.words[first:]):
        return
    gone = array("Q", [0] * first) + l1.words[first:]
    for index in range(first, len(l1.words)):
        if l1.words[index]:
            l1.words[index] = 0
            l1.mark(index)
    await drop_references(image, gone)


async def clear_flags(image: Image, words: Sequence[int]) -> None:
    """Take the copied flag from every entry of the L2 tables below an L1 table. Raises, waits: `tables`."""
    async for index, table in tables(image, words):
        for run in runs_of(table.items, image.geometry):
            check(run, image.geometry, index * image.geometry.l2_span + run.start * image.geometry.cluster_size)
            if run.word & COPIED and not run.word & COMPRESSED and is_stored(run, image.geometry):
                _set_entries(image, table, run, run.word & ~COPIED)


async def set_flags(image: Image) -> None:
    """Give the copied flag to all entries of the active tables whose clusters have one reference only.

    Raises:
        ImageCorrupt, IoFailure: tables could not be read, or a commit failed; the flags that are set are true.
    Waits: reads, commits. Checkpoint: no.
    """
    size, geometry = image.geometry.cluster_size, image.geometry
    l1 = image.mapping.l1
    async for index, table in tables(image, l1.words[:]):
        table.pins += 1
        try:
            if not await image.refcounts.last_uses(table.at // size, 1):
                continue  # what a shared table refers to is shared too
            if not l1.words[index] & COPIED:
                l1.words[index] |= COPIED
                l1.mark(index)
            for run in runs_of(table.items, geometry):
                if run.word & (COMPRESSED | COPIED) or geometry.has_data_file or not is_stored(run, geometry):
                    continue
                for cluster, length in await image.refcounts.last_uses(run.offset // size, run.end - run.start):
                    start = run.start + cluster - run.offset // size
                    word = run.word + (cluster * size - run.offset)
                    _set_entries(image, table, Mapped(start, start + length, word, run.bitmap), word | COPIED)
        finally:
            table.pins -= 1


def _set_entries(image: Image, table: Table, run: Mapped, word: int) -> None:
    """Make the entries of a run `word` and its successors in the host file."""
    step, size = image.geometry.entry_words, image.geometry.cluster_size
    start, end = run.start * step, run.end * step
    count = run.end - run.start
    table.items[start:end:step] = array("Q", range(word, word + count * size, size))
    image.mapping.l2.touch(table, start, end)
