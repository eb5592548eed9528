"""`--chardev`: the option structs and the objects that they describe."""

from typing import TYPE_CHECKING, TypeAlias

from blockjobs.base.clock import Clock
from blockjobs.base.errors import ParameterError, UsageError
from blockjobs.monitor.chardev import Chardev, ConnectingSocket, ListeningSocket
from blockjobs.monitor.stdio import Stdio
from blockjobs.schema.keyval import parse
from blockjobs.schema.types import Options
from blockjobs.schema.union import OpenUnion
from blockjobs.wire.qmp_lines import read_one


class ChardevOptions(Options, frozen=True, kw_only=True, tag_field="backend"):
    """What every character device has.

    Attributes:
        wait: a listening socket holds up the options that follow until its first client is there.
    """

    id: str | None = None
    wait: bool = True

    @property
    def waits(self) -> bool:
        """Whether start-up stops here until a client comes."""
        return False

    def make(self, clock: Clock) -> Chardev:
        """The device, not yet open.

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
    host: str | None = None
    port: str | None = None
    server: bool = False
    reconnect: int = 0

    @property
    def waits(self) -> bool:
        """See `ChardevOptions`."""
        return self.server and self.wait

    def make(self, clock: Clock) -> Chardev:
        """See `ChardevOptions`."""
        if self.path is None and self.port is None:
            raise UsageError("a socket needs a 'path', or a 'host' and a 'port'")
        if self.path is not None and (self.host is not None or self.port is not None):
            raise UsageError("a socket has a 'path' or a 'host' and a 'port', not both")
        if self.server and self.reconnect:
            raise UsageError("'reconnect' option is incompatible with socket in server listen mode")
        host, port = self.host or "", self.port or ""
        if self.server:
            return ListeningSocket(path=self.path, host=host, port=port)
        return ConnectingSocket(clock, path=self.path, host=host, port=port, reconnect_s=self.reconnect)


@chardev_options.add
class StdioOptions(ChardevOptions, frozen=True, kw_only=True, tag="stdio"):
    """The process's own input and output."""

    def make(self, clock: Clock) -> Chardev:
        """See `ChardevOptions`."""
        return Stdio()


def parse_chardev(text: str) -> ChardevOptions:
    """Read the value of `--chardev`.

    Raises:
        UsageError: QSD's text.
    """
    try:
        options: ChardevOptions = parse(
            text, AnyChardevOptions, implied="backend", short_booleans=True, read_json=read_one
        )
    except ParameterError as error:
        if error.path == "backend" and "does not accept value" in str(error):
            name = str(error).rpartition(" value ")[2]
            raise UsageError(f"{name} is not a valid char driver name") from error
        raise
    if options.id is None:
        raise UsageError("chardev: no id specified")
    return options
