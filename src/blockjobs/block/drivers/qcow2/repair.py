"""Repair: refcounts and COPIED flags made to agree with what the tables refer to.

`repair_leaks` lowers refcounts that are too high, in place. Otherwise refcounts are never patched: a complete new set
is written behind the end of the file and switched to by one write of the header, in the same 512 bytes that clear the
dirty bit; so a crash leaves the old state or the new one, and broken refcount structures need no special care. Order
(spec/durability.md §1): wrong COPIED flags cleared ▷ new blocks and table ▷ header ▷ missing COPIED flags set ▷.
Entries that point outside the file or between clusters are left as they are: no tool can know what they meant.
"""

from array import array
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from blockjobs.base.errors import UsageError
from blockjobs.base.offload import Offload
from blockjobs.base.span import Span
from blockjobs.block.driver import Child
from blockjobs.block.drivers.qcow2.check import (
    READ_BYTES,
    Advance,
    CheckResult,
    check_image,
    no_advance,
    read_clusters,
    read_padded,
    read_table,
)
from blockjobs.block.drivers.qcow2.header import read_header
from blockjobs.block.drivers.qcow2.header_update import HeaderFile
from blockjobs.wire.qcow2 import FIELD_REFCOUNTS, REFCOUNT_TABLE_BYTES_MAX, Header, HostAt, Incompatible
from blockjobs.wire.qcow2_tables import (
    COMPRESSED,
    COPIED,
    OFFSET,
    REFCOUNT_BLOCK_OFFSET,
    decode_refcounts,
    decode_table,
    encode_refcounts,
    encode_table,
    refcount_array,
)

if TYPE_CHECKING:
    from blockjobs.block.drivers.qcow2.check_counts import Counts
    from blockjobs.block.drivers.qcow2.check_tally import Tally

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
    await CopiedFlags(found.tally, setting=False).correct(file, offload)
    await rebuilt.write(file)
    await headers.switch(rebuilt.header, FIELD_REFCOUNTS)
    await CopiedFlags(found.tally, setting=True).correct(file, offload)
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
        await _lower_refcounts(file, found.tally)
        found = await check_image(file, offload=offload)
    if found.tally.wrong_flags and found.corruptions == found.tally.wrong_flags and not found.leaks:
        await CopiedFlags(found.tally, setting=False).correct(file, offload)
        await CopiedFlags(found.tally, setting=True).correct(file, offload)
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


async def _lower_refcounts(file: Child, tally: "Tally") -> None:
    header = tally.header
    size = header.cluster_size
    table = decode_table(await read_padded(file, header.refcount_table_at, header.refcount_table_clusters * size))
    for index in sorted(tally.leaky_blocks()):
        at = table[index] & REFCOUNT_BLOCK_OFFSET
        if tally.references[at // size] == 1:  # else it may be somebody's data
            counts = decode_refcounts(await read_padded(file, at, size), header.refcount_bits)
            tally.lower(index, counts)
            await file.write(at, encode_refcounts(counts, header.refcount_bits))
    await file.flush()


async def _settle_strays(file: Child, found: CheckResult, offload: Offload) -> "tuple[CheckResult, RebuiltCounts]":
    """The new refcounts, for the end of a file that has grown over entries which point just behind it.

    What they point at is a hole then, and counted like any other cluster. Raises and waits as `repair_image`.
    """
    while True:
        header, tally = found.tally.header, found.tally
        await forget_refcount_structures(file, tally)
        rebuilt = RebuiltCounts(header, tally.references, tally.clusters)
        start = tally.behind_strays(tally.clusters, rebuilt.end - tally.clusters)
        if start == tally.clusters:
            return found, rebuilt
        if start - tally.clusters > STRAY_CLUSTERS_MAX:
            raise UsageError("Too many entries point behind the end of the file: there is no room for new refcounts")
        await file.resize(start * header.cluster_size)
        found = await check_image(file, offload=offload)


async def forget_refcount_structures(file: Child, tally: "Tally") -> None:
    """Take back the references to the refcount table and its blocks, which will be free."""
    header = tally.header
    size = header.cluster_size
    length = header.refcount_table_clusters * size
    clusters = list(range(header.refcount_table_at // size, (header.refcount_table_at + length) // size))
    table = decode_table(await read_padded(file, header.refcount_table_at, length))
    clusters += [entry // size for entry in table if entry and entry % size == 0]  # those that `check` counts
    for cluster in clusters:
        if cluster < tally.clusters:
            tally.references.take_back(cluster)


class RebuiltCounts:
    """New refcount blocks and their table, from cluster `start` on; they count themselves.

    Attributes:
        header: the header that refers to them.
        indexes: numbers of the blocks.
        end: the cluster behind them all.

    Raises:
        UsageError: a cluster has more references than the format's refcounts can say, or the table would be too long.
    """

    def __init__(self, header: Header, references: "Counts", start: int) -> None:
        self._references, self._start = references, start
        self._check_width(header.refcount_bits)
        used = references.used_groups(header.refcounts_per_block)
        blocks = table = 0
        while True:
            end = start + blocks + table
            indexes = used | set(range(start // header.refcounts_per_block, -(-end // header.refcounts_per_block)))
            table_needed = -(-(max(indexes, default=0) + 1) * 8 // header.cluster_size)
            if (len(indexes), table_needed) == (blocks, table):
                break
            blocks, table = len(indexes), table_needed
        if table * header.cluster_size > REFCOUNT_TABLE_BYTES_MAX:
            raise UsageError("The file is too long for a refcount table of the format's size")
        self.indexes, self.end = sorted(indexes), end
        self.header = replace(
            header,
            refcount_table_at=HostAt(start * header.cluster_size),
            refcount_table_clusters=table,
            incompatible=header.incompatible & ~int(Incompatible.DIRTY),
        )

    def _check_width(self, width: int) -> None:
        cluster = self._references.first_above((1 << width) - 1)
        if cluster is not None:
            most = self._references[cluster]
            raise UsageError(f"Cluster {cluster} has {most} references, more than refcounts of {width} bits can hold")

    async def write(self, file: Child, *, advance: Advance = no_advance) -> None:
        """Write blocks and table; nobody refers to them yet. Checkpoint: no. Waits: writes.

        Args:
            advance: told how many more blocks are written; may wait, and raise.
        """
        size = self.header.cluster_size
        at = self.header.refcount_table_at + self.header.refcount_table_clusters * size
        table = array("Q", bytes(self.header.refcount_table_clusters * size))
        for index in self.indexes:
            table[index] = at
            await file.write(at, self._block(index))
            at += size
            await advance(1)
        await file.write(self.header.refcount_table_at, encode_table(table))

    def _block(self, index: int) -> bytes:
        width, per_block = self.header.refcount_bits, self.header.refcounts_per_block
        counts = refcount_array(width, per_block)
        first = index * per_block
        if first < self._start:
            known = self._references.numbers(first, min(per_block, self._start - first))
            counts[: len(known)] = array(counts.typecode, known.astype(f"u{counts.itemsize}").tobytes())
        for cluster in range(max(first, self._start), min(first + per_block, self.end)):
            counts[cluster - first] = 1
        return encode_refcounts(counts, width)


class CopiedFlags:
    """Corrects the COPIED flags of the active tables in one direction: only clears wrong ones, or only sets right ones.

    Tables are rewritten in place: each entry is good with the old and with the new flag.
    """

    def __init__(self, tally: "Tally", *, setting: bool) -> None:
        self._header, self._references, self._clusters = tally.header, tally.references, tally.clusters
        self._setting = setting

    async def correct(self, file: Child, offload: Offload) -> None:
        """Correct L1 and all L2 tables that are where tables can be. Checkpoint: no. Waits: reads, writes, a flush."""
        header = self._header
        if self._setting:
            await self._correct_l1(file)
        entries = await read_table(file, header.l1_at, header.l1_entries * 8)
        places = [entry & OFFSET for _, entry in entries if self._is_place(entry & OFFSET)]
        if not header.has_data_file:
            per_step = max(1, READ_BYTES // header.cluster_size)
            for start in range(0, len(places), per_step):
                step = places[start : start + per_step]
                for at, raw in zip(step, await read_clusters(file, header, step), strict=True):
                    corrected = await offload.run(self._corrected, raw, header.l2_entry_bytes // 8)
                    if corrected != raw:
                        await file.write(at, corrected)
        if not self._setting:
            await self._correct_l1(file)
        await file.flush()

    async def _correct_l1(self, file: Child) -> None:
        for part in Span(self._header.l1_at, self._header.l1_entries * 8).split(READ_BYTES):
            raw = await read_padded(file, part.at, part.length)
            corrected = self._corrected(raw, 1)
            if corrected != raw:
                await file.write(part.at, corrected)

    def _is_place(self, at: int) -> bool:
        return at > 0 and at % self._header.cluster_size == 0 and at // self._header.cluster_size < self._clusters

    def _corrected(self, raw: bytes, step: int) -> bytes:
        import numpy as np

        words = np.frombuffer(raw, ">u8").astype(np.uint64)
        entries = words[::step]
        offsets = (entries & np.uint64(OFFSET)).astype(np.int64)
        clusters = offsets // self._header.cluster_size
        is_candidate = (
            (offsets > 0)
            & (entries & np.uint64(COMPRESSED) == 0)
            & ((entries & np.uint64(COPIED) == 0) == self._setting)
            & (offsets % self._header.cluster_size == 0)
            & (clusters < self._clusters)
        )
        candidates = np.flatnonzero(is_candidate)
        if not len(candidates):
            return raw
        wrong = candidates[(self._references.of(clusters[candidates]) == 1) == self._setting]
        entries[wrong] ^= np.uint64(COPIED)
        return words.astype(">u8").tobytes()
