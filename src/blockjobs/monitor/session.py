"""One QMP connection: greeting, negotiation, commands one at a time, events in between (spec/qmp.md).

The order of what a client reads is contract: events are put into the outgoing buffer at the moment they are published,
and a reply at the moment its command has run, still under the control lock. A reply goes out at once, with the events
before it; events without one at the end of the loop's turn, since each packet wakes the client.

A request whose command never waits is answered where it arrives, and so are those behind it in the packet, up to the
first one that may wait. All others wait their turn in `run`, which takes the control lock for each.

Flow control: while a command runs, or while the client does not read its reply, nothing more is read from it. Only
events come unasked, so a client that never reads them is dropped when too much is waiting for it (`outgoing.py`).
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, NamedTuple, Protocol, cast

import msgspec

from blockjobs.base.bus import Bus
from blockjobs.base.clock import Clock
from blockjobs.base.errors import BlockjobsError, CommandNotFound, UsageError, WireError
from blockjobs.base.patience import Patience
from blockjobs.base.trace import TracePoint
from blockjobs.monitor.chardev import Client
from blockjobs.monitor.chardevs import Chardevs
from blockjobs.monitor.event_gate import EventGate
from blockjobs.monitor.outgoing import Outgoing
from blockjobs.schema.command import Call, Event, Registry, qmp
from blockjobs.schema.types import Record
from blockjobs.wire.qmp_encode import encode
from blockjobs.wire.qmp_lines import Limits, Malformed, Scanner, Value

log = logging.getLogger(__name__)

_FLUSH_S_MAX: Final = 5.0
_BYTES_PER_TURN: Final = 16 * 1024  # to scan, then others run
_ANSWERS_PER_TURN: Final = 16  # then others run: errors and simple commands never wait for anything by themselves
STAY_QUERIES_MAX: Final = 8  # then others run: half a millisecond
LATE_LOOKS_MAX: Final = 64  # for what a client does about an event, or next: it has more to do than after a query
_SHORT_REPLY_BYTES: Final = 4096  # what is longer does not wait for the replies to the rest of its packet
_SECRETIVE: Final = frozenset({"object-add", "qom-set"})

_trace_command = TracePoint("qmp_command", "a client sends a command")
_trace_error = TracePoint("qmp_error", "a command is answered with an error")
_trace_event = TracePoint("qmp_event", "a client is sent an event")
_trace_client = TracePoint("qmp_client", "a client of a monitor comes or goes")


class QemuVersion(Record, frozen=True, kw_only=True):
    """The version that clients compare to know what they may use."""

    major: int
    minor: int
    micro: int


class Version(Record, frozen=True, kw_only=True):
    """What `query-version` answers; `package` names the program that really answers."""

    qemu: QemuVersion
    package: str


QEMU_7_2: Final = Version(qemu=QemuVersion(major=7, minor=2, micro=22), package="blockjobs")


class Lock(Protocol):
    """As `asyncio.Lock`."""

    def locked(self) -> bool:
        """Whether anybody holds it."""
        ...

    async def __aenter__(self) -> None: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """What sessions serve, and from what.

    Attributes:
        host: first argument of every command.
        bus: where events come from.
        clock: stamps events.
        control: held while a command runs, so that no command sees a half-settled transaction (design §1.3).
        registry: the commands.
        version: what the greeting says.
        limits: of one request.
        chardevs: what `chardev-add` and its like act on.
        is_busy: whether work is under way that needs processors.
    """

    host: object
    bus: Bus
    clock: Clock
    control: Lock
    registry: Registry = qmp
    version: Version = QEMU_7_2
    limits: Limits = field(default_factory=Limits)
    chardevs: Chardevs | None = None
    is_busy: Callable[[], bool] = bool  # never


@dataclass(frozen=True, slots=True)
class Request:
    """The envelope of a command, checked."""

    command: str
    arguments: dict[str, object]
    out_of_band: bool


class _Bound(NamedTuple):
    """A request that may run, and what its reply repeats of it."""

    call: Call
    echo: dict[str, object]


class Session(Client):
    """A client's connection, from greeting to the end.

    Give it to a transport as its protocol and await `run()`.

    Attributes:
        service: see `Service`.
        capabilities: what the client has enabled; None before it negotiated.
    """

    def __init__(self, service: Service, *, pretty: bool = False, guarded: bool = True) -> None:
        """See the class.

        Args:
            service: what to serve.
            pretty: spread replies over several lines.
            guarded: close a connection whose first byte cannot begin a request, such as an HTTP client's.
        """
        self.service = service
        self.capabilities: frozenset[str] | None = None
        self._pretty = pretty
        self._guarded = guarded
        self._scanner = Scanner(service.limits)
        self._patience = Patience(STAY_QUERIES_MAX)  # behind queries
        self._late_patience = Patience(STAY_QUERIES_MAX, LATE_LOOKS_MAX)  # behind all else
        self._only_queries = False  # were answered last
        self._staying: asyncio.Handle | None = None  # will look when others have had their turn
        self._unread: deque[bytes] = deque()
        self._out = Outgoing(self._stay_late)
        self._received: deque[Value | Malformed | _Bound] = deque()
        self._transport: asyncio.Transport | None = None
        self._arrived = asyncio.Event()  # something to do: input, end of input, or loss
        self._writable = asyncio.Event()
        self._writable.set()
        self._input_ended = False
        self._is_idle = False  # nothing is queued and `run` waits for more
        self._is_reading = True
        self._lost = asyncio.Event()
        self._subscribed = False
        self._stack = ExitStack()
        self._gate = EventGate(service.clock, self._out.add_soon)

    # The transport's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Greet."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are so by behaviour, not by inheritance
        _trace_client(state="connected")
        self._out.open(self._transport, self.sock)
        self._send({"QMP": {"version": self.service.version, "capabilities": ["oob"]}})

    def data_received(self, data: bytes) -> None:
        """Look at the bytes if nothing else is to do; else queue them, and read no more until their turn has come."""
        if self._guarded:
            first = data.lstrip()[:1]
            if first and first != b"{":
                log.warning("closed a connection that does not speak QMP")
                self._abort()
                return
            self._guarded = not first
        if self._is_idle and len(data) <= _BYTES_PER_TURN:
            self._answer_at_once(self._scanner.feed(data))
            if not self._received and self._only_queries:
                self._stay(self._patience)
            if not self._received:
                return
        else:
            self._unread.extend(data[at : at + _BYTES_PER_TURN] for at in range(0, len(data), _BYTES_PER_TURN))
            if self._transport is not None and self._is_reading:
                self._is_reading = False
                self._transport.pause_reading()
        self._is_idle = False
        self._arrived.set()

    def _stay(self, patience: Patience) -> None:
        """Look for the client's next requests here, before the loop does."""
        if self._may_stay() and patience.stay(self._take):
            self._stay_soon(patience)

    def _stay_soon(self, patience: Patience) -> None:
        """Look behind what has been begun by now, not before it, as an earlier wish would."""
        if self._staying is not None:
            self._staying.cancel()
        self._staying = asyncio.get_running_loop().call_soon(self._stay_on, patience)

    def _may_stay(self) -> bool:
        ready = self._is_idle and not self._input_ended and self.sock is not None
        return ready and not self.service.is_busy()

    def _take(self) -> bool:
        """Receive from the socket; says whether all that came is answered, and was queries."""
        assert self.sock is not None
        data = self.sock.recv(_BYTES_PER_TURN)
        self._answer_at_once(self._scanner.feed(data))
        return bool(data) and not self._received and self._only_queries and self._may_stay()

    def _stay_on(self, patience: Patience) -> None:
        """Others have had their turn."""
        self._stay(patience)
        if self._received:
            self._is_idle = False
            self._arrived.set()

    def _stay_late(self) -> None:
        """Events have left, or what was asked for last has begun: the client may answer to that, or ask on."""
        self._stay_on(self._late_patience)

    def eof_received(self) -> bool:
        """Keep the connection for the replies to what was received: the client may have closed one direction only."""
        self._input_ended = True
        self._arrived.set()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget requests that did not run yet; the running one finishes, its reply goes nowhere."""
        del exc
        _trace_client(state="gone")
        self._transport = self.sock = None
        self._out.lost()
        self._forget()
        self._lost.set()
        self._writable.set()
        self._arrived.set()
        self._stack.close()

    def pause_writing(self) -> None:
        """The client does not read: wait before the next request."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """The client reads again."""
        self._writable.set()

    # The monitor's side

    async def run(self) -> None:
        """Serve until the connection is gone."""
        async with self._gate:
            answered = 0
            while await self._more():
                await self._writable.wait()
                if not self._received:
                    continue  # it was dropped meanwhile
                await self._answer(self._received.popleft())
                await self._writable.wait()
                answered += 1
                if answered % _ANSWERS_PER_TURN == 0:
                    await asyncio.sleep(0)
            await self._leave()

    def finish(self) -> None:
        """End after the running command's reply, if one runs; drop what was not begun. `run()` returns then."""
        self._forget()
        self._input_ended = True
        self._arrived.set()

    def abort(self) -> None:
        """End now; unsent replies are lost."""
        self.finish()
        self._abort()

    async def _leave(self) -> None:
        """Close, but give the client a moment to read what is still under way to it."""
        self._out.send()
        if self._transport is not None:
            self._transport.close()
        try:
            async with asyncio.timeout(_FLUSH_S_MAX):
                await self._lost.wait()
        except TimeoutError:
            self._abort()
            await self._lost.wait()

    async def _more(self) -> bool:
        """Wait for a request; False when none will come."""
        while not self._received:
            if self._unread:
                self._received.extend(self._scanner.feed(self._unread.popleft()))
                await asyncio.sleep(0)
                continue
            if self._lost.is_set() or self._input_ended:
                return False
            self._arrived.clear()
            if not self._is_reading and self._transport is not None and not self._transport.is_closing():
                self._is_reading = True
                self._transport.resume_reading()
            self._is_idle = True
            await self._arrived.wait()
        return True

    def _answer_at_once(self, received: list[Value | Malformed]) -> None:
        """Answer requests, and queue those behind the first one that may have to wait, or that others go before."""
        answered, self._only_queries = 0, True
        waiting: list[Value | Malformed | _Bound] = [*received]
        for request in received[:_ANSWERS_PER_TURN]:
            if (bound := self._answered_at_once(request)) is not None:
                waiting[answered] = bound
                break
            answered += 1
        self._received.extend(waiting[answered:])
        if answered:
            self._out.send()
            if not self._only_queries:
                self._stay_soon(self._late_patience)

    def _answered_at_once(self, received: Value | Malformed) -> _Bound | None:
        """Answer a request here, or return it for its turn if it may have to wait."""
        bound = self._bound(received)
        if bound is None or bound.call.command.waits or self.service.control.locked() or not self._writable.is_set():
            return bound
        self._only_queries = self._only_queries and bound.call.command.name.startswith("query-")
        try:
            reply = self._reply(bound.call.begin(self._receiver(bound)), bound)
        except Exception as error:
            reply = self._failure(error, bound)
        self._out.add(reply)
        if len(reply) > _SHORT_REPLY_BYTES:
            self._out.send()  # and learn whether the client still reads
        self._subscribe()
        return None

    async def _answer(self, received: Value | Malformed | _Bound) -> None:
        bound = received if isinstance(received, _Bound) else self._bound(received)
        if bound is None:
            return
        async with self.service.control:
            self._out.add(await self._run(bound))
            self._out.send()
        self._subscribe()

    def _bound(self, received: Value | Malformed) -> _Bound | None:
        """Check a request; None if it is answered with that."""
        if isinstance(received, Malformed):
            self._send(_error_reply("GenericError", str(received)))
            return None
        echo: dict[str, object] = {}
        if isinstance(received.json, dict) and "id" in received.json:
            echo["id"] = received.json["id"]
        try:
            request = self._request(received.json)
            if _trace_command.is_on:
                _trace_command(command=request.command, arguments=_shown(request), **echo)
            return _Bound(self._bind(request), echo)
        except BlockjobsError as error:
            _trace_error(error=error)
            self._send(_error_reply(error.error_class, str(error)) | echo)
            return None

    def _request(self, value: object) -> Request:
        """Check the envelope in QEMU's order."""
        if not isinstance(value, dict):
            raise WireError("QMP input must be a JSON object")
        out_of_band = self.capabilities is not None and "oob" in self.capabilities
        if not out_of_band and "exec-oob" in value:
            raise WireError("QMP input member 'exec-oob' is unexpected")
        names = ("exec-oob", "execute") if out_of_band else ("execute",)
        given = [name for name in names if name in value]
        for name in given:
            if not isinstance(value[name], str):
                raise WireError(f"QMP input member '{name}' must be a string")
        if len(given) > 1:
            raise WireError("QMP input member 'execute' clashes with 'exec-oob'")
        arguments = value.get("arguments", {})
        if not isinstance(arguments, dict):
            raise WireError("QMP input member 'arguments' must be an object")
        for member in value:
            if member not in (*names, "arguments", "id"):
                raise WireError(f"QMP input member '{member}' is unexpected")
        if not given:
            raise WireError("QMP input lacks member 'execute'")
        return Request(value[given[0]], arguments, given[0] == "exec-oob")

    def _bind(self, request: Request) -> Call:
        if self.capabilities is None and request.command != "qmp_capabilities":
            raise CommandNotFound("Expecting capabilities negotiation with 'qmp_capabilities'")
        self.service.registry.find(request.command)
        if request.out_of_band:
            # No command of a storage daemon may overtake others (spec/qmp.md, Out of band).
            raise UsageError(f"The command {request.command} does not support OOB")
        return self.service.registry.bind(request.command, request.arguments)

    async def _run(self, bound: _Bound) -> bytes:
        """Run a command; returns its reply."""
        try:
            return self._reply(await bound.call.run(self._receiver(bound)), bound)
        except Exception as error:
            return self._failure(error, bound)

    def _receiver(self, bound: _Bound) -> object:
        return self if bound.call.command.takes_session else self.service.host

    def _reply(self, result: object, bound: _Bound) -> bytes:
        return encode({"return": {} if result is None else result} | bound.echo, pretty=self._pretty)

    def _failure(self, error: Exception, bound: _Bound) -> bytes:
        """The reply of a command that raised `error`."""
        name = bound.call.command.name
        if isinstance(error, BlockjobsError):
            _trace_error(command=name, error=error)
            reply = _error_reply(error.error_class, str(error))
        else:
            # A bug in a command must not take the daemon, its other clients and its jobs with it.
            log.error("command %s failed unexpectedly", name, exc_info=error)
            text = f"Internal error: {type(error).__name__}: {error}".partition("\n")[0]
            reply = _error_reply("GenericError", text)
        return encode(reply | bound.echo, pretty=self._pretty)

    def negotiate(self, capabilities: frozenset[str]) -> None:
        """Enter command mode: from now on commands run and events are sent.

        Raises:
            CommandNotFound: it was done before.
        """
        if self.capabilities is not None:
            raise CommandNotFound("Capabilities negotiation is already complete, command ignored")
        self.capabilities = capabilities

    def _subscribe(self) -> None:
        """Events begin behind the reply to the negotiation."""
        if self.capabilities is not None and not self._subscribed and not self._lost.is_set():
            self._subscribed = True
            self._stack.enter_context(self.service.bus.listening(self._on_event))

    def _on_event(self, event: object) -> None:
        if not isinstance(event, Event) or not event.event_name:
            return
        wall_ns = self.service.clock.wall_ns()
        line: dict[str, object] = {"event": event.event_name}
        if any(getattr(event, name) is not None for name in event.__struct_fields__):
            line["data"] = event
        line["timestamp"] = {"seconds": wall_ns // 10**9, "microseconds": wall_ns % 10**9 // 1000}
        if _trace_event.is_on:
            _trace_event(event=event.event_name, data=_json(msgspec.to_builtins(event)))
        self._gate.pass_on(event, encode(line, pretty=self._pretty))

    def _send(self, line: dict[str, object]) -> None:
        self._out.add(encode(line, pretty=self._pretty))
        self._out.send()

    def _forget(self) -> None:
        """Drop what was received and not begun."""
        self._unread.clear()
        self._received.clear()

    def _abort(self) -> None:
        self._forget()
        if self._transport is not None:
            self._transport.abort()


def _shown(request: Request) -> str:
    """The arguments for a trace, but for what may be a secret."""
    return "(not shown)" if request.command in _SECRETIVE else _json(request.arguments)


def _json(value: object) -> str:
    return encode(value).decode().rstrip()


def _error_reply(error_class: str, text: str) -> dict[str, object]:
    return {"error": {"class": error_class, "desc": text}}
