"""The format of a log of writes, as the Linux kernel's dm-log-writes target keeps it (its public documentation).

A superblock says how many entries there are; each entry is a header in one sector of the log, followed by the bytes
that were written. All integers are little endian. A program can replay such a log up to any entry, and so see what a
power cut at that moment may have left.
"""

import struct
from enum import IntFlag
from typing import Final, NamedTuple

MAGIC: Final = 0x6A736677736872
VERSION: Final = 1
_SUPER: Final = struct.Struct("<QQQI")
_ENTRY: Final = struct.Struct("<QQQQ")
SUPER_BYTES: Final = _SUPER.size
ENTRY_BYTES: Final = _ENTRY.size
SECTOR_BYTES_MIN: Final = ENTRY_BYTES
SECTOR_BYTES_END: Final = 1 << 24


class EntryFlag(IntFlag):
    """What an entry stands for; none is a plain write."""

    FLUSH = 1
    FUA = 2
    DISCARD = 4
    MARK = 8
    METADATA = 16


ALL_FLAGS: Final = EntryFlag(31)


class Super(NamedTuple):
    """The start of a log."""

    magic: int
    version: int
    entries: int
    sector_bytes: int


class Entry(NamedTuple):
    """One request: `sector` and `sectors` in units of the log's sector size; `mark_bytes` is the length of a MARK."""

    sector: int
    sectors: int
    flags: int
    mark_bytes: int = 0

    @property
    def stored_sectors(self) -> int:
        """Sectors of payload behind the header: a discard has none."""
        return 0 if self.flags & EntryFlag.DISCARD else self.sectors


def pack_super(entries: int, sector_bytes: int) -> bytes:
    """The superblock, a whole sector."""
    return _SUPER.pack(MAGIC, VERSION, entries, sector_bytes).ljust(sector_bytes, b"\0")


def unpack_super(content: bytes) -> Super:
    """The first `SUPER_BYTES` of a log."""
    return Super(*_SUPER.unpack(content))


def pack_entry(entry: Entry, sector_bytes: int) -> bytes:
    """The header of an entry, a whole sector."""
    return _ENTRY.pack(*entry).ljust(sector_bytes, b"\0")


def unpack_entry(content: bytes) -> Entry:
    """The first `ENTRY_BYTES` of an entry."""
    return Entry(*_ENTRY.unpack(content))


def is_sector_size(size: int) -> bool:
    """Whether a log can have sectors of so many bytes."""
    return SECTOR_BYTES_MIN <= size < SECTOR_BYTES_END and size & (size - 1) == 0
