"""Keeping a log of writes on a node (the format: `wire.write_log`).

Places are given out at once, in the order that the log is to tell, and filled side by side. The superblock counts only
entries that are filled without a gap, and is written after they are durable: a log never promises what it lacks.
"""

import asyncio
from collections.abc import Callable

from blockjobs.base.buffers import Buffer
from blockjobs.base.errors import IoFailure, UsageError
from blockjobs.base.span import Span
from blockjobs.block.driver import Child
from blockjobs.wire.write_log import (
    ALL_FLAGS,
    ENTRY_BYTES,
    MAGIC,
    SUPER_BYTES,
    VERSION,
    Entry,
    EntryFlag,
    is_sector_size,
    pack_entry,
    pack_super,
    unpack_entry,
    unpack_super,
)


class WriteLog:
    """A log that grows.

    Attributes:
        sector_bytes: the log's unit.
    """

    def __init__(
        self, node: Callable[[], Child], *, sector_bytes: int, super_interval: int, entries: int = 0, end: int = 0
    ) -> None:
        """See the class.

        Args:
            node: where it is kept.
            super_interval: after so many entries the superblock is written, if no flush came before.
            entries: that it has already.
            end: where they end, in bytes.
        """
        self.sector_bytes = sector_bytes
        self._node, self._super_interval = node, super_interval
        self._given_out = self._filled = entries
        self._out_of_turn: set[int] = set()
        self._end = end or sector_bytes
        self._told: int | None = entries or None
        self._telling = asyncio.Lock()
        self._gap: IoFailure | None = None

    def place(self, entry: Entry) -> tuple[int, int]:
        """Give out the next place for `entry`; returns its number, and where it is."""
        number, at = self._given_out, self._end
        self._given_out += 1
        self._end += (1 + entry.stored_sectors) * self.sector_bytes
        return number, at

    async def fill(self, place: tuple[int, int], entry: Entry, content: Buffer | None = None) -> None:
        """Write an entry at its place; without `content` its payload is zeroes.

        Raises:
            IoFailure: the log could not be written; it ends before this entry for good.
        Waits: I/O. Checkpoint: no.
        """
        number, at = place
        try:
            if self._told is None:
                await self._tell()  # what an older log left there does not count any more
            await self._write(at, entry, content)
        except IoFailure as error:
            self._gap = self._gap or error
            raise
        self._out_of_turn.add(number)
        while self._filled in self._out_of_turn:
            self._out_of_turn.remove(self._filled)
            self._filled += 1
        if self._filled - (self._told or 0) >= self._super_interval:
            await self._tell()

    async def flush(self) -> None:
        """Everything filled so far counts, durably.

        Raises:
            IoFailure: it could not be written; or an earlier entry could not, so that the log has ended.
        Waits: I/O. Checkpoint: no.
        """
        if self._gap is not None:
            raise self._gap
        if not self._given_out:
            return
        await self._tell()
        await self._node().flush()

    async def _write(self, at: int, entry: Entry, content: Buffer | None) -> None:
        node, payload = self._node(), Span(at + self.sector_bytes, entry.stored_sectors * self.sector_bytes)
        if content is not None:
            await node.write(payload.at, content)
            payload = Span.between(payload.at + len(content), payload.end)
        if payload:
            await node.zero(payload)
        await node.write(at, pack_entry(entry, self.sector_bytes))

    async def _tell(self) -> None:
        async with self._telling:
            filled = self._filled
            if filled == self._told:
                return
            if filled:
                await self._node().flush()
            await self._node().write(0, pack_super(filled, self.sector_bytes))
            self._told = filled


async def read_end(node: Child) -> tuple[int, int, int]:
    """Find the end of a log: its sector size, how many entries it has, and where the next one goes, all in bytes.

    Raises:
        UsageError: it is no log, or a damaged one.
        IoFailure: it cannot be read.
    Waits: a read per entry. Checkpoint: no.
    """
    head = unpack_super(await node.read(0, SUPER_BYTES))
    if head.magic != MAGIC:
        raise UsageError("Invalid log superblock magic")
    if head.version != VERSION:
        raise UsageError(f"Unsupported log version {head.version}")
    if not is_sector_size(head.sector_bytes):
        raise UsageError(f"Invalid log sector size {head.sector_bytes}")
    at = head.sector_bytes
    for number in range(head.entries):
        if at + head.sector_bytes > node.length:
            raise UsageError(f"The log ends before entry {number} of {head.entries}")
        entry = unpack_entry(await node.read(at, ENTRY_BYTES))
        if entry.flags & ~int(ALL_FLAGS):
            raise UsageError(f"Invalid flags {entry.flags:#x} in log entry {number}")
        stored = -(-entry.mark_bytes // head.sector_bytes) if entry.flags & EntryFlag.MARK else entry.stored_sectors
        at += (1 + stored) * head.sector_bytes
    return head.sector_bytes, head.entries, at
