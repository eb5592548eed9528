"""Listening sockets of a server, and the loop that takes clients from one of them."""

import asyncio
import errno
import logging
import os
import socket
import stat
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, Final

from blockjobs.base.errors import UsageError, error_text
from blockjobs.block.socket_address import (
    FdSocketAddress,
    InetSocketAddress,
    UnixSocketAddress,
    VsockSocketAddress,
    check_port,
)
from blockjobs.export.addresses import AddressMembers

log = logging.getLogger(__name__)

BACKLOG: Final = 128
RETRY_S: Final = 1.0
PORT_MAX: Final = 65535
_STDERR: Final = 2


class Listener:
    """One listening socket and the task that accepts from it, owned until `close`."""

    def __init__(self, sock: socket.socket, *, unlink: str | None = None) -> None:
        self._socket, self._unlink = sock, unlink
        self._task: asyncio.Task[None] | None = None
        sock.setblocking(False)

    @property
    def address(self) -> Any:
        """Where it listens, in the socket module's form."""
        return self._socket.getsockname()

    def start(self, make: Callable[[socket.socket], asyncio.BaseProtocol], room: asyncio.Event) -> None:
        """Begin to accept: `make` gives each client its protocol; clients wait while `room` is not set."""
        self._task = asyncio.get_running_loop().create_task(self._accept(make, room), name="nbd-listener")

    async def close(self) -> None:
        """Accept nobody any more and remove the socket's file. Waits: for the accepting task to notice."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        self._socket.close()
        if self._unlink is not None:
            with suppress(OSError):
                os.unlink(self._unlink)

    async def _accept(self, make: Callable[[socket.socket], asyncio.BaseProtocol], room: asyncio.Event) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await room.wait()
            try:
                connection, _ = await loop.sock_accept(self._socket)
                if connection.family in (socket.AF_INET, socket.AF_INET6):
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                await loop.connect_accepted_socket(partial(make, connection), connection)
            except ConnectionError:
                continue  # it left before it was served
            except OSError as error:
                # Out of descriptors, most likely: the next client may have better luck.
                log.warning("cannot accept an NBD client: %s", error)
                await asyncio.sleep(RETRY_S)


async def listen(address: AddressMembers) -> list[Listener]:
    """Open the sockets that an address means: a host's name may mean several.

    Raises:
        UsageError: in QEMU's words; nothing is open.
    """
    if isinstance(address, UnixSocketAddress):
        return [_unix(address)]
    if isinstance(address, VsockSocketAddress):
        return [_vsock(address)]
    if isinstance(address, FdSocketAddress):
        return [_inherited(address)]
    assert isinstance(address, InetSocketAddress)
    return await _inet(address)


def _unix(address: UnixSocketAddress) -> Listener:
    if address.abstract:
        name = "\0" + address.path
        if not address.tight:
            name = name.ljust(108, "\0")
        return _bound(socket.AF_UNIX, name, f"Failed to bind socket to {address.path}")
    # As in QEMU a socket that is left over is replaced, and the process's umask says who may connect.
    with suppress(OSError):
        if stat.S_ISSOCK(os.lstat(address.path).st_mode):
            os.unlink(address.path)
    return _bound(socket.AF_UNIX, address.path, f"Failed to bind socket to {address.path}", unlink=address.path)


def _vsock(address: VsockSocketAddress) -> Listener:
    numbers = []
    for name, text in (("cid", address.cid), ("port", address.port)):
        if not text.isdigit() or int(text) > (1 << 32) - 1:
            raise UsageError(f"Failed to parse {name} '{text}'")
        numbers.append(int(text))
    return _bound(socket.AF_VSOCK, tuple(numbers), "Failed to bind socket")


def _inherited(address: FdSocketAddress) -> Listener:
    if not address.str.isdigit() or int(address.str) <= _STDERR:
        raise UsageError(f"File descriptor named '{address.str}' has not been found")
    try:
        sock = socket.socket(fileno=os.dup(int(address.str)))
    except OSError as error:
        raise UsageError(f"File descriptor '{address.str}' is not a socket") from error
    if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        sock.close()
        raise UsageError(f"File descriptor '{address.str}' is not a listening socket")
    return Listener(sock)


def _bound(family: int, address: Any, failed: str, *, unlink: str | None = None) -> Listener:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        text = error_text(error.errno) if error.errno else str(error)
        raise UsageError(f"{failed}: {text}") from error
    return Listener(sock, unlink=unlink)


async def _inet(address: InetSocketAddress) -> list[Listener]:
    check_port(address.host, address.port)
    families = {(True, False): socket.AF_INET, (False, True): socket.AF_INET6}
    family = families.get((bool(address.ipv4), bool(address.ipv6)), 0)
    if not family and (address.ipv4 is False) != (address.ipv6 is False):
        family = socket.AF_INET6 if address.ipv4 is False else socket.AF_INET
    flags = socket.AI_PASSIVE | (socket.AI_NUMERICHOST | socket.AI_NUMERICSERV if address.numeric else 0)
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            address.host or None, address.port or 0, family=family, type=socket.SOCK_STREAM, flags=flags
        )
    except (socket.gaierror, UnicodeError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"address resolution failed for {address.host}:{address.port}: {reason}") from error
    listeners: list[Listener] = []
    failure: UsageError | None = None
    for each in found:
        try:
            listeners.append(_at_free_port(each[0], each[4], address))
        except UsageError as error:
            failure = error
    if not listeners:
        assert failure is not None
        raise failure
    return listeners


def _at_free_port(family: int, place: Any, address: InetSocketAddress) -> Listener:
    """At the address's port, or at the first free one up to `to`."""
    first = place[1]
    last = first if address.to is None else min(address.to, PORT_MAX)
    for port in range(first, max(first, last) + 1):
        try:
            return _bound(family, (place[0], port, *place[2:]), "Failed to find an available port")
        except UsageError as error:
            taken = isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EADDRINUSE
            if port == last or not taken:
                raise
    raise AssertionError("the range has a port")
