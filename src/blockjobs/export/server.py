"""The NBD server of a host: listeners, clients, and what bounds them (spec/durability.md §2, §3)."""

import asyncio
import logging
from collections.abc import Sequence
from typing import Final

from blockjobs.base.errors import UsageError
from blockjobs.base.units import KiB
from blockjobs.block.tls_policy import TlsPolicy
from blockjobs.export.budget import Budget
from blockjobs.export.buffers import Buffers
from blockjobs.export.connection import Connection
from blockjobs.export.listener import Listener
from blockjobs.export.nbd_export import NbdExport
from blockjobs.export.options import CONNECTIONS_MAX, HANDSHAKE_S_MAX

log = logging.getLogger(__name__)

HALF_OPEN_MAX: Final = 64
"""Clients that negotiate at once; one more, and the oldest of them is dropped."""
WATCH_S: Final = 1.0
"""While clients wait for memory, those that hold some are looked at this often."""

CALM_LOOKS_MIN: Final = 3
"""Looks in a row at which nobody was stuck."""


class NbdServer:
    """Serves exports until `close`.

    Attributes:
        budget: memory that requests of all clients share.
        buffers: that memory itself.
        tls: None for connections in clear.
        handshake_s_max: how long a negotiation may take; 0 for as long as it likes.
        pace_bytes_min, strikes_max: a client that holds memory others wait for must move so many bytes between two
            looks, or is dropped at the so-manieth look in a row at which it has not.
    """

    pace_bytes_min: Final = 64 * KiB
    strikes_max: Final = 2

    def __init__(
        self,
        listeners: Sequence[Listener],
        *,
        tls: TlsPolicy | None = None,
        connections_max: int = CONNECTIONS_MAX,
        handshake_s_max: int = HANDSHAKE_S_MAX,
    ) -> None:
        """See the class.

        Args:
            listeners: bound already; the server closes them.
            tls: how clients prove who they are; None for connections in clear.
            connections_max: clients at work at once, 0 for any number; those that still negotiate do not count.
            handshake_s_max: see the class.
        """
        self.tls, self.handshake_s_max = tls, handshake_s_max
        self.budget = Budget()
        self.buffers = Buffers()
        self._listeners = listeners
        self._connections_max = connections_max
        self._exports: dict[str, NbdExport] = {}
        self._half_open: dict[Connection, None] = {}
        self._working: dict[Connection, NbdExport] = {}
        self._last_served: Connection | None = None
        self._room = asyncio.Event()
        self._room.set()
        self._watch: asyncio.TimerHandle | None = None
        self._calm_looks = 0
        self._is_closing = False

    def start(self) -> None:
        """Begin to accept clients."""
        for listener in self._listeners:
            listener.start(lambda sock: Connection(self, sock), self._room)

    @property
    def addresses(self) -> list[object]:
        """Where it listens, in the socket module's form."""
        return [listener.address for listener in self._listeners]

    @property
    def is_shared(self) -> bool:
        """Whether more than one client may work at a time."""
        return self._connections_max != 1

    async def close(self) -> None:
        """Stop accepting and drop all clients. What they had begun ends by itself. Waits: for accepting to stop."""
        self._is_closing = True
        for listener in self._listeners:
            await listener.close()
        for connection in [*self._half_open, *self._working]:
            connection.abort()
        if self._watch is not None:
            self._watch.cancel()

    # --- exports

    def add(self, export: NbdExport) -> None:
        """Offer an export under its name, which is free."""
        assert export.name not in self._exports
        self._exports[export.name] = export

    def remove(self, export: NbdExport) -> None:
        """Offer it no more."""
        if self._exports.get(export.name) is export:
            del self._exports[export.name]

    def check_free(self, name: str) -> None:
        """Refuse a name that is taken.

        Raises:
            UsageError: in QEMU's words.
        """
        if name in self._exports:
            raise UsageError(f"NBD server already has export named '{name}'")

    # --- as `Offers`

    def exports(self) -> list[NbdExport]:
        """See `Offers`."""
        return list(self._exports.values())

    def export(self, name: str) -> NbdExport | None:
        """See `Offers`."""
        return self._exports.get(name)

    def refuses(self) -> str | None:
        """See `Offers`."""
        return "too many clients" if self._is_full else None

    @property
    def _is_full(self) -> bool:
        return 0 < self._connections_max <= len(self._working)

    # --- told by connections

    def arrived(self, connection: Connection) -> None:
        """A client has connected and negotiates."""
        if self._is_closing:
            connection.abort()
            return
        while len(self._half_open) >= HALF_OPEN_MAX:
            oldest = next(iter(self._half_open))
            del self._half_open[oldest]
            log.warning("too many NBD clients negotiate at once: the oldest is dropped")
            oldest.abort()
        self._half_open[connection] = None

    def works(self, connection: Connection, export: NbdExport) -> None:
        """The client has agreed on an export."""
        self._half_open.pop(connection, None)
        self._working[connection] = export
        export.clients.add(connection)
        if self._is_full:
            self._room.clear()
        self.watch()

    def is_alone(self, connection: Connection) -> bool:
        """Whether nobody else is in a hurry: this client was served the last time, too, and no worker has work."""
        before, self._last_served = self._last_served, connection
        return before is connection and not self._working[connection].node.graph.offload.is_busy

    def left(self, connection: Connection) -> None:
        """The client is gone."""
        self._half_open.pop(connection, None)
        if self._last_served is connection:
            self._last_served = None
        export = self._working.pop(connection, None)
        if export is not None:
            export.clients.discard(connection)
        if not self._is_full:
            self._room.set()

    # --- memory

    def watch(self) -> None:
        """Keep looking for clients that hold memory and do nothing with it, while others wait for that memory."""
        if self._watch is None and not self._is_closing:
            self._watch = asyncio.get_running_loop().call_later(WATCH_S, self._look)

    def _look(self) -> None:
        self._watch = None
        self._calm_looks += 1
        stuck = [connection for connection in self._working if connection.is_stuck]
        if any(connection.strikes for connection in self._working):
            self._calm_looks = 0
        if self.budget.is_contended:
            # Where somebody is stuck, large requests may be what is stuck.
            if self._calm_looks >= CALM_LOOKS_MIN:
                self.budget.favour_large()
            for connection in stuck:
                log.warning(
                    "dropped a client of export '%s': it holds memory that others wait for",
                    self._working[connection].id,
                )
                connection.abort()
        if self._working:
            self.watch()
