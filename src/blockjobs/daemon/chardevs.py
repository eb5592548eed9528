"""`--chardev`: the older, flat way to write what `chardev-add` says in nested objects."""

from typing import TYPE_CHECKING, TypeAlias

from blockjobs.base.errors import ParameterError, UsageError
from blockjobs.base.ids import is_well_formed
from blockjobs.block.socket_address import InetSocketAddress, UnixSocketAddress
from blockjobs.export.addresses import InetLegacy, UnixLegacy
from blockjobs.monitor.chardevs import (
    ChardevBackend,
    ChardevCommon,
    ChardevSocket,
    NullBackend,
    SocketBackend,
    StdioBackend,
)
from blockjobs.schema.keyval import parse
from blockjobs.schema.types import Options
from blockjobs.schema.union import OpenUnion
from blockjobs.wire.qmp_lines import read_one


class ChardevOptions(Options, frozen=True, kw_only=True, tag_field="backend"):
    """What every character device has."""

    id: str | None = None

    def nested(self) -> ChardevBackend:
        """The same as `chardev-add` would have it.

        Raises:
            UsageError: members contradict each other.
        """
        raise AssertionError(f"{type(self).__name__} makes no device")


chardev_options = OpenUnion("ChardevBackend", base=ChardevOptions)
if TYPE_CHECKING:
    AnyChardevOptions: TypeAlias = ChardevOptions
else:
    AnyChardevOptions = chardev_options.type


@chardev_options.add
class SocketOptions(ChardevOptions, frozen=True, kw_only=True, tag="socket"):
    """A unix path, or a host and port; listens if `server` is on, else connects out."""

    path: str | None = None
    abstract: bool = False
    tight: bool = True
    host: str | None = None
    port: str | None = None
    server: bool = False
    wait: bool | None = None
    reconnect: int = 0
    tls_creds: str | None = None
    tls_authz: str | None = None

    def nested(self) -> ChardevBackend:
        """See `ChardevOptions`. A listening socket waits for its first client unless told not to."""
        if self.path is not None and self.host is not None:
            raise UsageError("None or one of 'path', 'fd' or 'host' option required.")
        address: UnixLegacy | InetLegacy
        if self.path is not None:
            address = UnixLegacy(data=UnixSocketAddress(path=self.path, abstract=self.abstract, tight=self.tight))
        elif self.port is not None:
            address = InetLegacy(data=InetSocketAddress(host=self.host or "", port=self.port))
        elif self.host is not None:
            raise UsageError("chardev: socket: no port given")
        else:
            raise UsageError("chardev: socket: a 'path', or a 'host' and a 'port' are needed")
        wait = True if self.server and self.wait is None else self.wait
        return SocketBackend(
            data=ChardevSocket(
                addr=address,
                server=self.server,
                wait=wait,
                reconnect=self.reconnect,
                tls_creds=self.tls_creds,
                tls_authz=self.tls_authz,
            )
        )


@chardev_options.add
class StdioOptions(ChardevOptions, frozen=True, kw_only=True, tag="stdio"):
    """The process's own input and output."""

    def nested(self) -> ChardevBackend:
        """See `ChardevOptions`."""
        return StdioBackend(data=ChardevCommon())


@chardev_options.add
class NullOptions(ChardevOptions, frozen=True, kw_only=True, tag="null"):
    """No client ever comes."""

    def nested(self) -> ChardevBackend:
        """See `ChardevOptions`."""
        return NullBackend(data=ChardevCommon())


def parse_chardev(text: str) -> tuple[str, ChardevBackend]:
    """Read the value of `--chardev`: the id, and what it is.

    Raises:
        UsageError: QSD's text.
    """
    try:
        options: ChardevOptions = parse(
            text, AnyChardevOptions, implied="backend", short_booleans=True, read_json=read_one
        )
    except ParameterError as error:
        raise UsageError(_as_qemu_says(error, text)) from error
    if options.id is None:
        raise UsageError("chardev: no id specified")
    if not is_well_formed(options.id):
        raise ParameterError.expects("id", "an identifier")
    return options.id, options.nested()


def _as_qemu_says(error: ParameterError, text: str) -> str:
    """The words of QEMU's older option parser, which looks for the id first."""
    given = [pair.partition("=") for pair in text.split(",")]
    ident = next((value for key, _, value in given if key == "id"), None)
    said = str(error)
    if error.path == "backend" and ident is None:
        return "chardev: no id specified"
    if error.path == "backend" and said.endswith("is missing"):
        return f'chardev: "{ident}" missing backend'
    if error.path == "backend":
        return f"{said.rpartition(' value ')[2]} is not a valid char driver name"
    return f"Invalid parameter '{error.path}'" if said.endswith("is unexpected") else said
