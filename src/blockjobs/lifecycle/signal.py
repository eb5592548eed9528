"""Waiting for "something changed": every waiter looks for itself, so nobody can miss or steal a wake-up."""

import asyncio


class Signal:
    """Wakes all who wait now. Test the condition, then wait: both happen in one step of the loop, so none is lost."""

    def __init__(self) -> None:
        self._waiters: set[asyncio.Event] = set()

    def notify(self) -> None:
        """Wake everyone; they test their condition again."""
        for waiter in self._waiters:
            waiter.set()

    async def wait(self) -> None:
        """Wait for the next `notify`. Checkpoint: no. Waits: for that."""
        waiter = asyncio.Event()
        self._waiters.add(waiter)
        try:
            await waiter.wait()
        finally:
            self._waiters.discard(waiter)
