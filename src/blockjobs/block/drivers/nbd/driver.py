"""An export of an NBD server as a node (spec/block-layer.md §2).

Losing a connection may mean that the server has crashed, with what it had acknowledged and not yet flushed. Who gives
a reconnect-delay vouches for the server (it writes to a file, say, whose pages outlive it) and nothing more is said.
Without one, a flush after such a loss fails, and all later ones, until the node is opened anew (spec/durability.md
§1, I8).

The server's block sizes become the node's limits, its `base:allocation` the block status. What a server cannot do is
done without (a flush where nothing is cached) or in another way (zeroes written as bytes).
"""

import errno
import os
import ssl
from collections.abc import Awaitable, Callable
from typing import Annotated, ClassVar, Final, Self, TypeVar

from blockjobs.base.buffers import Buffer, zeroes
from blockjobs.base.errors import IoFailure, UsageError
from blockjobs.base.span import Span
from blockjobs.base.units import GiB, MiB
from blockjobs.block.dial import Dial
from blockjobs.block.driver import Child, OpenContext, ProtocolDriver
from blockjobs.block.drivers.nbd.connection import NO_FLAGS, Connection
from blockjobs.block.drivers.nbd.link import Link
from blockjobs.block.drivers.nbd.negotiation import Denied, Terms, Wishes, negotiate
from blockjobs.block.drivers.nbd.replies import Refused
from blockjobs.block.drivers.nbd.session import Session
from blockjobs.block.options import NodeOptions, driver
from blockjobs.block.socket_address import AnySocketAddress, InetAddress, SocketAddress
from blockjobs.block.switch import NewValues, Switch
from blockjobs.block.tls_creds import QCryptoTLSCredsEndpoint, tls_credentials
from blockjobs.block.vocabulary import Kind, Limits, Segment, ZeroMode
from blockjobs.schema.types import UInt32, features
from blockjobs.wire.nbd import (
    BASE_ALLOCATION,
    STRING_BYTES_MAX,
    Allocation,
    Command,
    CommandFlag,
    Option,
    TransmissionFlag,
)
from blockjobs.wire.nbd_options import encode_option
from blockjobs.wire.nbd_requests import Extent

T = TypeVar("T")

STATUS_BYTES_PER_REQUEST: Final = 1 * GiB
_LENGTH_MAX_COMPACT: Final = 2 * GiB - 64 * 1024
"""Of requests without payload while lengths have 32 bits."""
_LENGTH_MAX_EXTENDED: Final = 1 << 62
_DIRTY: Final = 1
_ZERO_PIECE_BYTES: Final = 1 * MiB


class NbdOptions(NodeOptions, frozen=True, kw_only=True, tag="nbd"):
    """An export of an NBD server.

    Attributes:
        reconnect_delay: how many seconds requests wait for a lost connection to come back; 0: they fail at once.
        open_timeout: for how many seconds opening tries to connect; 0: once.
        x_dirty_bitmap: a context to show as block status in place of `base:allocation`.
    """

    server: AnySocketAddress
    export: str | None = None
    tls_creds: str | None = None
    tls_hostname: str | None = None
    x_dirty_bitmap: Annotated[str | None, features("unstable")] = None
    reconnect_delay: UInt32 = 0
    open_timeout: UInt32 = 0


@driver(NbdOptions)
class Nbd(ProtocolDriver):
    """Turns a node's requests into the server's."""

    open_ended = False
    reopenable: ClassVar[frozenset[str] | None] = frozenset()

    def __init__(self, session: Session, dialer: "_Dialer", terms: Terms, *, shows_bitmap: bool) -> None:
        self.children = {}
        self._session, self._dialer = session, dialer
        self._terms, self._shows_bitmap = terms, shows_bitmap
        self.limits = _limits(terms)
        self._changes = self._flushed = 0
        self._may_have_lost = False

    @classmethod
    async def open(cls, options: NbdOptions, children: dict[str, Child], context: OpenContext) -> Self:
        """Connect and look at the export.

        Raises:
            UsageError: no connection, or the server does not have what is asked for; nothing is left open.
        Waits: for the server, at most a little longer than `open-timeout`. Checkpoint: no.
        """
        del children
        wishes = _wishes(options, context)
        session = Session(
            lambda: dialer.connect(),
            clock=context.clock,
            name=context.node_name,
            reconnect_delay_s=options.reconnect_delay,
        )
        dialer = _Dialer(context.dial, options.server, wishes, session, writes=not context.read_only)
        try:
            terms = (await session.open(options.open_timeout)).terms
            if options.x_dirty_bitmap is not None and terms.context is None:
                raise UsageError("Could not open image: Invalid argument")
        except BaseException:
            await session.close()
            raise
        opened = cls(session, dialer, terms, shows_bitmap=options.x_dirty_bitmap not in (None, BASE_ALLOCATION))
        if not options.reconnect_delay:
            session.on_loss = opened._suspect_loss
        return opened

    async def prepare_reopen(self, options: NbdOptions, context: OpenContext) -> Switch:
        """See `Driver`: nothing but who may write can change."""
        del options
        if not context.read_only and self._terms.can(TransmissionFlag.READ_ONLY):
            raise UsageError("Can't reopen read-only NBD mount as read/write")
        return NewValues(self._dialer, writes=not context.read_only)

    @property
    def length(self) -> int:
        """As the server said."""
        return self._terms.export.length

    async def close(self) -> None:
        """See `Driver`."""
        await self._session.close()

    def cancel_in_flight(self) -> None:
        """See `Driver`."""
        self._session.release()

    async def read_into(self, at: int, buffer: memoryview) -> None:
        """See `ProtocolDriver`."""
        length = len(buffer)
        await self._do(at, length, lambda link: link.request(Command.READ, at, length, buffer=buffer))

    async def write(self, at: int, content: Buffer, *, fua: bool) -> None:
        """See `ProtocolDriver`."""
        flags = CommandFlag.FUA if fua and self._terms.can(TransmissionFlag.SEND_FUA) else NO_FLAGS
        length = len(content)
        await self._do(at, length, lambda link: link.request(Command.WRITE, at, length, flags=flags, payload=content))
        self._changes += not flags
        if fua and not flags:
            await self.flush()

    @property
    def zeroes_fast(self) -> bool:
        """See `ProtocolDriver`: the server knows."""
        return self._terms.can(TransmissionFlag.SEND_FAST_ZERO)

    async def zero(self, span: Span, mode: ZeroMode) -> None:
        """See `ProtocolDriver`."""
        if not self._terms.can(TransmissionFlag.SEND_WRITE_ZEROES):
            for piece in span.split(min(_ZERO_PIECE_BYTES, self.limits.transfer_bytes_max)):
                await self.write(piece.at, zeroes(piece.length), fua=False)
            return
        flags = CommandFlag.NO_HOLE if mode is ZeroMode.KEEP else NO_FLAGS
        await self._do(
            span.at, span.length, lambda link: link.request(Command.WRITE_ZEROES, span.at, span.length, flags=flags)
        )
        self._changes += 1

    async def discard(self, span: Span) -> None:
        """See `ProtocolDriver`."""
        if self._terms.can(TransmissionFlag.SEND_TRIM):
            await self._do(span.at, span.length, lambda link: link.request(Command.TRIM, span.at, span.length))

    async def flush(self) -> None:
        """See `ProtocolDriver`."""
        if not self._terms.can(TransmissionFlag.SEND_FLUSH):
            return
        covered = self._changes
        await self._do(0, 0, lambda link: link.request(Command.FLUSH, 0, 0))
        if self._may_have_lost:
            raise IoFailure(errno.EIO, "the NBD server may have lost what it had acknowledged")
        self._flushed = max(self._flushed, covered)

    def _suspect_loss(self) -> None:
        self._may_have_lost |= self._changes > self._flushed

    async def status(self, span: Span) -> list[Segment]:
        """See `ProtocolDriver`: all data if the server does not tell."""
        if self._terms.context is None:
            return [Segment(span.at, span.length, Kind.DATA, "", span.at)]
        segments: list[Segment] = []
        at = span.at
        while at < span.end:
            for extent in await self._extents(Span(at, min(span.end - at, STATUS_BYTES_PER_REQUEST))):
                length = min(extent.length, span.end - at)
                if length:
                    _append(segments, at, length, self._kind(extent))
                at += length
        return segments

    async def resize(self, length: int) -> None:
        """See `ProtocolDriver`: an export keeps its length; asking for less is no error, as in QEMU."""
        if length > self.length:
            raise UsageError("Cannot grow NBD nodes")

    async def _extents(self, span: Span) -> list[Extent]:
        align = self.limits.request_align
        wide = Span.between(span.at // align * align, min(self.length, -(-span.end // align) * align))
        # A session may come back to a server that has lost the context; then all is data.
        found = await self._do(span.at, span.length, lambda link: _block_status(link, wide))
        skip = span.at - wide.at
        if not skip:
            return found
        first = found[0]
        if first.length <= skip:
            raise IoFailure(errno.EIO, f"block status at {span.at}: an extent that ends before it")
        return [Extent(first.length - skip, first.flags), *found[1:]]

    def _kind(self, extent: Extent) -> Kind:
        # Of a bitmap nothing follows for the content: reading it is right in any case.
        is_zero = not self._shows_bitmap and extent.flags & Allocation.ZERO
        return Kind.ZERO if is_zero else Kind.DATA

    async def _do(self, at: int, length: int, work: Callable[[Connection], Awaitable[T]]) -> T:
        try:
            return await self._session.perform(work)
        except Refused as refused:
            where = f"at {at}+{length}" + (f": the server says: {refused}" if str(refused) else "")
            raise IoFailure(refused.code, where) from refused


async def _block_status(connection: Connection, span: Span) -> list[Extent]:
    if connection.terms.context is None:
        return [Extent(span.length, 0)]
    extents = await connection.request(Command.BLOCK_STATUS, span.at, span.length)
    assert extents
    return extents


def _append(segments: list[Segment], at: int, length: int, kind: Kind) -> None:
    """Add a run, joined to the last one if they are of a kind."""
    if segments and segments[-1].kind is kind:
        last = segments.pop()
        at, length = last.at, last.length + length
    segments.append(Segment(at, length, kind, "", at))


class _Dialer:
    """Makes connections to one export, all alike."""

    def __init__(self, dial: Dial, address: SocketAddress, wishes: Wishes, session: Session, *, writes: bool) -> None:
        self._dial, self._address, self._wishes, self._session = dial, address, wishes, session
        self.writes = writes
        self._first: Terms | None = None

    async def connect(self) -> Connection:
        """A connection on which the export is as it was on the first one.

        Raises:
            UsageError, ConnectionLost, WireError: there is none; nothing is left open.
        """
        link = Link()
        await self._dial(self._address, link)
        try:
            terms = await negotiate(link, self._wishes)
            self._check(terms)
            connection = Connection(link, terms)
        except Denied:
            await link.close(encode_option(Option.ABORT))
            raise
        except BaseException:
            link.fail("the negotiation failed")
            raise
        link.on_lost = lambda: self._session.on_lost(connection)
        return connection

    def _check(self, terms: Terms) -> None:
        if self.writes and terms.can(TransmissionFlag.READ_ONLY):
            denied = PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            raise Denied("Could not open image: Permission denied") from denied
        first = self._first = self._first or terms
        if terms.export.length != first.export.length:
            raise Denied(f"the export has {terms.export.length} bytes now, not {first.export.length}")
        if terms.sizes.minimum > first.sizes.minimum or terms.sizes.maximum < first.sizes.maximum:
            raise Denied("the export takes other block sizes now")
        if first.export.flags & ~terms.export.flags & _NEEDED_AGAIN or (first.extended and not terms.extended):
            raise Denied("the export can do less now")


_NEEDED_AGAIN: Final = (
    TransmissionFlag.SEND_FLUSH
    | TransmissionFlag.SEND_FUA
    | TransmissionFlag.SEND_TRIM
    | TransmissionFlag.SEND_WRITE_ZEROES
)


def _wishes(options: NbdOptions, context: OpenContext) -> Wishes:
    """What to ask the server for.

    Raises:
        UsageError: options that make no sense.
    """
    export, name = options.export or "", options.x_dirty_bitmap
    if len(export.encode()) > STRING_BYTES_MAX:
        raise UsageError("export name too long to send to server")
    if name is not None and len(name.encode()) > STRING_BYTES_MAX:
        raise UsageError("x-dirty-bitmap query too long to send to server")
    tls: ssl.SSLContext | None = None
    hostname = options.tls_hostname
    if options.tls_creds is not None:
        credentials = tls_credentials(context.objects, options.tls_creds, QCryptoTLSCredsEndpoint.CLIENT)
        if hostname is None and isinstance(options.server, InetAddress):
            hostname = options.server.host
        if hostname is None and credentials.verify_peer:
            raise UsageError("No hostname for certificate validation")
        tls = credentials.client_context()
    return Wishes(export=export, tls=tls, hostname=hostname or "", context=name or BASE_ALLOCATION)


def _limits(terms: Terms) -> Limits:
    minimum, _, maximum = terms.sizes
    longest = _LENGTH_MAX_EXTENDED if terms.extended else _LENGTH_MAX_COMPACT
    # Servers may refuse longer zero requests than the longest write, unless they know long requests.
    zero_max = longest if terms.extended else maximum
    return Limits(
        request_align=minimum,
        zero_align=minimum,
        discard_align=minimum,
        transfer_bytes_max=maximum // minimum * minimum,
        zero_bytes_max=zero_max // minimum * minimum,
        discard_bytes_max=longest // minimum * minimum,
    )
