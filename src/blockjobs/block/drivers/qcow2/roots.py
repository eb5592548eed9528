"""The two tables that the header itself points at: the active L1 table and the refcount table.

They are always in memory as a whole. Entries are independent of each other, so single 512-byte sectors may be
rewritten in place; a table that must grow is written anew elsewhere and the header switches to it (spec/durability.md
§1, I5, I6).
"""

from array import array
from typing import Final

from msgspec import Struct, field

from blockjobs.block.driver import Child
from blockjobs.wire.qcow2 import SECTOR
from blockjobs.wire.qcow2_tables import encode_table

ENTRIES_PER_SECTOR: Final = SECTOR // 8


class RootCopy(Struct, kw_only=True):
    """What a commit writes of a root table: it was true at one instant.

    Attributes:
        at: where the table lived then.
        entries: its length then.
        whole: all of it, if it had moved and was not yet written; else empty.
        sectors: (place, content, sector number) of changed parts, ascending.
    """

    at: int
    entries: int
    whole: bytes
    sectors: list[tuple[int, bytes, int]] = field(default_factory=list)

    async def write_whole(self, file: Child) -> None:
        """Write a moved table. Nothing points at it yet."""
        if self.whole:
            await file.write(self.at, self.whole)

    async def write_sectors(self, file: Child) -> None:
        """Write changed parts in place."""
        for at, content, _ in self.sectors:
            await file.write(at, content)


class RootTable:
    """One of them in memory.

    Attributes:
        words: the entries, in native byte order; after a change call `mark`.
        at: its place; not the header's while a moved table waits for its commit.
    """

    def __init__(self, words: "array[int]", at: int) -> None:
        self.words = words
        self.at = at
        self._dirty: set[int] = set()
        self._is_unwritten = False

    @property
    def is_dirty(self) -> bool:
        """Whether memory is ahead of the file."""
        return self._is_unwritten or bool(self._dirty)

    def mark(self, index: int) -> None:
        """The entry has been changed."""
        self._dirty.add(index // ENTRIES_PER_SECTOR)

    def move(self, at: int, entries: int) -> None:
        """The table is `entries` long from now on and will live at `at`."""
        assert entries >= len(self.words)
        self.words.extend(array("Q", bytes((entries - len(self.words)) * 8)))
        self.at = at
        self._is_unwritten = True
        self._dirty.clear()

    def take(self) -> RootCopy:
        """Copies of what the file lacks; it counts as written until `give_back`."""
        copy = RootCopy(at=self.at, entries=len(self.words), whole=b"")
        if self._is_unwritten:
            copy.whole = encode_table(self.words)
        else:
            for sector in sorted(self._dirty):
                first = sector * ENTRIES_PER_SECTOR
                content = encode_table(self.words[first : first + ENTRIES_PER_SECTOR])
                copy.sectors.append((self.at + sector * SECTOR, content, sector))
        self._is_unwritten = False
        self._dirty.clear()
        return copy

    def give_back(self, copy: RootCopy, *, is_whole_written: bool) -> None:
        """The commit failed; `is_whole_written`: not before a moved table was durable in its new place."""
        if copy.whole and not is_whole_written:
            self._is_unwritten = True
        self._dirty.update(sector for _, _, sector in copy.sectors)
