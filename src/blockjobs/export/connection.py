"""One client's connection: the negotiation, TLS in between if asked for, then the transmission."""

import asyncio
import logging
import socket
import ssl
from collections.abc import Sequence
from mmap import mmap
from typing import TYPE_CHECKING, Final, cast

from blockjobs.base.buffers import Buffer
from blockjobs.base.errors import UsageError, WireError
from blockjobs.base.patience import Patience
from blockjobs.base.trace import TracePoint
from blockjobs.base.units import KiB
from blockjobs.export.negotiation import Negotiation, Outcome, Tls
from blockjobs.export.transmission import UNSENT_BYTES_HIGH, UNSENT_BYTES_LOW, Transmission

if TYPE_CHECKING:
    from blockjobs.export.server import NbdServer

log = logging.getLogger(__name__)
_trace_client = TracePoint("nbd_client", "a client of the NBD server comes or goes")

NEGOTIATION_BYTES: Final = 4 * KiB
EARLY_BYTES_MAX: Final = 64 * KiB
"""What a client may send before we know that its TLS handshake is over; a moment's worth."""
JOIN_BYTES_MAX: Final = 16 * KiB
"""Shorter pieces of what is sent together are copied into one."""
TLS_HANDSHAKE_S_MAX: Final = 10.0
STAY_RECEIPTS_MAX: Final = 64
"""So often a client may send, before others get their turn; no other one is at work meanwhile."""


class Connection(asyncio.BufferedProtocol):
    """Give it to an accepted socket as its protocol; the server is told how far it gets.

    Args:
        server: which it belongs to.
        sock: that socket, if replies may go to it past the loop's own buffers. The loop closes it, and it is of no use
            then, whatever becomes of its number.
    """

    def __init__(self, server: "NbdServer", sock: socket.socket | None = None) -> None:
        self._server, self._socket = server, sock
        self._negotiation = Negotiation(server, tls=Tls.REQUIRED if server.tls else Tls.NONE)
        self._transmission: Transmission | None = None
        self._transport: asyncio.Transport | None = None
        self._scratch = bytearray(NEGOTIATION_BYTES)
        self._deadline: asyncio.TimerHandle | None = None
        self._securing: asyncio.Task[None] | None = None
        self._early = bytearray()
        self._reading = True
        self._lost = False
        self._patience = Patience(STAY_RECEIPTS_MAX)
        self.strikes = 0
        self.moved_bytes_seen = 0

    def __repr__(self) -> str:
        return f"<Connection {'working' if self._transmission else 'negotiating'}>"

    # --- asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Greet; from here on the negotiation's deadline runs."""
        self._transport = cast("asyncio.Transport", transport)
        seconds = self._server.handshake_s_max
        if seconds:
            self._deadline = asyncio.get_running_loop().call_later(seconds, self._too_slow)
        _trace_client(state="connected", peer=transport.get_extra_info("peername"))
        self._server.arrived(self)
        self._transport.write(self._negotiation.greeting())

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes go."""
        del sizehint
        return memoryview(self._scratch) if self._transmission is None else self._transmission.room()

    def buffer_updated(self, nbytes: int) -> None:
        """Bytes have arrived."""
        if self._transmission is not None:
            self._transmission.received(nbytes)
            self._stay()
        elif self._securing is None:
            self._negotiate(bytes(self._scratch[:nbytes]))
        else:
            # Decrypted already, since in clear nothing is read: it came with the end of the handshake.
            self._early += self._scratch[:nbytes]
            if len(self._early) > EARLY_BYTES_MAX:
                self.abort()

    def _stay(self) -> None:
        """Look for the client's next requests here, before the loop does, if all that came is answered."""
        transmission = self._transmission
        if transmission is None or self._socket is None or not self._server.is_alone(self):
            return
        if transmission.is_at_rest and self._reading and self._patience.stay(self._take):
            asyncio.get_running_loop().call_soon(self._stay)

    def _take(self) -> bool:
        """Receive from the socket; says whether all that came is answered."""
        if self._transmission is None or self._socket is None:
            return False
        count = self._socket.recv_into(self._transmission.room())
        return count > 0 and self._transmission.received(count) and self._reading

    def pause_writing(self) -> None:
        """The client does not take what it asked for."""
        if self._transmission is not None:
            self._transmission.set_writable(False)
        elif self._transport is not None:
            self._transport.pause_reading()  # options whose answers are not read are not answered

    def resume_writing(self) -> None:
        """The client takes it again."""
        if self._transmission is not None:
            if self._transport is not None:
                self._transport.set_write_buffer_limits(high=UNSENT_BYTES_HIGH, low=UNSENT_BYTES_LOW)
            self._transmission.set_writable(True)
        elif self._transport is not None and self._securing is None:
            self._transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the client; its requests under way end by themselves."""
        del exc
        if self._lost:
            return
        self._lost = True
        self._stop_deadline()
        self._transport = self._socket = None
        if self._transmission is not None:
            self._transmission.lost()
        _trace_client(state="gone")
        self._server.left(self)

    # --- the transmission's side

    def send(self, buffers: Sequence[Buffer]) -> None:
        """See `Channel`."""
        if self._transport is None:
            return
        small: list[Buffer] = []
        for buffer in buffers:
            assert not isinstance(buffer, mmap)
            if len(buffer) <= JOIN_BYTES_MAX:
                small.append(buffer)
                continue
            if small:
                self._transport.write(b"".join(small))
                small = []
            self._transport.write(buffer)
        if small:
            self._transport.write(b"".join(small))

    def send_now(self, pieces: Sequence[memoryview], length: int) -> int:
        """See `Channel`."""
        if self._transport is None:
            return 0
        sent = 0
        if self._socket is not None and not self._transport.get_write_buffer_size():
            try:
                sent = self._socket.send(pieces[0]) if len(pieces) == 1 else self._socket.sendmsg(pieces)
            except OSError:  # what is wrong for good the transport will find, too
                pass
            if sent == length:
                return 0
        self._transport.write(b"".join(pieces)[sent:])
        return self.unsent_bytes()

    def unsent_bytes(self) -> int:
        """See `Channel`."""
        return self._transport.get_write_buffer_size() if self._transport is not None else 0

    def read_on(self, wanted: bool) -> None:
        """See `Channel`."""
        if wanted != self._reading and self._transport is not None:
            self._reading = wanted
            if wanted:
                self._transport.resume_reading()
            else:
                self._transport.pause_reading()

    def close(self) -> None:
        """See `Channel`."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """See `Channel`."""
        if self._transport is not None:
            self._transport.abort()
        if self._securing is not None:
            self._securing.cancel()

    def wait_until_taken(self) -> None:
        """See `Channel`."""
        if self._transport is not None:
            self._transport.set_write_buffer_limits(high=0)  # which calls `pause_writing` at once

    # --- the server's side

    @property
    def is_stuck(self) -> bool:
        """Whether it holds memory and has moved little since the last question; for whoever needs that memory."""
        transmission = self._transmission
        if transmission is None or not transmission.is_holding:
            self.strikes = 0
            return False
        moved = transmission.moved_bytes - self.moved_bytes_seen
        self.moved_bytes_seen += moved
        self.strikes = self.strikes + 1 if moved < self._server.pace_bytes_min else 0
        if self.strikes:
            transmission.distrust()
        return self.strikes >= self._server.strikes_max

    # --- negotiation

    def _negotiate(self, data: bytes) -> None:
        assert self._transport is not None
        negotiation = self._negotiation
        try:
            answer = negotiation.feed(data)
        except WireError as error:
            log.info("dropped an NBD client while it negotiated: %s", error)
            self._transport.abort()
            return
        if negotiation.outcome is Outcome.START_TLS:
            # Not before the answer is out: the client's first TLS record is not for us.
            self._socket = None
            self._transport.pause_reading()
            self._transport.write(answer)
            self._securing = asyncio.get_running_loop().create_task(self._secure(), name="nbd-tls")
            return
        if answer:
            self._transport.write(answer)
        if negotiation.outcome is Outcome.GONE:
            self._transport.close()
        elif negotiation.outcome is Outcome.TRANSMISSION:
            self._work(self._transport)

    def _work(self, transport: asyncio.Transport) -> None:
        agreed = self._negotiation.agreed
        assert agreed is not None
        self._stop_deadline()
        transport.set_write_buffer_limits(high=UNSENT_BYTES_HIGH, low=UNSENT_BYTES_LOW)
        self._transmission = Transmission(self, agreed, self._server.budget, self._server.buffers)
        self._scratch = bytearray()
        self._server.works(self, agreed.export)
        self._transmission.begin(self._negotiation.rest)

    async def _secure(self) -> None:
        """The TLS handshake and, behind it, who the client is."""
        assert self._transport is not None and self._server.tls is not None
        loop = asyncio.get_running_loop()
        raw = self._transport
        try:
            secured = await loop.start_tls(
                raw,
                self,
                self._server.tls.context,
                server_side=True,
                ssl_handshake_timeout=self._server.handshake_s_max or TLS_HANDSHAKE_S_MAX,
            )
            if secured is None:
                raise ConnectionResetError
            if self._lost:
                secured.abort()
                return
            self._transport = secured
            self._server.tls.admit(secured.get_extra_info("ssl_object"))
            self._negotiation.secured()
            self._securing = None
            if self._early:
                self._negotiate(bytes(self._early))
                self._early.clear()
        except (OSError, ssl.SSLError, UsageError, TimeoutError) as error:
            log.info("dropped an NBD client while it negotiated TLS: %s", error)
            self._drop(raw)
        except asyncio.CancelledError:
            self._drop(raw)
            raise
        finally:
            self._securing = None

    def _drop(self, transport: asyncio.Transport) -> None:
        """End while TLS is in between, which does not always say so."""
        transport.abort()
        self.connection_lost(None)

    def _too_slow(self) -> None:
        log.info("dropped an NBD client that did not end its negotiation in time")
        self.abort()

    def _stop_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
