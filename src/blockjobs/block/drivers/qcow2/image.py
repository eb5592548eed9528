"""One open qcow2 image: its parts put together, and what they share.

Tables may turn out to be wrong while it is in use (spec/durability.md §3). A request that needs them fails, the image
takes no further change, and its header says so to whoever opens it next. What is only to be given back leaks instead,
which harms nobody: that is worth an event, and no more.
"""

import asyncio
import errno
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator
from contextlib import asynccontextmanager, suppress
from functools import wraps
from typing import Any, Concatenate, Final, NamedTuple, ParamSpec, Protocol, TypeVar

from blockjobs.base.buffers import Buffer, zeroes
from blockjobs.base.errors import ImageCorrupt, IoFailure
from blockjobs.base.offload import Offload
from blockjobs.base.span import Span
from blockjobs.block.driver import Child
from blockjobs.block.drivers.qcow2.allocate import INACTIVE_L2, OVERLAPS, Allocator, Run
from blockjobs.block.drivers.qcow2.cache_cleaning import CacheCleaner
from blockjobs.block.drivers.qcow2.entries import Mapped, check, is_stored
from blockjobs.block.drivers.qcow2.geometry import Geometry
from blockjobs.block.drivers.qcow2.header import metadata_places
from blockjobs.block.drivers.qcow2.header_update import HeaderFile
from blockjobs.block.drivers.qcow2.mapping import Mapping
from blockjobs.block.drivers.qcow2.pending import PendingFrees
from blockjobs.block.drivers.qcow2.refcounts import Refcounts
from blockjobs.block.drivers.qcow2.roots import RootTable
from blockjobs.block.drivers.qcow2.transaction import Transaction
from blockjobs.block.encipherment import Encipherment
from blockjobs.block.vocabulary import Placement, Segment, ZeroMode
from blockjobs.wire.qcow2 import Autoclear, Header, HostAt, Incompatible
from blockjobs.wire.qcow2_tables import COMPRESSED, OFFSET, decode_table, unpack_compressed

GUARDED_TABLES_MAX: Final = 1 << 18
"""L2 tables, and refcount blocks, that are known by place so that nothing is written over them: 128 TiB of disk with
64 KiB clusters. An image with more of them must have tiny clusters; it is guarded in part, to bound the memory."""

ZERO_WRITE_BYTES_MAX: Final = 1 << 20
"""Zeroes that must be enciphered go in pieces of this size."""


class Tuning(NamedTuple):
    """What the options say about an open image; sizes in bytes."""

    l2_cache_bytes: int
    refcount_cache_bytes: int
    discard_requests: bool
    """Hand clusters freed by discard and zero requests back to the file system."""
    discard_others: bool
    """The same for clusters freed by anything else."""
    discard_snapshots: bool = True
    """The same for clusters freed when a snapshot is deleted."""
    discards_keep_clusters: bool = False
    """Discards and zeroes leave clusters where they are, so that the image does not become fragmented."""
    clean_interval_s: int = 0
    """After how long tables that nobody uses leave memory; 0 for never."""
    guards_inactive_l2: bool = False
    """Write nothing over the L2 tables of snapshots, whatever the reference counts say."""


class Image:
    """The state of one open image. Modules of this package work on it; only `driver.py` is known outside.

    Attributes:
        on_corrupt: told when the image turns out to be corrupt, and whether it takes changes no more: once for each.
        is_writable: whoever opened the image lets its header be changed.
        has_unmarked_bitmaps: the file has bitmaps that a change of the image would make wrong without a word.
        mark_bitmaps: makes the file say that they are in use.
        snapshot_places: the host clusters of the snapshot table and of the snapshots' L1 tables.
        read_inactive_l2: finds the host clusters of the snapshots' L2 tables, as the file has them.
        encipherment: how guest bytes are enciphered in the child that they are in; None if they are not.
        packing: held while compressed streams get their places, which depend on the one before.
    """

    def __init__(
        self,
        children: dict[str, Child],
        header: Header,
        *,
        name: str,
        offload: Offload,
        tuning: Tuning,
        refcount_table: "array[int]",
        l1: "array[int]",
    ) -> None:
        self._children = children
        self.geometry = Geometry.of(header, name)
        self.offload = offload
        self.tuning = tuning
        self.header_file = HeaderFile(children, header)
        self.pending = PendingFrees()
        self.refcounts = Refcounts(
            self.geometry,
            RootTable(refcount_table, header.refcount_table_at),
            cache_bytes=tuning.refcount_cache_bytes,
            read=self._read_refcount_block,
        )
        self.allocator = Allocator(self.geometry, self.refcounts)
        self.allocator.name_of = self._name_of
        self.mapping = Mapping(
            self.geometry,
            RootTable(l1, header.l1_at),
            cache_bytes=tuning.l2_cache_bytes,
            read=self._read_l2_table,
            allocator=self.allocator,
            pending=self.pending,
            refcounts=self.refcounts,
            trusts_flags=not header.snapshots,
        )
        self.cleaner = CacheCleaner((self.mapping.l2, self.refcounts.blocks), tuning.clean_interval_s)
        self.transaction = Transaction(
            self.geometry, self.header_file, self.refcounts, self.allocator, self.mapping, self.pending, self.child
        )
        self.encipherment: Encipherment | None = None
        self.packing = asyncio.Lock()
        self._may_change = False
        self._beginning = asyncio.Lock()
        self.has_unmarked_bitmaps = False
        self.mark_bitmaps: Callable[[], Awaitable[None]] = _no_bitmaps
        self.snapshot_places: Callable[[], Iterable[tuple[str, range]]] = tuple
        self.read_inactive_l2: Callable[[], Awaitable[set[int]]] = _no_tables
        self.is_corrupt = bool(header.incompatible & Incompatible.CORRUPT)
        self.is_writable = False
        self._is_leak_told = False
        self.on_corrupt: Callable[[ImageCorrupt, bool], None] = lambda error, is_fatal: None
        self.transaction.on_corrupt = self.found_corrupt

    @property
    def header(self) -> Header:
        """What the file durably says."""
        return self.header_file.header

    @property
    def size(self) -> int:
        """Virtual length in bytes."""
        return self.transaction.size

    @property
    def has_backing(self) -> bool:
        """Whether absent clusters may be anything but zeroes."""
        return "backing" in self._children

    def child(self, edge: str) -> Child:
        """The node now at that edge."""
        return self._children[edge]

    async def read_stored(self, stored: Segment, buffer: memoryview) -> None:
        """Read guest bytes that are stored in a child.

        Raises:
            IoFailure: what `buffer` holds is unspecified.
        Waits: a read. Checkpoint: no.
        """
        at = stored.child_at
        await self._children[stored.child].read_into(at, buffer)
        if self.encipherment is not None:
            await self.offload.run(self.encipherment.placed(stored.at, at).decipher, at, buffer)

    async def store(self, place: Placement, content: Buffer) -> None:
        """Write guest bytes to their place in a child.

        Raises:
            IoFailure: any part may be written.
        Waits: a write. Checkpoint: no.
        """
        at = place.child_at
        if self.encipherment is not None:
            content = await self.offload.run(self.encipherment.placed(place.at, at).encipher, at, content)
        await self._children[place.child].write(at, content)

    async def store_zeroes(self, place: Placement, *, mode: ZeroMode = ZeroMode.UNMAP) -> None:
        """Let guest bytes that are stored in a child be zeroes. Raises, Waits: as `store`. Checkpoint: no."""
        if self.encipherment is None:
            await self._children[place.child].zero(Span(place.child_at, place.length), mode=mode)
            return
        shift = place.child_at - place.at
        for piece in Span(place.at, place.length).split(ZERO_WRITE_BYTES_MAX):
            await self.store(Placement(*piece, place.child, piece.at + shift), zeroes(piece.length))

    async def _read_l2_table(self, at: int, length: int) -> bytes:
        return await self._read_table(at, length, "l2_load", "L2 table")

    async def _read_refcount_block(self, at: int, length: int) -> bytes:
        return await self._read_table(at, length, "refblock_load", "refcount block")

    async def _read_table(self, at: int, length: int, event: str, what: str) -> bytes:
        file = self._children["file"]
        if at + length > file.length:
            raise ImageCorrupt(self.geometry.name, f"{what} at {at:#x} lies beyond the end of the file")
        file.debug_event(event)
        return await file.read(at, length)

    @property
    def is_changing(self) -> bool:
        """Whether `begin_change` has nothing to do but to make room."""
        unusable = self.is_corrupt or self.transaction.is_unsure
        return self._may_change and not unusable and not self.has_unmarked_bitmaps

    async def begin_change(self) -> None:
        """To be awaited before metadata is changed: room in the caches, and a header fit for a changing image.

        The first time it clears the autoclear bits that this program does not keep up, and marks persistent bitmaps as
        in use, so that a crash leaves them inconsistent rather than silently stale.

        Raises:
            IoFailure: the image is corrupt (EIO), or could not be written; nothing changed.
            ImageCorrupt: it turns out to be so now; nothing changed.
        Waits: a commit if too much is dirty. Checkpoint: no.
        """
        if self.is_changing:
            await self.transaction.make_room()
            return
        await self.begin_metadata_change()
        if self.has_unmarked_bitmaps:
            await self.mark_bitmaps()

    async def begin_metadata_change(self) -> None:
        """As `begin_change`, for what leaves the guest's bytes as they are.

        Waits: a write of the header, and reads, the first time.
        """
        self.check_usable()
        kept = Autoclear.DATA_FILE_RAW | (Autoclear.BITMAPS if self.header.bitmaps else 0)
        await self.transaction.begin_writing(int(kept))
        if self._may_change:
            return
        async with self._beginning:  # nobody changes anything while tables are still being read
            if self._may_change:
                return
            await self.guard_metadata()
            if (text := self._shared_place()) is not None:
                error = ImageCorrupt(self.geometry.name, text)
                await self.found_corrupt(error)
                raise error
            self._may_change = True

    async def guard_metadata(self) -> None:
        """Nothing is written over tables from now on; again after those of a snapshot were given up.

        What was given up may have been counted wrong, and be in use still.

        Raises:
            IoFailure: the snapshots' tables could not be read; what was guarded still is.
        Waits: reads, if `overlap-check` wants all L2 tables of snapshots guarded. Checkpoint: no.
        """
        allocator = self.allocator
        if self.tuning.guards_inactive_l2:
            inactive = await self.read_inactive_l2()
            allocator.guarded -= allocator.inactive_l2
            allocator.inactive_l2 = inactive
        allocator.guarded |= self.metadata_clusters() | set(self.directory_clusters()) | allocator.inactive_l2
        self.guard_snapshots()

    def guard_inactive_l2(self, words: Iterable[int]) -> None:
        """A snapshot with that L1 table has been made: nothing is written over its L2 tables, if that is wanted."""
        if self.tuning.guards_inactive_l2:
            from blockjobs.block.drivers.qcow2.inactive_tables import add_clusters

            add_clusters(self.allocator.inactive_l2, words, self.geometry.cluster_size)
            self.allocator.guarded |= self.allocator.inactive_l2

    def guard_snapshots(self) -> None:
        """Nothing is written over the snapshot table and the L1 tables that it names; again when it is a new one."""
        for _, clusters in self.snapshot_places():
            self.allocator.guarded.update(clusters)

    def _shared_place(self) -> str | None:
        """What is wrong if two tables lie in one place: a change of one would destroy the other."""
        size = self.geometry.cluster_size
        seen = set(self._root_clusters())
        for what, table in (("refcount block", self.refcounts.root), ("L2 table", self.mapping.l1)):
            own = {(word & OFFSET) // size for word in table.words[:GUARDED_TABLES_MAX] if word & OFFSET}
            if not seen.isdisjoint(own):
                return f"{what} at {min(seen & own) * size:#x} overlaps with other metadata"
            seen |= own
        inactive = self.allocator.inactive_l2
        if inactive and not inactive.isdisjoint(self.metadata_clusters(l2_too=False)):
            return OVERLAPS.format(INACTIVE_L2)
        return None

    def check_usable(self) -> None:
        """Refuse to change an image of which nobody knows what it is.

        Raises:
            IoFailure: it is corrupt, or its header could not be written (EIO).
        """
        if self.is_corrupt or self.transaction.is_unsure:
            what = "is corrupt" if self.is_corrupt else "has a header that could not be written"
            raise IoFailure(errno.EIO, f"node '{self.geometry.name}' {what}")

    async def settle(self) -> None:
        """Commit until the file has all that memory has, the frees of the commit before included.

        Raises:
            IoFailure: as `Transaction.commit`.
        Waits: commits. Checkpoint: no.
        """
        await self.transaction.commit()
        while self.pending:
            await self.transaction.commit()
        if not self.transaction.is_clean:
            await self.transaction.commit()

    def metadata_clusters(self, *, l2_too: bool = True) -> set[int]:
        """Clusters of the header, the root tables, and what they point at, up to a bound.

        Args:
            l2_too: the active L2 tables are among them, which snapshots share.
        """
        size = self.geometry.cluster_size
        clusters = set(self._root_clusters())
        for table in (self.refcounts.root, self.mapping.l1) if l2_too else (self.refcounts.root,):
            clusters.update((word & OFFSET) // size for word in table.words[:GUARDED_TABLES_MAX] if word)
        return clusters

    def _name_of(self, cluster: int) -> str:
        """What metadata a cluster of the image file holds, for messages."""
        size = self.geometry.cluster_size
        for what, span in metadata_places(self.header):
            if span.at // size <= cluster < -(-span.end // size):
                return {"header": "qcow2_header", "reference count table": "refcount table"}.get(what, what)
        for what, root in (("refcount block", self.refcounts.root), ("active L2 table", self.mapping.l1)):
            if any((word & OFFSET) // size == cluster for word in root.words if word):
                return what
        for what, clusters in (*self.snapshot_places(), ("bitmap directory", self.directory_clusters())):
            if cluster in clusters:
                return what
        return INACTIVE_L2 if cluster in self.allocator.inactive_l2 else "metadata"

    def _root_clusters(self) -> Iterator[int]:
        size = self.geometry.cluster_size
        for _, span in metadata_places(self.header):
            yield from range(span.at // size, -(-span.end // size))

    def directory_clusters(self) -> range:
        """Those of the bitmap directory; it is given back like others when a new one is stored."""
        size, place = self.geometry.cluster_size, self.header.bitmaps
        if place is None:
            return range(0)
        return range(place.directory_at // size, -(-(place.directory_at + place.directory_bytes) // size))

    async def found_corrupt(self, error: ImageCorrupt) -> None:
        """Refuse every further change, and say so in the header where it has a place for it. Never raises."""
        if self.is_corrupt:
            return
        self.is_corrupt = True
        try:
            if self.is_writable and self.geometry.version > 2:
                with suppress(OSError):
                    await self.transaction.mark_corrupt()
        finally:
            self.on_corrupt(error, self.is_writable)

    def found_leaking(self, error: ImageCorrupt) -> None:
        """Say, once, that space leaks because what names it is wrong."""
        if not (self._is_leak_told or self.is_corrupt):
            self._is_leak_told = True
            self.on_corrupt(error, False)

    def check_entries(self, run: Mapped, guest_at: int) -> None:
        """Refuse to give up what these entries refer to.

        Raises:
            ImageCorrupt: they are such as no writer may have made, or name metadata.
        """
        check(run, self.geometry, guest_at)
        if not self.geometry.has_data_file and (used := self._clusters_of(run)) is not None:
            self.allocator.check_not_metadata(used)

    def free_entries(self, run: Mapped, *, requested: bool) -> None:
        """The guest no longer refers to what these entries say; the space follows after the next commit.

        Args:
            run: entries that `check_entries` has passed: metadata is not the guest's to give away.
            requested: the guest has asked for it, by discard or zero.
        """
        if self.geometry.has_data_file:
            return
        discards = self.tuning.discard_requests if requested else self.tuning.discard_others
        if (used := self._clusters_of(run)) is not None:
            self.pending.add(*used, discards=discards)

    def _clusters_of(self, run: Mapped) -> Run | None:
        """What entries of an image without a data file refer to."""
        if run.word & COMPRESSED:
            touched = compressed_clusters(run.word, self.geometry)
            return Run(touched.start, len(touched))
        return host_run(run.offset, run.end - run.start, self.geometry) if is_stored(run, self.geometry) else None


async def _no_bitmaps() -> None:
    """What to mark in an image without bitmaps."""


async def _no_tables() -> set[int]:
    """The L2 tables of the snapshots of an image without any."""
    return set()


def compressed_clusters(word: int, geometry: Geometry) -> range:
    """The host clusters that a compressed entry touches, and whose counts include it."""
    at, length = unpack_compressed(word, geometry.cluster_bits)
    return range(at // geometry.cluster_size, (at + length - 1) // geometry.cluster_size + 1)


def host_run(at: int, clusters: int, geometry: Geometry) -> Run:
    """The run of clusters at a host offset."""
    return Run(at // geometry.cluster_size, clusters)


async def load_image(
    children: dict[str, Child], header: Header, *, name: str, offload: Offload, tuning: Tuning
) -> Image:
    """Read the root tables of an image whose header has been checked.

    Raises:
        IoFailure: they could not be read.
    Waits: two reads of at most 8 and 32 MiB. Checkpoint: no.
    """
    file = children["file"]
    file.debug_event("reftable_load")
    refcount_table = await file.read(header.refcount_table_at, header.refcount_table_clusters * header.cluster_size)
    l1 = await file.read(HostAt(header.l1_at), header.l1_entries * 8)
    return Image(
        children,
        header,
        name=name,
        offload=offload,
        tuning=tuning,
        refcount_table=decode_table(refcount_table),
        l1=decode_table(l1),
    )


class WorksOnImage(Protocol):
    """Whatever has methods that work on the tables of an image."""

    image: Image


Owner = TypeVar("Owner", bound=WorksOnImage)
Args = ParamSpec("Args")
T = TypeVar("T")


def marks_corrupt(
    method: Callable[Concatenate[Owner, Args], Awaitable[T]],
) -> Callable[Concatenate[Owner, Args], Coroutine[Any, Any, T]]:
    """The method, with an image that is marked corrupt whenever that is why it fails.

    Requests that are made many thousand times a second have the same in their own words, without another coroutine.
    """

    @wraps(method)
    async def marking(owner: Owner, /, *args: Args.args, **kwargs: Args.kwargs) -> T:
        try:
            return await method(owner, *args, **kwargs)
        except ImageCorrupt as error:
            await owner.image.found_corrupt(error)
            raise

    return marking


@asynccontextmanager
async def leaving_leaks(image: Image) -> AsyncIterator[None]:
    """Around what only cleans up after a change that is durable, or was not to be: what it cannot do is left undone.

    Space that is not given back for that leaks; a repair finds it. Never raises for it.
    """
    try:
        yield
    except ImageCorrupt as error:
        image.found_leaking(error)
    except OSError:
        return
