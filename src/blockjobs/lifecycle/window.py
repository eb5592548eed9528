"""I/O in flight: bounded, drained before the job parks or ends, never cancelled (design §1.3)."""

import asyncio
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self

from blockjobs.lifecycle.runner import Runner

Io = Callable[[], Awaitable[None]]


class Window:
    """Up to `max_in_flight` pieces of I/O at once.

    Unlike a `TaskGroup` it cancels nothing when the body raises: half-published metadata must be finished. Leaving the
    block waits for all pieces, then raises the first failure unless the block itself has raised.
    """

    def __init__(self, runner: Runner, max_in_flight: int) -> None:
        if max_in_flight < 1:
            raise ValueError(f"a window of {max_in_flight} can carry nothing")
        self._runner = runner
        self._max = max_in_flight
        self._in_flight = 0
        self._failure: BaseException | None = None

    async def submit(self, io: Io) -> None:
        """Start `io()` as soon as there is room.

        Raises:
            BaseException: the first failure of an earlier piece; `io` was not started.
        Checkpoint: parks, does not raise on cancel. Waits: for a free place.
        """
        await self._runner.rest(lambda: self._in_flight < self._max or self._failure is not None)
        self._raise_failure()
        self._in_flight += 1
        self._runner.flying.add(self._runner.spawn(self._fly(io)))

    async def drain(self) -> None:
        """Wait until nothing is in flight.

        Raises:
            BaseException: the first failure of a piece.
        Checkpoint: parks, does not raise on cancel. Waits: for the I/O in flight.
        """
        await self._runner.rest(lambda: self._in_flight == 0)
        self._raise_failure()

    async def __aenter__(self) -> Self:
        """Checkpoint: no. Waits: no."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """See the class. Checkpoint: parks, does not raise on cancel. Waits: for the I/O in flight."""
        await self._runner.rest(lambda: self._in_flight == 0)
        if error is None:
            self._raise_failure()

    async def _fly(self, io: Io) -> None:
        try:
            await io()
        except asyncio.CancelledError:
            raise  # only a loop that is torn down cancels I/O
        except BaseException as error:
            self._failure = self._failure or error  # the body raises it
        finally:
            self._in_flight -= 1
            self._runner.land()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
