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
import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Final

from blockjobs.base.errors import BlockjobsError, UsageError
from blockjobs.block.bitmap import DirtyBitmap
from blockjobs.block.bitmap_store import BitmapStore
from blockjobs.block.drivers.qcow2 import bitmap_tables
from blockjobs.block.drivers.qcow2.allocate import Run
from blockjobs.block.drivers.qcow2.bitmap_tables import MAP_BYTES_MAX, TABLE_BYTES_MAX, map_bytes, shown_name
from blockjobs.block.drivers.qcow2.image import Image
from blockjobs.block.node_bitmap import NodeBitmap, find_bitmap
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

LOADED_BYTES_MAX: Final = 1 << 30
"""Of all bitmaps of one image in memory: a few hundred bytes of a hostile image can describe any amount."""


class StoredBitmaps(BitmapStore):
    """The bitmaps of one open image.

    Attributes:
        entries: the directory that is in the file.
    """

    def __init__(self, image: Image, entries: Sequence[BitmapEntry], *, read_only: bool) -> None:
        self.entries = list(entries)
        self._image = image
        self._read_only = read_only
        self._bitmaps: list[NodeBitmap] = []
        self._is_loaded = False
        self._is_marked = False
        self._digests: dict[str, bytes] = {}
        self._lock = asyncio.Lock()
        image.mark_bitmaps = self.begin_use
        image.has_unmarked_bitmaps = bool(self.entries)

    @property
    def _cluster_size(self) -> int:
        return self._image.geometry.cluster_size

    @property
    def bitmaps(self) -> list[NodeBitmap] | None:
        """The node's list, if they have been loaded."""
        return self._bitmaps if self._is_loaded else None

    # --- loading

    async def load(self, bitmaps: list[NodeBitmap]) -> None:
        """See `BitmapStore`."""
        for entry in self.entries:
            bitmap_tables.check_entry(entry, self._cluster_size)
        self._check_names_and_memory()
        loaded = [await self._load_one(entry) for entry in self.entries]
        self._bitmaps = bitmaps
        names = {bitmap.name for bitmap in loaded}
        for gone in [each for each in bitmaps if each.persistent and not each.busy and each.name not in names]:
            if gone.readonly:
                bitmaps.remove(gone)
        for bitmap in loaded:
            self._take_over(bitmap)
        self._is_loaded = True

    def _check_names_and_memory(self) -> None:
        seen: set[bytes] = set()
        total = 0
        for entry in self.entries:
            if entry.name in seen:
                raise UsageError(f"Bitmap already exists: {shown_name(entry)}")
            seen.add(entry.name)
            if not entry.flags & BITMAP_IN_USE:
                total += map_bytes(self._image.size, 1 << entry.granularity_bits)
        _check_memory(total)

    async def _load_one(self, entry: BitmapEntry) -> NodeBitmap:
        length, name = self._image.size, shown_name(entry)
        is_broken = bool(entry.flags & BITMAP_IN_USE)
        bitmap = NodeBitmap(
            # The content of one that was in use is not worth any memory.
            map=DirtyBitmap(0, 1 << entry.granularity_bits)
            if is_broken
            else await bitmap_tables.read_map(self._image.child("file"), entry, length, self._cluster_size),
            name=name,
            enabled=bool(entry.flags & BITMAP_AUTO),
            persistent=True,
            readonly=self._read_only,
            inconsistent=is_broken,
        )
        if not is_broken:
            self._digests[name] = _digest(bitmap)
        return bitmap

    def _take_over(self, loaded: NodeBitmap) -> None:
        assert loaded.name is not None
        known = find_bitmap(self._bitmaps, loaded.name)
        if known is None:
            self._bitmaps.append(loaded)
            return
        known.readonly = loaded.readonly
        if not known.busy:
            known.map, known.enabled, known.inconsistent = loaded.map, loaded.enabled, loaded.inconsistent

    # --- what may be stored

    def check_new(self, name: str, *, length: int, granularity: int) -> None:
        """See `BitmapStore`; the texts about versions and space are QEMU's."""
        if self._image.geometry.version < 3:
            raise UsageError("Cannot store dirty bitmaps in qcow2 v2 files")
        size = map_bytes(length, granularity)
        if self._is_too_large(length, granularity):
            raise UsageError("Too much space will be occupied by the bitmap. Use larger granularity")
        names = {each.name for each in self._bitmaps if each.persistent and each.name is not None}
        if len(names) >= BITMAPS_MAX:
            raise UsageError("Maximum number of persistent bitmaps is already reached")
        kept = sum(map_bytes(each.map.length, each.map.granularity) for each in self._bitmaps if each.persistent)
        _check_memory(kept + size)
        if sum(_directory_bytes(each) for each in (*names, name)) > BITMAP_DIRECTORY_BYTES_MAX:
            raise UsageError("Not enough space in the bitmap directory")

    def _is_too_large(self, length: int, granularity: int) -> bool:
        size = map_bytes(length, granularity)
        return size > MAP_BYTES_MAX or -(-size // self._cluster_size) * 8 > TABLE_BYTES_MAX

    def warn_of_lost(self) -> None:
        """The image is closed and may not be written: what was to be stored is lost, as in QEMU."""
        stored = {shown_name(entry) for entry in self.entries}
        for bitmap in self._bitmaps:
            if bitmap.persistent and bitmap.name not in stored:
                log.warning(
                    "node '%s' is read-only: its new bitmap '%s' is not stored", self._image.geometry.name, bitmap.name
                )

    def set_read_only(self, read_only: bool) -> None:
        """Nobody may change stored bitmaps from now on, or may again."""
        self._read_only = read_only
        for bitmap in self._bitmaps:
            if bitmap.persistent:
                bitmap.readonly = read_only

    # --- using

    async def begin_use(self) -> None:
        """See `BitmapStore`."""
        async with self._lock:
            if self._is_marked:
                return
            if self.entries:
                await self._mark()
            self._is_marked = True
            self._image.has_unmarked_bitmaps = False

    async def _mark(self) -> None:
        place = self._image.header.bitmaps
        assert place is not None
        marked = [replace(entry, flags=entry.flags | BITMAP_IN_USE) for entry in self.entries]
        if marked != self.entries:
            file = self._image.child("file")
            await file.write(place.directory_at, b"".join(entry.encode() for entry in marked))
            await file.flush()
        self.entries = marked

    # --- storing

    async def remove(self, name: str) -> None:
        """See `BitmapStore`."""
        async with self._lock:
            kept = [entry for entry in self.entries if shown_name(entry) != name]
            if len(kept) < len(self.entries):
                await self._switch(kept, [])
                self._digests.pop(name, None)
                self._image.has_unmarked_bitmaps &= bool(kept)

    async def store(self) -> None:
        """See `BitmapStore`."""
        if not self._is_loaded:
            return
        async with self._lock:
            wanted = {each.name: each for each in self._bitmaps if each.persistent and each.name is not None}
            if not self._is_out_of_date(wanted):
                return
            taken: list[Run] = []
            try:
                written = [await self._write(wanted[name], taken) for name in self._in_order(wanted)]
            except BaseException:
                await self._give_back(taken)
                raise
            entries = [entry for entry in written if entry is not None]
            await self._switch(entries, taken)
            self._digests = {name: _digest(each) for name, each in wanted.items() if not each.inconsistent}
            self._is_marked = False
            self._image.has_unmarked_bitmaps = bool(entries)

    def _is_out_of_date(self, wanted: dict[str, NodeBitmap]) -> bool:
        stored = {shown_name(entry) for entry in self.entries}
        if stored != set(wanted):
            return True
        usable = [each for each in wanted.values() if not each.inconsistent]
        return any(self._is_marked or self._digests.get(each.name or "") != _digest(each) for each in usable)

    def _in_order(self, wanted: Iterable[str]) -> list[str]:
        """As QEMU: what was there stays in its place, new ones follow, the newest first."""
        stored = [shown_name(entry) for entry in self.entries]
        left = set(wanted)
        return [name for name in stored if name in left] + [
            name for name in reversed(list(wanted)) if name not in stored
        ]

    async def _write(self, bitmap: NodeBitmap, taken: list[Run]) -> BitmapEntry | None:
        """The new entry of a bitmap, whose content is written; the old one, if it has none that is worth it."""
        assert bitmap.name is not None
        name = bitmap.name.encode("utf-8", "surrogateescape")
        if bitmap.inconsistent or self._is_too_large(bitmap.map.length, bitmap.map.granularity):
            if not bitmap.inconsistent:
                log.warning("bitmap '%s' has become too large to be stored", bitmap.name)
            return next((entry for entry in self.entries if entry.name == name), None)
        place = await bitmap_tables.write_map(
            self._image.child("file"), self._image.allocator, bitmap.map, self._cluster_size, taken
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
        image = self._image
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
        for run in freed:
            image.pending.add(run.cluster, run.length)

    async def _freed_by(self, entries: list[BitmapEntry]) -> list[Run]:
        """Clusters of bitmaps that are in the file's directory and not in `entries`; never those of other metadata."""
        kept = {entry.table_at for entry in entries}
        runs: list[Run] = []
        for entry in self.entries:
            if entry.table_at in kept:
                continue
            try:
                table = await bitmap_tables.read_table(self._image.child("file"), entry, self._cluster_size)
            except BlockjobsError:
                continue  # its clusters leak, which harms nobody
            runs += bitmap_tables.clusters_of(entry, table, self._cluster_size)
        protected = self._image.metadata_clusters()
        return [run for run in runs if protected.isdisjoint(range(run.cluster, run.cluster + run.length))]

    async def _give_back(self, taken: list[Run]) -> None:
        for run in taken:
            await self._image.allocator.give_back(run)


def _referring_to(header: Header, place: BitmapsExtension | None) -> Header:
    autoclear = header.autoclear & ~int(Autoclear.BITMAPS) | (int(Autoclear.BITMAPS) if place else 0)
    return replace(header.with_extension(EXT_BITMAPS, place.encode() if place else None), autoclear=autoclear)


def _digest(bitmap: NodeBitmap) -> bytes:
    """Tells whether a bitmap is as it was stored."""
    state = f"{bitmap.map.length} {bitmap.map.granularity} {bitmap.enabled}".encode()
    return hashlib.blake2b(state + bitmap.map.packed(), digest_size=16).digest()


def _check_memory(total_bytes: int) -> None:
    if total_bytes > LOADED_BYTES_MAX:
        text = f"The image's dirty bitmaps would take {total_bytes} bytes of memory: {LOADED_BYTES_MAX} are allowed"
        raise UsageError(text)


def _directory_bytes(name: str) -> int:
    return -(-(24 + len(name.encode("utf-8", "surrogateescape"))) // 8) * 8
