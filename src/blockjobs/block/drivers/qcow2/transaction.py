"""The commit: the only place that writes metadata, in the order that survives a crash at any instant.

How changes and commits go together
-----------------------------------
All changes of metadata (refcounts, L2, L1, refcount table) are made in memory, each synchronously between two awaits,
by any number of requests at once. None of them writes anything. A commit takes, in one synchronous step at an instant
T, copies of everything dirty together with the list of pending frees, and writes those copies:

    step 1   refcount blocks; new L2 tables, moved L1 or refcount table, whole       ▷ (data file too)
    step 2   refcount table entries, or the header's switch to a moved table         ▷ (only if there are any)
    step 3   L2 tables; L1 entries, or the header's switch to a moved L1 table       ▷ (only if there are any)
    then     the pending frees of T lose their references in memory and may be reused

What requests change after T is in memory and in no copy, so it belongs to the next commit. Commits run one after the
other; all who ask while one runs share the next (group commit).

The crash argument, for spec/durability.md §1
---------------------------------------------
- I1 (counts never too low). Every reference that step 3 writes was made before T, its count was raised in memory
  before that (space is taken before it is published), so the count is in a copy of step 1 or was written earlier.
  Counts are lowered in memory only when the step 3 that wrote the loss of the reference is durable.
- I2 (content first). An L2 entry is made after the payload's write has returned, so before T; the flush of step 1 makes
  that payload durable. New tables go whole in step 1, and what they point at is durable before step 3 makes *them*
  reachable. A refcount block is durable before the entry of step 2 that reaches it, and reachable before step 3.
- I3 (no reuse before the loss is durable). A cluster whose reference is gone in memory keeps its count until the end of
  the commit that wrote the loss; only then can the allocator find it, or a discard punch it.
- I4 (copied). Only entries for clusters just taken get the flag; a copy of a shared L2 table loses it.
- I5, I6. Tables are moved by a write of 12 or 24 bytes in H0. L1, L2 and refcount table entries are independent of
  each other, so a torn write of several sectors leaves a legal mix; an entry never crosses a sector.
- I8. If a write or a flush fails, the copies are dirty again and the frees pending again: nothing is lost, the caller
  learns it, the next commit begins anew. A table that step 1 has made durable is not new any more even if a later step
  fails: its entry may have reached the file, so from then on it is changed in step 3 only.

Tables that a commit has copied cannot be evicted until it ends, so a reload never reads what is still on its way.
"""

import asyncio
import errno
from collections.abc import Awaitable, Callable
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from blockjobs.base.errors import ImageCorrupt, IoFailure
from blockjobs.base.span import Span
from blockjobs.block.driver import Child
from blockjobs.block.drivers.qcow2.allocate import Allocator
from blockjobs.block.drivers.qcow2.geometry import Geometry
from blockjobs.block.drivers.qcow2.header_update import HeaderFile
from blockjobs.block.drivers.qcow2.mapping import Mapping
from blockjobs.block.drivers.qcow2.pending import Freed, PendingFrees, joined
from blockjobs.block.drivers.qcow2.refcounts import Refcounts
from blockjobs.block.drivers.qcow2.roots import RootCopy
from blockjobs.block.drivers.qcow2.tables import Piece
from blockjobs.wire.qcow2 import FIELD_REFCOUNT_TABLE, FIELD_SIZE_AND_L1, Field, Header, HostAt, Incompatible

PENDING_FREES_MAX: Final = 100_000
"""Runs of clusters; about 15 MiB of memory."""


class _Copies(Struct, kw_only=True):
    """What was dirty at the instant T."""

    blocks: list[Piece]
    tables: list[Piece]
    new_tables: list[Piece]
    refcount_table: RootCopy
    l1: RootCopy
    frees: list[Freed]
    size: int
    is_step_1_durable: bool = False


class Transaction:
    """Turns changes in memory into changes of the file.

    Attributes:
        size: the virtual length in bytes that the next commit's last step writes if the header says otherwise.
        is_unsure: nobody knows which of two headers the file has, so nothing may be written any more.
        on_corrupt: told of refcounts that turn out to be wrong when space is given back; what was asked has succeeded.
    """

    def __init__(
        self,
        geometry: Geometry,
        header_file: HeaderFile,
        refcounts: Refcounts,
        allocator: Allocator,
        mapping: Mapping,
        pending: PendingFrees,
        child: Callable[[str], Child],
    ) -> None:
        self._geometry = geometry
        self._header_file = header_file
        self._refcounts = refcounts
        self._allocator = allocator
        self._mapping = mapping
        self._pending = pending
        self._child = child
        self._lock = asyncio.Lock()
        self._begun = 0
        self._succeeded = 0
        self.size = header_file.header.size
        self._is_size_doubtful = False
        self.is_unsure = False
        self._found: ImageCorrupt | None = None
        self.on_corrupt: Callable[[ImageCorrupt], Awaitable[None]] = _ignored

    @property
    def is_clean(self) -> bool:
        """Whether the file has everything that memory has."""
        header = self._header_file.header
        return not (
            self._pending
            or self._allocator.moved_tables
            or self._refcounts.blocks.dirty
            or self._refcounts.root.is_dirty
            or self._mapping.l2.dirty
            or self._mapping.l1.is_dirty
            or (header.refcount_table_at, header.l1_at) != (self._refcounts.root.at, self._mapping.l1.at)
            or header.size != self.size
            or self._is_size_doubtful
        )

    async def commit(self) -> None:
        """Make all that was changed or written before the call durable; callers that overlap share one commit.

        Raises:
            IoFailure: something could not be written or flushed; it stays in memory for the next commit.
        Waits: for a commit under way; then up to three rounds of writes and flushes. Checkpoint: no.
        """
        asked = self._begun
        async with self._lock:
            if self._succeeded > asked:
                return
            if self.is_unsure:
                raise IoFailure(errno.EIO, f"node '{self._geometry.name}': its header could not be written")
            self._begun += 1
            number = self._begun
            frees = await self._write_in_order()
            self._succeeded = number
            await self._release(frees)
            found, self._found = self._found, None
        if found is not None:
            await self.on_corrupt(found)

    async def make_room(self, part: int = 2) -> None:
        """Commit early if dirty tables fill a `part`-th of their cache, or much waits to be free.

        Raises, waits: `commit`.
        """
        if len(self._pending) > PENDING_FREES_MAX:
            await self.commit()
            return
        for cache in (self._mapping.l2, self._refcounts.blocks):
            if cache.dirty_bytes * part > cache.budget_bytes:
                await self.commit()
                return

    async def begin_writing(self, keep: int) -> None:
        """See `HeaderFile.begin_writing`; never at the same time as a commit."""
        async with self._lock:
            await self._header_file.begin_writing(keep)

    async def rewrite_header(self, change: Callable[[Header], Header]) -> None:
        """Make the header that `change` makes of the present one durable; see `HeaderFile.rewrite`."""
        async with self._lock:
            await self._header_file.rewrite(change(self._header_file.header))

    async def name_backing_file(self, filename: str | None, backing_format: str | None) -> None:
        """See `HeaderFile.change_backing`; never at the same time as a commit."""
        async with self._lock:
            await self._header_file.change_backing(filename, backing_format)

    async def set_dirty(self, is_dirty: bool) -> None:
        """Say in the header that whoever opens the image must rebuild its refcounts, or need not any more."""
        async with self._lock:
            if is_dirty:
                await self._header_file.set_features(set_bits=Incompatible.DIRTY)
            else:
                await self._header_file.set_features(clear_bits=Incompatible.DIRTY)

    async def switch_header(self, change: Callable[[Header], Header], part: Field) -> None:
        """Make a root change durable, or leave the durable header as it was; never at the same time as a commit.

        Raises:
            IoFailure: it could not be written. The file says what it said before, unless it could not be told so
                either: then `is_unsure`.
        """
        async with self._lock:
            before = self._header_file.header
            try:
                await self._header_file.switch(change(before), part)
            except BaseException:
                self.is_unsure = True
                await self._header_file.switch(before, part)
                self.is_unsure = False
                raise

    async def mark_corrupt(self) -> None:
        """Say in the header that the image must not be written any more; see `HeaderFile.set_features`."""
        async with self._lock:
            await self._header_file.set_features(set_bits=Incompatible.CORRUPT)

    def _collect(self) -> _Copies:
        """The instant T."""
        for run in self._allocator.moved_tables:
            self._pending.add(run.cluster, run.length)
        self._allocator.moved_tables.clear()
        tables = self._mapping.l2.take_dirty()
        return _Copies(
            blocks=self._refcounts.blocks.take_dirty(),
            tables=[piece for piece in tables if not piece.table.is_new],
            new_tables=[piece for piece in tables if piece.table.is_new],
            refcount_table=self._refcounts.root.take(),
            l1=self._mapping.l1.take(),
            frees=self._pending.take(),
            size=self.size,
        )

    def _put_back(self, copies: _Copies) -> None:
        """The commit failed: everything is as dirty as it was."""
        self._refcounts.blocks.give_back(copies.blocks)
        self._mapping.l2.give_back([*copies.tables, *copies.new_tables])
        self._refcounts.root.give_back(copies.refcount_table, is_whole_written=copies.is_step_1_durable)
        self._mapping.l1.give_back(copies.l1, is_whole_written=copies.is_step_1_durable)
        self._pending.put_back(copies.frees)

    async def _write_in_order(self) -> list[Freed]:
        """All three steps; returns the frees that are durable now."""
        file = self._child("file")
        copies = self._collect()
        try:
            await self._write_unreachable(file, copies)
            await self._link_blocks(file, copies)
            await self._link_clusters(file, copies)
        except BaseException:
            self._put_back(copies)
            raise
        self._refcounts.blocks.settle(copies.blocks)
        self._mapping.l2.settle([*copies.tables, *copies.new_tables])
        return copies.frees

    async def _write_unreachable(self, file: Child, copies: _Copies) -> None:
        """Step 1: what nothing durable points at yet, and counts; the payload becomes durable with it."""
        await write_pieces(file, copies.blocks, "refblock_update_part")
        await write_pieces(file, copies.new_tables, "l2_alloc_write")
        if copies.refcount_table.whole:
            file.debug_event("refblock_alloc_write_table")
            await copies.refcount_table.write_whole(file)
        if copies.l1.whole:
            file.debug_event("l1_grow_write_table")
            await copies.l1.write_whole(file)
        if self._geometry.has_data_file:
            await self._child("data-file").flush()
        file.debug_event("flush_to_os")
        await file.flush()
        copies.is_step_1_durable = True
        for piece in (*copies.blocks, *copies.new_tables):
            piece.table.is_new = False

    async def _link_blocks(self, file: Child, copies: _Copies) -> None:
        """Step 2: make new refcount blocks reachable."""
        table, header = copies.refcount_table, self._header_file.header
        if table.sectors:
            file.debug_event("refblock_alloc_hookup")
            await table.write_sectors(file)
        if table.at != header.refcount_table_at:
            file.debug_event("refblock_alloc_switch_table")
            clusters = table.entries * 8 // self._geometry.cluster_size
            moved = replace(header, refcount_table_at=HostAt(table.at), refcount_table_clusters=clusters)
            await self._header_file.switch(moved, FIELD_REFCOUNT_TABLE)
        elif table.sectors:
            await file.flush()

    async def _link_clusters(self, file: Child, copies: _Copies) -> None:
        """Step 3: make clusters and new L2 tables reachable, and the loss of references durable."""
        l1, header = copies.l1, self._header_file.header
        await write_pieces(file, copies.tables, "l2_update")
        if l1.sectors:
            file.debug_event("l1_update")
            await l1.write_sectors(file)
        if (l1.at, copies.size) != (header.l1_at, header.size) or self._is_size_doubtful:
            file.debug_event("l1_grow_activate_table")
            moved = replace(header, l1_at=HostAt(l1.at), l1_entries=l1.entries, size=copies.size)
            # After a failure the file may say either: the next commit says it again.
            self._is_size_doubtful = True
            await self._header_file.switch(moved, FIELD_SIZE_AND_L1)
            self._is_size_doubtful = False
        elif copies.tables or l1.sectors:
            file.debug_event("flush_to_disk")
            await file.flush()

    async def _release(self, frees: list[Freed]) -> None:
        """The loss of these references is durable: count them down, and let the space be used again.

        What would change more refcount blocks than may be in memory waits for the next commit. A block that cannot be
        read leaves its clusters leaked, which harms nobody.
        """
        waiting = joined(frees)[::-1]
        if waiting:
            self._child("file").debug_event("cluster_free")
        blocks, per_block = self._refcounts.blocks, self._refcounts.per_block
        try:
            while waiting:
                freed = waiting.pop()
                if freed.length > per_block:
                    waiting.append(freed._replace(cluster=freed.cluster + per_block, length=freed.length - per_block))
                    freed = freed._replace(length=per_block)
                await self._release_one(freed)
                if blocks.dirty_bytes * 2 > blocks.budget_bytes:
                    break
        finally:
            self._pending.put_back(waiting)

    async def _release_one(self, freed: Freed) -> None:
        self._allocator.forget_tail(freed.cluster, freed.length)
        try:
            if freed.discards:
                await self._punch(freed)
            unused = await self._refcounts.drop(freed.cluster, freed.length)
        except ImageCorrupt as error:
            self._found = error
            return
        except OSError:
            return
        for cluster, length in unused:
            if freed.is_table:  # a table that a snapshot shares stays what it is
                for each in range(cluster, cluster + length):
                    self._mapping.l2.forget(each * self._geometry.cluster_size)
            self._allocator.is_free(cluster, length)

    async def _punch(self, freed: Freed) -> None:
        """Hand clusters whose last reference this is back to the file system, while nobody can take them yet."""
        size = self._geometry.cluster_size
        spans = await self._refcounts.last_uses(freed.cluster, freed.length)
        for cluster, length in spans:
            await self._child("file").discard(Span(cluster * size, length * size))


async def _ignored(error: ImageCorrupt) -> None:
    """Nobody listens."""


async def write_pieces(file: Child, pieces: list[Piece], event: str) -> None:
    """Write copies of tables, neighbours in one go."""
    index = 0
    while index < len(pieces):
        joined = [pieces[index].content]
        at = pieces[index].at
        end = at + len(joined[0])
        index += 1
        while index < len(pieces) and pieces[index].at == end:
            joined.append(pieces[index].content)
            end += len(joined[-1])
            index += 1
        file.debug_event(event)
        await file.write(at, b"".join(joined))
