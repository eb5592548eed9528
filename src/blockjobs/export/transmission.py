"""The transmission phase of one client: requests out of a receive buffer, replies gathered into one write.

All complete requests in the buffer are begun at once; a read whose bytes are at hand is answered on the spot, the rest
runs in tasks of which a client has at most `REQUESTS_MAX`. Nothing more is read from a client that has so many, that
does not take its replies, or for whose next request there is no memory (`budget`).
"""

import asyncio
import logging
from collections import deque
from typing import TYPE_CHECKING, Final, Protocol

from blockjobs.base.buffers import Buffer
from blockjobs.base.errors import IoFailure, WireError
from blockjobs.base.units import KiB, MiB
from blockjobs.block.drivers.file_medium import CACHED_WRITE_BYTES_MAX
from blockjobs.block.quick import read_now, write_now
from blockjobs.export.budget import Budget
from blockjobs.export.buffers import COPY_ALIGN, REPLIES_BYTES, SHORT_BYTES_MAX, Buffers
from blockjobs.export.nbd_export import ExportClosed
from blockjobs.export.negotiation import Agreed
from blockjobs.export.plain import PlainRequests
from blockjobs.export.replies import Replies
from blockjobs.export.serve import BadRequest, check, cost_bytes, payload_bytes, serve
from blockjobs.wire.nbd import REQUEST_BYTES_MAX, Command, CommandFlag
from blockjobs.wire.nbd_requests import Request, decode_request, request_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

log = logging.getLogger(__name__)

RECEIVE_BYTES: Final = 64 * KiB - COPY_ALIGN
"""And a request's header: if a long write fills the buffer, its rest goes to an aligned place in its own."""
REQUESTS_MAX: Final = 64
"""Under way at once for one client; QEMU's server has 16."""
TURN_REQUESTS_MAX: Final = 64
"""So many requests of one client are begun before others get their turn."""
UNREAD_REPLIES_MAX: Final = 64
"""A client that has not taken so many replies gets no more before it has taken all of them, however short they are."""
KNOWN_BYTES_MIN: Final = 2 * MiB
"""So many bytes must move without a rest before a client is trusted with the last of the memory."""
UNSENT_BYTES_HIGH: Final = 2 * MiB
UNSENT_BYTES_LOW: Final = 512 * KiB
GATHER_BYTES: Final = 256 * KiB
"""So many bytes of replies are put together before they are handed to the kernel."""
INLINE_BYTES_MAX: Final = 1 * MiB
"""Longer reads leave the loop's thread even if their bytes are at hand."""
_PLAIN: Final = (0, int(CommandFlag.PAYLOAD_LEN))
"""Flags of writes that ask for nothing but that the bytes be written."""


class Channel(Protocol):
    """The connection, as this phase sees it."""

    def send(self, buffers: "Sequence[Buffer]") -> None:
        """Send, as far as the client takes it; the rest waits in memory."""
        ...

    def send_now(self, pieces: "Sequence[memoryview]", length: int) -> int:
        """As `send`, but of memory that is used for something else afterwards; `length` bytes together.

        Returns `unsent_bytes()`.
        """
        ...

    def unsent_bytes(self) -> int:
        """What waits in memory."""
        ...

    def read_on(self, wanted: bool) -> None:
        """Whether to read more from the client."""
        ...

    def close(self) -> None:
        """End once everything is sent."""
        ...

    def abort(self) -> None:
        """End now."""
        ...

    def wait_until_taken(self) -> None:
        """Say `set_writable(False)`, and True once the client has taken everything."""
        ...


class Transmission:
    """See the module.

    Attributes:
        moved_bytes: payload received and replies sent so far; whoever holds memory without moving bytes is stuck.
    """

    def __init__(self, channel: Channel, agreed: Agreed, budget: Budget, buffers: Buffers) -> None:
        self._channel, self._agreed, self._budget, self._buffers = channel, agreed, budget, buffers
        self._on_the_way: deque[tuple[int, Buffer]] = deque()
        self._export = agreed.export
        self._replies = Replies(structured=agreed.structured, extended=agreed.extended)
        self._plain = PlainRequests(agreed, self._replies, buffers.replies)
        self._header_bytes = request_bytes(extended=agreed.extended)
        self._view = memoryview(bytearray(RECEIVE_BYTES + request_bytes(extended=agreed.extended)))
        self._start = self._end = 0
        self._skip = 0
        self._incoming: tuple[Request, memoryview] | None = None
        self._filled = 0
        self._deferred: Request | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._out: list[Buffer] = []
        self._out_bytes = 0
        self._flush_scheduled = False
        self._unsent_bytes = 0
        self._spent_bytes = 0
        self._writable = True
        self._is_reading = False
        self._ending = self._gone = False
        self._sent_bytes = self._received_bytes = 0
        self._unread_replies = 0
        self._known_at_bytes = KNOWN_BYTES_MIN
        self._next_turn_scheduled = False

    # --- from the connection

    def begin(self, rest: bytes) -> None:
        """Start, with what the client sent behind its last option."""
        for at in range(0, len(rest), RECEIVE_BYTES):
            piece = rest[at : at + RECEIVE_BYTES]
            while piece and not self._gone:
                room = self.room()
                count = min(len(room), len(piece))
                room[:count] = piece[:count]
                self.received(count)
                piece = piece[count:]
        self._pace()

    def room(self) -> memoryview:
        """Where the next bytes go: straight into a write's own buffer, if it is known."""
        if self._incoming is not None:
            return self._incoming[1][self._filled :]
        if self._end == len(self._view):
            kept = self._end - self._start
            assert kept < len(self._view), "nothing is read while the buffer is full"
            self._view[:kept] = bytes(self._view[self._start : self._end])
            self._start, self._end = 0, kept
        return self._view[self._end :]

    def received(self, count: int) -> bool:
        """So many bytes were put into `room()`. Returns whether nothing happens before the client sends something."""
        if self._gone:
            return False
        self._received_bytes += count
        if self._incoming is not None:
            request, content = self._incoming
            self._filled += count
            if self._filled < len(content):
                return self.is_at_rest
            self._incoming = None
            if self._write_now(request, content):
                self._budget.give(cost_bytes(request))
            else:
                self._start_task(request, content)
        else:
            self._end += count
        self._advance()
        return self.is_at_rest

    def set_writable(self, writable: bool) -> None:
        """Whether the client takes its replies."""
        self._writable = writable
        self._account()
        if writable:
            self._advance()

    def lost(self) -> None:
        """The connection is gone; requests under way end by themselves and give back what they hold."""
        self._gone = True
        self._budget.leave(self._granted)
        self._budget.charge(-self._unsent_bytes)
        self._unsent_bytes = 0
        if self._incoming is not None:
            self._budget.give(len(self._incoming[1]))
            self._incoming = None
        self._out.clear()
        self._on_the_way.clear()
        # The garbage collector finds the rest when it likes, and thousands may come and go until then.
        self._view = memoryview(bytearray(1))
        self._start = self._end = 0

    @property
    def moved_bytes(self) -> int:
        """See the class."""
        return self._received_bytes + self._sent_bytes - self._channel.unsent_bytes()

    @property
    def is_at_rest(self) -> bool:
        """Whether nothing happens before the client sends something."""
        return not (self._tasks or self._gone or self._ending or self._next_turn_scheduled or self._deferred)

    @property
    def is_holding(self) -> bool:
        """Whether it is the client's turn: memory is held until he sends or takes something."""
        self._account()
        return self._incoming is not None or self._unsent_bytes > 0

    def distrust(self) -> None:
        """The client rests while others wait for memory that it holds."""
        self._known_at_bytes = self.moved_bytes + KNOWN_BYTES_MIN

    @property
    def _known(self) -> bool:
        return self._received_bytes + self._sent_bytes >= self._known_at_bytes + self._unsent_bytes

    # --- requests

    def _may_advance(self) -> bool:
        return not (
            self._gone
            or self._ending
            or self._next_turn_scheduled
            or not self._writable
            or self._deferred is not None
            or self._incoming is not None
            or len(self._tasks) >= REQUESTS_MAX
        )

    def _advance(self) -> None:
        """Begin the requests that are there, as far as may be and as far as it is this client's turn."""
        left = TURN_REQUESTS_MAX
        try:
            while left and self._may_advance():
                if not self._skip and self._end - self._start >= self._header_bytes:
                    requests, lacks_payload = self._run_plain(left)
                    left -= requests
                    if lacks_payload or self._start == self._end:
                        if left and self._is_client_turn():
                            return
                        break
                    if not left or not self._may_advance():
                        break
                left -= 1
                if self._skip:
                    skipped = min(self._skip, self._end - self._start)
                    self._start += skipped
                    self._skip -= skipped
                if self._skip or self._end - self._start < self._header_bytes:
                    break
                request = decode_request(self._view, self._start, extended=self._agreed.extended)
                self._start += self._header_bytes
                self._begin_request(request)
        except WireError as error:
            log.info("dropped a client of export '%s': %s", self._export.id, error)
            self._channel.abort()
            return
        if self._start == self._end:
            self._start = self._end = 0
        if not left and not self._next_turn_scheduled:
            self._next_turn_scheduled = True
            asyncio.get_running_loop().call_soon(self._next_turn)
        self._flush()
        self._pace()

    def _is_client_turn(self) -> bool:
        """Whether plain requests were all that there was, and left nothing else to do: mostly."""
        if self._out or self._gone or not (self._writable and self._is_reading):
            return False
        if self._start == self._end:
            self._start = self._end = 0
        return True

    def _next_turn(self) -> None:
        self._next_turn_scheduled = False
        self._advance()

    def _run_plain(self, requests_max: int) -> tuple[int, bool]:
        """Answer the plain requests at the head of the buffer; returns how many, and if the next is not all there."""
        if not (self._export.is_open and self._budget.has_room(REPLIES_BYTES, known=self._known)):
            return 0, False
        done = self._plain.run(self._view, self._start, self._end, requests_max)
        self._start = done.start
        if done.requests:
            if self._out:
                self._flush()
            self._sent_bytes += done.replies_bytes
            if self._channel.send_now(done.replies, done.replies_bytes) or self._unsent_bytes:
                self._sent(done.requests)
            else:
                self._unread_replies = 0
        return done.requests, done.lacks_payload

    def _begin_request(self, request: Request) -> None:
        if request.command == Command.DISCONNECT:
            self._ending = True
            self._end_if_done()
            return
        try:
            check(request, self._agreed)
        except BadRequest as refused:
            self._refuse(request, refused)
            return
        if request.command == Command.READ:
            if self._read_now(request):
                return
        elif request.command == Command.WRITE and self._write_received(request):
            return
        cost, known = cost_bytes(request), self._known
        if self._budget.take(cost, known=known):
            self._admitted(request)
        else:
            self._deferred = request
            self._budget.wait(cost, self._granted, known=known)

    def _refuse(self, request: Request, refused: BadRequest) -> None:
        self._put(self._replies.error(request, refused.code, str(refused)))
        self._skip = payload_bytes(request, self._agreed)
        if self._skip > REQUEST_BYTES_MAX:
            # Nobody knows whether so much will really come.
            self._skip = 0
            self._ending = True
            self._end_if_done()

    def _read_now(self, request: Request) -> bool:
        """Answer a read on the spot, if its bytes are at hand."""
        if not (0 < request.length <= INLINE_BYTES_MAX and self._export.is_open):
            return False
        if not self._budget.has_room(request.length, known=self._known):
            return False
        head = self._replies.data_bytes
        buffer = self._buffers.lend(request.length, head=head)
        if not read_now(self._export.node, request.at, memoryview(buffer)[head:]):
            self._buffers.take_back(buffer)
            return False
        buffer[:head] = self._replies.data(request)
        self._put(buffer)
        return True

    def _write_received(self, request: Request) -> bool:
        """Write on the spot what lies behind the request's header, if it is all there."""
        end = self._start + request.length
        if end > self._end or not self._write_now(request, self._view[self._start : end]):
            return False
        self._start = end
        return True

    def _write_now(self, request: Request, content: memoryview) -> bool:
        """Write on the spot, if that takes no longer than copying the bytes."""
        if request.flags not in _PLAIN or not (0 < request.length <= CACHED_WRITE_BYTES_MAX and self._export.is_open):
            return False
        if self._export.writethrough or self._budget.is_spent:
            return False
        try:
            if not write_now(self._export.node, request.at, content):
                return False
        except IoFailure as error:
            self._put(self._replies.failed(request, error))
        else:
            self._put(self._replies.done(request))
        return True

    def _granted(self) -> None:
        """There is memory for the request that waited."""
        asyncio.get_running_loop().call_soon(self._go_on)

    def _go_on(self) -> None:
        request, self._deferred = self._deferred, None
        assert request is not None
        if self._gone:
            self._budget.give(cost_bytes(request))
            return
        self._admitted(request)
        self._advance()

    def _admitted(self, request: Request) -> None:
        """Memory is taken: begin, or first receive what is to be written."""
        if request.command == Command.READ:
            self._start_task(request, self._buffers.lend(request.length, head=self._replies.data_bytes))
            return
        if request.command != Command.WRITE:
            self._start_task(request, b"")
            return
        there = min(request.length, self._end - self._start)
        if there == request.length:
            content: Buffer = bytes(self._view[self._start : self._start + there])
            self._start += there
            self._start_task(request, content)
            return
        target = memoryview(self._buffers.lend(request.length))
        target[:there] = self._view[self._start : self._end]
        self._start = self._end = 0
        self._incoming, self._filled = (request, target), there

    def _start_task(self, request: Request, content: Buffer) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(request, content))
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    async def _serve(self, request: Request, content: Buffer) -> None:
        try:
            for buffer in await serve(request, content, self._agreed, self._replies):
                self._put(buffer)
        except ExportClosed:
            pass
        finally:
            self._spent_bytes += cost_bytes(request)
            if request.command == Command.WRITE:
                self._buffers.take_back(content)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # A bug of ours: this client cannot be told anything sensible any more, the others can.
            log.error("a request on export '%s' failed unexpectedly", self._export.id, exc_info=error)
            self._channel.abort()
        if self._gone:
            self._settle()
        elif not self._flush_scheduled:
            self._flush_scheduled = True
            asyncio.get_running_loop().call_soon(self._after_tasks)

    def _after_tasks(self) -> None:
        """Some requests have ended in this turn of the loop: send their replies together and begin others."""
        self._flush_scheduled = False
        self._flush()
        self._settle()
        if not self._gone:
            self._advance()
            self._end_if_done()

    def _settle(self) -> None:
        """Give back what requests have held that are over: what is left of their replies counts as unsent by now."""
        spent, self._spent_bytes = self._spent_bytes, 0
        self._budget.give(spent)

    # --- replies

    def _put(self, buffer: Buffer) -> None:
        if self._gone:
            return
        self._out.append(buffer)
        self._out_bytes += len(buffer)
        if self._out_bytes >= GATHER_BYTES:
            self._flush()

    def _flush(self) -> None:
        if not self._out or self._gone:
            return
        out, self._out = self._out, []
        self._out_bytes = 0
        replies = len(out)
        for buffer in out:
            self._sent_bytes += len(buffer)
            if len(buffer) > SHORT_BYTES_MAX:
                self._on_the_way.append((self._sent_bytes, buffer))
        self._channel.send(out)
        self._sent(replies)

    def _sent(self, replies: int) -> None:
        self._account()
        self._unread_replies = self._unread_replies + replies if self._unsent_bytes else 0
        if self._unread_replies >= UNREAD_REPLIES_MAX and self._writable:
            self._channel.wait_until_taken()

    def _account(self) -> None:
        """What the client has not taken yet is in our memory."""
        if self._gone:
            return
        now = self._channel.unsent_bytes()
        change, self._unsent_bytes = now - self._unsent_bytes, now
        if change:
            self._budget.charge(change)
        while self._on_the_way and self._on_the_way[0][0] <= self._sent_bytes - now:
            self._buffers.take_back(self._on_the_way.popleft()[1])

    def _pace(self) -> None:
        self._is_reading = not self._gone and (self._incoming is not None or self._may_advance())
        self._channel.read_on(self._is_reading)

    def _end_if_done(self) -> None:
        if self._ending and not self._tasks and not self._gone:
            self._flush()
            self._channel.close()
