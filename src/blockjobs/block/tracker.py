"""Requests that overlap wait for each other, in the order they came (design §1.5)."""

import asyncio
from types import TracebackType

from blockjobs.base.span import Span


class Ticket:
    """One request's place in the queue of a node.

    Attributes:
        at, end: the bytes it covers.
        exclusive: nobody else may be there meanwhile; two shared tickets may overlap.
    """

    __slots__ = ("_done", "_tracker", "at", "end", "exclusive")

    def __init__(self, tracker: "RangeTracker", span: Span, *, exclusive: bool) -> None:
        self._tracker, self.at, self.end, self.exclusive = tracker, span.at, span.at + span.length, exclusive
        self._done: asyncio.Future[None] | None = None

    def blocks(self, later: "Ticket") -> bool:
        """Whether `later`, which came after, must wait for this one."""
        return (self.exclusive or later.exclusive) and max(self.at, later.at) < min(self.end, later.end)

    def done(self) -> asyncio.Future[None]:
        """What becomes true when the request ends."""
        if self._done is None:
            self._done = asyncio.get_running_loop().create_future()
        return self._done

    def shorten(self, end: int) -> None:
        """Give the bytes from `end` on free for those who come from now on."""
        self.end = max(self.at, min(self.end, end))

    def drop(self) -> None:
        """The request has ended, however it did."""
        self._tracker.live.remove(self)
        if self._done is not None:
            self._done.set_result(None)

    async def __aenter__(self) -> "Ticket":
        await self._tracker.enter(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.drop()


class RangeTracker:
    """The requests under way on one node.

    A ticket waits only for earlier overlapping tickets of which at least one side is exclusive, so waits always point
    back in time and can form no cycle. A request never takes a second overlapping ticket of the same node.
    """

    def __init__(self) -> None:
        self.live: list[Ticket] = []

    def shared(self, span: Span) -> Ticket:
        """A ticket that tolerates other shared ones; enter it with `async with`."""
        return Ticket(self, span, exclusive=False)

    def exclusive(self, span: Span) -> Ticket:
        """A ticket that tolerates nobody; enter it with `async with`."""
        return Ticket(self, span, exclusive=True)

    def is_free(self, span: Span, *, exclusive: bool) -> bool:
        """Whether such a ticket would be entered without waiting."""
        at, end = span.at, span.at + span.length
        for ticket in self.live:
            if (exclusive or ticket.exclusive) and ticket.at < end and at < ticket.end:
                return False
        return True

    async def enter(self, ticket: Ticket) -> None:
        """Queue the ticket and wait for all earlier ones in the way; a waiter that is cancelled gives its place up.

        Waits: for requests of the same node that overlap.
        """
        # Tickets in front can only vanish, and those behind never block: what is in the way now is all there will be.
        obstacles = [earlier for earlier in self.live if earlier.blocks(ticket)]
        self.live.append(ticket)
        try:
            for earlier in obstacles:
                if earlier in self.live:
                    await asyncio.shield(earlier.done())
        except BaseException:
            ticket.drop()
            raise
