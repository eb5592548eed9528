"""What a driver promises: formats map, protocols move, filters watch (docs/adr/0002-map-move-watch.md).

A driver is small and knows neither its parents nor its name. `Node` owns naming, tickets, permissions, statistics
and the order of things; it asks the driver only what is in these classes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol, Self

from blockjobs.base.buffers import Buffer
from blockjobs.base.errors import UsageError
from blockjobs.base.span import Span
from blockjobs.block.amend_options import Amending
from blockjobs.block.bitmap import DirtyBitmap
from blockjobs.block.bitmap_store import BitmapStore
from blockjobs.block.claims import Perm, Rights
from blockjobs.block.encipherment import Encipherment
from blockjobs.block.internal_snapshots import InternalSnapshots
from blockjobs.block.medium import Medium
from blockjobs.block.open_context import OpenContext as OpenContext
from blockjobs.block.switch import Switch
from blockjobs.block.vocabulary import (
    NO_LIMITS,
    NO_PERMS,
    ImpliedChild,
    Limits,
    Reservation,
    Segment,
    Watch,
    ZeroMode,
)


class Child(Protocol):
    """What a driver sees of a node below it. Offsets and lengths in bytes. `Node` is one."""

    @property
    def name(self) -> str:
        """The node's name, for messages."""
        ...

    @property
    def length(self) -> int:
        """Current length."""
        ...

    @property
    def open_ended(self) -> bool:
        """Whether reads past `length` give zeroes, as `Driver.open_ended`."""
        ...

    @property
    def filename(self) -> str:
        """The image's name as users gave it, or `json:{...}` (spec/block-layer.md §5)."""
        ...

    async def read(self, at: int, length: int) -> bytes:
        """Bytes of the run. What lies past the end is zeroes if `open_ended` (a file may stop inside its last
        cluster), else EIO.
        """
        ...

    async def read_into(self, at: int, buffer: memoryview) -> None:
        """As `read`, without a copy."""
        ...

    async def write(self, at: int, content: Buffer, *, fua: bool = False) -> None:
        """Write; with `fua` durable on return. Grows the node if its user holds RESIZE and the driver can."""
        ...

    async def zero(self, span: Span, *, mode: ZeroMode = ZeroMode.UNMAP) -> None:
        """Make the run read as zeroes."""
        ...

    async def discard(self, span: Span) -> None:
        """Give space back where possible."""
        ...

    async def flush(self) -> None:
        """Everything completed before is durable on return."""
        ...

    async def resize(self, length: int) -> None:
        """Set the length."""
        ...

    def debug_event(self, event: str) -> None:
        """Tell this node, which may be a blkdebug, that `event` (such as `l2_update`) is about to happen."""
        ...


class Driver(ABC):
    """What all drivers have. `children` is kept current by the graph; look it up at each use, never store a child."""

    reopenable: ClassVar[frozenset[str] | None] = None
    """Options of its own that `prepare_reopen` can change, by their names on the wire; None: it cannot be reopened."""

    limits: Limits = NO_LIMITS
    children: dict[str, Child]
    open_ended: bool = False
    """The length is only how much is stored so far: reads past it give zeroes, and writes past it grow the node if one
    of its users holds RESIZE."""
    bitmap_store: BitmapStore | None = None
    """Where persistent bitmaps of the node are kept, if the driver can; it stores them itself when it is closed or
    becomes read-only."""
    internal_snapshots: InternalSnapshots | None = None
    """The snapshots inside the image, if the driver can have such."""

    @classmethod
    @abstractmethod
    async def open(cls, options: Any, children: dict[str, Child], context: OpenContext) -> Self:
        """Make the driver of a node.

        Args:
            options: the struct registered with `@driver`, decoded and checked.
            children: the nodes that the options refer to, by edge name, already open and claimed with
                `opening_rights`. The graph keeps this same dict current: store it as `self.children`. Children that
                the header implies come later, before the first request.
            context: what else the driver may use.

        Raises:
            UsageError: the options or the image make no sense; nothing is left open.
            IoFailure: the image could not be read.
        """

    @classmethod
    def opening_rights(cls, edge: str, options: Any, *, read_only: bool) -> Rights:
        """Rights on a child while `open` runs, before `child_perms` can be asked; nothing by default."""
        del edge, options, read_only
        return Rights(*NO_PERMS)

    @property
    @abstractmethod
    def length(self) -> int:
        """Bytes that the node shows."""

    async def close(self) -> None:
        """Write what is still only in memory, and free everything; children are still there.

        Raises:
            IoFailure: metadata could not be written; the driver is closed nevertheless.
        """

    async def prepare_reopen(self, options: Any, context: OpenContext) -> Switch:
        """Do all of a reopen that can fail and changes nothing yet; above all, write what is only in memory.

        Args:
            options: as for `open`; in the options of its own the driver finds only changes that it knows.
            context: as for `open`. That it says `read_only` no longer, or now, is the usual reason for a reopen.

        Raises:
            UsageError: a change is not possible; nothing changed.
            IoFailure: what is only in memory could not be written.
        """
        del options, context
        return Switch()

    def child_perms(self, child: str, needs: Perm, shares: Perm) -> tuple[Perm, Perm]:
        """What the driver takes from and shares on the edge to `child`, given the sum over the node's own parents.

        Source: spec/block-layer.md §3. The default is a filter's: what the parents take, what the parents share.
        """
        del child
        return needs, shares

    def permissions_changed(self, needs: Perm, shares: Perm) -> None:
        """The sum of rights over all users is about to change (file locks follow it).

        Not async, so that a change of the graph is one step that nobody sees half done.

        Raises:
            UsageError: the rights are not to be had; the driver is as before, and the whole change is refused.
        """

    tidies: ClassVar[bool] = False
    """Whether a change of rights is something that `tidy` must follow up."""

    async def tidy(self) -> None:
        """The rights changed a moment ago: do what that asks for and takes I/O. `child_perms` is asked anew then.

        Never raises.
        """

    def drain_begin(self) -> None:
        """The node is being drained: whoever holds requests back (a throttle) lets them go on at once. Nests."""

    def drain_end(self) -> None:
        """One `drain_begin` is over."""

    def cancel_in_flight(self) -> None:
        """Whoever made the requests under way is not interested any more: let those fail that are stuck."""

    def debug_event(self, event: str) -> None:
        """A parent's driver is about to do `event` (such as `l2_update`) with this node as its direct child.

        Only blkdebug cares; it answers by failing the requests that follow.
        """

    takes_children: ClassVar[bool] = False
    """Whether users may add and remove children while the node is open (x-blockdev-change)."""

    def edge_for(self, child: Child) -> str:
        """The edge at which one more child is to be added; asked only if `takes_children`.

        Raises:
            UsageError: this one cannot be a child.
        """
        raise AssertionError(f"{self} takes no children")

    def check_may_lose(self, edge: str) -> None:
        """Make sure that the node can do without the child at `edge`; asked only if `takes_children`.

        Raises:
            UsageError: it cannot.
        """
        raise AssertionError(f"{self} loses no children")

    def kept_maps(self, edge: str | None) -> Sequence[DirtyBitmap]:
        """Maps that the driver itself keeps up: users see them as unnamed dirty bitmaps that do not record.

        Args:
            edge: those over the child at that edge; None for those over the node itself.
        """
        del edge
        return ()

    def can_replace(self, child: str) -> bool:
        """Whether a mirror of this node may take the place of `child`, which need not show the same bytes (quorum)."""
        del child
        return False

    can_amend: ClassVar[bool] = False
    """Whether `amend` is for more than refusing."""

    async def amend(self, options: Any, work: Amending) -> None:
        """Change what was chosen when the image was made; nobody uses it meanwhile. Asked only if `can_amend`.

        Raises:
            UsageError: not that, or not to that; nothing changed.
            IoFailure: the image is good, whatever it is now.
        """
        raise AssertionError(f"{self} cannot be amended")

    def info(self) -> dict[str, Any]:
        """Extra members of ImageInfo: cluster-size, format-specific, backing-filename, ... (spec/block-layer.md §5)."""
        return {}


class ProtocolDriver(Driver):
    """Moves bytes: to and from a file, a server, or several nodes in a way of its own (ADR 0009)."""

    open_ended = True
    medium: Medium | None = None
    """Set if plain blocking calls reach the bytes; the copy engine then works on it directly."""

    @property
    def zeroes_fast(self) -> bool:
        """Whether `zero` is known to cost less than writing, as far as anybody can tell."""
        return True

    @abstractmethod
    async def read_into(self, at: int, buffer: memoryview) -> None:
        """Fill `buffer`; the node has checked the range."""

    @abstractmethod
    async def write(self, at: int, content: Buffer, *, fua: bool) -> None:
        """Write; may grow the file."""

    @abstractmethod
    async def zero(self, span: Span, mode: ZeroMode) -> None:
        """Make the run read as zeroes."""

    @abstractmethod
    async def discard(self, span: Span) -> None:
        """Give the space back."""

    @abstractmethod
    async def flush(self) -> None:
        """Make everything durable."""

    @abstractmethod
    async def status(self, span: Span) -> list[Segment]:
        """Runs of DATA (child unused) and ZERO (holes), in order, without gaps."""

    @abstractmethod
    async def resize(self, length: int) -> None:
        """Set the length."""


OwnPlaces = Callable[[int, int], int | None]
Compressor = Callable[[Buffer], bytes | None]
"""One cluster in, its compressed form out; None if it does not shrink. Safe to call in any worker thread."""


class FormatDriver(Driver):
    """Maps bytes, never carries them: raw, qcow2.

    The node serialises requests: while `reserve`..`publish`, `zero` or `discard` of a run widened to `write_align` is
    under way, no other request of that run is. Requests of different runs do overlap in time.
    """

    shows_holes: ClassVar[bool] = False
    """Whether a DATA segment may be a hole of the child, so that the block status must look there too (raw)."""

    @property
    def zeroes_fast(self) -> bool:
        """Whether `zero` needs no bytes written for whole units of `write_align`."""
        return True

    encipherment: Encipherment | None = None
    """Set if what `resolve` and `reserve` place in a child is enciphered there, as DATA; `length`, `write_align`
    and all places are multiples of its unit then. Who moves bytes for the node applies it; nobody copies past it."""

    write_align: int = 1
    """Allocating unit in bytes (cluster or subcluster); 1 for a driver that only shifts offsets."""

    @classmethod
    def opening_rights(cls, edge: str, options: Any, *, read_only: bool) -> Rights:
        """As for the metadata of an image: nobody else may write it or change its length (spec/block-layer.md §3)."""
        del options
        if edge != "file":
            return Rights(*NO_PERMS)
        needs = Perm.CONSISTENT_READ if read_only else Perm.CONSISTENT_READ | Perm.WRITE | Perm.RESIZE
        return Rights(needs, Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED)

    @abstractmethod
    async def resolve(self, span: Span) -> list[Segment]:
        """Where the run's bytes are: in order, without gaps, neighbours of the same kind and place joined.

        Raises:
            ImageCorrupt, IoFailure: tables could not be read or are wrong; nothing changed.
        """

    def place_now(self, at: int, length: int) -> tuple[str, int] | None:
        """The child that shows the run ("" for zeroes) and the offset there, if known without waiting; else None."""
        del at, length
        return None

    def own_places_now(self) -> OwnPlaces | None:
        """Where in `file` bytes may be overwritten without ado, within this step of the loop; None: ask `reserve`."""
        return None

    @abstractmethod
    async def reserve(self, span: Span) -> Reservation:
        """Find host space for a write. Runs already allocated for this image alone are placed where they are.

        Raises:
            IoFailure: no space or tables unreadable; nothing is reserved.
        """

    async def reserve_many(self, spans: Sequence[Span]) -> list[Reservation]:
        """`reserve` for disjoint runs, ascending, of one copy: together the placements are exactly `spans`, in order.

        Raises:
            IoFailure: as `reserve`; nothing is reserved.
        """
        reservations: list[Reservation] = []
        for span in spans:
            try:
                reservations.append(await self.reserve(span))
            except BaseException:
                for reservation in reservations:
                    await self.release(reservation)
                raise
        return reservations

    @abstractmethod
    async def publish(self, reservation: Reservation) -> None:
        """Make it visible, after payload and fills have been written. The reservation is spent whatever happens."""

    @abstractmethod
    async def release(self, reservation: Reservation) -> None:
        """The write failed: give the space back. Never raises."""

    async def read_special(self, segment: Segment, buffer: memoryview) -> None:
        """Fill `buffer` with the guest bytes of a SPECIAL segment that `resolve` returned (possibly cut shorter)."""
        raise AssertionError("resolve() of this driver gives no SPECIAL segments")

    @abstractmethod
    async def zero(self, span: Span, mode: ZeroMode) -> list[Span]:
        """Make whole units read as zeroes by metadata; returns the parts that the node must write as zero bytes."""

    @abstractmethod
    async def discard(self, span: Span) -> None:
        """Give whole units back; parts of units are left alone. Discarded bytes read as zeroes or as the backing."""

    @abstractmethod
    async def flush(self) -> None:
        """Make everything published durable, in the format's order, on every child it writes to."""

    @abstractmethod
    async def resize(self, length: int) -> None:
        """Set the virtual length."""

    def compressor(self, level: str) -> Compressor | None:
        """A function that compresses one unit at `level` (fast, default, best); None: the format cannot compress."""

    async def write_compressed(self, clusters: Sequence[tuple[int, bytes]]) -> None:
        """Store already compressed units: (guest offset, stream) pairs, ascending; visible on return.

        Raises:
            IoFailure: nothing of the batch is visible, the space is given back.
        """
        raise AssertionError("only drivers with a compressor() are asked")

    async def make_empty(self) -> None:
        """Let the backing file, which shows the same durably, show through everywhere; durable on return.

        Raises: IoFailure, ImageCorrupt: any part may be gone from this layer.
        """
        raise UsageError("Operation not supported")

    async def name_backing_file(self, filename: str | None, backing_format: str | None) -> None:
        """Let the header name another backing file, or none, once all that was published is durable.

        Raises:
            UsageError: there is no place for such a name; nothing changed.
            IoFailure: the header has the old name or the new one.
        """
        raise UsageError("Operation not supported")

    def implied_children(self) -> list[ImpliedChild]:
        """Children named by the header, for the graph to open where the options do not say otherwise."""
        return []


class Forward(Protocol):
    """The rest of the route below a filter: the same requests, without the filter's own claim checks."""

    async def read_into(self, at: int, buffer: memoryview) -> None:
        """Read from the filtered child."""
        ...

    async def write(self, at: int, content: Buffer, *, fua: bool = False, compressed: bool = False) -> None:
        """Write to the filtered child; `compressed`: a format below that can compress stores it so."""
        ...

    async def zero(self, span: Span, *, mode: ZeroMode = ZeroMode.UNMAP) -> None:
        """Zero in the filtered child."""
        ...

    async def discard(self, span: Span) -> None:
        """Discard in the filtered child."""
        ...

    async def flush(self) -> None:
        """Flush the filtered child."""
        ...

    async def resize(self, length: int) -> None:
        """Set the length of the filtered child."""
        ...


class FilterDriver(Driver):
    """Watches requests; shows the same bytes as its child `filtered`. What is not overridden goes straight on."""

    filtered: ClassVar[str] = "file"
    watches: Watch = Watch.NONE
    """May change while open; whoever changes it calls `graph.routes_changed()` through the node."""

    @property
    def length(self) -> int:
        """The child's."""
        return self.children[self.filtered].length

    @property
    def open_ended(self) -> bool:  # type: ignore[override]  # computed here, a plain attribute elsewhere
        """The child's."""
        return self.children[self.filtered].open_ended

    async def read_into(self, at: int, buffer: memoryview, forward: Forward) -> None:
        """A read passes, if READ is watched."""
        await forward.read_into(at, buffer)

    async def write(self, at: int, content: Buffer, forward: Forward, *, fua: bool) -> None:
        """A write passes, if WRITE is watched."""
        await forward.write(at, content, fua=fua)

    async def zero(self, span: Span, mode: ZeroMode, forward: Forward) -> None:
        """A zero request passes, if ZERO is watched."""
        await forward.zero(span, mode=mode)

    async def discard(self, span: Span, forward: Forward) -> None:
        """A discard passes, if DISCARD is watched."""
        await forward.discard(span)

    async def flush(self, forward: Forward) -> None:
        """A flush passes, if FLUSH is watched."""
        await forward.flush()

    async def resize(self, length: int, forward: Forward) -> None:
        """A change of the length passes."""
        await forward.resize(length)

    async def status(self, span: Span) -> None:
        """A question for the allocation status passes, if STATUS is watched; raise to fail it."""
        del span
