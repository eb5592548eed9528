"""Persistent bitmaps of an image: loaded at open, marked in use before the first change, stored at close.

The order of writes (spec/durability.md §1), with ▷ for a flush:

    use     IN_USE set in every entry of the directory, in place ▷ the first change of the image
    store   bits, their tables, a new directory without IN_USE; their refcounts ▷ header ▷ the old ones are freed

The mark is set in place although the directory may be longer than a sector: each entry has it within one sector, and a
torn write leaves some bitmaps marked and others not, before any of them is out of date. So a full disk does not hinder
it. Everything else is written to clusters that nothing refers to, and the one write of the header switches. Whatever
fails on the way leaves the marked directory, whose bitmaps nobody believes.
"""

import asyncio
import logging
from collections.abc import Sequence

from msgspec.structs import replace

from blockjobs.base.errors import BlockjobsError, ImageCorrupt, UsageError
from blockjobs.base.text import printable
from blockjobs.block.bitmap import DirtyBitmap
from blockjobs.block.bitmap_store import MAP_BYTES_MAX, BitmapStore, check_total, map_bytes
from blockjobs.block.drivers.qcow2 import bitmap_tables
from blockjobs.block.drivers.qcow2.allocate import Run
from blockjobs.block.drivers.qcow2.bitmap_tables import TABLE_BYTES_MAX, shown_name
from blockjobs.block.drivers.qcow2.image import Image, marks_corrupt
from blockjobs.block.node_bitmap import NodeBitmap
from blockjobs.wire.qcow2 import (
    BITMAP_DIRECTORY_BYTES_MAX,
    BITMAPS_MAX,
    EXT_BITMAPS,
    Autoclear,
    BitmapsExtension,
    Header,
)
from blockjobs.wire.qcow2_tables import BITMAP_AUTO, BITMAP_IN_USE, BitmapEntry

log = logging.getLogger(__name__)


class StoredBitmaps(BitmapStore):
    """The bitmaps of one open image.

    Attributes:
        entries: the directory that is in the file.
    """

    def __init__(self, image: Image, entries: Sequence[BitmapEntry], *, read_only: bool) -> None:
        super().__init__(image.geometry.name, read_only=read_only)
        self.entries = list(entries)
        self.image = image
        self._is_marked = False
        self._lock = asyncio.Lock()
        image.mark_bitmaps = self.begin_use
        image.has_unmarked_bitmaps = bool(self.entries)

    def move_to(self, image: Image) -> None:
        """The same bitmaps, of the same file, whose state was read anew."""
        image.mark_bitmaps = self.begin_use
        image.has_unmarked_bitmaps = self.image.has_unmarked_bitmaps
        self.image = image

    @property
    def _cluster_size(self) -> int:
        return self.image.geometry.cluster_size

    def stored_names(self) -> list[str]:
        """See `BitmapStore`."""
        return [shown_name(entry) for entry in self.entries]

    # --- loading

    async def load(self, bitmaps: list[NodeBitmap]) -> None:
        """See `BitmapStore`."""
        for entry in self.entries:
            bitmap_tables.check_entry(entry, self._cluster_size)
        self._check_names_and_memory()
        self._take_over(bitmaps, [await self._load_one(entry) for entry in self.entries])

    def _check_names_and_memory(self) -> None:
        seen: set[bytes] = set()
        total = 0
        for entry in self.entries:
            if entry.name in seen:
                raise UsageError(f"Bitmap already exists: {printable(shown_name(entry))}")
            seen.add(entry.name)
            if not entry.flags & BITMAP_IN_USE:
                total += map_bytes(self.image.size, 1 << entry.granularity_bits)
        check_total(total)

    async def _load_one(self, entry: BitmapEntry) -> NodeBitmap:
        is_broken = bool(entry.flags & BITMAP_IN_USE)
        if is_broken:  # its content is not worth any memory
            map_ = DirtyBitmap(0, 1 << entry.granularity_bits)
        else:
            file = self.image.child("file")
            map_ = await bitmap_tables.read_map(file, entry, self.image.size, self._cluster_size)
        return NodeBitmap(
            map=map_,
            name=shown_name(entry),
            enabled=bool(entry.flags & BITMAP_AUTO),
            persistent=True,
            readonly=self._read_only,
            inconsistent=is_broken,
        )

    # --- what may be stored

    def check_new(self, name: str, *, length: int, granularity: int) -> None:
        """See `BitmapStore`; the texts about versions and space are QEMU's."""
        if self.image.geometry.version < 3:
            raise UsageError("Cannot store dirty bitmaps in qcow2 v2 files")
        if self._is_too_large(length, granularity):
            raise UsageError("Too much space will be occupied by the bitmap. Use larger granularity")
        self._check_memory(length, granularity)
        names = self.persistent().keys()
        if len(names) >= BITMAPS_MAX:
            raise UsageError("Maximum number of persistent bitmaps is already reached")
        if sum(_directory_bytes(each) for each in (*names, name)) > BITMAP_DIRECTORY_BYTES_MAX:
            raise UsageError("Not enough space in the bitmap directory")

    def _is_too_large(self, length: int, granularity: int) -> bool:
        size = map_bytes(length, granularity)
        return size > MAP_BYTES_MAX or -(-size // self._cluster_size) * 8 > TABLE_BYTES_MAX

    # --- using

    @marks_corrupt
    async def begin_use(self) -> None:
        """See `BitmapStore`.

        Raises:
            ImageCorrupt: the bitmaps lie where other metadata is, or where space counts as free; nothing changed.
        """
        async with self._lock:
            if self._is_marked:
                return
            if self.entries:
                await self._check_places()
                await self._mark()
            self._is_marked = True
            self.image.has_unmarked_bitmaps = False

    async def _check_places(self) -> None:
        """Refuse bitmaps whose marking would change other metadata, or whose space a guest's write may take.

        Such a place would be given back as a bitmap's when a new one is stored, whatever is there by then.
        """
        image, size = self.image, self._cluster_size
        directory = image.directory_clusters()
        places = {"directory": [Run(directory.start, len(directory))]}
        for each in self.entries:
            table = bitmap_tables.table_clusters(each, size)
            places[f"bitmap '{shown_name(each)}'"] = [table, *await self._places_of(each)]
        metadata = self._other_metadata()
        for what, runs in places.items():
            for run in runs:
                at, length = run.cluster * size, run.length * size
                if not metadata.isdisjoint(range(run.cluster, run.end)):
                    text = f"Bitmaps: {what} overlaps with other metadata"
                elif await image.refcounts.least(run.cluster, run.length) == 0:
                    text = f"Bitmaps: {what} lies in clusters that count as free"
                else:
                    continue
                raise ImageCorrupt(image.geometry.name, printable(text), at=at, length=length)

    async def _places_of(self, entry: BitmapEntry) -> list[Run]:
        """The clusters of a bitmap; none if its table makes no sense: they leak, which harms nobody."""
        try:
            table = await bitmap_tables.read_table(self.image.child("file"), entry, self._cluster_size)
        except BlockjobsError:
            return []
        return bitmap_tables.clusters_of(entry, table, self._cluster_size)

    def _other_metadata(self) -> set[int]:
        image = self.image
        snapshots = (clusters for _, clusters in image.snapshot_places())
        return image.metadata_clusters().union(image.allocator.inactive_l2, *snapshots)

    async def _mark(self) -> None:
        place = self.image.header.bitmaps
        assert place is not None
        marked = [replace(entry, flags=entry.flags | BITMAP_IN_USE) for entry in self.entries]
        if marked != self.entries:
            file = self.image.child("file")
            await file.write(place.directory_at, b"".join(entry.encode() for entry in marked))
            await file.flush()
        self.entries = marked

    # --- storing

    @marks_corrupt
    async def remove(self, name: str) -> None:
        """See `BitmapStore`."""
        async with self._lock:
            kept = [entry for entry in self.entries if shown_name(entry) != name]
            if len(kept) < len(self.entries):
                await self._switch(kept, [])
                self._digests.pop(name, None)
                self.image.has_unmarked_bitmaps &= bool(kept)

    @marks_corrupt
    async def store(self) -> None:
        """See `BitmapStore`."""
        if self.bitmaps is None:
            return
        async with self._lock:
            if not self._is_out_of_date(is_marked=self._is_marked):
                return
            wanted = self.persistent()
            taken: list[Run] = []
            # Refused where a header may refer to clusters that have been given back.
            await self.image.begin_metadata_change()
            if not self._is_marked:
                await self._check_places()
            try:
                written = [await self._write(wanted[name], taken) for name in self._in_order()]
            except BaseException:
                await self._give_back(taken)
                raise
            entries = [entry for entry in written if entry is not None]
            await self._switch(entries, taken)
            self._stored()
            self._is_marked = False
            self.image.has_unmarked_bitmaps = bool(entries)

    async def _write(self, bitmap: NodeBitmap, taken: list[Run]) -> BitmapEntry | None:
        """The new entry of a bitmap, whose content is written; the old one, if it has none that is worth it."""
        assert bitmap.name is not None
        name = bitmap.name.encode("utf-8", "surrogateescape")
        if bitmap.inconsistent or self._is_too_large(bitmap.map.length, bitmap.map.granularity):
            if not bitmap.inconsistent:
                log.warning("bitmap '%s' has become too large to be stored", bitmap.name)
            return next((entry for entry in self.entries if entry.name == name), None)
        place = await bitmap_tables.write_map(
            self.image.child("file"), self.image.allocator, bitmap.everything, self._cluster_size, taken
        )
        return BitmapEntry(
            table_at=place.table_at,
            table_entries=place.table_entries,
            flags=BITMAP_AUTO if bitmap.enabled else 0,
            granularity_bits=bitmap.map.granularity.bit_length() - 1,
            name=name,
        )

    async def _switch(self, entries: list[BitmapEntry], taken: list[Run]) -> None:
        """Let the header refer to a new directory, and free what only the old one refers to.

        Args:
            entries: the new directory.
            taken: clusters that were taken for it already.

        Raises:
            IoFailure, ImageCorrupt: the file has the old directory, or possibly the new one.
        """
        image = self.image
        old_place, old_entries = image.header.bitmaps, self.entries
        freed = await self._freed_by(entries)
        place = None
        try:
            await image.begin_metadata_change()
            if entries:
                directory = b"".join(entry.encode() for entry in entries)
                at = await bitmap_tables.write_whole(
                    image.child("file"), image.allocator, directory, self._cluster_size, taken
                )
                place = BitmapsExtension(len(entries), len(directory), at)
            await image.transaction.commit()
        except BaseException:
            await self._give_back(taken)
            raise
        # If this fails the file may refer to either: then both stay allocated.
        await image.transaction.rewrite_header(lambda header: _referring_to(header, place))
        self.entries = entries
        if old_place is not None and old_entries:
            clusters = -(-old_place.directory_bytes // self._cluster_size)
            freed.append(Run(old_place.directory_at // self._cluster_size, clusters))
        others = self._other_metadata()
        for run in freed:
            if others.isdisjoint(range(run.cluster, run.end)):
                image.pending.add(run.cluster, run.length)

    async def _freed_by(self, entries: list[BitmapEntry]) -> list[Run]:
        """Clusters of bitmaps that are in the file's directory and not in `entries`."""
        kept = {entry.table_at for entry in entries}
        runs: list[Run] = []
        for entry in self.entries:
            if entry.table_at in kept:
                continue
            runs += await self._places_of(entry)
        return runs

    async def _give_back(self, taken: list[Run]) -> None:
        for run in taken:
            await self.image.allocator.give_back(run)


def _referring_to(header: Header, place: BitmapsExtension | None) -> Header:
    autoclear = header.autoclear & ~int(Autoclear.BITMAPS) | (int(Autoclear.BITMAPS) if place else 0)
    return replace(header.with_extension(EXT_BITMAPS, place.encode() if place else None), autoclear=autoclear)


def _directory_bytes(name: str) -> int:
    return -(-(24 + len(name.encode("utf-8", "surrogateescape"))) // 8) * 8
