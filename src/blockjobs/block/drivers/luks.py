"""The `luks` driver: a disk that is enciphered as a whole, behind a LUKS header (spec/block-layer.md §2)."""

from typing import Any, ClassVar, Final, Self

from blockjobs.base.errors import UsageError
from blockjobs.base.span import Span
from blockjobs.block.amend_options import Amending
from blockjobs.block.claims import Perm
from blockjobs.block.divisible import Divisible
from blockjobs.block.driver import Child, FormatDriver, OpenContext, OwnPlaces
from blockjobs.block.encipherment import Encipherment
from blockjobs.block.luks import volume
from blockjobs.block.luks.cipher import DiskCipher
from blockjobs.block.luks.slots import Keys
from blockjobs.block.luks.volume import Means
from blockjobs.block.options import BlockRef, NodeOptions, driver
from blockjobs.block.switch import Switch
from blockjobs.block.vocabulary import Kind, Placement, Reservation, Segment, ZeroMode
from blockjobs.wire.luks import SECTOR, LuksHeader

SIZE_MAX: Final = (1 << 63) - 1


class LuksOptions(NodeOptions, frozen=True, kw_only=True, tag="luks"):
    """An enciphered disk.

    Attributes:
        key_secret: id of the secret with its passphrase.
    """

    file: BlockRef
    key_secret: str | None = None


@driver(LuksOptions)
class Luks(FormatDriver, Divisible):
    """Shifts offsets by the header's length; whoever moves bytes enciphers them.

    Attributes:
        header: what the file says; an amend changes its key slots.
    """

    reopenable: ClassVar[frozenset[str] | None] = frozenset()
    write_align = SECTOR

    can_amend: ClassVar[bool] = True

    def __init__(
        self, children: dict[str, Child], header: LuksHeader, options: LuksOptions, context: OpenContext
    ) -> None:
        self.children = children
        self.header = header
        self.read_only = context.read_only
        self._key_secret, self._context = options.key_secret, context

    @classmethod
    async def open(cls, options: LuksOptions, children: dict[str, Child], context: OpenContext) -> Self:
        """See `Driver`.

        Raises:
            UsageError: no LUKS header, no such secret, or the wrong one.
            IoFailure: the header could not be read.
        Waits: reads, and seconds of work in a worker. Checkpoint: no.
        """
        file = children["file"]
        passphrase = b""
        if not context.looks_only:
            passphrase = volume.secret_of(context.objects, options.key_secret, "key-secret")
        header = await volume.read_header(file, 0)
        opened = cls(children, header, options, context)
        if opened.length < 0:
            raise UsageError("The file ends within its LUKS header")
        if not context.looks_only:
            means = Means(offload=context.offload, clock=context.clock, entropy=context.entropy)
            key = await volume.unlock(file, 0, header, passphrase, means)
            opened.encipherment = Encipherment(DiskCipher(header.cipher, header.mode, key), opened.payload_bytes)
        return opened

    async def prepare_reopen(self, options: Any, context: OpenContext) -> Switch:
        """See `Driver`."""
        del options
        self.read_only = context.read_only
        return Switch()

    async def amend(self, options: Any, work: Amending) -> None:
        """See `Driver`: key slots. Waits: I/O, and seconds of work in workers. Checkpoint: no."""
        context = self._context
        keys = Keys(
            file=self.children["file"],
            at=0,
            objects=context.objects,
            key_secret=self._key_secret,
            means=Means(offload=context.offload, clock=context.clock, entropy=context.entropy),
            force=work.force,
        )
        self.header = await keys.amend(self.header, options)

    def child_perms(self, child: str, needs: Perm, shares: Perm) -> tuple[Perm, Perm]:
        """See `Driver`, and spec/block-layer.md §3. Key slots may be written at any time."""
        del child, needs
        writes_too = Perm(0) if self.read_only else Perm.WRITE | Perm.RESIZE
        return Perm.CONSISTENT_READ | writes_too, (shares & Perm.CONSISTENT_READ) | Perm.WRITE_UNCHANGED

    @property
    def payload_bytes(self) -> int:
        """Where the disk begins in the file."""
        return self.header.payload_sector * SECTOR

    @property
    def length(self) -> int:
        """What the file has behind the header."""
        return self.children["file"].length - self.payload_bytes

    @property
    def zeroes_fast(self) -> bool:
        """See `FormatDriver`: zeroes are bytes like any others."""
        return False

    async def resolve(self, span: Span) -> list[Segment]:
        """See `FormatDriver`."""
        return [Segment(span.at, span.length, Kind.DATA, "file", span.at + self.payload_bytes)]

    def place_now(self, at: int, length: int) -> tuple[str, int] | None:
        """See `FormatDriver`."""
        del length
        return "file", at + self.payload_bytes

    def own_places_now(self) -> OwnPlaces:
        """See `FormatDriver`."""
        payload_bytes = self.payload_bytes
        return lambda at, _length: at + payload_bytes

    async def reserve(self, span: Span) -> Reservation:
        """See `FormatDriver`."""
        place = Placement(span.at, span.length, "file", span.at + self.payload_bytes)
        return Reservation(span=span, placements=[place])

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
        """See `FormatDriver`: nobody sees from outside which parts of the disk are empty."""
        del mode
        return [span]

    async def discard(self, span: Span) -> None:
        """See `FormatDriver`: as `zero`."""

    async def flush(self) -> None:
        """See `FormatDriver`."""
        await self.children["file"].flush()

    async def resize(self, length: int) -> None:
        """See `FormatDriver`. What is added shows anything but zeroes.

        Raises:
            UsageError: too long.
        """
        if length > SIZE_MAX - self.payload_bytes:
            raise UsageError("The requested file size is too large")
        await self.children["file"].resize(length + self.payload_bytes)

    def info(self) -> dict[str, Any]:
        """See `Driver`."""
        data = volume.info_of(self.header)
        return {"encrypted": True, "format-specific": {"type": "luks", "data": data}}
