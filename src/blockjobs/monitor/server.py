"""A monitor: a chardev whose clients speak QMP. A program may have several (spec/qmp.md, Connections)."""

import asyncio
import logging
from typing import Final

from blockjobs.monitor.chardev import Chardev
from blockjobs.monitor.session import Service, Session

log = logging.getLogger(__name__)

_FINISH_S_MAX: Final = 10.0


class Monitor:
    """Serves one client after the other on a chardev.

    Args:
        chardev: where clients come from.
        service: what they get.
        pretty: the monitor option of that name.
    """

    def __init__(self, chardev: Chardev, service: Service, *, pretty: bool = False) -> None:
        self._chardev = chardev
        self._service = service
        self._pretty = pretty
        self._session: Session | None = None
        self._connected = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._closing = False

    async def start(self, *, wait_for_client: bool = False) -> None:
        """Begin to serve, in a task that this object owns until `close`.

        Args:
            wait_for_client: return only when the first client is there (the option `wait=on`).

        Raises:
            UsageError: the chardev cannot be opened.
        """
        await self._chardev.open()
        self._task = asyncio.get_running_loop().create_task(self._serve(), name="monitor")
        if wait_for_client:
            await self._connected.wait()

    async def close(self) -> None:
        """Accept nobody any more; let the running command reply, and end the connection behind that reply."""
        self._closing = True
        session = self._session
        if self._task is not None and session is None:
            self._task.cancel()
            await asyncio.wait([self._task])
        # Before the client sees the end of its connection: what it does next must not find the socket file.
        await self._chardev.close()
        if self._task is None or session is None:
            return
        session.finish()
        done, _ = await asyncio.wait([self._task], timeout=_FINISH_S_MAX)
        if not done:
            log.warning("a command is still running: its client is dropped")
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _serve(self) -> None:
        while not self._closing:
            session = Session(self._service, pretty=self._pretty, guarded=self._chardev.guarded)
            if not await self._chardev.attach(session):
                return
            self._session = session
            self._connected.set()
            try:
                await session.run()
            finally:
                session.abort()
                self._session = None
                if not self._closing:
                    self._connected.clear()
