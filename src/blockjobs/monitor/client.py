"""A small QMP client for the command line, tests and embedding programs; it speaks to a real QEMU as well."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from types import TracebackType
from typing import Any, Final, Protocol, Self, cast

from blockjobs.base.errors import BlockjobsError, WireError
from blockjobs.wire.qmp_encode import encode
from blockjobs.wire.qmp_lines import Limits, Malformed, Scanner

_EVENTS_MAX: Final = 65_536  # unread; the oldest are dropped beyond it
_REPLY_LIMITS: Final = Limits(token_bytes=256 * 2**20, tokens=16 * 2**20)


class QmpError(BlockjobsError):
    """The server refused a command.

    Attributes:
        qmp_class: the error's class, for instance `DeviceNotActive`.
        desc: its text.
    """

    def __init__(self, qmp_class: str, desc: str) -> None:
        self.qmp_class, self.desc = qmp_class, desc
        super().__init__(desc)


class Commander(Protocol):
    """Whoever carries out QMP commands and tells events: a connection, or a host in this process."""

    async def execute(self, name: str, /, **arguments: Any) -> Any:
        """Run a command; `job_id=` is sent as `job-id`, None is not sent.

        Raises:
            QmpError: it was refused.
            WireError: the connection ended before the reply.
        """
        ...

    async def command(self, name: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """Run a command with arguments spelled as on the wire; see `execute`."""
        ...

    async def event(self) -> dict[str, Any] | None:
        """The next event, in order; None when there will be no more."""
        ...


class QmpClient(asyncio.Protocol):
    """A negotiated connection to a QMP server.

        async with await QmpClient.connect("/run/blockjobs.sock") as qmp:
            jobs = await qmp.execute("query-jobs")

    Attributes:
        greeting: what the server said first: `version` and `capabilities`.
    """

    def __init__(self) -> None:
        """Use `connect`."""
        self.greeting: dict[str, Any] = {}
        self._scanner = Scanner(_REPLY_LIMITS)
        self._transport: asyncio.Transport | None = None
        self._greeted: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._events: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._last_id = 0
        self._lost = asyncio.Event()

    @classmethod
    async def connect(cls, address: str, *, timeout_s: float = 10.0) -> Self:
        """Connect and negotiate.

        Args:
            address: path of a unix socket, or `host:port` if it has a colon and no slash.
            timeout_s: for connecting and the greeting; a server that is busy with another client stays silent.

        Raises:
            OSError: nobody listens there.
            TimeoutError: no greeting came.
            WireError: what came is no QMP.
            QmpError: the negotiation was refused.
        """
        loop = asyncio.get_running_loop()
        client: Self
        async with asyncio.timeout(timeout_s):
            if ":" in address and "/" not in address:
                host, _, port = address.rpartition(":")
                _, client = await loop.create_connection(cls, host.strip("[]"), int(port))
            else:
                _, client = await loop.create_unix_connection(cls, address)
            try:
                client.greeting = await client._greeted
                await client.command("qmp_capabilities")
            except BaseException:
                client._abort()
                raise
        return client

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def execute(self, name: str, /, **arguments: Any) -> Any:
        """Run a command; `job_id=` is sent as `job-id`, None is not sent.

        Raises:
            QmpError: it was refused.
            WireError: the connection ended before the reply.
        """
        given = {key.replace("_", "-"): value for key, value in arguments.items() if value is not None}
        return await self.command(name, given)

    async def command(self, name: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """Run a command with arguments spelled as on the wire; see `execute`."""
        if self._transport is None or self._transport.is_closing():
            raise WireError("The connection is closed")
        self._last_id += 1
        request: dict[str, Any] = {"execute": name, "id": self._last_id}
        if arguments:
            request["arguments"] = dict(arguments)
        reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting[self._last_id] = reply
        self._transport.write(encode(request))
        return await reply

    async def event(self) -> dict[str, Any] | None:
        """The next event, in order; None when the connection has ended."""
        event = await self._events.get()
        if event is None:
            self._events.put_nowait(None)
        return event

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """All events from now until the connection ends."""
        while (event := await self.event()) is not None:
            yield event

    async def close(self) -> None:
        """Hang up."""
        if self._transport is not None:
            self._transport.close()
            await self._lost.wait()

    async def closed(self) -> None:
        """Wait until the server hangs up."""
        await self._lost.wait()

    # The transport's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are so by behaviour, not by inheritance

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        for received in self._scanner.feed(data):
            if isinstance(received, Malformed) or not isinstance(received.json, dict):
                self._fail(WireError("The other side does not speak QMP"))
                self._abort()
                return
            self._take(received.json)

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        del exc
        self._fail(WireError("The connection was closed by the other side"))
        self._transport = None
        self._events.put_nowait(None)
        self._lost.set()

    def _take(self, line: dict[str, Any]) -> None:
        if "event" in line:
            if self._events.qsize() >= _EVENTS_MAX:
                self._events.get_nowait()
            self._events.put_nowait(line)
        elif "QMP" in line:
            if not self._greeted.done():
                self._greeted.set_result(line["QMP"])
        else:
            number = line.get("id")
            reply = self._waiting.pop(number, None) if isinstance(number, int) else None
            if reply is None or reply.done():
                return
            if "error" in line:
                reply.set_exception(QmpError(line["error"]["class"], line["error"]["desc"]))
            else:
                reply.set_result(line.get("return"))

    def _fail(self, error: WireError) -> None:
        for future in (self._greeted, *self._waiting.values()):
            if not future.done():
                future.set_exception(error)
        if self._greeted.done() and not self._greeted.cancelled():
            self._greeted.exception()  # seen, even if nobody waits any more
        self._waiting.clear()

    def _abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()
