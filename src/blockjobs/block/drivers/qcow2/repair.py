"""Repair: refcounts and COPIED flags made to agree with what the tables refer to.

`repair_leaks` lowers refcounts that are too high, in place. Otherwise refcounts are never patched: a complete new set
is written behind the end of the file and switched to by one write of the header, in the same 512 bytes that clear the
dirty bit; so a crash leaves the old state or the new one, and broken refcount structures need no special care. Order
(spec/durability.md §1): wrong COPIED flags cleared ▷ new blocks and table ▷ header ▷ missing COPIED flags set ▷.
Entries that point outside the file or between clusters are left as they are: no tool can know what they meant.
"""

from array import array
from typing import TYPE_CHECKING, Final, Self

from msgspec.structs import replace

from blockjobs.base.errors import UsageError
from blockjobs.base.offload import Offload
from blockjobs.base.span import Span
from blockjobs.block.driver import Child
from blockjobs.block.drivers.qcow2.check import Advance, CheckResult, check_image, no_advance
from blockjobs.block.drivers.qcow2.check_reads import READ_BYTES, read_clusters, read_padded
from blockjobs.block.drivers.qcow2.header import read_header
from blockjobs.block.drivers.qcow2.header_update import HeaderFile
from blockjobs.wire.qcow2 import FIELD_REFCOUNTS, REFCOUNT_TABLE_BYTES_MAX, Header, HostAt, Incompatible
from blockjobs.wire.qcow2_tables import (
    COMPRESSED,
    COPIED,
    OFFSET,
    decode_refcounts,
    encode_refcounts,
    encode_table,
    refcount_array,
)

if TYPE_CHECKING:
    from blockjobs.block.drivers.qcow2.check_counts import Counts
    from blockjobs.block.drivers.qcow2.check_tally import Tally
    from blockjobs.block.drivers.qcow2.check_walk import MetadataWalk

STRAY_CLUSTERS_MAX: Final = 1 << 16
"""How far a file may grow over entries that point behind its end."""


async def repair_image(file: Child, *, offload: Offload) -> CheckResult:
    """Rebuild the refcounts of the image in `file`, and clear its dirty bit.

    The corrupt mark is cleared too, if nothing is wrong any more. A clean image is left as it is.

    Args:
        file: a node on which the caller may write and resize; nobody else may use it meanwhile.
        offload: see `check_image`.

    Returns: what a check finds afterwards.

    Raises:
        UsageError: the image cannot be opened or walked completely, or the format has no room; nothing was changed.
        IoFailure: the refcounts are the old ones or the new ones.

    Checkpoint: no. Waits: reads of all metadata, several times, and writes of new refcounts.
    """
    found = await check_image(file, offload=offload)
    header = await read_header(file, read_only=True, for_check=True)
    marked = header.incompatible & (Incompatible.DIRTY | Incompatible.CORRUPT)
    if found.is_clean and not marked:
        return found
    _require_all_references(found)
    headers = HeaderFile({"file": file}, header)
    if found.is_clean:
        await headers.set_features(clear_bits=marked)
        return found
    found, rebuilt = await _settle_strays(file, found, offload)
    await correct_flags(found.walk, file, offload, setting=False)
    await rebuilt.write(file)
    await headers.switch(rebuilt.header, FIELD_REFCOUNTS)
    await correct_flags(found.walk, file, offload, setting=True)
    after = await check_image(file, offload=offload)
    if not after.corruptions:
        await headers.set_features(clear_bits=Incompatible.CORRUPT)
    return after


async def repair_leaks(file: Child, *, offload: Offload) -> CheckResult:
    """Give wasted space back, and nothing else: no refcount is raised, no entry is changed.

    Only if nothing but COPIED flags is wrong any more, those are corrected too, and the marks in the header cleared, as
    `qemu-img check -r leaks` does (observed). A refcount may be lowered at any time: a crash leaves the old number or
    the new one.

    Args, returns: as `repair_image`.

    Raises:
        UsageError: the image cannot be opened or walked completely; nothing was changed.
        IoFailure: leaks may be left.

    Checkpoint: no. Waits: reads of all metadata, several times, and writes of refcount blocks.
    """
    found = await check_image(file, offload=offload)
    _require_all_references(found)
    if found.leaks:
        await _lower_refcounts(file, found.walk)
        found = await check_image(file, offload=offload)
    if found.wrong_flags and found.corruptions == found.wrong_flags and not found.leaks:
        await correct_flags(found.walk, file, offload, setting=False)
        await correct_flags(found.walk, file, offload, setting=True)
        found = await check_image(file, offload=offload)
    header = await read_header(file, read_only=True, for_check=True)
    marked = header.incompatible & (Incompatible.DIRTY | Incompatible.CORRUPT)
    if found.is_clean and marked:
        await HeaderFile({"file": file}, header).set_features(clear_bits=marked)
    return found


def _require_all_references(found: CheckResult) -> None:
    if found.tally.unread:
        raise UsageError(
            f"Cannot repair the image without its {found.tally.unread}: clusters in use would be given away"
        )


async def _lower_refcounts(file: Child, walk: "MetadataWalk") -> None:
    async def lower(tally: "Tally") -> None:
        size, bits = tally.header.cluster_size, tally.header.refcount_bits
        for index in sorted(tally.leaky_blocks()):
            at = walk.block_place(index)
            if walk.is_referred_once(at // size):  # else it may be somebody's data
                counts = decode_refcounts(await read_padded(file, at, size), bits)
                tally.lower(index, counts)
                await file.write(at, encode_refcounts(counts, bits))

    await walk.each_window(lower)
    await file.flush()


async def _settle_strays(file: Child, found: CheckResult, offload: Offload) -> "tuple[CheckResult, RebuiltCounts]":
    """The new refcounts, for the end of a file that has grown over entries which point just behind it.

    What they point at is a hole then, and counted like any other cluster. Raises and waits as `repair_image`.
    """
    while True:
        header, tally = found.tally.header, found.tally
        found.walk.forget_refcount_structures()
        rebuilt = await RebuiltCounts.plan(header, found.walk)
        start = tally.behind_strays(tally.clusters, rebuilt.end - tally.clusters)
        if start == tally.clusters:
            return found, rebuilt
        if start - tally.clusters > STRAY_CLUSTERS_MAX:
            raise UsageError("Too many entries point behind the end of the file: there is no room for new refcounts")
        await file.resize(start * header.cluster_size)
        found = await check_image(file, offload=offload)


class RebuiltCounts:
    """New refcount blocks and their table, from cluster `start` on; they count themselves.

    Attributes:
        header: the header that refers to them.
        indexes: numbers of the blocks, ascending.
        end: the cluster behind them all.
    """

    def __init__(self, header: Header, walk: "MetadataWalk", used: set[int]) -> None:
        self._walk, self._start = walk, walk.tally.clusters
        start = self._start
        blocks = table = 0
        while True:
            end = start + blocks + table
            indexes = used | set(range(start // header.refcounts_per_block, -(-end // header.refcounts_per_block)))
            table_needed = -(-(max(indexes, default=0) + 1) * 8 // header.cluster_size)
            _check_table_bytes(table_needed * header.cluster_size)
            if (len(indexes), table_needed) == (blocks, table):
                break
            blocks, table = len(indexes), table_needed
        self.indexes, self.end = array("q", sorted(indexes)), end
        self.header = replace(
            header,
            refcount_table_at=HostAt(start * header.cluster_size),
            refcount_table_clusters=table,
            incompatible=header.incompatible & ~int(Incompatible.DIRTY),
        )

    @classmethod
    async def plan(cls, header: Header, walk: "MetadataWalk") -> Self:
        """How many blocks are needed for what the walk counts, and where they go: behind the end of the file.

        Args:
            header: with the width of the new refcounts; its refcount structures may be others than the walk's.

        Raises:
            UsageError: a cluster has more references than the format's refcounts can say, or the table would be too
                long.
            IoFailure: the metadata could not be read.

        Checkpoint: no. Waits: reads of all metadata, if the file has more than one window.
        """
        used: set[int] = set()

        async def look(tally: "Tally") -> None:
            _check_width(tally.counts, header.refcount_bits)
            used.update(tally.counts.used_groups(header.refcounts_per_block))
            _check_table_bytes(8 * len(used))

        await walk.each_window(look)
        return cls(header, walk, used)

    async def write(self, file: Child, *, advance: Advance = no_advance) -> None:
        """Write blocks and table; nobody refers to them yet. Checkpoint: no.

        Args:
            advance: told how many more blocks are written; may wait, and raise.

        Waits: writes, and reads of all metadata if the file has more than one window.
        """
        size, per_block = self.header.cluster_size, self.header.refcounts_per_block
        first_at = self.header.refcount_table_at + self.header.refcount_table_clusters * size
        table = array("Q", bytes(self.header.refcount_table_clusters * size))
        done = 0

        async def write_window(tally: "Tally") -> None:
            nonlocal done
            is_last = tally.counts.end == self._start
            while done < len(self.indexes) and (is_last or self.indexes[done] * per_block < tally.counts.end):
                index, at = self.indexes[done], first_at + done * size
                table[index] = at
                await file.write(at, self._block(index, tally.counts))
                done += 1
                await advance(1)

        await self._walk.each_window(write_window)
        await file.write(self.header.refcount_table_at, encode_table(table))

    def _block(self, index: int, references: "Counts") -> bytes:
        width, per_block = self.header.refcount_bits, self.header.refcounts_per_block
        counts = refcount_array(width, per_block)
        first = index * per_block
        if first < self._start:
            known = references.numbers(first, min(per_block, self._start - first))
            counts[: len(known)] = array(counts.typecode, known.astype(f"u{counts.itemsize}").tobytes())
        for cluster in range(max(first, self._start), min(first + per_block, self.end)):
            counts[cluster - first] = 1
        return encode_refcounts(counts, width)


def _check_table_bytes(needed: int) -> None:
    if needed > REFCOUNT_TABLE_BYTES_MAX:
        raise UsageError("The file is too long for a refcount table of the format's size")


def _check_width(references: "Counts", width: int) -> None:
    cluster = references.first_above((1 << width) - 1)
    if cluster is not None:
        most = references[cluster]
        raise UsageError(f"Cluster {cluster} has {most} references, more than refcounts of {width} bits can hold")


async def correct_flags(walk: "MetadataWalk", file: Child, offload: Offload, *, setting: bool) -> None:
    """Correct the COPIED flags of the active tables in one direction.

    Args:
        setting: only set those that are missing; else only clear wrong ones.

    Raises:
        IoFailure: some flags may be corrected.

    Checkpoint: no. Waits: reads of all metadata, writes, flushes.
    """

    async def correct(tally: "Tally") -> None:
        await _CopiedFlags(tally, setting=setting).correct(file, offload)

    await walk.each_window(correct)


class _CopiedFlags:
    """Corrects the flags of the clusters of one window.

    Tables are rewritten in place: each entry is good with the old and with the new flag.
    """

    def __init__(self, tally: "Tally", *, setting: bool) -> None:
        self._header, self._references, self._clusters = tally.header, tally.counts, tally.clusters
        self._setting = setting

    async def correct(self, file: Child, offload: Offload) -> None:
        """Correct L1 and all L2 tables that are where tables can be. Checkpoint: no. Waits: reads, writes, a flush."""
        header = self._header
        if self._setting:
            await self._correct_l1(file)
        if not header.has_data_file:
            per_step = max(1, READ_BYTES // header.cluster_size)
            for part in Span(header.l1_at, header.l1_entries * 8).split(READ_BYTES):
                places = self._places(await read_padded(file, part.at, part.length))
                for start in range(0, len(places), per_step):
                    await self._correct_tables(file, places[start : start + per_step], offload)
        if not self._setting:
            await self._correct_l1(file)
        await file.flush()

    async def _correct_tables(self, file: Child, places: list[int], offload: Offload) -> None:
        for at, raw in zip(places, await read_clusters(file, self._header, places), strict=True):
            corrected = await offload.run(self._corrected, raw, self._header.l2_entry_bytes // 8, COMPRESSED)
            if corrected != raw:
                await file.write(at, corrected)

    async def _correct_l1(self, file: Child) -> None:
        for part in Span(self._header.l1_at, self._header.l1_entries * 8).split(READ_BYTES):
            raw = await read_padded(file, part.at, part.length)
            corrected = self._corrected(raw, 1, skipped=0)  # no entry there is compressed, whatever its bits say
            if corrected != raw:
                await file.write(part.at, corrected)

    def _places(self, raw: bytes) -> list[int]:
        """Where the L2 tables are that entries of an L1 table name, of those that are where tables can be."""
        import numpy as np

        size = self._header.cluster_size
        places = (np.frombuffer(raw, ">u8") & np.uint64(OFFSET)).astype(np.int64)
        is_place = (places > 0) & (places % size == 0) & (places // size < self._clusters)
        found: list[int] = places[is_place].tolist()
        return found

    def _corrected(self, raw: bytes, step: int, skipped: int) -> bytes:
        import numpy as np

        words = np.frombuffer(raw, ">u8").astype(np.uint64)
        entries = words[::step]
        offsets = (entries & np.uint64(OFFSET)).astype(np.int64)
        clusters = offsets // self._header.cluster_size
        is_candidate = (
            (offsets > 0)
            & (entries & np.uint64(skipped) == 0)
            & ((entries & np.uint64(COPIED) == 0) == self._setting)
            & (offsets % self._header.cluster_size == 0)
            & self._references.holds(clusters)
        )
        candidates = np.flatnonzero(is_candidate)
        if not len(candidates):
            return raw
        wrong = candidates[(self._references.of(clusters[candidates]) == 1) == self._setting]
        entries[wrong] ^= np.uint64(COPIED)
        return words.astype(">u8").tobytes()
