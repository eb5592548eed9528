"""What a server answers, taken apart as it comes and checked against what was asked.

No I/O here: bytes go in, in pieces of any size, and operations end. Payload of reads lands in the caller's own buffer,
without a stop in between where the transport can receive into `sink`. Whatever a server sends, memory and work stay in
proportion to what was asked for; an answer that the protocol does not allow is a `WireError`, and the connection is of
no more use.
"""

import asyncio
import errno
from collections.abc import Callable
from typing import Final

from blockjobs.base.errors import WireError
from blockjobs.wire.nbd import ChunkType, Command, host_errno
from blockjobs.wire.nbd_requests import (
    OFFSET_BYTES,
    Chunk,
    Extent,
    SimpleReply,
    decode_error,
    decode_hole,
    decode_offset,
    decode_reply,
    decode_status,
    reply_bytes,
    reply_magic,
)

STATUS_BYTES_MAX: Final = 4 << 20
"""Payload of one block status; QEMU's server sends at most a quarter of it."""
ERROR_BYTES_MAX: Final = 6 + (1 << 16) + 8
"""Payload of an error: its numbers and a text whose length has 16 bits."""
_HOLE_BYTES: Final = 12
_CHUNKS_MIN: Final = 64
_BYTES_PER_CHUNK: Final = 512
"""A read may come in so many chunks, and one more for each sector: holes and data alternate no faster than that."""
_MAGIC_BYTES: Final = 4


class Operation:
    """One request that waits for its answer.

    Attributes:
        done: ends with the extents of a block status, else None. `Refused` if the server says no.
        buffer: where the bytes of a read go; None once nobody wants them any more.
    """

    __slots__ = ("_chunks", "_error", "_extents", "_parts", "_received", "at", "buffer", "command", "done", "length")

    def __init__(self, command: Command, at: int, length: int, buffer: memoryview | None = None) -> None:
        self.command, self.at, self.length, self.buffer = command, at, length, buffer
        self.done: asyncio.Future[list[Extent] | None] = asyncio.get_running_loop().create_future()
        self._parts: list[tuple[int, int]] = []
        self._chunks = self._received = 0
        self._error: Refused | None = None
        self._extents: list[Extent] | None = None

    @property
    def is_read(self) -> bool:
        """Whether bytes are expected."""
        return self.command is Command.READ

    def part(self, at: int, length: int) -> memoryview:
        """Where bytes that the server announced go.

        Raises:
            WireError: they are not part of what was asked for, or more than that.
        """
        if not self.is_read:
            raise WireError(f"data in the answer to a request of type {self.command}")
        self._chunks += 1
        self._received += length
        if at < self.at or at + length > self.at + self.length or self._received > self.length:
            raise WireError(f"data at {at}+{length} in the answer to a read of {self.at}+{self.length}")
        if self._chunks > _CHUNKS_MIN + self.length // _BYTES_PER_CHUNK:
            raise WireError("a read came in too many pieces")
        self._parts.append((at, at + length))
        if self.buffer is None:
            return memoryview(bytearray(length))
        return self.buffer[at - self.at : at - self.at + length]

    def refuse(self, code: int, text: str) -> None:
        """The server reports an error; the first one counts."""
        self._error = self._error or Refused(host_errno(code), text)

    def report(self, extents: list[Extent]) -> None:
        """The server reports the block status.

        Raises:
            WireError: nobody asked, or twice.
        """
        if self.command is not Command.BLOCK_STATUS or self._extents is not None:
            raise WireError("a block status that nobody asked for")
        self._extents = extents

    def finish(self) -> None:
        """The answer is complete.

        Raises:
            WireError: it is not.
        """
        if self._error is None and self.is_read:
            self._check_whole()
        if self.done.done():
            return
        if self._error is not None:
            self.done.set_exception(self._error)
        elif self.command is Command.BLOCK_STATUS and not self._extents:
            self.done.set_exception(Refused(errno.EIO, "the server reported no block status"))
        else:
            self.done.set_result(self._extents)

    def _check_whole(self) -> None:
        """Not more than the length came, so if no parts overlap and the sum is right, nothing is missing."""
        self._parts.sort()
        for before, after in zip(self._parts, self._parts[1:]):
            if after[0] < before[1]:
                raise WireError("overlapping pieces in the answer to a read")
        if self._received != self.length:
            raise WireError(f"{self.length - self._received} bytes are missing in the answer to a read")

    def lose(self, error: Exception) -> None:
        """No answer will come."""
        self.buffer = None
        if not self.done.done():
            self.done.set_exception(error)

    def abandon(self) -> None:
        """Nobody waits any more; the answer is read and forgotten."""
        self.buffer = None
        if not self.done.cancel() and not self.done.cancelled():
            self.done.exception()  # looked at, so that asyncio does not complain that nobody has


class Refused(Exception):
    """The server's error reply to one request.

    Attributes:
        code: a host's errno.
    """

    def __init__(self, code: int, text: str) -> None:
        self.code = code
        super().__init__(text)


class ReplyParser:
    """Turns the server's bytes into the ends of operations.

    Attributes:
        pending: operations by cookie; each leaves when its answer is complete.
        sink: if not None, the next bytes of the stream belong there; after putting `n` there call `sunk(n)`.
        answered: how many operations have ended here.
    """

    def __init__(self, *, structured: bool, extended: bool, context: int | None) -> None:
        self.pending: dict[int, Operation] = {}
        self.sink: memoryview | None = None
        self.answered = 0
        self._structured, self._extended, self._context = structured, extended, context
        self._then: Callable[[], None] = _nothing
        self._sink_of: Operation | None = None

    def feed(self, view: memoryview) -> int:
        """Take bytes; returns how many. The rest must come again, with more.

        Raises:
            WireError: the server broke the protocol.
        """
        at = 0
        while True:
            if self.sink is not None:
                count = min(len(self.sink), len(view) - at)
                if not count:
                    return at
                self.sink[:count] = view[at : at + count]
                at += count
                self.sunk(count)
                continue
            left = len(view) - at
            if left < _MAGIC_BYTES:
                return at
            size = reply_bytes(reply_magic(view, at), structured=self._structured, extended=self._extended)
            if left < size:
                return at
            reply = decode_reply(view, at)
            if isinstance(reply, SimpleReply):
                at += size
                self._simple(reply)
            elif reply.type == ChunkType.OFFSET_DATA:
                if left < size + OFFSET_BYTES + 1:
                    self._check_data(reply)
                    return at
                self._data(reply, decode_offset(view[at + size : at + size + OFFSET_BYTES + 1]))
                at += size + OFFSET_BYTES
            else:
                at += size
                self._chunk(reply)

    def sunk(self, count: int) -> None:
        """`count` bytes were put into `sink`.

        Raises:
            WireError: what is complete now makes no sense.
        """
        assert self.sink is not None
        self.sink = self.sink[count:] if count < len(self.sink) else None
        if self.sink is None:
            self._then()

    def abandon(self, operation: Operation) -> None:
        """Nobody waits for this one any more; its answer is read and forgotten."""
        operation.abandon()
        if self.sink is not None and self._sink_of is operation:
            self.sink = memoryview(bytearray(len(self.sink)))

    def lose(self, error: Exception) -> None:
        """No answers will come any more."""
        self.sink = None
        pending, self.pending = self.pending, {}
        for operation in pending.values():
            operation.lose(error)

    def _operation(self, cookie: int) -> Operation:
        operation = self.pending.get(cookie)
        if operation is None:
            raise WireError(f"a reply to a request that was never made ({cookie:#x})")
        return operation

    def _simple(self, reply: SimpleReply) -> None:
        operation = self._operation(reply.cookie)
        if self._structured and operation.command in (Command.READ, Command.BLOCK_STATUS) and not reply.error:
            raise WireError("a simple reply where a structured one was agreed on")
        if reply.error:
            operation.refuse(reply.error, "")
        elif operation.is_read:
            part = operation.part(operation.at, operation.length)
            self._receive(operation, part, lambda: self._end(reply.cookie))
            return
        self._end(reply.cookie)

    def _check_data(self, chunk: Chunk) -> None:
        """What can be checked before the offset is there: else a server could make us wait for nothing."""
        operation = self._operation(chunk.cookie)
        if not OFFSET_BYTES < chunk.length <= OFFSET_BYTES + operation.length or not operation.is_read:
            raise WireError(f"a data chunk of {chunk.length} bytes in the answer to {operation.command}")

    def _data(self, chunk: Chunk, at: int) -> None:
        self._check_data(chunk)
        operation = self._operation(chunk.cookie)
        part = operation.part(at, chunk.length - OFFSET_BYTES)
        self._receive(operation, part, lambda: self._chunk_ends(chunk))

    def _chunk(self, chunk: Chunk) -> None:
        operation = self._operation(chunk.cookie)
        if chunk.is_error:
            limit, take = ERROR_BYTES_MAX, self._take_error
        elif chunk.type == ChunkType.NONE:
            if chunk.length or not chunk.is_done:
                raise WireError("an empty chunk that is not the last one, or is not empty")
            self._end(chunk.cookie)
            return
        elif chunk.type == ChunkType.OFFSET_HOLE:
            limit, take = _HOLE_BYTES, self._take_hole
        elif chunk.type in (ChunkType.BLOCK_STATUS, ChunkType.BLOCK_STATUS_EXT):
            limit, take = STATUS_BYTES_MAX, self._take_status
        else:
            raise WireError(f"a chunk of unknown type {chunk.type}")
        if not 0 < chunk.length <= limit:
            raise WireError(f"a chunk of type {chunk.type} with {chunk.length} bytes")
        payload = memoryview(bytearray(chunk.length))

        def then() -> None:
            take(operation, chunk, payload)
            self._chunk_ends(chunk)

        self._receive(None, payload, then)

    def _take_error(self, operation: Operation, chunk: Chunk, payload: memoryview) -> None:
        code, text = decode_error(payload, chunk.type)
        operation.refuse(code, text)

    def _take_hole(self, operation: Operation, chunk: Chunk, payload: memoryview) -> None:
        at, length = decode_hole(payload)
        operation.part(at, length)[:] = bytes(length)

    def _take_status(self, operation: Operation, chunk: Chunk, payload: memoryview) -> None:
        is_wide = chunk.type == ChunkType.BLOCK_STATUS_EXT
        if is_wide is not self._extended:
            raise WireError("a block status in a form that was not agreed on")
        context, extents = decode_status(payload, extended=is_wide)
        if context != self._context:
            raise WireError(f"a block status of a context that was not asked for ({context})")
        operation.report(extents)

    def _receive(self, whose: Operation | None, sink: memoryview, then: Callable[[], None]) -> None:
        self._sink_of, self.sink, self._then = whose, sink, then

    def _chunk_ends(self, chunk: Chunk) -> None:
        if chunk.is_done:
            self._end(chunk.cookie)

    def _end(self, cookie: int) -> None:
        operation = self._operation(cookie)
        operation.finish()
        del self.pending[cookie]
        self.answered += 1


def _nothing() -> None:
    pass
