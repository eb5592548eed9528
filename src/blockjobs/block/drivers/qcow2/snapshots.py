"""Internal snapshots: made, applied and deleted so that a crash at any instant leaves the old state or the new one.

A snapshot is an entry of the snapshot table with an L1 table of its own; everything below is shared with the active
state and counted. The order of writes is that of spec/durability.md §1; whatever becomes visible does so by one write
into the header's first sector. All methods want a node without requests, and hold none back themselves.
"""

import errno
from array import array
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Final

from msgspec.structs import replace

from blockjobs.base.buffers import Buffer
from blockjobs.base.errors import ImageCorrupt, IoFailure, UsageError
from blockjobs.base.span import Span
from blockjobs.base.text import printable
from blockjobs.block.drivers.qcow2 import resize, snapshot_tree, vm_state
from blockjobs.block.drivers.qcow2.allocate import Run
from blockjobs.block.drivers.qcow2.header import metadata_places
from blockjobs.block.drivers.qcow2.image import GUARDED_TABLES_MAX, Image, leaving_leaks, marks_corrupt
from blockjobs.block.drivers.qcow2.records import SNAPSHOT_TABLE_BYTES_MAX
from blockjobs.block.drivers.qcow2.roots import RootTable
from blockjobs.block.internal_snapshots import GroupMark, InternalSnapshot
from blockjobs.wire.qcow2 import FIELD_SIZE_AND_L1, FIELD_SNAPSHOTS, L1_BYTES_MAX, SECTOR, HostAt
from blockjobs.wire.qcow2_tables import (
    COPIED,
    NO_ICOUNT,
    SNAPSHOT_GROUP,
    SNAPSHOT_GROUP_BYTES_MAX,
    SnapshotEntry,
    decode_table,
    encode_table,
)

SNAPSHOTS_MAX: Final = 65_536
_NAME_BYTES_MAX: Final = 0xFFFF
_ID_DIGITS_MAX: Final = 20
"""Longer numbers are no number of anybody's; a new one cannot collide with them."""


class Snapshots:
    """The snapshots of one open image: `InternalSnapshots`.

    Attributes:
        table: what the snapshot table says.
    """

    def __init__(self, image: Image, table: list[SnapshotEntry]) -> None:
        self.table = table
        self._tail = vm_state.Tail()
        self._lacks_flags = False
        """A snapshot could be neither made nor taken back: flags are clear that a repair sets."""
        self.move_to(image)

    def move_to(self, image: Image) -> None:
        """The same snapshots, of the same file, whose state was read anew."""
        self.image = image
        image.snapshot_places = self._places
        image.read_inactive_l2 = self._read_inactive_l2

    def _places(self) -> Iterator[tuple[str, range]]:
        """What holds their tables, each place once: in clusters of the file, and up to a bound."""
        size, left = self.image.geometry.cluster_size, GUARDED_TABLES_MAX
        if self.table:
            first = self.image.header.snapshots_at // size
            yield "snapshot table", range(first, first + -(-sum(len(each.encode()) for each in self.table) // size))
        for place in self._l1_places():
            clusters = range(place.at // size, -(-place.end // size))
            left -= len(clusters)
            if left < 0:
                return
            yield "inactive L1 table", clusters

    def _l1_places(self) -> set[Span]:
        return {Span(each.l1_at, min(each.l1_entries * 8, L1_BYTES_MAX)) for each in self.table}

    async def _read_inactive_l2(self) -> set[int]:
        from blockjobs.block.drivers.qcow2.inactive_tables import l2_clusters

        return await l2_clusters(self.image.child("file"), sorted(self._l1_places()), self.image.geometry.cluster_size)

    @property
    def entries(self) -> Sequence[InternalSnapshot]:
        """See `InternalSnapshots`."""
        return [self._shown(each) for each in self.table]

    def _shown(self, entry: SnapshotEntry) -> InternalSnapshot:
        return InternalSnapshot(
            id=entry.id.decode("utf-8", "replace"),
            name=entry.name.decode("utf-8", "replace"),
            vm_state_bytes=entry.vm_state_bytes,
            date_ns=entry.date_s * 10**9 + entry.date_ns,
            vm_clock_ns=entry.vm_clock_ns,
            icount=None if entry.icount == NO_ICOUNT else entry.icount,
            disk_bytes=self.image.size if entry.disk_size is None else entry.disk_size,
            mark=None if entry.group is None else GroupMark.decode(entry.group),
        )

    def _find(self, id: str) -> SnapshotEntry:
        for entry in self.table:
            if entry.id.decode("utf-8", "replace") == id:
                return entry
        raise UsageError(f"Snapshot with id '{id}' does not exist")

    def _new_id(self) -> bytes:
        numbers = (int(each.id) for each in self.table if each.id.isdigit() and len(each.id) <= _ID_DIGITS_MAX)
        return b"%d" % (1 + max(numbers, default=0))

    @marks_corrupt
    async def create(
        self,
        name: str,
        *,
        date_ns: int,
        vm_state_bytes: int = 0,
        vm_clock_ns: int = 0,
        icount: int | None = None,
        mark: GroupMark | None = None,
    ) -> InternalSnapshot:
        """See `InternalSnapshots`. Waits: table I/O and commits. Checkpoint: no."""
        image = self.image
        self._check_may_create(name)
        await image.begin_change()
        self._tail.check(image, vm_state_bytes)
        await self._tail.write(image)
        await image.settle()
        entry = SnapshotEntry(
            l1_at=HostAt(0),
            l1_entries=len(image.mapping.l1.words),
            id=self._new_id(),
            name=name.encode("utf-8", "surrogateescape"),
            date_s=date_ns // 10**9,
            date_ns=date_ns % 10**9,
            vm_clock_ns=vm_clock_ns,
            vm_state_bytes=vm_state_bytes,
            disk_size=image.size,
            icount=NO_ICOUNT if icount is None else icount,
            extra=_extra(mark),
        )
        marks = image.geometry.version > 2
        if marks:
            await image.transaction.set_dirty(True)
        try:
            entry = await self._share(entry)
        finally:
            await self._finish(unmark=marks and not self._lacks_flags)
        return self._shown(entry)

    async def _finish(self, *, unmark: bool) -> None:
        """The snapshot is durable, or has been given back: clean up. What cannot be done now, a repair does."""
        async with leaving_leaks(self.image):
            await snapshot_tree.drop_past(self.image, self.image.size)
            await self.image.settle()
            if unmark:
                await self.image.transaction.set_dirty(False)

    def _check_may_create(self, name: str) -> None:
        if self.image.geometry.has_data_file:
            raise UsageError("Operation not supported")
        if len(self.table) >= SNAPSHOTS_MAX:
            raise UsageError("File too large")
        if len(name.encode("utf-8", "surrogateescape")) > _NAME_BYTES_MAX:
            raise UsageError("Snapshot name too long")

    async def _share(self, entry: SnapshotEntry) -> SnapshotEntry:
        """Let a new entry of the table have everything that the active state has."""
        image = self.image
        l1 = image.mapping.l1
        words = array("Q", [word & ~COPIED for word in l1.words])
        image.mapping.flags_may_be_false()
        taken: list[Run] = []
        counted = False
        try:
            await snapshot_tree.clear_flags(image, words)
            for index, word in enumerate(l1.words):
                if word & COPIED:
                    l1.words[index] = word & ~COPIED
                    l1.mark(index)
            await snapshot_tree.add_references(image, words)
            counted = True
            run = await self._put(encode_table(words), taken)
            entry = replace(entry, l1_at=HostAt(run.cluster * image.geometry.cluster_size))
            await self._write_table([*self.table, entry])
            image.guard_inactive_l2(words)
        except BaseException as error:
            await self._unshare(error, words if counted else array("Q"), taken)
            raise
        self._lacks_flags = False
        return entry

    async def _unshare(self, error: BaseException, words: "array[int]", taken: list[Run]) -> None:
        """The snapshot was not to be: everything belongs to the active state alone again, as far as can be written."""
        image = self.image
        if isinstance(error, ImageCorrupt):
            await image.found_corrupt(error)
        self._lacks_flags = True
        async with leaving_leaks(image):
            for run in taken:
                await image.allocator.give_back(run)
            await snapshot_tree.drop_references(image, words)
            await image.settle()
            await snapshot_tree.set_flags(image)
            await image.settle()
            self._lacks_flags = False

    @marks_corrupt
    async def mark(self, id: str, mark: GroupMark | None) -> None:
        """See `InternalSnapshots`. Waits: table I/O and commits. Checkpoint: no."""
        entry = self._find(id)
        await self.image.begin_change()
        marked = replace(
            entry,
            extra=_extra(mark),
            disk_size=self.image.size if entry.disk_size is None else entry.disk_size,
            icount=NO_ICOUNT if entry.icount is None else entry.icount,
        )
        await self._write_table([marked if each is entry else each for each in self.table])
        await self.image.settle()

    @marks_corrupt
    async def delete(self, id: str) -> None:
        """See `InternalSnapshots`. Waits: table I/O and commits. Checkpoint: no."""
        entry, image = self._find(id), self.image
        await image.begin_change()
        await image.settle()
        words = await self.l1_of(entry)
        await self._write_table([each for each in self.table if each is not entry])
        async with self._guarding_again(), leaving_leaks(image):  # it is gone, and that is durable
            await self._release(words, Run(entry.l1_at // image.geometry.cluster_size, self._l1_clusters(words)))

    async def _release(self, words: "array[int]", l1: Run) -> None:
        """Nothing durable refers to an L1 table any more: free it and what is below, and set flags that are true."""
        image = self.image
        snapshot_tree.Metadata(image).check(l1.cluster, l1.length, is_table=False)
        await snapshot_tree.drop_references(image, words)
        image.pending.add(l1.cluster, l1.length)
        await image.settle()
        await snapshot_tree.set_flags(image)
        await image.settle()
        if not self.table:
            image.mapping.trusts_flags = True

    @asynccontextmanager
    async def _guarding_again(self) -> AsyncIterator[None]:
        """Around what gives up tables of a snapshot. If it cannot be read which are left, what is guarded stays so."""
        yield
        with suppress(OSError):
            await self.image.guard_metadata()

    @marks_corrupt
    async def apply(self, id: str) -> None:
        """See `InternalSnapshots`. Waits: table I/O and commits. Checkpoint: no."""
        entry, image = self._find(id), self.image
        size = image.geometry.cluster_size
        await image.begin_change()
        self._tail.forget()
        await image.settle()
        words = await self.l1_of(entry)
        length = image.size if entry.disk_size is None else entry.disk_size
        resize.check_length(image, length)
        words.extend([0] * (-(-length // image.geometry.l2_span) - len(words)))
        taken: list[Run] = []
        await snapshot_tree.clear_flags(image, words)
        await snapshot_tree.add_references(image, words)
        old = image.mapping.l1
        try:
            run = await self._put(encode_table(words), taken)
            await image.transaction.commit()
            at = HostAt(run.cluster * size)
            await image.transaction.switch_header(
                lambda header: replace(header, l1_at=at, l1_entries=len(words), size=length), FIELD_SIZE_AND_L1
            )
        except BaseException as error:
            await self._unshare(error, words, taken)
            raise
        image.mapping.flags_may_be_false()
        image.mapping.l1 = RootTable(words, at)
        image.transaction.size = length
        image.allocator.guarded.update(range(run.cluster, run.end))
        async with self._guarding_again(), leaving_leaks(image):  # the disk is what it was, and that is durable
            await self._release(old.words, Run(old.at // size, self._l1_clusters(old.words)))
            await snapshot_tree.drop_past(image, length)
            await image.settle()

    @marks_corrupt
    async def view(self, id: str) -> None:
        """See `InternalSnapshots`. Waits: a read. Checkpoint: no."""
        entry, image = self._find(id), self.image
        words = await self.l1_of(entry)
        length = image.size if entry.disk_size is None else entry.disk_size
        resize.check_length(image, length)
        words.extend([0] * (-(-length // image.geometry.l2_span) - len(words)))
        image.mapping.l1 = RootTable(words, entry.l1_at)
        image.transaction.size = length

    def refuse_changes(self) -> None:
        """See `InternalSnapshots`."""
        self.image.transaction.is_unsure = True

    @marks_corrupt
    async def l1_of(self, entry: SnapshotEntry) -> "array[int]":
        """The L1 table of a snapshot, without copied flags. Waits: a read. Checkpoint: no.

        Raises:
            ImageCorrupt: its place makes no sense.
            IoFailure: it could not be read.
        """
        file, size = self.image.child("file"), self.image.geometry.cluster_size
        length = entry.l1_entries * 8
        place = Span(entry.l1_at, length)
        overlaps = any(place.overlaps(span) for _, span in metadata_places(self.image.header))
        clusters = range(place.at // size, -(-min(place.end, file.length) // size))
        overlaps = overlaps or not self.image.metadata_clusters().isdisjoint(clusters)
        if place.at % size or length > L1_BYTES_MAX or place.end > file.length or overlaps:
            name = printable(entry.name.decode("utf-8", "replace"))
            raise ImageCorrupt(self.image.geometry.name, f"Snapshot '{name}' has an L1 table at no place for one")
        words = decode_table(await file.read(entry.l1_at, length)) if length else array("Q")
        return array("Q", [word & ~COPIED for word in words])

    def _l1_clusters(self, words: "array[int]") -> int:
        return -(-len(words) * 8 // self.image.geometry.cluster_size)

    async def _put(self, content: bytes, taken: list[Run]) -> Run:
        """Write a table to clusters of its own, which are noted in `taken`; not yet durable."""
        image, size = self.image, self.image.geometry.cluster_size
        [run] = await image.allocator.take(max(1, -(-len(content) // size)), in_one=True)
        taken.append(run)
        await image.child("file").write(run.cluster * size, content.ljust(-(-len(content) // SECTOR) * SECTOR, b"\0"))
        return run

    async def _write_table(self, entries: list[SnapshotEntry]) -> None:
        """Make a new snapshot table durable, with everything that it refers to, and free the old one.

        Raises:
            UsageError: it would be too large.
            IoFailure: the file has the old table.
        """
        image, size = self.image, self.image.geometry.cluster_size
        content = b"".join(entry.encode() for entry in entries)
        if len(content) > SNAPSHOT_TABLE_BYTES_MAX:
            raise UsageError("File too large")
        old = sum(len(entry.encode()) for entry in self.table)
        taken: list[Run] = []
        try:
            place = (await self._put(content, taken)).cluster * size if entries else 0
            # The counts of all that the table refers to come first.
            await image.transaction.commit()
            old_at = image.header.snapshots_at
            await image.transaction.switch_header(
                lambda header: replace(header, snapshots=len(entries), snapshots_at=HostAt(place)), FIELD_SNAPSHOTS
            )
        except BaseException:
            for run in taken:
                await image.allocator.give_back(run)
            raise
        if old:
            image.pending.add(old_at // size, -(-old // size))
        self.table[:] = entries
        image.guard_snapshots()

    # --- the vm state area

    @marks_corrupt
    async def write_vm_state(self, at: int, content: Buffer) -> None:
        """See `InternalSnapshots`. Bytes come in order. Waits: I/O, commits. Checkpoint: no."""
        await self.image.begin_change()
        await self._tail.add(self.image, at, content)

    @marks_corrupt
    async def read_vm_state(self, id: str, at: int, length: int) -> bytes:
        """See `InternalSnapshots`. Waits: reads. Checkpoint: no."""
        entry = self._find(id)
        if at + length > entry.vm_state_bytes:
            raise IoFailure(errno.EIO, f"node '{self.image.geometry.name}' vm state")
        disk = self.image.size if entry.disk_size is None else entry.disk_size
        words = await self.l1_of(entry)
        return await vm_state.read(self.image, words, disk, at, length)

    @marks_corrupt
    async def drop_vm_state(self) -> None:
        """See `InternalSnapshots`. Waits: table reads, commits. Checkpoint: no."""
        self._tail.forget()
        async with leaving_leaks(self.image):
            await snapshot_tree.drop_past(self.image, self.image.size)
            await self.image.settle()


def _extra(mark: GroupMark | None) -> bytes:
    return b"" if mark is None else SNAPSHOT_GROUP + mark.encode(SNAPSHOT_GROUP_BYTES_MAX)
