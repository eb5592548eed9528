"""Making the sockets of character devices: listening on, and connecting to, unix paths and Internet addresses."""

import asyncio
import ipaddress
import os
import socket
import stat
from typing import Any, Final

from blockjobs.base.errors import UsageError, error_text

_BACKLOG: Final = 16
_SOCKET_UMASK: Final = 0o177  # 0600: a QMP client has the daemon's powers (spec/durability.md §2)
_SHARED_UMASK: Final = 0o111  # who may use it is decided by the user at the other end


def listen_unix(path: str, *, shared: bool = False) -> socket.socket:
    """A listening socket at a path, or at a name in Linux's abstract space if it begins with NUL.

    Args:
        path: a socket left over there is replaced, as QEMU does.
        shared: anybody may connect; otherwise the daemon's own user only.

    Raises:
        UsageError: in QEMU's words.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(_SHARED_UMASK if shared else _SOCKET_UMASK)
    try:
        if not is_abstract(path) and os.path.exists(path) and stat.S_ISSOCK(os.lstat(path).st_mode):
            os.unlink(path)
        listener.bind(path)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise UsageError(f"Failed to bind socket to {shown_path(path)}: {error.strerror or error}") from error
    finally:
        os.umask(before)
    return listener


async def listen_inet(host: str, port: str, *, remote: bool) -> socket.socket:
    """A listening socket on the first address of a host that works.

    Args:
        remote: addresses that other machines can reach are allowed.

    Raises:
        UsageError: in QEMU's words, or an address is not allowed; nothing listens.
    """
    failure: OSError | None = None
    for family, _, _, _, address in await resolve(host, port, passive=True):
        if not remote and not ipaddress.ip_address(address[0].partition("%")[0]).is_loopback:
            raise UsageError(
                f"Other machines could reach {address[0]}, and a QMP client may do all that this program may: "
                "use tls-creds with verify-peer=on, or a loopback address, or --allow-remote-qmp"
            )
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


async def resolve(host: str, port: str, *, passive: bool = False) -> list[Any]:
    """The addresses of a host, in the socket module's form.

    Args:
        passive: to listen on; no host means all of this one's.

    Raises:
        UsageError: there are none.
    """
    flags = socket.AI_PASSIVE if passive else 0
    try:
        return await asyncio.get_running_loop().getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=flags)
    except socket.gaierror as error:
        raise UsageError(f"address resolution failed for {host}:{port}: {error.strerror}") from error


def is_abstract(path: str) -> bool:
    """Whether it is a name in Linux's abstract space, which is no file."""
    return path.startswith("\0")


def shown_path(path: str) -> str:
    """A unix address for people."""
    return path.strip("\0")
