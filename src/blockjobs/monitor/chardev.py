"""Where monitors find their clients: character devices of the kind `socket` (spec/qmp.md, Connections).

A chardev serves one client at a time. While one is served, the next waits in the kernel's queue.
"""

import asyncio
import logging
import os
import socket
import stat
from abc import ABC, abstractmethod
from contextlib import suppress
from typing import Any, Final

from blockjobs.base.clock import Clock
from blockjobs.base.errors import UsageError, error_text

log = logging.getLogger(__name__)

_BACKLOG: Final = 16
_RETRY_S: Final = 1.0
_SOCKET_UMASK: Final = 0o177  # 0600: a QMP client has the daemon's powers (spec/durability.md §2)


class Chardev(ABC):
    """A source of clients, one after the other."""

    guarded: bool = True  # whether strangers may come, so that what does not look like QMP is refused

    @abstractmethod
    async def open(self) -> None:
        """Make ready for clients; does nothing if it is.

        Raises:
            UsageError: it cannot be done; the text names the address as QEMU does.
        """

    @abstractmethod
    async def attach(self, client: asyncio.Protocol) -> bool:
        """Wait for the next client and connect it to `client`; False when there will be no more."""

    async def close(self) -> None:
        """Accept nobody any more and remove what `open` made."""


class ListeningSocket(Chardev):
    """`socket,server=on`: listens on a unix path or on an address of the Internet protocols."""

    def __init__(self, *, path: str | None = None, host: str = "", port: str | int = "") -> None:
        """See the class.

        Args:
            path: of a unix socket; made with mode 0600, a socket left over there is replaced.
            host: name or address where no path is given; empty for all.
            port: number or service name; 0 takes a free one, see `address`.
        """
        self._path, self._host, self._port = path, host, str(port)
        self._listener: socket.socket | None = None

    @property
    def address(self) -> Any:
        """Where it listens, in the socket module's form."""
        assert self._listener is not None
        return self._listener.getsockname()

    async def open(self) -> None:
        """See `Chardev`."""
        if self._listener is not None:
            return
        if self._path is not None:
            self._listener = _listen_unix(self._path)
        else:
            self._listener = await _listen_inet(self._host, self._port)
        self._listener.setblocking(False)

    async def attach(self, client: asyncio.Protocol) -> bool:
        """See `Chardev`."""
        assert self._listener is not None
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(self._listener)
                await loop.connect_accepted_socket(lambda: client, connection)
            except ConnectionError:
                continue  # it left before it was served
            except OSError as error:
                # Out of descriptors, most likely: the next client may have better luck.
                log.warning("cannot accept a client: %s", error)
                await asyncio.sleep(_RETRY_S)
                continue
            return True

    async def close(self) -> None:
        """See `Chardev`."""
        if self._listener is None:
            return
        self._listener.close()
        self._listener = None
        if self._path is not None:
            with suppress(FileNotFoundError):
                os.unlink(self._path)


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
    ) -> None:
        """See the class.

        Args:
            clock: for the pauses between attempts.
            path: of a unix socket.
            host: name or address where no path is given.
            port: number or service name.
            reconnect_s: seconds between attempts; 0 connects once, at start, and fails if that fails.
        """
        self._clock = clock
        self._path, self._host, self._port = path, host, str(port)
        self._reconnect_s = reconnect_s
        self._first: socket.socket | None = None
        self._served = False

    async def open(self) -> None:
        """See `Chardev`."""
        if not self._reconnect_s and self._first is None:
            self._first = await self._connect()

    async def attach(self, client: asyncio.Protocol) -> bool:
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
        await asyncio.get_running_loop().create_connection(lambda: client, sock=connection)
        return True

    async def close(self) -> None:
        """See `Chardev`."""
        if self._first is not None:
            self._first.close()

    async def _pause(self) -> None:
        await self._clock.sleep_until(self._clock.now_ns() + self._reconnect_s * 10**9)

    async def _connect(self) -> socket.socket:
        name = self._path if self._path is not None else f"{self._host}:{self._port}"
        if self._path is not None:
            targets = [(socket.AF_UNIX, self._path)]
        else:
            targets = [(each[0], each[4]) for each in await _resolve(self._host, self._port)]
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


def _listen_unix(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(_SOCKET_UMASK)
    try:
        if os.path.exists(path) and stat.S_ISSOCK(os.lstat(path).st_mode):
            os.unlink(path)  # left over: QEMU replaces it too
        listener.bind(path)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise UsageError(f"Failed to bind socket to {path}: {error.strerror or error}") from error
    finally:
        os.umask(before)
    return listener


async def _listen_inet(host: str, port: str) -> socket.socket:
    failure: OSError | None = None
    for family, _, _, _, address in await _resolve(host, port, passive=True):
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(_BACKLOG)
        except OSError as error:
            listener.close()
            failure = error
        else:
            return listener
    assert failure is not None
    raise UsageError(f"Failed to find an available port: {error_text(failure.errno or 0)}") from failure


async def _resolve(host: str, port: str, *, passive: bool = False) -> list[Any]:
    flags = socket.AI_PASSIVE if passive else 0
    try:
        return await asyncio.get_running_loop().getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=flags)
    except socket.gaierror as error:
        raise UsageError(f"address resolution failed for {host}:{port}: {error.strerror}") from error
