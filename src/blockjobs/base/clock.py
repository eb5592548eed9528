"""The clock port: everything that waits or stamps goes through it, so that tests run in virtual time."""

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    """What the program may know of time."""

    def now_ns(self) -> int:
        """Monotonic time in nanoseconds; only differences mean something."""
        ...

    def wall_ns(self) -> int:
        """Nanoseconds since the Unix epoch, for event timestamps and history."""
        ...

    async def sleep_until(self, deadline_ns: int) -> None:
        """Wait until `now_ns()` reaches `deadline_ns`; returns at once when that has passed."""
        ...


class SystemClock:
    """The real clock. It is the one that the loop's timers run by, but read anew each time: uvloop's own reading is as
    old as the present turn of the loop, in milliseconds.
    """

    def now_ns(self) -> int:
        """See `Clock`."""
        return time.monotonic_ns()

    def wall_ns(self) -> int:
        """See `Clock`."""
        return time.time_ns()

    async def sleep_until(self, deadline_ns: int) -> None:
        """See `Clock`."""
        await asyncio.sleep(max(0.0, (deadline_ns - self.now_ns()) / 1e9))
        while (left_ns := deadline_ns - self.now_ns()) > 0:  # noqa: ASYNC110  # its timer counts from an older reading
            await asyncio.sleep(left_ns / 1e9)
