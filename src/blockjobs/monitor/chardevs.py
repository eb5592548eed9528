"""The character devices of a program, as `--chardev` and `chardev-add` make them, and the monitors' claims on them."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, TypeAlias

from blockjobs.base.clock import Clock
from blockjobs.base.errors import UsageError
from blockjobs.block.socket_address import InetSocketAddress, UnixSocketAddress
from blockjobs.block.tls_creds import QCryptoTLSCredsEndpoint, tls_credentials
from blockjobs.block.tls_policy import tls_policy
from blockjobs.export.addresses import AnySocketAddressLegacy
from blockjobs.monitor.chardev import Chardev, ConnectingSocket, Door, ListeningSocket, Null
from blockjobs.monitor.stdio import Stdio
from blockjobs.schema.types import INT64_MAX, Options, Record, qapi
from blockjobs.schema.union import OpenUnion

_ABSTRACT_BYTES = 107


class ChardevCommon(Options, frozen=True, kw_only=True):
    """What every kind has: nothing."""


class ChardevSocket(Options, frozen=True, kw_only=True):
    """A unix path, or a host and a port; listens if `server` is on, else connects out."""

    addr: AnySocketAddressLegacy
    tls_creds: str | None = None
    tls_authz: str | None = None
    server: bool = True
    wait: bool | None = None
    reconnect: Annotated[int, qapi("int64")] = 0


class ChardevBackend(Options, frozen=True, kw_only=True, tag_field="type"):
    """What a character device is."""


chardev_backends = OpenUnion("ChardevBackend", base=ChardevBackend)
if TYPE_CHECKING:
    AnyChardevBackend: TypeAlias = ChardevBackend
else:
    AnyChardevBackend = chardev_backends.type


@chardev_backends.add
class SocketBackend(ChardevBackend, frozen=True, kw_only=True, tag="socket"):
    """See `ChardevSocket`."""

    data: ChardevSocket


@chardev_backends.add
class NullBackend(ChardevBackend, frozen=True, kw_only=True, tag="null"):
    """No client ever comes."""

    data: ChardevCommon


@chardev_backends.add
class StdioBackend(ChardevBackend, frozen=True, kw_only=True, tag="stdio"):
    """The process's own input and output."""

    data: ChardevCommon


class ChardevInfo(Record, frozen=True, kw_only=True):
    """A character device: `frontend-open` if a monitor uses it."""

    label: str
    filename: str
    frontend_open: bool


class Chardevs:
    """Character devices by id.

    Args:
        clock: for the pauses of those that connect again.
        objects: where credentials are.
        door: who may come in where the device itself says nothing of it.
        may_use_stdio: false in the background.
    """

    def __init__(
        self, clock: Clock, objects: Mapping[str, object], *, door: Door | None = None, may_use_stdio: bool = True
    ) -> None:
        self._clock, self._objects, self._door = clock, objects, door or Door()
        self._may_use_stdio = may_use_stdio
        self._devices: dict[str, Chardev] = {}
        self._used: set[str] = set()

    def check_free(self, ident: str) -> None:
        """Refuse an id that is taken.

        Raises:
            UsageError: it is.
        """
        if ident in self._devices:
            raise UsageError(f"Chardev with id '{ident}' already exists")

    async def add(self, ident: str, backend: ChardevBackend) -> None:
        """Make a device and open it.

        Raises:
            UsageError: in QEMU's words; nothing was made.
        Waits: for name resolution, and for a server to connect to.
        """
        self.check_free(ident)
        device = self._make(backend)
        await device.open()
        self._devices[ident] = device

    async def remove(self, ident: str) -> None:
        """Close a device that no monitor uses.

        Raises:
            UsageError: there is none, or one uses it.
        """
        if ident not in self._devices:
            raise UsageError(f"Chardev '{ident}' not found")
        if ident in self._used:
            raise UsageError(f"Chardev '{ident}' is busy")
        await self._devices.pop(ident).close()

    def use(self, ident: str) -> Chardev:
        """A device, from now on in use by a monitor.

        Raises:
            UsageError: there is none, or it is in use.
        """
        if ident not in self._devices:
            raise UsageError(f'chardev "{ident}" not found')
        if ident in self._used:
            raise UsageError(f"Device '{ident}' is in use")
        self._used.add(ident)
        return self._devices[ident]

    def infos(self) -> list[ChardevInfo]:
        """Describe all devices, the oldest first."""
        return [
            ChardevInfo(label=ident, filename=device.filename, frontend_open=ident in self._used)
            for ident, device in self._devices.items()
        ]

    async def close(self) -> None:
        """Close all devices; the monitors on them have ended."""
        while self._devices:
            await self._devices.popitem()[1].close()

    def _make(self, backend: ChardevBackend) -> Chardev:
        if isinstance(backend, SocketBackend):
            return self._listening(backend.data) if backend.data.server else self._connecting(backend.data)
        if isinstance(backend, NullBackend):
            return Null()
        if not self._may_use_stdio:
            raise UsageError("cannot use stdio with -daemonize")
        if any(isinstance(each, Stdio) for each in self._devices.values()):
            raise UsageError("cannot use stdio by multiple character devices")
        return Stdio()

    def _listening(self, wanted: ChardevSocket) -> ListeningSocket:
        if wanted.reconnect:
            raise UsageError("'reconnect' option is incompatible with socket in server listen mode")
        path, host, port = _place(wanted)
        tls = None
        if wanted.tls_creds is not None:
            tls = tls_policy(self._objects, wanted.tls_creds, wanted.tls_authz)
        elif wanted.tls_authz is not None:
            raise UsageError("'tls_authz' option requires 'tls_creds' option")
        door = Door(tls=tls, users=self._door.users, remote=self._door.remote)
        return ListeningSocket(path=path, host=host, port=port, door=door, waits=bool(wanted.wait))

    def _connecting(self, wanted: ChardevSocket) -> ConnectingSocket:
        if wanted.wait is not None:
            raise UsageError("'wait' option is incompatible with socket in client connect mode")
        path, host, port = _place(wanted)
        tls = None
        if wanted.tls_creds is not None:
            tls = tls_credentials(self._objects, wanted.tls_creds, QCryptoTLSCredsEndpoint.CLIENT).client_context()
        elif wanted.tls_authz is not None:
            raise UsageError("'tls_authz' option requires 'tls_creds' option")
        reconnect_s = max(0, min(wanted.reconnect, INT64_MAX // 10**9))
        return ConnectingSocket(self._clock, path=path, host=host, port=port, reconnect_s=reconnect_s, tls=tls)


def _place(wanted: ChardevSocket) -> tuple[str | None, str, str]:
    """Path, host and port of a socket.

    Raises:
        UsageError: it is of a kind that no QMP client comes through.
    """
    address = wanted.addr.address
    if isinstance(address, UnixSocketAddress):
        if not address.abstract:
            return address.path, "", ""
        name = "\0" + address.path
        return (name if address.tight else name.ljust(_ABSTRACT_BYTES + 1, "\0")), "", ""
    if isinstance(address, InetSocketAddress):
        return None, address.host, address.port
    raise UsageError("a character device takes a socket address of type 'unix' or 'inet'")
