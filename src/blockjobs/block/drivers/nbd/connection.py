"""A connection that has been negotiated: requests go out, many at once, and each waits for its own answer."""

import asyncio
from itertools import count
from typing import Final

from blockjobs.base.buffers import Buffer
from blockjobs.block.drivers.nbd.link import ConnectionLost, Link
from blockjobs.block.drivers.nbd.negotiation import Terms
from blockjobs.block.drivers.nbd.replies import Operation, ReplyParser
from blockjobs.wire.nbd import Command, CommandFlag
from blockjobs.wire.nbd_requests import Extent, Request, encode_request

REQUESTS_IN_FLIGHT_MAX: Final = 64
NO_FLAGS: Final = CommandFlag(0)


class Connection:
    """What a session sends its requests through while it lasts.

    Attributes:
        terms: what was agreed on.
    """

    def __init__(self, link: Link, terms: Terms) -> None:
        self.terms, self._link = terms, link
        self._parser = ReplyParser(structured=terms.structured, extended=terms.extended, context=terms.context)
        self._cookies = count(1)
        self._slots = asyncio.Semaphore(REQUESTS_IN_FLIGHT_MAX)
        self._sending = asyncio.Lock()
        link.hand_over(self._parser)

    @property
    def lost(self) -> ConnectionLost | None:
        """Why it is of no use any more."""
        return self._link.lost

    @property
    def has_answered(self) -> bool:
        """Whether the server has answered anything yet."""
        return self._parser.answered > 0

    @property
    def pending(self) -> frozenset[int]:
        """The requests under way, by cookie."""
        return frozenset(self._parser.pending)

    async def request(
        self,
        command: Command,
        at: int,
        length: int,
        *,
        flags: CommandFlag = NO_FLAGS,
        buffer: memoryview | None = None,
        payload: Buffer | None = None,
    ) -> list[Extent] | None:
        """Make one request; the extents of a block status, else None.

        Args:
            buffer: where a read puts its bytes. Whoever is cancelled here gets no more bytes into it.
            payload: what a write writes; it must not change until this returns.

        Raises:
            Refused: the server said no.
            ConnectionLost: nobody knows whether it was done.
        Waits: for earlier requests and the server. Checkpoint: no.
        """
        async with self._slots:
            if self._link.lost is not None:
                raise self._link.lost
            operation = Operation(command, at, length, buffer)
            cookie = next(self._cookies)
            header = encode_request(Request(flags, command, cookie, at, length), extended=self.terms.extended)
            self._parser.pending[cookie] = operation
            try:
                await self._send(header, payload)
                return await operation.done
            except BaseException:
                self._parser.abandon(operation)
                raise

    async def _send(self, header: bytes, payload: Buffer | None) -> None:
        async with self._sending:
            try:
                if payload is None:
                    await self._link.writable()
                    self._link.send(header)
                else:
                    await self._link.send_all(header, payload)
            except asyncio.CancelledError:
                # Half a request has gone out; the server would take the next one for the rest of it.
                self._link.fail("a request was given up while it was being sent")
                raise

    def fail(self, reason: str) -> None:
        """Give the connection up; everything under way is lost."""
        self._link.fail(reason)

    async def close(self) -> None:
        """Say good-bye. Waits: a moment. Checkpoint: no."""
        farewell = encode_request(Request(0, Command.DISCONNECT, 0, 0, 0), extended=self.terms.extended)
        await self._link.close(farewell)
