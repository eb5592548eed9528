"""The content of one stored bitmap: a table with an entry for each cluster of bits (spec/block-layer.md §6)."""

from array import array
from typing import Final, NamedTuple

from blockjobs.base.errors import UsageError
from blockjobs.base.text import printable
from blockjobs.block.bitmap import DirtyBitmap
from blockjobs.block.bitmap_store import map_bytes
from blockjobs.block.driver import Child
from blockjobs.block.drivers.qcow2.allocate import Allocator, Run
from blockjobs.wire.qcow2 import HostAt
from blockjobs.wire.qcow2_tables import (
    BITMAP_ALL_ONES,
    BITMAP_AUTO,
    BITMAP_DIRTY_TRACKING,
    BITMAP_IN_USE,
    OFFSET,
    BitmapEntry,
    decode_table,
    encode_table,
)

TABLE_BYTES_MAX: Final = 64 << 20
GRANULARITY_BITS: Final = range(9, 32)
_WRITE_BYTES_MAX: Final = 4 << 20
_KNOWN_FLAGS: Final = BITMAP_IN_USE | BITMAP_AUTO


class Written(NamedTuple):
    """Where a bitmap's content went."""

    table_at: HostAt
    table_entries: int


def check_entry(entry: BitmapEntry, cluster_size: int) -> None:
    """Refuse an entry of the directory that QEMU refuses.

    Raises:
        UsageError: in QEMU's words.
    """
    if entry.extra or not entry.name:
        raise UsageError("Bitmap extra data is not supported")
    is_sound = (
        entry.table_at
        and entry.table_at % cluster_size == 0
        and 0 < entry.table_entries * 8 <= TABLE_BYTES_MAX
        and entry.type == BITMAP_DIRTY_TRACKING
        and entry.granularity_bits in GRANULARITY_BITS
        and not entry.flags & ~_KNOWN_FLAGS
    )
    if not is_sound:
        raise UsageError(f"Bitmap '{printable(shown_name(entry))}' doesn't satisfy the constraints")


def shown_name(entry: BitmapEntry) -> str:
    """The name as text; bytes that are no text survive the way back."""
    return entry.name.decode("utf-8", "surrogateescape")


async def read_table(file: Child, entry: BitmapEntry, cluster_size: int) -> "array[int]":
    """The table of a bitmap.

    Raises:
        UsageError: it lies outside the file, or has entries that mean nothing.
        IoFailure: it cannot be read.
    Waits: a read of at most 64 MiB. Checkpoint: no.
    """
    name = printable(shown_name(entry))
    if entry.table_at + entry.table_entries * 8 > -(-file.length // cluster_size) * cluster_size:
        raise UsageError(f"Bitmap '{name}' lies beyond the end of the file")
    table = decode_table(await file.read(entry.table_at, entry.table_entries * 8))
    for word in set(table):
        if word != BITMAP_ALL_ONES and (word & ~OFFSET or word % cluster_size):
            text = f"Could not read bitmap_table table from image for bitmap '{name}': Invalid argument"
            raise UsageError(text)
    return table


async def read_map(file: Child, entry: BitmapEntry, length: int, cluster_size: int) -> DirtyBitmap:
    """The bits of a bitmap over a disk of `length` bytes.

    Raises:
        UsageError: the table is broken, or belongs to a disk of another length.
        IoFailure: it cannot be read.
    Waits: reads. Checkpoint: no.
    """
    granularity = 1 << entry.granularity_bits
    size = map_bytes(length, granularity)
    if entry.table_entries != -(-size // cluster_size):
        raise UsageError(f"Could not read bitmap '{printable(shown_name(entry))}' from image: Invalid argument")
    table = await read_table(file, entry, cluster_size)
    bits = bytearray(len(table) * cluster_size)
    end = -(-file.length // cluster_size) * cluster_size
    index = 0
    while index < len(table):
        word, first = table[index], index
        index += 1
        if word == BITMAP_ALL_ONES:
            bits[first * cluster_size : index * cluster_size] = b"\xff" * cluster_size
        elif word:
            while index < len(table) and table[index] == word + (index - first) * cluster_size:
                index += 1
            if word + (index - first) * cluster_size > end:
                # QEMU reads zeroes there, and so forgets what was dirty.
                raise UsageError(f"Bitmap '{printable(shown_name(entry))}' lies beyond the end of the file")
            bits[first * cluster_size : index * cluster_size] = await file.read(word, (index - first) * cluster_size)
    return DirtyBitmap.unpacked(length, granularity, bytes(bits[:size]))


async def write_map(
    file: Child, allocator: Allocator, bitmap: DirtyBitmap, cluster_size: int, taken: list[Run]
) -> Written:
    """Write bits and their table to clusters that nobody refers to yet; those are added to `taken`.

    Raises:
        IoFailure, ImageCorrupt: some are written, or none.
    Waits: table reads and writes. Checkpoint: no.
    """
    content = bitmap.packed()
    ones, zeroes = b"\xff" * cluster_size, bytes(cluster_size)
    table = array("Q", bytes(8 * -(-len(content) // cluster_size)))
    stored: list[int] = []
    for index in range(len(table)):
        piece = content[index * cluster_size : (index + 1) * cluster_size]
        if piece == ones:
            table[index] = BITMAP_ALL_ONES
        elif not zeroes.startswith(piece):
            stored.append(index)
    runs = await allocator.take(len(stored)) if stored else []
    taken += runs
    done = 0
    for run in runs:
        for first in range(0, run.length, max(1, _WRITE_BYTES_MAX // cluster_size)):
            some = stored[done : done + min(run.length - first, max(1, _WRITE_BYTES_MAX // cluster_size))]
            at = (run.cluster + first) * cluster_size
            pieces = [content[index * cluster_size : (index + 1) * cluster_size] for index in some]
            await file.write(at, b"".join(piece.ljust(cluster_size, b"\0") for piece in pieces))
            for offset, index in enumerate(some):
                table[index] = at + offset * cluster_size
            done += len(some)
    return Written(await write_whole(file, allocator, encode_table(table), cluster_size, taken), len(table))


async def write_whole(file: Child, allocator: Allocator, content: bytes, cluster_size: int, taken: list[Run]) -> HostAt:
    """Write something to clusters in one run, which is added to `taken`; returns where. Raises, waits: `write_map`."""
    clusters = -(-len(content) // cluster_size)
    [run] = await allocator.take(clusters, in_one=True)
    taken.append(run)
    at = run.cluster * cluster_size
    await file.write(at, content.ljust(clusters * cluster_size, b"\0"))
    return HostAt(at)


def clusters_of(entry: BitmapEntry, table: "array[int]", cluster_size: int) -> list[Run]:
    """The clusters that a bitmap takes: its bits and its table."""
    runs: list[Run] = []
    for word in table:
        cluster = word // cluster_size
        if word <= BITMAP_ALL_ONES:
            continue
        if runs and runs[-1].end == cluster:
            runs[-1] = Run(runs[-1].cluster, runs[-1].length + 1)
        else:
            runs.append(Run(cluster, 1))
    return [*runs, table_clusters(entry, cluster_size)]


def table_clusters(entry: BitmapEntry, cluster_size: int) -> Run:
    """The clusters that its table takes."""
    table_bytes = min(entry.table_entries * 8, TABLE_BYTES_MAX)
    return Run(entry.table_at // cluster_size, -(-table_bytes // cluster_size))
