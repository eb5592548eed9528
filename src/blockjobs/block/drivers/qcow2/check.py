"""`check`: does the image's metadata agree with itself? Reads everything but data, changes nothing.

What counts as a leak, a corruption or a check error, and the words, are `qemu-img check`'s (observed).
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from blockjobs.base.errors import IoFailure, UsageError, first_failure
from blockjobs.base.offload import Offload
from blockjobs.block.driver import Child
from blockjobs.block.drivers.qcow2.header import read_header
from blockjobs.block.drivers.qcow2.records import read_bitmaps, read_snapshots
from blockjobs.wire.qcow2 import CRYPT_LUKS, L1_BYTES_MAX, Header
from blockjobs.wire.qcow2_tables import (
    L1_RESERVED,
    OFFSET,
    REFCOUNT_BLOCK_OFFSET,
    BitmapEntry,
    SnapshotEntry,
    decode_refcounts,
)

if TYPE_CHECKING:
    from blockjobs.block.drivers.qcow2.check_tally import Tally

READ_BYTES: Final = 1 << 20
"""So many tables are read at once, neighbours in one go, and counted in one worker hop."""
_COUNTED_BYTES: Final = 64 << 10
"""So much of the tables is counted at once: what that takes stays in the processor's nearest cache."""
_BITMAP_TABLE_BYTES_MAX: Final = 64 << 20
REPEATED_BYTES_MAX: Final = 64 << 20
"""So much of L2 tables that an L1 table names more than once is counted again for each time, as QEMU does. No writer
makes any; millions of names of one table would keep a reader busy for minutes."""
Advance: TypeAlias = Callable[[int], Awaitable[None]]


async def no_advance(done: int) -> None:
    """Nobody wants to know how far the work is. Checkpoint: no. Waits: no."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckResult:
    """What a check has found.

    Attributes:
        corruptions: data is in danger; leaks: space is wasted, nothing else; check_errors: could not be checked.
        image_end: end of the last cluster in use, in bytes.
        problems: the first lines about them, in QEMU's words; all are counted.
        tally: the counted references, for a repair.
    """

    corruptions: int
    leaks: int
    check_errors: int
    total_clusters: int
    allocated_clusters: int
    compressed_clusters: int
    fragmented_clusters: int
    image_end: int
    problems: list[str] = field(repr=False)
    tally: "Tally" = field(repr=False)

    @property
    def is_clean(self) -> bool:
        """Whether nothing at all was found."""
        return not (self.corruptions or self.leaks or self.check_errors)

    def members(self) -> dict[str, Any]:
        """As in the output of `qemu-img check --output=json`: what is 0 is left out, but for the errors."""
        always = {"image-end-offset": self.image_end, "check-errors": self.check_errors}
        sometimes = {
            "total-clusters": self.total_clusters,
            "corruptions": self.corruptions,
            "leaks": self.leaks,
            "allocated-clusters": self.allocated_clusters,
            "fragmented-clusters": self.fragmented_clusters,
            "compressed-clusters": self.compressed_clusters,
        }
        return always | {name: count for name, count in sometimes.items() if count}


async def check_image(file: Child, *, offload: Offload, advance: Advance = no_advance) -> CheckResult:
    """Walk over all metadata of the image in `file`.

    Args:
        file: the node that has the image; nobody may write to it meanwhile.
        offload: counting runs in its workers, one batch at a time.
        advance: told how many more L2 tables have been looked at; may wait, and raise.

    Raises:
        UsageError: the image cannot be opened at all, or its structure is too far from sense to be walked.
        IoFailure: the file could not be read.

    Checkpoint: no. Waits: reads of all metadata.
    """
    from blockjobs.block.drivers.qcow2.check_tally import Tally

    header = await read_header(file, read_only=True, for_check=True)
    tally = Tally(header, file.length)
    table = await read_table(file, header.refcount_table_at, header.refcount_table_clusters * header.cluster_size)
    await _load_refcounts(file, tally, table, offload)
    tally.add_region(0, header.cluster_size)
    await _walk(file, tally, header.l1_at, header.l1_entries, is_active=True, offload=offload, advance=advance)
    await _walk_snapshots(file, tally, offload, advance)
    if header.crypt_method == CRYPT_LUKS and header.luks is not None:
        tally.add_region(header.luks.at, header.luks.length)
    await _walk_bitmaps(file, tally)
    tally.add_region(header.refcount_table_at, header.refcount_table_clusters * header.cluster_size)
    _walk_refcount_blocks(tally, table)
    image_end = await offload.run(tally.compare)
    return CheckResult(
        corruptions=tally.corruptions,
        leaks=tally.leaks,
        check_errors=tally.check_errors,
        total_clusters=-(-header.size // header.cluster_size),
        allocated_clusters=tally.allocated,
        compressed_clusters=tally.compressed,
        fragmented_clusters=tally.fragmented,
        image_end=image_end,
        problems=tally.problems,
        tally=tally,
    )


async def read_padded(file: Child, at: int, length: int) -> bytes:
    """Bytes of the file; what lies past its end is zeroes. Checkpoint: no. Waits: a read."""
    inside = max(0, min(length, file.length - at))
    found = await file.read(at, inside) if inside else b""
    return found if inside == length else found.ljust(length, b"\0")


async def read_table(file: Child, at: int, length: int) -> list[tuple[int, int]]:
    """(index, entry) of the entries of a table that are not zero; there may be millions. Waits: a read."""
    import numpy as np

    words = np.frombuffer(await read_padded(file, at, length), ">u8")
    used = np.flatnonzero(words)
    return list(zip(used.tolist(), words[used].tolist(), strict=True))


async def _load_refcounts(file: Child, tally: "Tally", table: list[tuple[int, int]], offload: Offload) -> None:
    header = tally.header
    size = header.cluster_size
    sound: list[tuple[int, int]] = []
    for index, entry in table:
        at = entry & REFCOUNT_BLOCK_OFFSET
        is_sound = at % size == 0 and at // size < tally.clusters
        if is_sound and index * header.refcounts_per_block < tally.clusters:
            sound.append((index, at))
    per_step = max(1, READ_BYTES // size)
    for start in range(0, len(sound), per_step):
        step = sound[start : start + per_step]
        blocks = await read_clusters(file, header, [at for _, at in step])
        await offload.run(_set_refcounts, tally, [index for index, _ in step], blocks)


def _set_refcounts(tally: "Tally", indexes: list[int], blocks: list[bytes]) -> None:
    for index, block in zip(indexes, blocks, strict=True):
        tally.set_refcounts(index, decode_refcounts(block, tally.header.refcount_bits))


def _walk_refcount_blocks(tally: "Tally", table: list[tuple[int, int]]) -> None:
    size = tally.header.cluster_size
    for index, entry in table:
        at = entry & REFCOUNT_BLOCK_OFFSET
        if at != entry:
            tally.corrupt(f"refcount table entry {index} has reserved bits set")
        elif at % size:
            tally.corrupt(f"refcount block {index} is not cluster aligned; refcount table entry corrupted")
        elif at // size >= tally.clusters:
            tally.corrupt(f"refcount block {index} is outside image")
        else:
            tally.add_region(at, size)
            references = tally.references[at // size]
            if references != 1:
                tally.corrupt(f"refcount block {index} refcount={references}")


async def _walk(
    file: Child,
    tally: "Tally",
    l1_at: int,
    l1_entries: int,
    *,
    is_active: bool,
    offload: Offload,
    advance: Advance,
) -> None:
    """Count an L1 table, and all L2 tables below it with what they refer to."""
    header = tally.header
    tally.add_region(l1_at, l1_entries * 8)
    entries = _without_repeats(tally, l1_at, await read_table(file, l1_at, l1_entries * 8))
    for index, entry in entries:
        at = entry & OFFSET
        if entry & L1_RESERVED:
            tally.corrupt(f"found L1 entry with reserved bits set: {entry:x}")
        tally.add_region(at, header.cluster_size)
        if at % header.cluster_size:
            tally.corrupt(f"l2_offset={at:x}: Table is not cluster aligned; L1 entry corrupted")
        if is_active:
            tally.check_l2_flag(index, entry)
    places = [entry & OFFSET for _, entry in entries if entry & OFFSET]
    per_step = max(1, READ_BYTES // header.cluster_size)
    for start in range(0, len(places), per_step):
        tables = await read_clusters(file, header, places[start : start + per_step])
        await offload.run(_add_l2_tables, tally, tables, is_active)
        await advance(len(tables))


def _without_repeats(tally: "Tally", l1_at: int, entries: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The entries of an L1 table; if too many name tables that others name too, only the first for each table."""
    places = {entry & OFFSET for _, entry in entries}
    repeated = len(entries) - len(places)
    if repeated * tally.header.cluster_size <= REPEATED_BYTES_MAX:
        return entries
    tally.corrupt(f"L1 table at {l1_at:#x} has {repeated} entries for L2 tables that it names already")
    tally.unread = f"L1 table at {l1_at:#x}"
    firsts: list[tuple[int, int]] = []
    for index, entry in entries:
        if entry & OFFSET in places:
            places.remove(entry & OFFSET)
            firsts.append((index, entry))
    return firsts


async def read_clusters(file: Child, header: Header, places: list[int]) -> list[bytes]:
    """The clusters at `places`, in that order; neighbours are read in one go. Checkpoint: no. Waits: reads."""
    size = header.cluster_size
    runs: list[tuple[int, int]] = []
    for at in places:
        if runs and runs[-1][0] + runs[-1][1] == at:
            runs[-1] = runs[-1][0], runs[-1][1] + size
        else:
            runs.append((at, size))
    try:
        async with asyncio.TaskGroup() as tasks:
            reads = [tasks.create_task(read_padded(file, *run)) for run in runs]
    except* IoFailure as failures:
        raise first_failure(failures) from None
    return [raw[at : at + size] for raw in (read.result() for read in reads) for at in range(0, len(raw), size)]


def _add_l2_tables(tally: "Tally", tables: list[bytes], is_active: bool) -> None:
    per_step = max(1, _COUNTED_BYTES // tally.header.cluster_size)
    for start in range(0, len(tables), per_step):
        tally.add_l2_tables(b"".join(tables[start : start + per_step]), is_active=is_active)


async def _walk_snapshots(file: Child, tally: "Tally", offload: Offload, advance: Advance) -> None:
    header = tally.header
    snapshots: list[SnapshotEntry] = []
    try:
        snapshots = await read_snapshots(file, header)
    except UsageError as error:
        tally.corrupt(f"snapshot table: {error}")
        tally.unread = "snapshot table"
    for snapshot in snapshots:
        name = snapshot.name.decode("utf-8", "replace")
        if snapshot.l1_at % header.cluster_size or snapshot.l1_entries * 8 > L1_BYTES_MAX:
            tally.unread = f"snapshot '{name}'"
        if snapshot.l1_at % header.cluster_size:
            tally.corrupt(f"snapshot '{name}' l1_offset={snapshot.l1_at:#x}: L1 table is not cluster aligned")
        elif snapshot.l1_entries * 8 > L1_BYTES_MAX:
            tally.corrupt(f"snapshot '{name}' l1_size={snapshot.l1_entries:#x}: L1 table is too large")
        elif tally.is_used(snapshot.l1_at, snapshot.l1_entries * 8):
            # Not walked: thousands of snapshots with one long table would keep a reader busy for days.
            tally.corrupt(f"snapshot '{name}' l1_offset={snapshot.l1_at:#x}: L1 table lies on other metadata")
            tally.add_region(snapshot.l1_at, snapshot.l1_entries * 8)
            tally.unread = f"snapshot '{name}'"
        else:
            place = snapshot.l1_at, snapshot.l1_entries
            await _walk(file, tally, *place, is_active=False, offload=offload, advance=advance)
    tally.add_region(header.snapshots_at, sum(len(snapshot.encode()) for snapshot in snapshots))


async def _walk_bitmaps(file: Child, tally: "Tally") -> None:
    header = tally.header
    if header.bitmaps is None:
        return
    tally.add_region(header.bitmaps.directory_at, header.bitmaps.directory_bytes)
    bitmaps: list[BitmapEntry] = []
    try:
        bitmaps = await read_bitmaps(file, header)
    except UsageError as error:
        tally.corrupt(f"bitmaps: {error}")
        tally.unread = "bitmap directory"
    for bitmap in bitmaps:
        name = bitmap.name.decode("utf-8", "replace")
        if bitmap.table_at % header.cluster_size or bitmap.table_entries * 8 > _BITMAP_TABLE_BYTES_MAX:
            tally.corrupt(f"Bitmap '{name}' doesn't satisfy the constraints")
            tally.unread = f"bitmap '{name}'"
            continue
        is_used = tally.is_used(bitmap.table_at, bitmap.table_entries * 8)
        tally.add_region(bitmap.table_at, bitmap.table_entries * 8)
        if is_used:
            tally.corrupt(f"bitmap '{name}': table lies on other metadata")
            tally.unread = f"bitmap '{name}'"
            continue
        for _, entry in await read_table(file, bitmap.table_at, bitmap.table_entries * 8):
            at = entry & OFFSET
            if entry & ~(OFFSET | 1) or (at and entry & 1):
                tally.corrupt(f"bitmap '{name}': table entry {entry:x} has reserved bits set")
            elif at:
                tally.add_region(at, header.cluster_size)
