"""The only lock of the control plane: whoever holds it never sees a group half settled."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Final


class Control:
    """A fair lock that the task holding it may enter again, and may lend to one it waits for.

    In-band commands hold it while they run; `JobHandle.finalize()` and its like enter it themselves, so that they
    work for callers who hold it (a monitor) and for those who do not (a program that embeds a host).
    A job's body never waits for it: a settler that holds it may be waiting for that body.
    """

    def __init__(self) -> None:
        self._lock: Final = asyncio.Lock()
        self._owner: asyncio.Task[Any] | None = None
        self._guests: set[asyncio.Task[Any]] = set()
        self._depth = 0

    def locked(self) -> bool:
        """Whether anyone holds it."""
        return self._lock.locked()

    async def __aenter__(self) -> None:
        """Take the lock, or go one deeper. Checkpoint: no. Waits: for the holder to finish its command."""
        task = asyncio.current_task()
        assert task is not None
        if task is self._owner or task in self._guests:
            self._depth += 1
            return
        await self._lock.acquire()
        self._owner, self._depth = task, 1

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Undo one entry. Checkpoint: no. Waits: no."""
        self._depth -= 1
        if self._depth == 0:
            self._owner = None
            self._lock.release()

    @contextmanager
    def lent_to(self, task: asyncio.Task[Any]) -> Iterator[None]:
        """Let `task`, which the holder waits for, enter as if it were the holder."""
        assert self._lock.locked()
        self._guests.add(task)
        try:
            yield
        finally:
            self._guests.discard(task)
