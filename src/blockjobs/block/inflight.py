"""Requests under way on a node, so that a drain can wait for them and say which one it waits for."""

import asyncio
from types import TracebackType
from typing import NamedTuple

from blockjobs.base.trace import TracePoint
from blockjobs.block.tally import NodeTally

_trace_error = TracePoint("block_io_error", "a request to a node has failed")


class Request(NamedTuple):
    """For messages: what is under way, where."""

    what: str
    at: int
    length: int

    def __str__(self) -> str:
        return f"{self.what} at {self.at}+{self.length}"


class InFlight:
    """A bag of requests with a wait for "empty"; those that end are counted.

    Args:
        tally: where.
        name: of the node, for messages.
    """

    def __init__(self, tally: NodeTally, name: str = "") -> None:
        self.tally, self.name = tally, name
        self._requests: dict[int, Request] = {}
        self._next = 0
        self._empty: asyncio.Future[None] | None = None

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def oldest(self) -> Request | None:
        """The request that has been under way longest."""
        return next(iter(self._requests.values()), None)

    def request(self, what: str, at: int, length: int) -> "_Entry":
        """Count a request inside the `with` block."""
        return _Entry(self, Request(what, at, length))

    async def empty(self) -> None:
        """Wait until nothing is under way. Waits: for requests."""
        while self._requests:
            if self._empty is None:
                self._empty = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._empty)

    def enter(self, request: Request) -> int:
        """Note a request; the number is for `leave`."""
        self._next += 1
        self._requests[self._next] = request
        return self._next

    def leave(self, number: int) -> None:
        """The request has ended, however it did."""
        del self._requests[number]
        if not self._requests and self._empty is not None:
            self._empty.set_result(None)
            self._empty = None


class _Entry:
    __slots__ = ("_bag", "_began_ns", "_number", "_request")

    def __init__(self, bag: InFlight, request: Request) -> None:
        self._bag, self._request = bag, request

    def __enter__(self) -> None:
        self._number = self._bag.enter(self._request)
        self._began_ns = self._bag.tally.clock.now_ns()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        what, at, length = self._request
        if error is not None:
            _trace_error(node=self._bag.name, request=self._request, error=error)
        self._bag.tally.ended(what, at + length, length, began_ns=self._began_ns, failed=error is not None)
        self._bag.leave(self._number)
