"""The thread port: blocking work leaves the loop through here and nowhere else."""

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar, TypeVarTuple

T = TypeVar("T")
Args = TypeVarTuple("Args")


class Offload(Protocol):
    """Runs functions of plain data away from the loop."""

    cores: int
    """How many functions truly run at once: compressors size their batches by it."""

    async def run(self, work: Callable[[*Args], T], *args: *Args) -> T:
        """Run `work(*args)` and return its result.

        Shielded: once submitted the work ends even if the waiter is cancelled, so issued I/O is never forgotten.

        Raises:
            Exception: whatever `work` raised.
        Waits: for a free worker and for the work itself.
        """
        ...

    def close(self) -> None:
        """Wait for running work and free the workers; the port is unusable afterwards."""
        ...


class ThreadOffload:
    """A pool of threads. More threads than cores, because most of them sit in system calls."""

    def __init__(self, threads: int | None = None) -> None:
        self.cores = len(os.sched_getaffinity(0))
        self._pool = ThreadPoolExecutor(threads or self.cores + 6, thread_name_prefix="blockjobs")

    async def run(self, work: Callable[[*Args], T], *args: *Args) -> T:
        """See `Offload`."""
        future = asyncio.get_running_loop().run_in_executor(self._pool, work, *args)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            # The loop is being torn down; the system call cannot be recalled, so wait for it before buffers die.
            await asyncio.wait([future])
            raise

    def close(self) -> None:
        """See `Offload`."""
        self._pool.shutdown(wait=True)


class InlineOffload:
    """Runs work in the loop thread after yielding once: deterministic, for simulation."""

    cores = 1

    async def run(self, work: Callable[[*Args], T], *args: *Args) -> T:
        """See `Offload`."""
        await asyncio.sleep(0)
        return work(*args)

    def close(self) -> None:
        """See `Offload`."""
