"""QMP without a socket: commands run on a host in this process, with the checks and the JSON that a client sees.

The command line steers its own jobs through this, so that one piece of code serves them and those of a server.
"""

import asyncio
from collections.abc import Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import msgspec

from blockjobs.base.errors import BlockjobsError
from blockjobs.monitor import commands  # noqa: F401  importing it makes them known
from blockjobs.monitor.client import QmpError
from blockjobs.schema.command import Event, qmp

if TYPE_CHECKING:
    from blockjobs.host import Host


class LocalClient:
    """What `QmpClient` offers, for a host in the same event loop.

    async with LocalClient(host) as qmp:
        await qmp.execute("block-stream", job_id="stream", device="disk")
    """

    def __init__(self, host: "Host") -> None:
        self._host = host
        self._events: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._listening = ExitStack()

    async def __aenter__(self) -> Self:
        self._listening.enter_context(self._host.bus.listening(self._note))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listening.close()
        self._events.put_nowait(None)

    async def execute(self, name: str, /, **arguments: Any) -> Any:
        """Run a command; `job_id=` stands for `job-id`, None is left out.

        Raises:
            QmpError: it was refused.
        """
        given = {key.replace("_", "-"): value for key, value in arguments.items() if value is not None}
        return await self.command(name, given)

    async def command(self, name: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """Run a command with arguments spelled as on the wire; see `execute`."""
        try:
            call = qmp.bind(name, arguments or {})
            assert not call.command.takes_session, f"{name} is about a connection, and there is none"
            async with self._host.jobs.control:
                result = await call.run(self._host)
        except BlockjobsError as error:
            raise QmpError(error.error_class, str(error)) from error
        return {} if result is None else msgspec.to_builtins(result)

    async def event(self) -> dict[str, Any] | None:
        """The next event, in order; None when the client was closed."""
        return await self._events.get()

    def _note(self, event: object) -> None:
        if isinstance(event, Event) and event.event_name:
            self._events.put_nowait({"event": event.event_name, "data": msgspec.to_builtins(event)})
