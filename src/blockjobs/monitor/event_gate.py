"""The rate limit of chatty events: at most one per second of each kind (spec/qmp.md, Events).

Job and block-job events are never limited. The first of a kind goes out at once; of those that follow within the second
only the last is sent, when the second is over.
"""

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

from blockjobs.base.clock import Clock
from blockjobs.schema.command import Event

_PERIOD_NS: Final = 10**9
# Event → the field that tells kinds apart, if any.
_LIMITED: Final[dict[str, str | None]] = {
    "RTC_CHANGE": None,
    "WATCHDOG": None,
    "BALLOON_CHANGE": None,
    "MEMORY_DEVICE_SIZE_CHANGE": None,
    "VSERPORT_CHANGE": "id",
    "QUORUM_REPORT_BAD": "node_name",
    "QUORUM_FAILURE": None,
}


class EventGate:
    """Sits between the bus and one client's buffer; used as an async context manager, which owns its timers.

    Args:
        clock: measures the second.
        send: takes an encoded event; called at once or from a timer.
    """

    def __init__(self, clock: Clock, send: Callable[[bytes], None]) -> None:
        self._clock = clock
        self._send = send
        self._held: dict[tuple[str, object], bytes | None] = {}
        self._timers: set[asyncio.Task[None]] = set()
        self._group = asyncio.TaskGroup()

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for timer in self._timers:
            timer.cancel()
        await self._group.__aexit__(kind, error, trace)

    def pass_on(self, event: Event, line: bytes) -> None:
        """Send an event, encoded as `line`, now, or hold it until the second of its kind is over."""
        name = event.event_name
        if name not in _LIMITED:
            self._send(line)
            return
        member = _LIMITED[name]
        key = (name, getattr(event, member) if member else None)
        if key in self._held:
            self._held[key] = line
            return
        self._send(line)
        self._held[key] = None
        timer = self._group.create_task(self._release(key))
        self._timers.add(timer)
        timer.add_done_callback(self._timers.discard)

    async def _release(self, key: tuple[str, object]) -> None:
        while True:
            await self._clock.sleep_until(self._clock.now_ns() + _PERIOD_NS)
            line = self._held[key]
            if line is None:
                del self._held[key]
                return
            self._send(line)
            self._held[key] = None
