"""Virtual time: a loop whose clock jumps to the next deadline whenever every task is blocked (design §3.7).

    def test_nightly() -> None:
        async def scenario() -> None:
            ...
            await asyncio.sleep(24 * 3600)      # takes no time

        run(scenario())

What waits for a real thread, a socket or a child process cannot work here: time would jump past it. Use
`InlineOffload`, which runs work in the loop's own thread.
"""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

T = TypeVar("T")

EPOCH_NS: Final = 1_700_000_000 * 10**9
"""Wall-clock time at which every virtual world begins."""


class Deadlock(RuntimeError):
    """Every task is blocked and no timer is armed: nothing can ever happen again."""


class _JumpingSelector(selectors.SelectSelector):
    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if ready:
            return ready
        if timeout is None:
            raise Deadlock("every task is blocked and no timer is armed")
        self.now_s += max(0.0, timeout)
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An event loop in virtual time, for `asyncio.Runner(loop_factory=VirtualTimeLoop)`; `run` is the short way."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._jumping.now_s


class VirtualClock:
    """The `Clock` port in virtual time."""

    def now_ns(self) -> int:
        """See `Clock`."""
        return round(asyncio.get_running_loop().time() * 1e9)

    def wall_ns(self) -> int:
        """See `Clock`; starts at `EPOCH_NS`."""
        return EPOCH_NS + self.now_ns()

    async def sleep_until(self, deadline_ns: int) -> None:
        """See `Clock`."""
        await asyncio.sleep(max(0, deadline_ns - self.now_ns()) / 1e9)


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end in virtual time, as `asyncio.run` does in real time.

    Raises:
        Deadlock: at the moment when nothing can happen any more; what the tasks waited for is in the traceback's notes.
        BaseException: whatever the coroutine raises.
    """
    runner = asyncio.Runner(loop_factory=VirtualTimeLoop)
    loop = runner.get_loop()
    try:
        return runner.run(work)
    except Deadlock as deadlock:
        for task in asyncio.all_tasks(loop):
            deadlock.add_note(f"blocked: {task!r}")
        raise
    finally:
        _close(runner, loop)


def _close(runner: asyncio.Runner, loop: asyncio.AbstractEventLoop) -> None:
    try:
        runner.close()
    except Deadlock:
        # The tasks cannot even be cancelled; the deadlock that led here is on its way to the caller.
        loop.close()
