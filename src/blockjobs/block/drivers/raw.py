"""The `raw` driver: the bytes of a child as they are, or a window of them (spec/block-layer.md §2)."""

from typing import TYPE_CHECKING, ClassVar, Final, Self, TypedDict, cast

from blockjobs.base.errors import ParameterError, UsageError
from blockjobs.base.span import Span
from blockjobs.block.claims import Perm, Rights
from blockjobs.block.divisible import Divisible
from blockjobs.block.driver import Child, FormatDriver, OpenContext, OwnPlaces
from blockjobs.block.drivers.file import File
from blockjobs.block.drivers.file_medium import FileMedium
from blockjobs.block.drivers.side_bitmaps import SideBitmaps
from blockjobs.block.drivers.side_file import HostSideFile, SideFile
from blockjobs.block.options import BlockRef, NodeOptions, driver
from blockjobs.block.switch import NewValues, Switch
from blockjobs.block.vocabulary import NO_PERMS, Kind, Placement, Reservation, Segment, ZeroMode

if TYPE_CHECKING:
    from blockjobs.block.node import Node

SECTOR: Final = 512


class RawOptions(NodeOptions, frozen=True, kw_only=True, tag="raw"):
    """A window of a child, by default all of it. In bytes.

    Attributes:
        bitmap_file: path of the file that persistent dirty bitmaps are kept in; it need not exist yet.
    """

    file: BlockRef
    offset: int | None = None
    size: int | None = None
    bitmap_file: str | None = None


@driver(RawOptions)
class Raw(FormatDriver, Divisible):
    """Shifts offsets, and passes everything else through."""

    shows_holes: ClassVar[bool] = True
    reopenable: ClassVar[frozenset[str] | None] = frozenset({"offset", "size"})

    def __init__(self, children: dict[str, Child], *, offset: int, size: int | None, is_window: bool) -> None:
        self.children, self._offset, self._size, self._is_window = children, offset, size, is_window
        self.read_only = False
        self.bitmap_store: SideBitmaps | None = None

    @classmethod
    async def open(cls, options: RawOptions, children: dict[str, Child], context: OpenContext) -> Self:
        """See `Driver`.

        Raises:
            UsageError: the window does not lie inside the child, or there is no place for bitmaps beside it.
        """
        check_window(options, children["file"].length)
        opened = cls(children, **_window(options))
        opened.read_only = context.read_only
        if options.bitmap_file is not None:
            opened.keep_bitmaps(_host_side_file(options.bitmap_file, children), context)
        return opened

    def keep_bitmaps(self, file: SideFile, context: OpenContext) -> None:
        """Let persistent bitmaps be stored in `file`."""
        self.bitmap_store = SideBitmaps(
            file,
            lambda: self._file,
            node_name=context.node_name,
            place=lambda: [self._offset, self.length],
            offload=context.offload,
            clock=context.clock,
            read_only=context.read_only,
        )

    async def close(self) -> None:
        """See `Driver`. Waits: I/O, if there are bitmaps to be stored. Checkpoint: no."""
        if self.bitmap_store is None:
            return
        if self.read_only:
            self.bitmap_store.warn_of_lost()
        else:
            await self.bitmap_store.store()

    async def prepare_reopen(self, options: RawOptions, context: OpenContext) -> Switch:
        """See `Driver`. Waits: I/O, if there are bitmaps to be stored. Checkpoint: no."""
        if self.bitmap_store is not None:
            if (options.offset or 0, options.size) != (self._offset, self._size):
                raise UsageError("Cannot change the window of a node with a 'bitmap-file'")
            if not self.read_only:
                await self.bitmap_store.store()
        return _Reopening(self, options, read_only=context.read_only)

    @classmethod
    def opening_rights(cls, edge: str, options: RawOptions, *, read_only: bool) -> Rights:
        """See `Driver`: there is no metadata, unless bitmaps are kept, which must not miss a write."""
        if options.bitmap_file is not None:
            return super().opening_rights(edge, options, read_only=read_only)
        return cls._window_rights(*NO_PERMS) if (options.offset, options.size) != (None, None) else Rights(*NO_PERMS)

    @staticmethod
    def _window_rights(needs: Perm, shares: Perm) -> Rights:
        # The bounds were checked against the child's length, so it must stay.
        return Rights(needs, shares & ~Perm.RESIZE)

    def child_perms(self, child: str, needs: Perm, shares: Perm) -> tuple[Perm, Perm]:
        """See `Driver`. Whoever keeps bitmaps holds the image all the time, so that nobody else writes between."""
        del child
        if self._is_window:
            needs, shares = self._window_rights(needs, shares)
        if self.bitmap_store is not None:
            needs |= Perm.CONSISTENT_READ if self.read_only else Perm.CONSISTENT_READ | Perm.WRITE
            shares &= Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED
        return needs, shares

    @property
    def _file(self) -> Child:
        return self.children["file"]

    @property
    def length(self) -> int:
        """The window's size, or what the child has from the offset on."""
        if self._size is not None:
            return self._size
        return -(-max(0, self._file.length - self._offset) // SECTOR) * SECTOR

    @property
    def open_ended(self) -> bool:  # type: ignore[override]  # a window with an end is closed
        """The child's, unless there is a size."""
        return self._size is None and self._file.open_ended

    def _below(self, span: Span) -> Span:
        return span.shifted(self._offset)

    async def resolve(self, span: Span) -> list[Segment]:
        """See `FormatDriver`."""
        return [Segment(span.at, span.length, Kind.DATA, "file", span.at + self._offset)]

    def place_now(self, at: int, length: int) -> tuple[str, int] | None:
        """See `FormatDriver`."""
        del length
        return "file", at + self._offset

    def own_places_now(self) -> OwnPlaces | None:
        """See `FormatDriver`."""
        if self.bitmap_store is not None and self.bitmap_store.must_mark:
            return None
        offset = self._offset
        return lambda at, _length: at + offset

    async def _before_change(self) -> None:
        if self.bitmap_store is not None and self.bitmap_store.must_mark:
            await self.bitmap_store.begin_use()

    async def reserve(self, span: Span) -> Reservation:
        """See `FormatDriver`. Waits: I/O before the first change of an image with stored bitmaps. Checkpoint: no."""
        await self._before_change()
        return Reservation(span=span, placements=[Placement(span.at, span.length, "file", span.at + self._offset)])

    async def publish(self, reservation: Reservation) -> None:
        """See `FormatDriver`: what is written is visible already."""

    async def release(self, reservation: Reservation) -> None:
        """See `FormatDriver`: nothing was reserved."""

    def is_divisible(self, reservation: Reservation) -> bool:
        """See `Divisible`."""
        del reservation
        return True

    async def shorten(self, reservation: Reservation, length: int) -> None:
        """See `Divisible`: nothing was reserved."""

    async def zero(self, span: Span, mode: ZeroMode) -> list[Span]:
        """See `FormatDriver`."""
        await self._before_change()
        await self._file.zero(self._below(span), mode=mode)
        return []

    async def discard(self, span: Span) -> None:
        """See `FormatDriver`."""
        await self._before_change()
        await self._file.discard(self._below(span))

    async def flush(self) -> None:
        """See `FormatDriver`."""
        await self._file.flush()

    async def resize(self, length: int) -> None:
        """See `FormatDriver`.

        Raises:
            UsageError: the window has a fixed size.
        """
        if self._size is not None:
            raise UsageError("Cannot resize fixed-size raw disks")
        await self._before_change()
        await self._file.resize(length + self._offset)


class _Reopening(NewValues):
    """The window is checked at the end, when the child is the one that is to stay; stored bitmaps follow the node."""

    def __init__(self, driver: Raw, options: RawOptions, *, read_only: bool) -> None:
        window = {f"_{name}": value for name, value in _window(options).items()}
        super().__init__(driver, **window, read_only=read_only)
        self._raw, self._options = driver, options
        self._becomes_writable = driver.read_only and not read_only

    def _set(self, values: dict[str, object]) -> None:
        super()._set(values)
        if self._raw.bitmap_store is not None:
            self._raw.bitmap_store.set_read_only(self._raw.read_only)

    async def activate(self) -> None:
        """See `Switch`.

        Raises:
            UsageError: the window does not lie inside the child, or the stored bitmaps make no sense.
            IoFailure: they cannot be read.
        Waits: reads, if there are bitmaps. Checkpoint: no.
        """
        check_window(self._options, self._raw.children["file"].length)
        store = self._raw.bitmap_store
        if self._becomes_writable and store is not None and store.bitmaps is not None:
            await store.load(store.bitmaps)


class _Window(TypedDict):
    offset: int
    size: int | None
    is_window: bool


def _window(options: RawOptions) -> _Window:
    is_window = options.offset is not None or options.size is not None
    return {"offset": options.offset or 0, "size": options.size, "is_window": is_window}


def check_window(options: RawOptions, length: int) -> None:
    """Whether the window lies inside a child of `length` bytes.

    Raises:
        UsageError: it does not, in QEMU's words.
    """
    offset, size = options.offset or 0, options.size
    for name, value in (("offset", offset), ("size", size)):
        if value is not None and value < 0:
            raise ParameterError.expects(name, "a non-negative number below 2^64")
    if offset > length:
        raise UsageError(f"Offset ({offset}) cannot be greater than size of the containing file ({length})")
    if size is not None and offset + size > length:
        raise UsageError(
            f"The sum of offset ({offset}) and size ({size}) has to be smaller or equal to the  actual size of "
            f"the containing file ({length})"
        )
    if size is not None and size % SECTOR:
        raise UsageError(f"Specified size is not multiple of {SECTOR}")


def _host_side_file(name: str, children: dict[str, Child]) -> HostSideFile:
    """The side file of an image that is a regular file.

    Raises:
        UsageError: it is none, so nobody could tell whether it has changed.
    """

    def medium() -> FileMedium:
        driver = cast("Node", children["file"]).storage.driver
        if not isinstance(driver, File) or not driver.is_regular or not isinstance(driver.medium, FileMedium):
            raise UsageError("'bitmap-file' requires the image to be a regular file")
        return driver.medium

    medium()
    return HostSideFile(name, lambda: medium().descriptor)
