"""The daemon at work: what its options make, and how it serves and stops."""

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Sequence
from enum import StrEnum
from typing import Final

import msgspec

from blockjobs import __version__
from blockjobs.base.collector import relax_collector
from blockjobs.base.errors import BlockjobsError, UsageError
from blockjobs.block.objects import AnyObjectOptions, add_object
from blockjobs.block.options import BlockdevOptions
from blockjobs.block.socket_address import AnySocketAddress
from blockjobs.daemon.chardevs import parse_chardev
from blockjobs.daemon.options import PROGRAM, Option, wants_help
from blockjobs.daemon.process import Background, PidFile, user_number
from blockjobs.daemon.warm_up import load_rest
from blockjobs.export.addresses import AddressMembers
from blockjobs.export.options import CONNECTIONS_MAX, HANDSHAKE_S_MAX, AnyExportOptions
from blockjobs.host import Host
from blockjobs.monitor import commands  # noqa: F401  importing it makes them known
from blockjobs.monitor.chardev import Door
from blockjobs.monitor.chardevs import ChardevBackend, Chardevs
from blockjobs.monitor.server import Monitor
from blockjobs.monitor.session import QEMU_7_2, Service
from blockjobs.schema.keyval import parse
from blockjobs.schema.types import Options, UInt32
from blockjobs.wire.qmp_lines import read_one

IDENTIFIER_HINT: Final = "\nIdentifiers consist of letters, digits, '-', '.', '_', starting with a letter."
_STRUCTURED: Final = frozenset({"blockdev", "chardev", "export", "monitor", "nbd-server", "object"})
STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class MonitorMode(StrEnum):
    """What a monitor speaks: QMP (`control`), or a language for people, which no storage daemon has."""

    CONTROL = "control"
    READLINE = "readline"


class MonitorOptions(Options, frozen=True, kw_only=True):
    """The value of `--monitor`."""

    chardev: str
    mode: MonitorMode = MonitorMode.CONTROL
    pretty: bool = False
    id: str | None = None


class NbdServerOptions(Options, frozen=True, kw_only=True):
    """The value of `--nbd-server`."""

    addr: AnySocketAddress
    tls_creds: str | None = None
    tls_authz: str | None = None
    max_connections: UInt32 = CONNECTIONS_MAX
    handshake_max_seconds: UInt32 = HANDSHAKE_S_MAX


class Answered(Exception):
    """An option asked for help: its text is printed, and nothing is started."""


class OptionError(UsageError):
    """An option that could not be carried out; the text repeats the option, as QSD's does."""

    def __init__(self, option: Option, cause: BlockjobsError) -> None:
        self.option, self.cause = option, cause
        hint = IDENTIFIER_HINT if str(cause).endswith("expects an identifier") else ""
        super().__init__(f"{option}: {cause}{hint}")


class Daemon:
    """What the options make: nodes and objects in a host, chardevs, and monitors on them."""

    def __init__(self, host: Host, options: Sequence[Option] = ()) -> None:
        """See the class.

        Args:
            host: the host.
            options: all of the command line, for what holds however late it is said.

        Raises:
            UsageError: a user in them does not exist.
        """
        self._host = host
        users = [user_number(option.value) for option in options if option.name == "qmp-user"]
        names = {option.name for option in options}
        door = Door(users=frozenset([os.getuid(), *users]) if users else None, remote="allow-remote-qmp" in names)
        self._chardevs = Chardevs(host.clock, host.objects, door=door, may_use_stdio="daemonize" not in names)
        self._monitors: list[Monitor] = []
        version = msgspec.structs.replace(QEMU_7_2, package=f"blockjobs {__version__}")
        self._service = Service(
            host=host,
            bus=host.bus,
            clock=host.clock,
            control=host.jobs.control,
            version=version,
            chardevs=self._chardevs,
            is_busy=lambda: host.offload.is_busy,
        )

    async def apply(self, option: Option) -> None:
        """Carry out one option.

        Raises:
            OptionError: it cannot be; what earlier options made is still there.
        """
        try:
            if option.name in _STRUCTURED and wants_help(option.value):
                from blockjobs.daemon.help import help_text

                raise Answered(help_text(option.name, option.value))
            match option.name:
                case "trace":
                    _trace(option)
                case "blockdev":
                    await self._host.graph.open(
                        parse(option.value, BlockdevOptions, implied="driver", read_json=read_one)
                    )
                case "object":
                    options = parse(option.value, AnyObjectOptions, implied="qom-type", read_json=read_one)
                    add_object(self._host.objects, options, self._host.clock)
                case "nbd-server":
                    await self._start_nbd_server(parse(option.value, NbdServerOptions, read_json=read_one))
                case "export":
                    exported = parse(option.value, AnyExportOptions, implied="type", read_json=read_one)
                    await self._host.exports.add(exported)
                case "chardev":
                    await self._add_chardev(*parse_chardev(option.value))
                case "monitor":
                    await self._add_monitor(parse(option.value, MonitorOptions, implied="chardev", read_json=read_one))
        except BlockjobsError as error:
            raise OptionError(option, error) from error

    async def close(self) -> None:
        """End the monitors; a command under way still replies."""
        for monitor in self._monitors:
            await monitor.close()
        await self._chardevs.close()

    async def _start_nbd_server(self, wanted: NbdServerOptions) -> None:
        assert isinstance(wanted.addr, AddressMembers)
        await self._host.exports.start_server(
            wanted.addr,
            tls_creds=wanted.tls_creds,
            tls_authz=wanted.tls_authz,
            connections_max=wanted.max_connections,
            handshake_s_max=wanted.handshake_max_seconds,
        )

    async def _add_chardev(self, ident: str, backend: ChardevBackend) -> None:
        self._chardevs.check_free(ident)
        await self._chardevs.add(ident, backend)

    async def _add_monitor(self, wanted: MonitorOptions) -> None:
        device = self._chardevs.use(wanted.chardev)
        if wanted.mode is not MonitorMode.CONTROL:
            raise UsageError("Only QMP is supported")
        monitor = Monitor(device, self._service, pretty=wanted.pretty)
        self._monitors.append(monitor)
        if device.waits:
            print(f"{PROGRAM}: info: waiting for connection on: {device.filename}", file=sys.stderr, flush=True)
        await monitor.start(wait_for_client=device.waits)


async def run(options: Sequence[Option], background: Background) -> None:
    """Start, serve until `quit` or a signal, stop: jobs first, then monitors, then images.

    Raises:
        UsageError: start-up failed; everything is closed again.
    """
    roots = [option.value for option in options if option.name == "image-root"]
    pid_paths = [option.value for option in options if option.name == "pidfile"]
    async with Host(image_roots=roots) as host:
        loop = asyncio.get_running_loop()
        for number in STOP_SIGNALS:
            loop.add_signal_handler(number, host.quitting.set)
        daemon = Daemon(host, options)
        pid_file = None
        try:
            for option in options:
                await daemon.apply(option)
            pid_file = PidFile(pid_paths[-1]) if pid_paths else None
            background.ready()
            async with asyncio.TaskGroup() as meanwhile:
                warming = meanwhile.create_task(load_rest())
                await host.quitting.wait()
                warming.cancel()
            await host.shutdown()
        finally:
            await daemon.close()
            if pid_file is not None:
                pid_file.remove()
    # The loop takes its handlers with it, and who asks to stop what has stopped must not see it killed. By now no other
    # thread is left that the kernel could choose.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def serve(options: Sequence[Option]) -> int:
    """Run the daemon as its options say; returns its exit status.

    Raises:
        UsageError: start-up failed.
    """
    logging.basicConfig(level=logging.WARNING, format=f"{PROGRAM}: %(message)s")
    try:
        relax_collector()
        background = Background()
        if any(option.name == "daemonize" for option in options):
            background.enter()
        with asyncio.Runner(loop_factory=_new_loop) as runner:
            runner.run(run(options, background))
    except Answered as answer:
        print(answer, end="")
    return 0


def _trace(option: Option) -> None:
    from blockjobs.daemon.tracing import start_tracing, trace_help

    if option.value in ("help", "?"):
        raise Answered(trace_help())
    for warning in start_tracing(option.value):
        print(f"{PROGRAM}: {option}: {warning}", file=sys.stderr)


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:  # no wheel for this platform: the standard loop is slower and does as well
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()
