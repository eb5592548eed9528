"""The straight way for what nearly all requests are: short reads and writes, without flags, of bytes in memory.

A client that keeps many requests on the way sends them in one piece; what is at the head of the receive buffer is
carried out in one go here, and its replies go out together. Whatever asks for more, or has to wait for anything, is
left where it is: `transmission` has the general way.
"""

from typing import TYPE_CHECKING, Final, NamedTuple

from blockjobs.base.errors import IoFailure
from blockjobs.base.units import KiB
from blockjobs.block.quick import ReadRun, WriteRun
from blockjobs.export.buffers import COPY_ALIGN, REPLIES_BYTES
from blockjobs.export.negotiation import Agreed
from blockjobs.export.replies import Replies
from blockjobs.wire.nbd import EXTENDED_REQUEST_MAGIC, REQUEST_MAGIC, Command, CommandFlag
from blockjobs.wire.nbd_requests import EXTENDED_REQUEST, REQUEST, Request, encode_simple_reply

if TYPE_CHECKING:
    from blockjobs.export.nbd_export import NbdExport

ERROR_BYTES_MAX: Final = 8 * KiB
"""No reply that tells of an error is longer."""
PLAIN_BYTES_MAX: Final = 64 * KiB
"""Longer requests have a buffer of their own."""
_AWAITED_BYTES_MAX: Final = 32 * KiB
"""Half of what a client's receive buffer takes."""
_READ, _WRITE = int(Command.READ), int(Command.WRITE)


class Done(NamedTuple):
    """How far a run got.

    Attributes:
        start: of the request behind it, in the receive buffer.
        requests: so many were answered.
        replies: theirs, in pieces; the memory is used again by the next run.
        replies_bytes: how long they are together.
        lacks_payload: the request behind it is a short write, and the rest of it is still to come: it needs no buffer
            of its own.
    """

    start: int
    requests: int
    replies: list[memoryview]
    replies_bytes: int
    lacks_payload: bool


class PlainRequests:
    """Carries out the plain requests of one client.

    Args:
        agreed: with the client.
        replies: in the client's style.
        memory: `REPLIES_BYTES` for replies; all clients of a loop may share it, since a run never waits.
    """

    def __init__(self, agreed: Agreed, replies: Replies, memory: memoryview) -> None:
        self._export: NbdExport = agreed.export
        self._replies, self._memory = replies, memory
        self._is_simple = not agreed.structured
        self._head = replies.data_bytes
        self._layout, self._magic = (
            (EXTENDED_REQUEST, EXTENDED_REQUEST_MAGIC) if agreed.extended else (REQUEST, REQUEST_MAGIC)
        )
        self._write_flags = int(CommandFlag.PAYLOAD_LEN) if agreed.extended else 0

    def run(self, received: memoryview, start: int, end: int, requests_max: int) -> Done:
        """Carry out what is plain at the head of `received[start:end]`.

        Only while the export is open; a writethrough export's writes are not plain.
        """
        export, memory, head = self._export, self._memory, self._head
        unpack, header_bytes = self._layout.unpack_from, self._layout.size
        reads: ReadRun | None = None
        writes: WriteRun | None = None
        pieces: list[memoryview] = []
        piece_at = filled = requests = replies_bytes = 0
        lacks_payload = False
        while requests < requests_max and end - start >= header_bytes:
            magic, flags, command, cookie, at, length = unpack(received, start)
            if magic != self._magic or not 0 < length <= PLAIN_BYTES_MAX or at + length > export.length:
                break
            payload_to = (filled + head + COPY_ALIGN - 1) & -COPY_ALIGN
            behind = payload_to + length
            if behind > REPLIES_BYTES or filled + ERROR_BYTES_MAX > REPLIES_BYTES:
                break
            payload_at = start + header_bytes
            if command == _READ and not flags:
                if reads is None:
                    reads = ReadRun(export.node)
                if not reads.read(at, memory[payload_to:behind]):
                    break
                head_at = payload_to - head
                if head_at > filled:
                    if filled > piece_at:
                        pieces.append(memory[piece_at:filled])
                    piece_at = head_at
                memory[head_at:payload_to] = self._header(cookie, at, length)
                replies_bytes += behind - head_at
                filled = behind
                start = payload_at
            elif command == _WRITE and flags in (0, self._write_flags) and export.writable and not export.writethrough:
                if payload_at + length > end:
                    lacks_payload = length <= _AWAITED_BYTES_MAX
                    break
                if writes is None:
                    writes = WriteRun(export.node)
                try:
                    if not writes.write(at, received[payload_at : payload_at + length]):
                        break
                    reply = self._written(cookie, at, length)
                except IoFailure as error:
                    reply = self._replies.failed(Request(flags, command, cookie, at, length), error)
                memory[filled : filled + len(reply)] = reply
                replies_bytes += len(reply)
                filled += len(reply)
                start = payload_at + length
            else:
                break
            requests += 1
        for run in (reads, writes):
            if run is not None:
                run.end()
        if filled > piece_at:
            pieces.append(memory[piece_at:filled])
        return Done(start, requests, pieces, replies_bytes, lacks_payload)

    def _header(self, cookie: int, at: int, length: int) -> bytes:
        """Of the reply to a read."""
        if self._is_simple:
            return encode_simple_reply(cookie)
        return self._replies.data(Request(0, _READ, cookie, at, length))

    def _written(self, cookie: int, at: int, length: int) -> bytes:
        """The reply to a write."""
        if self._is_simple:
            return encode_simple_reply(cookie)
        return self._replies.done(Request(0, _WRITE, cookie, at, length))
