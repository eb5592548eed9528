"""The thread port: blocking work leaves the loop through here and nowhere else."""

import asyncio
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Protocol, TypeVar, TypeVarTuple, cast

from msgspec import Struct

T = TypeVar("T")
Args = TypeVarTuple("Args")

Started = Future[None]
Starter = Callable[[Callable[[], None]], Started]
"""`Offload.start`."""


class Offload(Protocol):
    """Runs functions of plain data away from the loop."""

    cores: int
    """How many functions truly run at once: compressors size their batches by it."""

    @property
    def is_busy(self) -> bool:
        """Whether work is under way that needs processors."""
        ...

    async def run(self, work: Callable[[*Args], T], *args: *Args) -> T:
        """Run `work(*args)` and return its result.

        Shielded: once submitted the work ends even if the waiter is cancelled, so issued I/O is never forgotten.

        Raises:
            Exception: whatever `work` raised.
        Waits: for a free worker and for the work itself.
        """
        ...

    def start(self, work: Callable[[], None]) -> Started:
        """Have `work` done soon, from any thread, without waiting for it: for hints, which nobody misses if they fail.

        Returns:
            What can be cancelled as long as no worker has begun, and waited for in a worker after that.
        """
        ...

    def close(self) -> None:
        """Wait for running work and free the workers; the port is unusable afterwards."""
        ...


class ThreadOffload:
    """A pool of threads. More threads than cores, because most of them sit in system calls.

    Calls that end at about the same time wake the loop once, and with a tenth of what asyncio's own way of waiting for
    a pool's future costs.
    """

    def __init__(self, threads: int | None = None) -> None:
        self.cores = len(os.sched_getaffinity(0))
        self._pool = ThreadPoolExecutor(threads or self.cores + 6, thread_name_prefix="blockjobs")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._over: deque[_Call] = deque()
        self._is_waking = False
        self._under_way = 0

    @property
    def is_busy(self) -> bool:
        """See `Offload`."""
        return self._under_way > 0

    async def run(self, work: Callable[[*Args], T], *args: *Args) -> T:
        """See `Offload`."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._loop, self._is_waking = loop, False
        call = _Call(partial(work, *args), loop.create_future())
        self._pool.submit(self._carry_out, call)
        self._under_way += 1
        try:
            await call.ended
        except asyncio.CancelledError:
            # The system call cannot be recalled, so wait for it before its buffers die.
            if not call.is_over:
                call.ended = loop.create_future()
                await call.ended
            raise
        finally:
            self._under_way -= 1
        if call.error is not None:
            try:
                raise call.error
            finally:
                del call  # whose error has this frame in its traceback
        return cast("T", call.result)

    def _carry_out(self, call: "_Call") -> None:
        """In a worker."""
        try:
            call.result = call.work()
        except BaseException as error:
            call.error = error
        self._over.append(call)
        if not self._is_waking:
            self._is_waking = True
            assert self._loop is not None
            try:
                self._loop.call_soon_threadsafe(self._wake)
            except RuntimeError:  # the loop was closed meanwhile: nobody waits
                self._is_waking = False

    def _wake(self) -> None:
        """In the loop: tell the waiters. A call that ends behind the first line wakes the loop again."""
        self._is_waking = False
        while self._over:
            call = self._over.popleft()
            call.is_over = True
            if not call.ended.done():
                call.ended.set_result(None)

    def start(self, work: Callable[[], None]) -> Started:
        """See `Offload`."""
        return self._pool.submit(work)

    def close(self) -> None:
        """See `Offload`."""
        self._pool.shutdown(wait=True)


class _Call(Struct, eq=False):
    """Work on its way through a thread."""

    work: Callable[[], object]
    ended: "asyncio.Future[None]"
    result: object = None
    error: BaseException | None = None
    is_over: bool = False


class InlineOffload:
    """Runs work in the loop thread after yielding once: deterministic, for simulation."""

    cores = 1
    is_busy = False

    async def run(self, work: Callable[[*Args], T], *args: *Args) -> T:
        """See `Offload`."""
        await asyncio.sleep(0)
        return work(*args)

    def start(self, work: Callable[[], None]) -> Started:
        """See `Offload`."""
        ended: Started = Future()
        work()
        ended.set_result(None)
        return ended

    def close(self) -> None:
        """See `Offload`."""
