"""qcow2's tables: L1, L2 and refcount entries, snapshot and bitmap records (spec/block-layer.md §6)."""

import struct
import sys
from array import array
from typing import Final, NamedTuple, Self

from msgspec import Struct

from blockjobs.wire.qcow2 import HostAt

COPIED: Final = 1 << 63
"""Of an L1 or L2 entry: the refcount is exactly 1, so it may be written in place."""
COMPRESSED: Final = 1 << 62
ZERO: Final = 1
"""Of a standard L2 entry in version 3: reads as zeroes, whether a cluster is kept or not."""
OFFSET: Final = 0x00FF_FFFF_FFFF_FE00
"""Place of an L2 table or of a data cluster."""
REFCOUNT_BLOCK_OFFSET: Final = 0xFFFF_FFFF_FFFF_FE00
L1_RESERVED: Final = 0x7F00_0000_0000_01FF
L2_RESERVED: Final = 0x3F00_0000_0000_01FE
BITMAP_ALL_ONES: Final = 1
"""Of a bitmap table entry without an offset: every bit of the cluster is set."""

_SWAPPED: Final = sys.byteorder == "little"
_REFCOUNT_TYPES: Final = {1: "B", 2: "B", 4: "B", 8: "B", 16: "H", 32: "I", 64: "Q"}


def decode_table(raw: bytes | bytearray | memoryview) -> "array[int]":
    """A table of 64-bit entries; with extended L2 entries, entry and bitmap words alternate."""
    table = array("Q")
    table.frombytes(raw)
    if _SWAPPED:
        table.byteswap()
    return table


def encode_table(table: "array[int]") -> bytes:
    """The inverse of `decode_table`; leaves `table` as it is."""
    if not _SWAPPED:
        return table.tobytes()
    swapped = table[:]
    swapped.byteswap()
    return swapped.tobytes()


def refcount_array(width: int, count: int) -> "array[int]":
    """`count` zero refcounts in the smallest element type that holds `width` bits."""
    kind = _REFCOUNT_TYPES[width]
    return array(kind, bytes(count * array(kind).itemsize))


def decode_refcounts(raw: bytes | bytearray | memoryview, width: int) -> "array[int]":
    """The refcounts of a block, `width` bits each (1 to 64); those below a byte start at the lowest bits."""
    if width >= 8:
        counts = array(_REFCOUNT_TYPES[width])
        counts.frombytes(raw)
        if _SWAPPED and width > 8:
            counts.byteswap()
        return counts
    each = 8 // width
    mask = (1 << width) - 1
    packed = bytes(raw)
    spread = bytearray(len(packed) * each)
    for place in range(each):
        spread[place::each] = packed.translate(bytes(value >> place * width & mask for value in range(256)))
    return array("B", spread)


def encode_refcounts(counts: "array[int]", width: int) -> bytes:
    """The inverse of `decode_refcounts`; the caller has checked that no count exceeds `width` bits."""
    if width == 8:
        return counts.tobytes()
    if width > 8:
        swapped = counts[:]
        if _SWAPPED:
            swapped.byteswap()
        return swapped.tobytes()
    each = 8 // width
    spread = counts.tobytes()
    assert len(spread) % each == 0 and max(spread, default=0) < 1 << width
    packed = 0
    for place in range(each):
        packed |= int.from_bytes(spread[place::each], "little") << place * width
    return packed.to_bytes(len(spread) // each, "little")


class Compressed(NamedTuple):
    """Where a compressed cluster's stream is: `at`, to the byte, and the most bytes it can have.

    `length` reaches to the end of the last sector that the entry names, so it is an upper bound.
    """

    at: HostAt
    length: int


def unpack_compressed(entry: int, cluster_bits: int) -> Compressed:
    """What an L2 entry with COMPRESSED set points at."""
    shift = 62 - (cluster_bits - 8)
    at = entry & ((1 << shift) - 1)
    sectors = (entry >> shift & ((1 << (cluster_bits - 8)) - 1)) + 1
    return Compressed(HostAt(at), sectors * 512 - at % 512)


def pack_compressed(at: int, length: int, cluster_bits: int) -> int:
    """The L2 entry for a stream of `length` bytes at host offset `at`."""
    shift = 62 - (cluster_bits - 8)
    assert length > 0 and at >> shift == 0
    further = (at + length - 1) // 512 - at // 512
    assert further >> (cluster_bits - 8) == 0
    return COMPRESSED | further << shift | at


_SNAPSHOT: Final = struct.Struct(">QIHHIIQII")
_SNAPSHOT_EXTRA: Final = struct.Struct(">QQQ")
SNAPSHOT_EXTRA_BYTES_MAX: Final = 1024
NO_ICOUNT: Final = (1 << 64) - 1
SNAPSHOT_GROUP: Final = b"blockjobs\0group "
"""Ours: how extra data begins, past the known fields, of a snapshot that takes part in a change of several images.
Whoever does not know it keeps it, and sees a snapshot (docs/adr/0015)."""
SNAPSHOT_GROUP_BYTES_MAX: Final = SNAPSHOT_EXTRA_BYTES_MAX - _SNAPSHOT_EXTRA.size - len(SNAPSHOT_GROUP)


class SnapshotEntry(Struct, kw_only=True):
    """One internal snapshot.

    Attributes:
        disk_size: virtual bytes at the time, None where the table does not say (version 2).
        icount: instruction count of the VM, `NO_ICOUNT` if there is none, None where the table does not say.
        extra: extra data past the known fields, kept as it is.
    """

    l1_at: HostAt
    l1_entries: int
    id: bytes
    name: bytes
    date_s: int = 0
    date_ns: int = 0
    vm_clock_ns: int = 0
    vm_state_bytes: int = 0
    disk_size: int | None = None
    icount: int | None = None
    extra: bytes = b""

    @property
    def group(self) -> bytes | None:
        """What is noted of a change of several images; see `SNAPSHOT_GROUP`."""
        noted = self.extra.removeprefix(SNAPSHOT_GROUP)
        return None if noted == self.extra else noted

    @classmethod
    def decode(cls, raw: bytes | memoryview, at: int) -> tuple[Self, int]:
        """The entry at `at` and the place of the next one.

        Raises:
            ValueError: the entry does not end within `raw`, or its extra data is too long.
        """
        if at + _SNAPSHOT.size > len(raw):
            raise ValueError("snapshot table is cut off")
        l1_at, l1, id_bytes, name_bytes, date_s, date_ns, vm_clock_ns, vm_state, extra_bytes = _SNAPSHOT.unpack_from(
            raw, at
        )
        if extra_bytes > SNAPSHOT_EXTRA_BYTES_MAX:
            raise ValueError("Too much extra metadata in snapshot table entry")
        names_at = at + _SNAPSHOT.size + extra_bytes
        end = names_at + id_bytes + name_bytes
        if end > len(raw):
            raise ValueError("snapshot table is cut off")
        extra = bytes(raw[names_at - extra_bytes : names_at])
        known = _SNAPSHOT_EXTRA.unpack(extra[:24].ljust(24, b"\0"))
        entry = cls(
            l1_at=HostAt(l1_at),
            l1_entries=l1,
            id=bytes(raw[names_at : names_at + id_bytes]),
            name=bytes(raw[names_at + id_bytes : end]),
            date_s=date_s,
            date_ns=date_ns,
            vm_clock_ns=vm_clock_ns,
            vm_state_bytes=known[0] if extra_bytes >= 8 else vm_state,
            disk_size=known[1] if extra_bytes >= 16 else None,
            icount=known[2] if extra_bytes >= 24 else None,
            extra=extra[24:],
        )
        return entry, end + -end % 8

    def encode(self) -> bytes:
        """The entry with its padding; tables are entries in a row, the first at a cluster's start."""
        extra = b""
        if self.disk_size is not None:
            extra = struct.pack(">QQ", self.vm_state_bytes, self.disk_size)
            if self.icount is not None:
                extra += struct.pack(">Q", self.icount) + self.extra
        vm_state = self.vm_state_bytes if self.vm_state_bytes < 1 << 32 else 0
        fixed = _SNAPSHOT.pack(
            self.l1_at,
            self.l1_entries,
            len(self.id),
            len(self.name),
            self.date_s,
            self.date_ns,
            self.vm_clock_ns,
            vm_state,
            len(extra),
        )
        entry = fixed + extra + self.id + self.name
        return entry + bytes(-len(entry) % 8)


_BITMAP: Final = struct.Struct(">QIIBBHI")
BITMAP_IN_USE: Final = 1
BITMAP_AUTO: Final = 2
BITMAP_EXTRA_COMPATIBLE: Final = 4
BITMAP_DIRTY_TRACKING: Final = 1
"""The only type of bitmap."""


class BitmapEntry(Struct, kw_only=True):
    """One line of the directory of persistent bitmaps; `table_entries` counts 8-byte cluster pointers."""

    table_at: HostAt
    table_entries: int
    flags: int
    granularity_bits: int
    name: bytes
    type: int = BITMAP_DIRTY_TRACKING
    extra: bytes = b""

    @classmethod
    def decode(cls, raw: bytes | memoryview, at: int) -> tuple[Self, int]:
        """The entry at `at` and the place of the next one.

        Raises:
            ValueError: the entry does not end within `raw`.
        """
        if at + _BITMAP.size > len(raw):
            raise ValueError("Broken bitmap directory")
        table_at, entries, flags, kind, granularity_bits, name_bytes, extra_bytes = _BITMAP.unpack_from(raw, at)
        name_at = at + _BITMAP.size + extra_bytes
        end = name_at + name_bytes
        if end > len(raw):
            raise ValueError("Broken bitmap directory")
        entry = cls(
            table_at=HostAt(table_at),
            table_entries=entries,
            flags=flags,
            granularity_bits=granularity_bits,
            name=bytes(raw[name_at:end]),
            type=kind,
            extra=bytes(raw[name_at - extra_bytes : name_at]),
        )
        return entry, end + -end % 8

    def encode(self) -> bytes:
        """The entry with its padding."""
        entry = (
            _BITMAP.pack(
                self.table_at,
                self.table_entries,
                self.flags,
                self.type,
                self.granularity_bits,
                len(self.name),
                len(self.extra),
            )
            + self.extra
            + self.name
        )
        return entry + bytes(-len(entry) % 8)
