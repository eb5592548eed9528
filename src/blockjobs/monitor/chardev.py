"""Where monitors find their clients: character devices of the kind `socket` (spec/qmp.md, Connections).

A chardev serves one client at a time. While one is served, the next waits in the kernel's queue.
"""

import asyncio
import logging
import os
import socket
import ssl
import struct
from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, cast

from blockjobs.base.clock import Clock
from blockjobs.base.errors import UsageError, error_text
from blockjobs.block.tls_policy import TlsPolicy
from blockjobs.monitor.sockets import is_abstract, listen_inet, listen_unix, resolve, shown_path

log = logging.getLogger(__name__)

_RETRY_S: Final = 1.0
_HANDSHAKE_S_MAX: Final = 10.0
_PEER_CREDENTIALS: Final = struct.Struct("3i")  # process, user, group


class Client(asyncio.Protocol):
    """Whoever serves a client.

    Attributes:
        sock: of the connection, if it may be used beside the transport, as long as nothing waits there; set before
            the connection is made.
    """

    sock: socket.socket | None = None


class Chardev(ABC):
    """A source of clients, one after the other.

    Attributes:
        guarded: strangers may come, so that what does not look like QMP is refused.
        waits: a monitor on it holds up what follows until its first client is there.
    """

    guarded: bool = True
    waits: bool = False

    @property
    @abstractmethod
    def filename(self) -> str:
        """What `query-chardev` shows: kind, address and, of a connected socket, the other end."""

    @abstractmethod
    async def open(self) -> None:
        """Make ready for clients; does nothing if it is.

        Raises:
            UsageError: it cannot be done; the text names the address as QEMU does.
        """

    @abstractmethod
    async def attach(self, client: Client) -> bool:
        """Wait for the next client and connect it to `client`; False when there will be no more."""

    async def close(self) -> None:
        """Accept nobody any more and remove what `open` made."""


class Null(Chardev):
    """`null`: no client ever comes."""

    filename = "null"

    async def open(self) -> None:
        """See `Chardev`."""

    async def attach(self, client: Client) -> bool:
        """See `Chardev`."""
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Door:
    """Who may come in through a listening socket.

    Attributes:
        tls: clients must speak TLS, and pass it.
        users: numbers of the users that may connect to a unix socket; None: those whom the file's mode lets in.
        remote: other machines may come without a certificate.
    """

    tls: TlsPolicy | None = None
    users: frozenset[int] | None = None
    remote: bool = False


class ListeningSocket(Chardev):
    """`socket,server=on`: listens on a unix path or on an address of the Internet protocols."""

    def __init__(
        self,
        *,
        path: str | None = None,
        host: str = "",
        port: str | int = "",
        door: Door | None = None,
        waits: bool = False,
    ) -> None:
        """See the class.

        Args:
            path: of a unix socket; made with mode 0600, a socket left over there is replaced. With a leading NUL a
                name in Linux's abstract space.
            host: name or address where no path is given; empty for all.
            port: number or service name; 0 takes a free one, see `address`.
            door: who may come in; by default whoever can connect, on this machine.
            waits: see `Chardev`.
        """
        self._path, self._host, self._port = path, host, str(port)
        self._door = door or Door()
        self.waits = waits
        self._listener: socket.socket | None = None
        self._transport: asyncio.BaseTransport | None = None

    @property
    def address(self) -> Any:
        """Where it listens, in the socket module's form."""
        assert self._listener is not None
        return self._listener.getsockname()

    @property
    def filename(self) -> str:
        """See `Chardev`."""
        if self._path is None and self._listener is not None:
            host, port = self.address[:2]
            return _filename(None, host, port, self._transport, ",server=on")
        return _filename(self._path, self._host, self._port, self._transport, ",server=on")

    async def open(self) -> None:
        """See `Chardev`."""
        if self._listener is not None:
            return
        if self._path is not None:
            self._listener = listen_unix(self._path, shared=self._door.users is not None)
        else:
            tls = self._door.tls
            remote = self._door.remote or (tls is not None and tls.verifies)
            self._listener = await listen_inet(self._host, self._port, remote=remote)
        self._listener.setblocking(False)

    async def attach(self, client: Client) -> bool:
        """See `Chardev`."""
        assert self._listener is not None
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(self._listener)
                if not self._may_enter(connection):
                    connection.close()
                    continue
                if await self._connect(connection, client):
                    return True
            except (ConnectionError, ssl.SSLError) as error:
                log.info("a client left before it was served: %s", error)
            except OSError as error:
                # Out of descriptors, most likely: the next client may have better luck.
                log.warning("cannot accept a client: %s", error)
                await asyncio.sleep(_RETRY_S)

    def _may_enter(self, connection: socket.socket) -> bool:
        if self._door.users is None or connection.family != socket.AF_UNIX:
            return True
        peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
        _, user, _ = _PEER_CREDENTIALS.unpack(peer)
        if user not in self._door.users:
            log.warning("turned away a client of user %d", user)
        return user in self._door.users

    async def _connect(self, connection: socket.socket, client: Client) -> bool:
        """Hand the connection to `client`; False: the client was turned away."""
        loop, tls = asyncio.get_running_loop(), self._door.tls
        if tls is None:
            client.sock = connection
            self._transport, _ = await loop.connect_accepted_socket(lambda: client, connection)
            return True
        self._transport, gate = await loop.connect_accepted_socket(
            lambda: _TlsGate(client, tls), connection, ssl=tls.context, ssl_handshake_timeout=_HANDSHAKE_S_MAX
        )
        return gate.is_passed

    async def close(self) -> None:
        """See `Chardev`."""
        if self._listener is None:
            return
        self._listener.close()
        self._listener = None
        if self._path is not None and not is_abstract(self._path):
            with suppress(FileNotFoundError):
                os.unlink(self._path)


class _TlsGate(asyncio.Protocol):
    """Stands in for a client's protocol until the certificate has been looked at."""

    def __init__(self, client: Client, tls: TlsPolicy) -> None:
        self._client, self._tls = client, tls
        self.is_passed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        try:
            self._tls.admit(transport.get_extra_info("ssl_object"))
        except UsageError as error:
            log.warning("turned away a client: %s", error)
            cast("asyncio.Transport", transport).abort()
            return
        self.is_passed = True
        transport.set_protocol(self._client)
        self._client.connection_made(transport)


class ConnectingSocket(Chardev):
    """`socket,server=off`: connects out to a client that listens, and again after it left if told so."""

    guarded = False

    def __init__(
        self,
        clock: Clock,
        *,
        path: str | None = None,
        host: str = "",
        port: str | int = "",
        reconnect_s: int = 0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """See the class.

        Args:
            clock: for the pauses between attempts.
            path: of a unix socket.
            host: name or address where no path is given.
            port: number or service name.
            reconnect_s: seconds between attempts; 0 connects once, at start, and fails if that fails.
            tls: for the handshake, after which the other side is known to be `host`.
        """
        self._clock = clock
        self._path, self._host, self._port = path, host, str(port)
        self._reconnect_s = reconnect_s
        self._first: socket.socket | None = None
        self._tls = tls
        self._served = False
        self._transport: asyncio.BaseTransport | None = None

    @property
    def filename(self) -> str:
        """See `Chardev`."""
        if self._first is not None:
            return _filename(self._path, self._host, self._port, self._first, "")
        return _filename(self._path, self._host, self._port, self._transport, "")

    async def open(self) -> None:
        """See `Chardev`."""
        if not self._reconnect_s and self._first is None:
            self._first = await self._connect()

    async def attach(self, client: Client) -> bool:
        """See `Chardev`."""
        connection, self._first = self._first, None
        if connection is None and not self._reconnect_s:
            return False
        if self._served:
            await self._pause()
        while connection is None:
            try:
                connection = await self._connect()
            except UsageError:
                await self._pause()
        self._served = True
        self._transport, _ = await asyncio.get_running_loop().create_connection(
            lambda: client,
            sock=connection,
            ssl=self._tls,
            server_hostname=self._host if self._tls is not None else None,
        )
        return True

    async def close(self) -> None:
        """See `Chardev`."""
        if self._first is not None:
            self._first.close()

    async def _pause(self) -> None:
        await self._clock.sleep_until(self._clock.now_ns() + self._reconnect_s * 10**9)

    async def _connect(self) -> socket.socket:
        name = shown_path(self._path) if self._path is not None else f"{self._host}:{self._port}"
        if self._path is not None:
            targets = [(socket.AF_UNIX, self._path)]
        else:
            targets = [(each[0], each[4]) for each in await resolve(self._host, self._port)]
        failure: OSError | None = None
        for family, address in targets:
            connection = socket.socket(family, socket.SOCK_STREAM)
            connection.setblocking(False)
            try:
                await asyncio.get_running_loop().sock_connect(connection, address)
            except OSError as error:
                connection.close()
                failure = error
            else:
                return connection
        assert failure is not None
        raise UsageError(f"Failed to connect to '{name}': {error_text(failure.errno or 0)}") from failure


def _filename(
    path: str | None, host: str, port: str, link: asyncio.BaseTransport | socket.socket | None, suffix: str
) -> str:
    """A socket as QEMU shows it; `link` is its connection, if there is one."""
    name = f"unix:{shown_path(path)}" if path is not None else f"tcp:{host}:{port}"
    if path is not None and is_abstract(path):
        name += ",abstract=on,tight=on"
    peer = None
    if isinstance(link, socket.socket):
        ours, peer = link.getsockname(), link.getpeername()
    elif link is not None and not cast("asyncio.Transport", link).is_closing():
        ours, peer = link.get_extra_info("sockname"), link.get_extra_info("peername")
    if peer is None:
        return f"disconnected:{name}{suffix}"
    if path is not None:
        return name + suffix
    here, there = (f"[{each[0]}]:{each[1]}" if ":" in each[0] else f"{each[0]}:{each[1]}" for each in (ours, peer))
    return f"tcp:{here}{suffix} <-> {there}"
