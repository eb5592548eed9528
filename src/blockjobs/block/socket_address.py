"""Where sockets are: the addresses of servers and of what clients connect to, for QMP and the command line."""

from typing import TYPE_CHECKING, Final, TypeAlias

from blockjobs.base.errors import UsageError
from blockjobs.schema.types import Options, UInt16
from blockjobs.schema.union import OpenUnion

_PORT_MAX: Final = 65535


class SocketAddress(Options, frozen=True, kw_only=True, tag_field="type"):
    """An address with its `type` among its members."""


socket_addresses = OpenUnion("SocketAddress", base=SocketAddress)
if TYPE_CHECKING:
    AnySocketAddress: TypeAlias = SocketAddress
else:
    AnySocketAddress = socket_addresses.type


class InetSocketAddress(Options, frozen=True, kw_only=True):
    """Host and port; with `to` the first free port up to there."""

    host: str
    port: str
    numeric: bool = False
    to: UInt16 | None = None
    ipv4: bool | None = None
    ipv6: bool | None = None
    keep_alive: bool = False
    mptcp: bool = False


class UnixSocketAddress(Options, frozen=True, kw_only=True):
    """A path in the file system, or a name in Linux's abstract space."""

    path: str
    abstract: bool = False
    tight: bool = True


class VsockSocketAddress(Options, frozen=True, kw_only=True):
    """For guests of the same machine."""

    cid: str
    port: str


class FdSocketAddress(Options, frozen=True, kw_only=True):
    """A listening socket that the process was started with."""

    str: str


@socket_addresses.add
class InetAddress(InetSocketAddress, SocketAddress, frozen=True, kw_only=True, tag="inet"):
    """See `InetSocketAddress`."""


@socket_addresses.add
class UnixAddress(UnixSocketAddress, SocketAddress, frozen=True, kw_only=True, tag="unix"):
    """See `UnixSocketAddress`."""


@socket_addresses.add
class VsockAddress(VsockSocketAddress, SocketAddress, frozen=True, kw_only=True, tag="vsock"):
    """See `VsockSocketAddress`."""


@socket_addresses.add
class FdAddress(FdSocketAddress, SocketAddress, frozen=True, kw_only=True, tag="fd"):
    """See `FdSocketAddress`."""


def check_port(host: str, port: str) -> None:
    """Refuse a number that is no port: the C library would take the rest of it by 65536, as QEMU does.

    Raises:
        UsageError: as for other ports that make no sense.
    """
    if port.isdecimal() and int(port) > _PORT_MAX:
        raise UsageError(f"address resolution failed for {host}:{port}: Servname not supported for ai_socktype")
