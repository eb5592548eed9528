"""A session outlives its connections: what was under way when one broke is done again over the next.

Connected, a request goes out at once. Without a connection requests wait, at most `reconnect_delay_s` after it was
lost; from then on, or if somebody called `release`, they fail at once until there is a connection again. Meanwhile the
session goes on trying, with growing pauses. All NBD requests may be repeated: they say where and what, not "next".
"""

import asyncio
import errno
import logging
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from blockjobs.base.clock import Clock
from blockjobs.base.errors import IoFailure, UsageError, WireError
from blockjobs.block.dial import ConnectFailed
from blockjobs.block.drivers.nbd.connection import Connection
from blockjobs.block.drivers.nbd.link import ConnectionLost
from blockjobs.block.drivers.nbd.negotiation import Denied

log = logging.getLogger(__name__)

T = TypeVar("T")

CONNECT_S_MAX: Final = 10.0
"""A server that has not shown the export by then is taken for one that never will."""
PAUSE_S_MIN: Final = 0.1
PAUSE_S_MAX: Final = 5.0
"""Pauses between attempts double from one to the other."""
RELEASE_S: Final = 0.5
"""What a server that still answers gets to finish what is under way when it is to be released."""
_NS: Final = 1_000_000_000

Connect = Callable[[], Awaitable[Connection]]


class Session:
    """Requests to one export, over as many connections as it takes, one at a time.

    Attributes:
        connection: None while there is none.
        on_loss: called whenever a connection breaks.
    """

    def __init__(self, connect: Connect, *, clock: Clock, name: str, reconnect_delay_s: int) -> None:
        self.connection: Connection | None = None
        self.on_loss: Callable[[], None] = _nothing
        self._connect, self._clock, self._name = connect, clock, name
        self._delay_ns = reconnect_delay_s * _NS
        self._gives_up_ns = 0
        self._released = self._closed = False
        self._pause_s = PAUSE_S_MIN
        self._trying: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()

    async def open(self, timeout_s: int) -> Connection:
        """Connect for the first time; 0: try once.

        Raises:
            UsageError: no connection, or not to what we want.
        Waits: at most a little longer than `timeout_s`. Checkpoint: no.
        """
        deadline = self._clock.now_ns() + timeout_s * _NS
        while True:
            try:
                self._adopt(await self._attempt())
                assert self.connection is not None
                return self.connection
            except ConnectFailed:
                if self._clock.now_ns() >= deadline:
                    raise
            await self._clock.sleep_until(min(deadline, self._clock.now_ns() + int(self._pause_s * _NS)))
            self._pause_s = min(PAUSE_S_MAX, 2 * self._pause_s)

    async def perform(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        """Do `work` over the connection there is, again over the next one if that breaks.

        Raises:
            IoFailure: EIO; there is no connection.
            Exception: whatever else `work` raises.
        Waits: for the server and for connections. Checkpoint: no.
        """
        deadline: int | None = None
        while True:
            connection = self.connection
            if connection is None:
                connection = await self._next(deadline)
            try:
                return await work(connection)
            except ConnectionLost as lost:
                if not self._delay_ns or self._released or self._closed:
                    raise self._failure() from lost
                deadline = deadline or self._clock.now_ns() + self._delay_ns
                self._lost(connection)

    def release(self) -> None:
        """Let requests fail that nobody answers: those that wait for a connection at once, those under way soon."""
        if self.connection is None:
            self._released = True
            self._wake()
            return
        connection, stuck = self.connection, self.connection.pending

        def give_up() -> None:
            if connection is self.connection and stuck & connection.pending:
                self._released = True
                connection.fail("its requests were cancelled")

        if stuck:
            asyncio.get_running_loop().call_later(RELEASE_S, give_up)

    async def close(self) -> None:
        """End; requests that are still there fail. Waits: a moment. Checkpoint: no."""
        self._closed = True
        self._wake()
        if self._trying is not None:
            self._trying.cancel()
            await asyncio.wait([self._trying])
        if self.connection is not None:
            connection, self.connection = self.connection, None
            await connection.close()

    # --- losing and finding connections

    def on_lost(self, connection: Connection) -> None:
        """The connection is gone; called by it."""
        self._lost(connection)

    def _lost(self, connection: Connection) -> None:
        if connection is not self.connection or self._closed:
            return
        self.connection = None
        log.warning("node '%s': the connection to its NBD server is lost: %s", self._name, connection.lost)
        self.on_loss()
        self._gives_up_ns = self._clock.now_ns() + self._delay_ns
        if connection.has_answered:
            self._pause_s = PAUSE_S_MIN
        if self._trying is None or self._trying.done():
            self._trying = asyncio.get_running_loop().create_task(self._reconnect(), name=f"nbd {self._name}")

    async def _reconnect(self) -> None:
        while self.connection is None:
            # Also before the first attempt: a server that takes us in and hangs up must not keep us busy.
            await self._clock.sleep_until(self._clock.now_ns() + int(self._pause_s * _NS))
            self._pause_s = min(PAUSE_S_MAX, 2 * self._pause_s)
            try:
                self._adopt(await self._attempt())
            except UsageError as error:
                log.info("node '%s': no connection to its NBD server yet: %s", self._name, error)
                continue
            log.warning("node '%s': connected to its NBD server again", self._name)

    async def _attempt(self) -> Connection:
        """Connect and negotiate, in bounded time.

        Raises:
            ConnectFailed: the server is not there, or broke off; it may be better later.
            UsageError: it does not let us have what we want.
        """
        try:
            async with asyncio.timeout(CONNECT_S_MAX):
                return await self._connect()
        except TimeoutError as error:
            raise ConnectFailed(f"the NBD server did not answer within {CONNECT_S_MAX:g} seconds") from error
        except ConnectionLost as error:
            raise ConnectFailed(str(error)) from error
        except WireError as error:
            raise Denied(str(error)) from error

    def _adopt(self, connection: Connection) -> None:
        if connection.lost is not None:
            raise ConnectFailed(str(connection.lost))
        self.connection, self._released = connection, False
        self._wake()

    async def _next(self, deadline: int | None) -> Connection:
        """The next connection, if it comes in time.

        Raises:
            IoFailure: it did not.
        """
        while not self._closed:
            if self.connection is not None:
                return self.connection
            left_ns = min(self._gives_up_ns, deadline or self._gives_up_ns) - self._clock.now_ns()
            if self._released or left_ns <= 0:
                break
            try:
                async with asyncio.timeout(left_ns / _NS):
                    await self._changed.wait()
            except TimeoutError:
                continue
        raise self._failure()

    def _wake(self) -> None:
        """Let whoever waits look again."""
        self._changed.set()
        self._changed = asyncio.Event()

    def _failure(self) -> IoFailure:
        return IoFailure(errno.EIO, f"node '{self._name}': no connection to its NBD server")


def _nothing() -> None:
    pass
