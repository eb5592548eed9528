"""The `raw` driver: the bytes of a child as they are, or a window of them (spec/block-layer.md §2)."""

from typing import ClassVar, Final, Self, TypedDict

from blockjobs.base.errors import ParameterError, UsageError
from blockjobs.base.span import Span
from blockjobs.block.claims import Perm, Rights
from blockjobs.block.driver import Child, FormatDriver, OpenContext
from blockjobs.block.options import BlockRef, NodeOptions, driver
from blockjobs.block.switch import NewValues, Switch
from blockjobs.block.vocabulary import NO_PERMS, Kind, Placement, Reservation, Segment, ZeroMode

SECTOR: Final = 512


class RawOptions(NodeOptions, frozen=True, kw_only=True, tag="raw"):
    """A window of a child, by default all of it. In bytes."""

    file: BlockRef
    offset: int | None = None
    size: int | None = None


@driver(RawOptions)
class Raw(FormatDriver):
    """Shifts offsets, and passes everything else through."""

    shows_holes: ClassVar[bool] = True
    reopenable: ClassVar[frozenset[str] | None] = frozenset({"offset", "size"})

    def __init__(self, children: dict[str, Child], *, offset: int, size: int | None, is_window: bool) -> None:
        self.children, self._offset, self._size, self._is_window = children, offset, size, is_window

    @classmethod
    async def open(cls, options: RawOptions, children: dict[str, Child], context: OpenContext) -> Self:
        """See `Driver`.

        Raises:
            UsageError: the window does not lie inside the child.
        """
        del context
        check_window(options, children["file"].length)
        return cls(children, **_window(options))

    async def prepare_reopen(self, options: RawOptions, context: OpenContext) -> Switch:
        """See `Driver`."""
        del context
        return _NewWindow(self, options)

    @classmethod
    def opening_rights(cls, edge: str, options: RawOptions, *, read_only: bool) -> Rights:
        """See `Driver`: there is no metadata."""
        del edge, read_only
        return cls._window_rights(*NO_PERMS) if (options.offset, options.size) != (None, None) else Rights(*NO_PERMS)

    @staticmethod
    def _window_rights(needs: Perm, shares: Perm) -> Rights:
        # The bounds were checked against the child's length, so it must stay.
        return Rights(needs, shares & ~Perm.RESIZE)

    def child_perms(self, child: str, needs: Perm, shares: Perm) -> tuple[Perm, Perm]:
        """See `Driver`."""
        del child
        return self._window_rights(needs, shares) if self._is_window else (needs, shares)

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

    async def reserve(self, span: Span) -> Reservation:
        """See `FormatDriver`."""
        return Reservation(span=span, placements=[Placement(span.at, span.length, "file", span.at + self._offset)])

    async def publish(self, reservation: Reservation) -> None:
        """See `FormatDriver`: what is written is visible already."""

    async def release(self, reservation: Reservation) -> None:
        """See `FormatDriver`: nothing was reserved."""

    async def zero(self, span: Span, mode: ZeroMode) -> list[Span]:
        """See `FormatDriver`."""
        await self._file.zero(self._below(span), mode=mode)
        return []

    async def discard(self, span: Span) -> None:
        """See `FormatDriver`."""
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
        await self._file.resize(length + self._offset)


class _NewWindow(NewValues):
    """The window is checked at the end, when the child is the one that is to stay."""

    def __init__(self, driver: Raw, options: RawOptions) -> None:
        super().__init__(driver, **{f"_{name}": value for name, value in _window(options).items()})
        self._raw, self._options = driver, options

    async def activate(self) -> None:
        """See `Switch`.

        Raises:
            UsageError: the window does not lie inside the child.
        """
        check_window(self._options, self._raw.children["file"].length)


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
