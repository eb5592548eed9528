"""What goes out to a client of a monitor: lines that are gathered, and given away together.

They go to the socket itself if nothing waits in the transport: the loop's own buffers would send them a turn later.
"""

import asyncio
import logging
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Final

log = logging.getLogger(__name__)

OUTPUT_BYTES_MAX: Final = 8 * 2**20  # spec/durability.md §3
WRITE_HIGH_WATER_BYTES: Final = 256 * 1024


class Outgoing:
    """The way out of one connection; what is sent before it is there, or when it is gone or closing, goes nowhere.

    Args:
        on_unasked: called when lines have been sent that nobody asked for.
    """

    def __init__(self, on_unasked: Callable[[], None]) -> None:
        self._lines: list[bytes] = []
        self._on_unasked = on_unasked
        self._transport: asyncio.Transport | None = None
        self._socket: socket.socket | None = None

    def open(self, transport: asyncio.Transport, sock: socket.socket | None) -> None:
        """The connection is made.

        Args:
            transport: of it.
            sock: its socket, if that may be used beside the transport; the loop will close it.
        """
        self._transport, self._socket = transport, sock
        transport.set_write_buffer_limits(high=WRITE_HIGH_WATER_BYTES)

    def lost(self) -> None:
        """The connection is gone."""
        self._transport = self._socket = None

    def add(self, line: bytes) -> None:
        """Have a line sent with the next ones that are."""
        self._lines.append(line)

    def add_soon(self, line: bytes) -> None:
        """Have it sent with what else comes in this turn of the loop, at its end; for what comes unasked."""
        self._lines.append(line)
        if len(self._lines) == 1:
            asyncio.get_running_loop().call_soon(self._send_unasked)

    def send(self) -> None:
        """Give away what is gathered."""
        if self._lines and self._transport is not None and not self._transport.is_closing():
            data = b"".join(self._lines)
            if self._socket is not None and not self._transport.get_write_buffer_size():
                with suppress(OSError):  # what is wrong for good the transport will find, too
                    data = data[self._socket.send(data) :]
            if data:
                self._transport.write(data)
        self._lines.clear()

    def _send_unasked(self) -> None:
        if not self._lines:
            return  # they have left with a reply
        self.send()
        if self._transport is not None and self._transport.get_write_buffer_size() > OUTPUT_BYTES_MAX:
            log.warning("dropped a client that does not read its events")
            self._transport.abort()
        else:
            self._on_unasked()
