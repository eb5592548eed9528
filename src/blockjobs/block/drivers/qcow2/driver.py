"""The `qcow2` driver: the package's one door.

Where things are: `entries` (what L2 entries mean), `mapping` (L1 and L2), `refcounts` and `allocate` (space),
`writes`, `bulk`, `erase`, `pack` (the ways to change the mapping), `reads`, `compress`, `resize`, and `transaction`,
whose docstring has the order of writes and why a crash at any instant does no harm.
"""

import errno
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

from blockjobs.base.errors import ImageCorrupt, UsageError
from blockjobs.base.span import Span
from blockjobs.block import group_doubt
from blockjobs.block.amend_options import Amending, Qcow2AmendOptions
from blockjobs.block.claims import ALL, Perm
from blockjobs.block.columns import Columnar, Unpacked
from blockjobs.block.divisible import Divisible
from blockjobs.block.driver import Child, Compressor, FormatDriver, OpenContext, OwnPlaces
from blockjobs.block.drivers.qcow2 import bulk, erase, pack, reads, records, resize, writes
from blockjobs.block.drivers.qcow2.bitmaps import StoredBitmaps
from blockjobs.block.drivers.qcow2.header import read_header
from blockjobs.block.drivers.qcow2.image import Image, load_image, marks_corrupt
from blockjobs.block.drivers.qcow2.options import TUNABLE, Qcow2Options, tuning_of
from blockjobs.block.drivers.qcow2.reopen import Qcow2Switch
from blockjobs.block.drivers.qcow2.snapshots import Snapshots
from blockjobs.block.encipherment import Encipherment
from blockjobs.block.medium import Medium
from blockjobs.block.options import driver
from blockjobs.block.sparse import Counting
from blockjobs.block.vocabulary import ImpliedChild, Reservation, Segment, ZeroMode
from blockjobs.wire.qcow2 import BACKING_NAME_MAX, CRYPT_AES, ZSTD, Compatible, Incompatible
from blockjobs.wire.qcow2_tables import BitmapEntry, SnapshotEntry

if TYPE_CHECKING:
    from blockjobs.block.drivers.qcow2.encryption import Volume

_COMMITS_AT_CLOSE_MAX = 4
"""The first writes everything, the second what its frees have changed in refcounts; the others are margin."""


@driver(Qcow2Options)
class Qcow2(FormatDriver, Columnar, Counting, Divisible, Unpacked):
    """A qcow2 image, version 2 or 3.

    Attributes:
        image: its state, for jobs that work on the format itself (amend, snapshots, check).
        read_only: nobody may write; changed by a reopen only.
        bitmap_store: its persistent bitmaps.
        internal_snapshots: the snapshots in it.
        volume: its LUKS header, if it has one.
    """

    bitmap_store: StoredBitmaps
    internal_snapshots: Snapshots

    reopenable: ClassVar[frozenset[str] | None] = TUNABLE
    can_amend: ClassVar[bool] = True

    def __init__(
        self,
        children: dict[str, Child],
        image: Image,
        *,
        read_only: bool,
        snapshots: list[SnapshotEntry],
        bitmaps: Sequence[BitmapEntry],
        volume: "Volume | None" = None,
    ) -> None:
        self.children = children
        self.image = image
        self.read_only = read_only
        self.volume = volume
        self.internal_snapshots = Snapshots(image, snapshots)
        self.bitmap_store = StoredBitmaps(image, bitmaps, read_only=read_only)
        # Copying a shared or compressed cluster takes all of it, so requests of one cluster must not overlap.
        self.write_align = image.geometry.cluster_size

    @classmethod
    async def open(cls, options: Qcow2Options, children: dict[str, Child], context: OpenContext) -> Self:
        """See `Driver`.

        Raises:
            UsageError: the image or the options are refused, in QEMU's words where it has some.
            IoFailure: the image could not be read.
        Waits: reads of the header and the root tables; of all metadata, if refcounts must be rebuilt. Checkpoint: no.
        """
        file = children["file"]
        header = await read_header(file, read_only=context.read_only)
        tuning = tuning_of(options, header, unmap=context.unmap)
        if "data-file" in children and not header.has_data_file:
            raise UsageError("'data-file' can only be set for images with an external data file")
        if header.has_data_file and "data-file" not in children and header.data_file_name is None:
            raise UsageError("'data-file' is required for this image")
        if header.incompatible & Incompatible.DIRTY and not context.read_only:
            from blockjobs.block.drivers.qcow2.repair import repair_image

            # Written with lazy refcounts and not closed: what counts as free may be in use.
            await repair_image(file, offload=context.offload)
            header = await read_header(file, read_only=context.read_only)
        image = await load_image(children, header, name=context.node_name, offload=context.offload, tuning=tuning)
        image.on_corrupt, image.is_writable = context.corrupted, not context.read_only
        volume = None
        if header.luks is not None:
            from blockjobs.block.drivers.qcow2.encryption import open_volume

            volume = await open_volume(children["file"], header, options, context)
            image.encipherment = volume.encipherment
        elif header.crypt_method == CRYPT_AES:
            from blockjobs.block.drivers.qcow2.encryption import open_old

            image.encipherment = open_old(options, context)
        snapshots = await records.read_snapshots(file, header)
        bitmaps = await records.read_bitmaps(file, header)
        opened = cls(
            children,
            image,
            read_only=context.read_only,
            snapshots=snapshots,
            bitmaps=bitmaps,
            volume=volume,
        )
        await group_doubt.settle_opened(opened.internal_snapshots, context)
        return opened

    async def close(self) -> None:
        """See `Driver`. Waits: commits. Checkpoint: no."""
        if not self.read_only:
            await self.write_all()
        else:
            self.bitmap_store.warn_of_lost()

    async def prepare_reopen(self, options: Qcow2Options, context: OpenContext) -> Qcow2Switch:
        """See `Driver`. Waits: commits. Checkpoint: no."""
        switch = Qcow2Switch(self, options, context)
        await switch.prepare()
        return switch

    async def write_all(self) -> None:
        """Leave nothing in memory that is not in the file, dirty bitmaps included.

        Raises:
            IoFailure: something could not be written.
        Waits: commits. Checkpoint: no.
        """
        try:
            await self.bitmap_store.store()
        finally:
            await self._commit_all()

    @marks_corrupt
    async def amend(self, options: Any, work: Amending) -> None:
        """See `Driver` and `amend`. Waits: I/O. Checkpoint: through `work`."""
        from blockjobs.block.drivers.qcow2 import amend

        assert isinstance(options, Qcow2AmendOptions)
        await amend.amend(self, options, work)

    async def reload(self) -> None:
        """The header says something else than at the open that all sizes followed from: begin anew from the file.

        Raises:
            UsageError, IoFailure: it could not be read; nothing may be written any more.
        Waits: reads of the root tables. Checkpoint: no.
        """
        old = self.image
        old.transaction.is_unsure = True
        header = await read_header(self.children["file"], read_only=False)
        image = await load_image(self.children, header, name=old.geometry.name, offload=old.offload, tuning=old.tuning)
        image.on_corrupt, image.encipherment, image.is_writable = old.on_corrupt, old.encipherment, old.is_writable
        self.image = image
        self.bitmap_store.move_to(image)
        self.internal_snapshots.move_to(image)

    async def _commit_all(self) -> None:
        for _ in range(_COMMITS_AT_CLOSE_MAX):
            if self.image.transaction.is_clean:
                return
            await self.image.settle()

    @property
    def encipherment(self) -> Encipherment | None:  # type: ignore[override]  # the image's here, a plain attribute elsewhere
        """The image's."""
        return self.image.encipherment

    @property
    def length(self) -> int:
        """Virtual length."""
        return self.image.size

    def child_perms(self, child: str, needs: Perm, shares: Perm) -> tuple[Perm, Perm]:
        """See `Driver`, and spec/block-layer.md §3."""
        if child == "file":
            writes_too = Perm(0) if self.read_only else Perm.WRITE | Perm.RESIZE
            return Perm.CONSISTENT_READ | writes_too, (shares & Perm.CONSISTENT_READ) | Perm.WRITE_UNCHANGED
        if child == "backing":
            shared = ALL if Perm.WRITE in shares else Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED
            return needs & Perm.CONSISTENT_READ, shared
        changes = Perm.WRITE | Perm.RESIZE  # a change of the length writes zeroes too
        return (needs | changes if needs & changes else needs), shares

    async def resolve(self, span: Span) -> list[Segment]:
        """See `FormatDriver`. Waits: table reads. Checkpoint: no."""
        try:
            return await reads.resolve(self.image, span)
        except ImageCorrupt as error:
            await self.image.found_corrupt(error)
            raise

    def place_now(self, at: int, length: int) -> tuple[str, int] | None:
        """See `FormatDriver`."""
        return reads.place_now(self.image, at, length)

    def own_places_now(self) -> OwnPlaces | None:
        """See `FormatDriver`."""
        return writes.own_places_now(self.image)

    @property
    def columns_in(self) -> str:
        """See `Columnar`."""
        return self.image.geometry.data_child

    @property
    def keeps_places(self) -> bool:
        """See `Columnar`: an external data file has all clusters where the disk has them."""
        return self.image.geometry.has_data_file

    async def pieces(self, span: Span, *, has_zeroes: bool = True) -> tuple[list[int], list[int], list[int]] | None:
        """See `Columnar`; what only `resolve` understands, or refuses, is left to it. Waits: table reads."""
        try:
            return await reads.pieces(self.image, span, has_zeroes=has_zeroes)
        except ImageCorrupt:
            return None

    async def is_sparse(self, stored_bytes: int) -> bool:
        """See `Counting`."""
        from blockjobs.block.drivers.qcow2 import sparse

        return await sparse.is_sparse(self.image, stored_bytes)

    async def read_special(self, segment: Segment, buffer: memoryview) -> None:
        """See `FormatDriver`: inflates.

        Raises:
            IoFailure: the file could not be read, or a stream is no good (EIO).
        Waits: reads and workers. Checkpoint: no.
        """
        from blockjobs.block.drivers.qcow2.streams import read_special

        await read_special(self.image, segment, buffer)

    async def reserve(self, span: Span) -> Reservation:
        """See `FormatDriver`. Waits: table reads; a commit if too much is dirty. Checkpoint: no."""
        try:
            return await writes.reserve(self.image, span)
        except ImageCorrupt as error:
            await self.image.found_corrupt(error)
            raise

    async def reserve_many(self, spans: Sequence[Span]) -> list[Reservation]:
        """See `FormatDriver`. Waits: table reads; a commit if too much is dirty. Checkpoint: no."""
        try:
            reservation = await bulk.reserve(self.image, spans)
        except ImageCorrupt as error:
            await self.image.found_corrupt(error)
            raise
        return [reservation] if reservation is not None else await super().reserve_many(spans)

    def unpacked(self, segments: Sequence[Segment], file: Medium) -> Medium:
        """See `Unpacked`."""
        from blockjobs.block.drivers.qcow2.streams import unpacked

        return unpacked(self.image, segments, file)

    async def reserve_in_one(self, at: list[int], length: list[int]) -> Reservation | None:
        """See `Columnar`. Waits: table reads; a commit if too much is dirty. Checkpoint: no."""
        try:
            return await bulk.reserve_in_one(self.image, at, length)
        except ImageCorrupt as error:
            await self.image.found_corrupt(error)
            raise

    async def publish(self, reservation: Reservation) -> None:
        """See `FormatDriver`. Waits: at most one zero request, at the end of the disk. Checkpoint: no.

        Raises:
            IoFailure: that request failed; the space is given back.
        """
        if isinstance(reservation.token, bulk.Claim):
            bulk.publish(self.image, reservation.token)
        else:
            await writes.publish(self.image, reservation)

    async def release(self, reservation: Reservation) -> None:
        """See `FormatDriver`. Waits: a read at most. Checkpoint: no."""
        if isinstance(reservation.token, bulk.Claim):
            await bulk.release(self.image, reservation.token)
        else:
            await writes.release(self.image, reservation)

    def is_divisible(self, reservation: Reservation) -> bool:
        """See `Divisible`: new clusters for many runs, and what is written in place."""
        return isinstance(reservation.token, bulk.Claim) or writes.is_in_place(reservation)

    async def shorten(self, reservation: Reservation, length: int) -> None:
        """See `Divisible`. Waits: a read at most. Checkpoint: no."""
        if isinstance(reservation.token, bulk.Claim):
            await bulk.shorten(self.image, reservation.token, length // self.image.geometry.cluster_size)

    @property
    def zeroes_fast(self) -> bool:
        """See `FormatDriver`: before version 3 nothing but bytes hides a backing file."""
        return self.image.geometry.version > 2 or not self.image.has_backing

    @marks_corrupt
    async def zero(self, span: Span, mode: ZeroMode) -> list[Span]:
        """See `FormatDriver`. Waits: table reads, commits if too much is dirty. Checkpoint: no."""
        return await erase.zero(self.image, span, mode)

    @marks_corrupt
    async def zero_many(self, spans: Sequence[Span], mode: ZeroMode) -> list[Span]:
        """See `Columnar`. Waits: as `zero`. Checkpoint: no."""
        return await erase.zero_many(self.image, spans, mode)

    @marks_corrupt
    async def discard(self, span: Span) -> None:
        """See `FormatDriver`. Waits: table reads, commits if too much is dirty. Checkpoint: no."""
        await erase.discard(self.image, span)

    async def flush(self) -> None:
        """See `FormatDriver` and `transaction`. Waits: up to three rounds of writes and flushes. Checkpoint: no.

        Raises:
            IoFailure: something is not durable; it stays in memory for the next try.
        """
        await self.image.transaction.commit()

    @marks_corrupt
    async def resize(self, length: int) -> None:
        """See `FormatDriver`; durable on return. Waits: table I/O and commits. Checkpoint: no.

        Raises:
            UsageError: not to that length.
            IoFailure: the length is as before.
        """
        await resize.resize(self.image, length)

    @marks_corrupt
    async def preallocate(self, span: Span, mode: ZeroMode) -> None:
        """See `resize.preallocate`. Waits: table I/O and commits. Checkpoint: no."""
        await resize.preallocate(self.image, span, mode)

    async def take_room(self, length: int, *, with_data: bool) -> None:
        """See `room.take_room`. Waits: writes. Checkpoint: no."""
        from blockjobs.block.drivers.qcow2 import room

        await room.take_room(self.image, length, with_data=with_data)

    async def leave_room(self, least_bytes: int) -> None:
        """See `room.leave_room`; what is dirty is written before. Waits: commits. Checkpoint: no."""
        from blockjobs.block.drivers.qcow2 import room

        await self._commit_all()
        await room.leave_room(self.image, least_bytes)

    def compressor(self, level: str) -> Compressor | None:
        """See `FormatDriver`.

        None with an external data file, which has no place for streams, and if the image is enciphered: streams are
        stored as they are, for everybody to read.
        """
        if self.image.geometry.has_data_file or self.encipherment is not None:
            return None
        from blockjobs.block.drivers.qcow2.compress import compressor

        return compressor(self.image.header.compression_type, level)

    @marks_corrupt
    async def write_compressed(self, clusters: Sequence[tuple[int, bytes]]) -> None:
        """See `FormatDriver`. Waits: table reads, one write. Checkpoint: no.

        Raises:
            IoFailure: nothing of the batch is visible, the space is given back.
        """
        await pack.write_compressed(self.image, clusters)

    @marks_corrupt
    async def make_empty(self) -> None:
        """See `FormatDriver`. Waits: table reads, commits. Checkpoint: no."""
        size = self.image.geometry.cluster_size
        await self.image.begin_change()
        await erase.erase(self.image, Span(0, -(-self.image.size // size) * size), erase.Erasure.FORGET)
        await self._commit_all()

    @marks_corrupt
    async def name_backing_file(self, filename: str | None, backing_format: str | None) -> None:
        """See `FormatDriver`. Waits: commits, and writes of the header. Checkpoint: no."""
        if filename is not None and len(os.fsencode(filename)) > BACKING_NAME_MAX:
            raise UsageError(os.strerror(errno.EINVAL))
        await self.image.begin_change()
        await self.image.transaction.commit()
        await self.image.transaction.name_backing_file(filename, backing_format)

    def implied_children(self) -> list[ImpliedChild]:
        """See `FormatDriver`."""
        header = self.image.header
        implied: list[ImpliedChild] = []
        if header.has_data_file and header.data_file_name is not None:
            implied.append(ImpliedChild("data-file", header.data_file_name, None))
        if header.backing_file:
            implied.append(ImpliedChild("backing", header.backing_file, header.backing_format))
        return implied

    def info(self) -> dict[str, Any]:
        """See `Driver`; shape from spec/block-layer.md §5."""
        header = self.image.header
        specific: dict[str, Any] = {
            "compat": "0.10" if header.version == 2 else "1.1",
            "refcount-bits": header.refcount_bits,
            "compression-type": "zstd" if header.compression_type == ZSTD else "zlib",
        }
        if header.version > 2:
            specific |= {
                "lazy-refcounts": bool(header.compatible & Compatible.LAZY_REFCOUNTS),
                "corrupt": bool(header.incompatible & Incompatible.CORRUPT),
                "extended-l2": header.has_extended_l2,
            }
        if header.has_data_file:
            specific["data-file"] = header.data_file_name
            specific["data-file-raw"] = header.is_data_file_raw
        if self.bitmap_store.entries:
            specific["bitmaps"] = [records.bitmap_info(each) for each in self.bitmap_store.entries]
        if self.volume is not None:
            from blockjobs.block.luks.volume import info_of

            specific["encrypt"] = {"format": "luks", **info_of(self.volume.header)}
        elif header.crypt_method == CRYPT_AES:
            specific["encrypt"] = {"format": "aes"}
        members: dict[str, Any] = {
            "cluster-size": header.cluster_size,
            "dirty-flag": bool(header.incompatible & Incompatible.DIRTY),
            "format-specific": {"type": "qcow2", "data": specific},
        }
        if "encrypt" in specific:
            members["encrypted"] = True
        known = zip(self.internal_snapshots.entries, self.internal_snapshots.table, strict=True)
        if shown := [entry for each, entry in known if each.is_shown]:
            members["snapshots"] = [records.snapshot_info(entry) for entry in shown]
        return members
