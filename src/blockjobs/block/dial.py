"""The port through which drivers reach servers: real sockets in production, memory in tests.

A dial connects a protocol object to an address and hands back the transport. It is not told about TLS; whoever has the
transport asks the loop to upgrade it.
"""

import asyncio
import os
import socket
import stat
from collections.abc import Awaitable, Callable

from blockjobs.base.errors import UsageError, error_text
from blockjobs.block.socket_address import FdAddress, InetAddress, SocketAddress, UnixAddress, VsockAddress, check_port

Dial = Callable[[SocketAddress, asyncio.BaseProtocol], Awaitable[asyncio.Transport]]
"""`dial_socket` is the real one; what others raise and wait for is as there."""


class ConnectFailed(UsageError):
    """The peer cannot be reached now; trying again later may help."""


async def dial_socket(address: SocketAddress, protocol: asyncio.BaseProtocol) -> asyncio.Transport:
    """Connect `protocol` to a real socket.

    Raises:
        UsageError: the address makes no sense.
        ConnectFailed: nobody answers there.
    Waits: for name resolution and the peer's kernel. Checkpoint: no.
    """
    loop = asyncio.get_running_loop()
    where = describe(address)
    try:
        match address:
            case UnixAddress():
                name = "\0" + address.path if address.abstract else address.path
                _check_path(name)
                transport, _ = await loop.create_unix_connection(lambda: protocol, name)
                return transport
            case InetAddress():
                found = await _resolve(loop, address)
                connected = await _first_that_answers(loop, found, keep_alive=address.keep_alive)
            case VsockAddress():
                connected = await _vsock(loop, address)
            case FdAddress():
                connected = _inherited(address.str)
            case _:
                raise UsageError(f"connections to {where} are not supported")
        transport, _ = await loop.create_connection(lambda: protocol, sock=connected)
    except OSError as error:
        raise ConnectFailed(f"Failed to connect to '{where}': {error_text(error.errno or 0)}") from error
    return transport


def describe(address: SocketAddress) -> str:
    """The address as messages show it: a path, or `host:port`."""
    match address:
        case UnixAddress():
            return address.path
        case InetAddress():
            return f"{address.host}:{address.port}"
        case VsockAddress():
            return f"{address.cid}:{address.port}"
        case FdAddress():
            return address.str
    return type(address).__name__


_SUN_PATH_BYTES_MAX = 108


def _check_path(path: str) -> None:
    if len(os.fsencode(path)) >= _SUN_PATH_BYTES_MAX:
        raise UsageError(f"UNIX socket path '{path}' is too long: it must be less than {_SUN_PATH_BYTES_MAX} bytes")


async def _resolve(
    loop: asyncio.AbstractEventLoop, address: InetAddress
) -> list[tuple[int, int, int, str, tuple[str, int] | tuple[str, int, int, int]]]:
    check_port(address.host, address.port)
    family = socket.AF_UNSPEC
    if address.ipv4 is not address.ipv6 and (address.ipv4 or address.ipv6 is False):
        family = socket.AF_INET
    elif address.ipv4 is not address.ipv6:
        family = socket.AF_INET6
    flags = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV if address.numeric else 0
    try:
        found = await loop.getaddrinfo(address.host, address.port, family=family, type=socket.SOCK_STREAM, flags=flags)
    except socket.gaierror as error:
        text = f"address resolution failed for {describe(address)}: {error.strerror}"
        raise (ConnectFailed if error.errno == socket.EAI_AGAIN else UsageError)(text) from error
    except UnicodeError as error:
        raise UsageError(f"address resolution failed for {describe(address)}: {error}") from error
    return found  # type: ignore[return-value]  # of the families that are asked for


async def _first_that_answers(
    loop: asyncio.AbstractEventLoop,
    found: list[tuple[int, int, int, str, tuple[str, int] | tuple[str, int, int, int]]],
    *,
    keep_alive: bool,
) -> socket.socket:
    failure: OSError | None = None
    for family, kind, protocol, _, place in found:
        attempt = socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol)
        try:
            attempt.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if keep_alive:
                attempt.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            await loop.sock_connect(attempt, place)
        except OSError as error:
            failure = failure or error
            attempt.close()
        except BaseException:
            attempt.close()
            raise
        else:
            return attempt
    raise failure or OSError(0, "no address")


async def _vsock(loop: asyncio.AbstractEventLoop, address: VsockAddress) -> socket.socket:
    try:
        place = int(address.cid), int(address.port)
    except ValueError as error:
        raise UsageError(f"Failed to parse vsock address '{describe(address)}'") from error
    attempt = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        await loop.sock_connect(attempt, place)
    except BaseException:
        attempt.close()
        raise
    return attempt


def _inherited(text: str) -> socket.socket:
    """A connected socket that the process was started with; it stays the caller's to close."""
    try:
        number = int(text)
    except ValueError as error:
        raise UsageError(f"Unable to parse FD number {text}") from error
    try:
        is_socket = stat.S_ISSOCK(os.fstat(number).st_mode)
    except (OSError, OverflowError):
        is_socket = False
    if not is_socket:
        raise UsageError(f"File descriptor '{text}' is not a socket")
    connected = socket.socket(fileno=os.dup(number))
    connected.setblocking(False)
    return connected
