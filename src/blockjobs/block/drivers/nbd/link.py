"""One connection's bytes: reading while negotiating, then handing what comes to a parser, and writing with manners.

A `BufferedProtocol`, so that payload of large reads goes from the kernel straight to where it is wanted.
"""

import asyncio
import ssl
from typing import Final, cast

from blockjobs.base.buffers import Buffer
from blockjobs.base.errors import WireError
from blockjobs.base.units import KiB
from blockjobs.block.drivers.nbd.replies import ReplyParser

_SCRATCH_BYTES: Final = 256 * KiB
_DIRECT_BYTES_MIN: Final = 16 * KiB
"""Less than this is received together with what follows and copied: fewer system calls."""
_SLICE_BYTES: Final = 512 * KiB
"""Payload is handed over in such pieces: what the transport cannot send at once it copies, or holds."""
_HIGH_WATER_BYTES: Final = 1024 * KiB
CLOSE_S_MAX: Final = 0.5
"""How long a closed connection may go on sending what is under way."""


class ConnectionLost(Exception):
    """There is no connection any more; its text says why."""


class Link(asyncio.BufferedProtocol):
    """The protocol object of one connection.

    Attributes:
        lost: why the connection is of no use any more; None while it is.
        on_lost: called once when it is lost.
    """

    def __init__(self) -> None:
        self.lost: ConnectionLost | None = None
        self.on_lost = _nothing
        self._transport: asyncio.Transport | None = None
        self._scratch = memoryview(bytearray(_SCRATCH_BYTES))
        self._begin = self._end = 0
        self._parser: ReplyParser | None = None
        self._direct = False
        self._more = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()
        self._gone = asyncio.Event()

    # --- the transport's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.BaseProtocol`; comes again when TLS begins."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are so by behaviour, not by inheritance
        self._transport.set_write_buffer_limits(high=_HIGH_WATER_BYTES)

    def get_buffer(self, sizehint: int) -> memoryview:
        """See `asyncio.BufferedProtocol`."""
        del sizehint
        parser = self._parser
        if parser is not None and parser.sink is not None and len(parser.sink) >= _DIRECT_BYTES_MIN:
            assert self._begin == self._end
            self._direct = True
            return parser.sink
        self._direct = False
        if self._begin == self._end:
            self._begin = self._end = 0
        elif self._end == _SCRATCH_BYTES:
            kept = self._end - self._begin
            self._scratch[:kept] = bytes(self._scratch[self._begin : self._end])
            self._begin, self._end = 0, kept
        if self._end == _SCRATCH_BYTES:
            self.fail("the server sends more than it was asked for")
            return memoryview(bytearray(1))
        return self._scratch[self._end :]

    def buffer_updated(self, count: int) -> None:
        """See `asyncio.BufferedProtocol`."""
        if self.lost is not None:
            return
        parser = self._parser
        try:
            if self._direct:
                assert parser is not None
                parser.sunk(count)
                return
            self._end += count
            if parser is not None:
                self._begin += parser.feed(self._scratch[self._begin : self._end])
        except WireError as error:
            self.fail(str(error))
        self._more.set()

    def eof_received(self) -> None:
        """See `asyncio.BufferedProtocol`: a server that sends no more will not answer."""

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.BaseProtocol`."""
        self._transport = None
        self._gone.set()
        self._lose(_why(exc))

    def pause_writing(self) -> None:
        """See `asyncio.BaseProtocol`."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """See `asyncio.BaseProtocol`."""
        self._writable.set()

    # --- the driver's side

    async def read(self, count: int, what: str) -> bytes:
        """The next bytes while negotiating.

        Raises:
            ConnectionLost: `Failed to read <what>: ...`.
        Waits: for the server. Checkpoint: no.
        """
        while self._end - self._begin < count:
            if self.lost is not None:
                raise ConnectionLost(f"Failed to read {what}: {self.lost}")
            self._more.clear()
            await self._more.wait()
        found = bytes(self._scratch[self._begin : self._begin + count])
        self._begin += count
        return found

    async def start_tls(self, context: ssl.SSLContext, hostname: str) -> None:
        """Everything from here on is encrypted; the peer's certificate has been checked on return.

        Raises:
            ConnectionLost: the handshake failed, or there were bytes already that nobody vouches for.
        Waits: for the server. Checkpoint: no.
        """
        if self._begin != self._end:
            raise ConnectionLost("the server sent data in the clear after TLS was agreed on")
        if self._transport is None:
            raise self.lost or ConnectionLost("the connection is closed")
        loop = asyncio.get_running_loop()
        try:
            upgraded = await loop.start_tls(self._transport, self, context, server_hostname=hostname or None)
        except ssl.SSLCertVerificationError as error:
            raise ConnectionLost(f"TLS handshake failed: {error.verify_message}") from error
        except (OSError, ValueError) as error:
            raise ConnectionLost(f"TLS handshake failed: {_why(error)}") from error
        if upgraded is None:
            raise ConnectionLost("TLS handshake failed: the server closed the connection")
        self.connection_made(upgraded)

    def hand_over(self, parser: ReplyParser) -> None:
        """Negotiation is over: everything that comes goes to `parser`."""
        self._parser = parser
        if self.lost is not None:
            parser.lose(self.lost)
        elif self._begin != self._end:
            self.fail("the server answers before it was asked")

    def send(self, content: bytes | memoryview) -> None:
        """Write something short.

        Raises:
            ConnectionLost: there is no connection.
        """
        if self.lost is not None or self._transport is None:
            raise self.lost or ConnectionLost("the connection is closed")
        self._transport.write(content)

    async def send_all(self, header: bytes, payload: Buffer) -> None:
        """Write a request and what belongs to it; nobody else may write meanwhile.

        Raises:
            ConnectionLost: there is no connection.
        Waits: until the transport takes more. Checkpoint: no.
        """
        await self.writable()
        self.send(header)
        view = memoryview(payload)
        for at in range(0, len(view), _SLICE_BYTES):
            await self.writable()
            self.send(view[at : at + _SLICE_BYTES])

    async def writable(self) -> None:
        """Return once the transport takes more, or is gone. Waits: for the server to read. Checkpoint: no."""
        if not self._writable.is_set():
            await self._writable.wait()

    def fail(self, reason: str) -> None:
        """Give the connection up at once."""
        self._lose(reason)
        if self._transport is not None:
            self._transport.abort()

    async def close(self, farewell: bytes = b"") -> None:
        """Say good-bye and close; does not wait long for a server that does not listen.

        Waits: at most `CLOSE_S_MAX`. Checkpoint: no.
        """
        if self.lost is None and self._writable.is_set() and farewell:
            self.send(farewell)
        self._lose("the connection was closed")
        if self._transport is None:
            return
        self._transport.close()
        try:
            async with asyncio.timeout(CLOSE_S_MAX):
                await self._gone.wait()
        except TimeoutError:
            if self._transport is not None:
                self._transport.abort()

    def _lose(self, reason: str) -> None:
        if self.lost is not None:
            return
        self.lost = ConnectionLost(reason)
        self._more.set()
        self._writable.set()
        if self._parser is not None:
            self._parser.lose(self.lost)
        self.on_lost()


def _why(error: Exception | None) -> str:
    match error:
        case None:
            return "Unexpected end-of-file before all data were read"
        case ssl.SSLError():
            return (error.reason or str(error)).replace("_", " ").lower()
        case OSError():
            return error.strerror or str(error)
    return str(error)


def _nothing() -> None:
    pass
