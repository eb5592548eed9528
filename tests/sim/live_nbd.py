"""Guests that speak NBD: the server's real code behind connections in memory, in virtual time.

Bytes arrive late and in pieces of any size, in order. A connection may have several requests in flight.
"""

import asyncio
import errno
import itertools
import os
import random
import sys
from collections import deque

from live_guests import Door

from blockjobs.base.errors import IoFailure
from blockjobs.base.span import Span
from blockjobs.block.node import Node
from blockjobs.export.connection import Connection
from blockjobs.export.nbd_export import NbdExport
from blockjobs.export.options import NbdExportOptions
from blockjobs.export.server import NbdServer
from blockjobs.testing.host import SimHost
from blockjobs.wire.nbd import ChunkType, Command, CommandFlag, HandshakeFlag, Option, host_errno
from blockjobs.wire.nbd_options import (
    EXPORT_NAME_REPLY_BYTES,
    GREETING_BYTES,
    OPTION_REPLY_HEADER_BYTES,
    decode_export_name_reply,
    decode_greeting,
    decode_option_reply_header,
    encode_client_flags,
    encode_option,
)
from blockjobs.wire.nbd_requests import (
    OFFSET_BYTES,
    Chunk,
    Request,
    SimpleReply,
    decode_error,
    decode_hole,
    decode_offset,
    decode_reply,
    encode_request,
    reply_bytes,
    reply_magic,
)

DELAY_S_MAX = 0.002


class Line:
    """Bytes on their way in one direction."""

    def __init__(self, chance: random.Random, deliver, room=lambda: sys.maxsize) -> None:
        self._chance, self._deliver, self._room = chance, deliver, room
        self._bytes: deque[bytes] = deque()
        self._is_due = False
        self.is_held = False

    def push(self, data: bytes) -> None:
        if data:
            self._bytes.append(bytes(data))
            self.pump()

    def pump(self) -> None:
        if self._bytes and not (self._is_due or self.is_held):
            self._is_due = True
            asyncio.get_running_loop().call_later(self._chance.random() * DELAY_S_MAX, self._arrive)

    def take(self, length_max: int) -> bytes:
        """What has been sent, without waiting for its arrival."""
        if self.is_held or not self._bytes:
            return b""
        data = self._bytes.popleft()
        if data[length_max:]:
            self._bytes.appendleft(data[length_max:])
        return data[:length_max]

    def _arrive(self) -> None:
        self._is_due = False
        if self.is_held or not self._bytes:
            return
        data = self._bytes.popleft()
        cut = self._chance.randrange(1, len(data)) if len(data) > 1 and self._chance.random() < 0.2 else len(data)
        cut = min(cut, self._room())
        if data[cut:]:
            self._bytes.appendleft(data[cut:])
        self._deliver(data[:cut])
        self.pump()


class ServerEnd(asyncio.Transport):
    """What the server's protocol takes for a socket."""

    def __init__(self, client: "NbdDoor", protocol: Connection, chance: random.Random) -> None:
        super().__init__()
        self._protocol = protocol
        self._out = Line(chance, client.received)
        self._in = Line(chance, self._feed, room=lambda: len(protocol.get_buffer(-1)))
        self._is_gone = False

    def _feed(self, data: bytes) -> None:
        self._protocol.get_buffer(len(data))[: len(data)] = data
        self._protocol.buffer_updated(len(data))

    def from_client(self, data: bytes) -> None:
        self._in.push(data)

    def take(self, length_max: int) -> bytes:
        if self._is_gone:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return self._in.take(length_max)

    def write(self, data) -> None:
        self._out.push(data)

    def get_write_buffer_size(self) -> int:
        return 0

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        del high, low

    def pause_reading(self) -> None:
        self._in.is_held = True

    def resume_reading(self) -> None:
        self._in.is_held = False
        self._in.pump()

    def is_closing(self) -> bool:
        return self._is_gone

    def close(self) -> None:
        self.abort()

    def abort(self) -> None:
        if not self._is_gone:
            self._is_gone = True
            asyncio.get_running_loop().call_soon(self._protocol.connection_lost, None)


class SocketEnd:
    """The same, past the loop's own buffers: in a good mood it has what the client has just sent, and takes replies."""

    end: ServerEnd

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance

    def recv_into(self, room: memoryview) -> int:
        data = self.end.take(len(room)) if self._chance.random() < 0.7 else b""
        if not data:
            raise BlockingIOError
        room[: len(data)] = data
        return len(data)

    def send(self, piece: memoryview) -> int:
        """As socket's."""
        return self.sendmsg([piece])

    def sendmsg(self, pieces: list[memoryview]) -> int:
        data = b"".join(pieces)
        count = len(data) if self._chance.random() < 0.7 else self._chance.randrange(len(data))
        if not count:
            raise BlockingIOError
        self.end.write(data[:count])
        return count


class NbdDoor(Door):
    """A client of an export; see `Door`."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._input = bytearray()
        self._arrived = asyncio.Event()
        self._waiting: dict[int, tuple[Request, bytearray, asyncio.Future[bytes]]] = {}
        self._errors: dict[int, int] = {}
        self._cookies = itertools.count(chance.randrange(1 << 32))

    # --- the connection

    async def attach(self, host: SimHost, node: Node) -> None:
        """See `Door`: an export of its own, and a client that agrees with the server on it."""
        options = NbdExportOptions(id=f"export{id(self)}", node_name=node.name, writable=True, name="live")
        self.server = NbdServer([], connections_max=0)
        self.export = await NbdExport.open(host.graph, node, options, shared=True)
        self.server.add(self.export)
        sock = SocketEnd(self._chance)
        protocol = Connection(self.server, sock)
        self._line = sock.end = ServerEnd(self, protocol, self._chance)
        protocol.connection_made(self._line)
        decode_greeting(await self._read(GREETING_BYTES))
        self._line.from_client(encode_client_flags(HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES))
        self._structured = self._chance.random() < 0.5
        if self._structured:
            self._line.from_client(encode_option(Option.STRUCTURED_REPLY))
            assert not decode_option_reply_header(await self._read(OPTION_REPLY_HEADER_BYTES)).length
        self._line.from_client(encode_option(Option.EXPORT_NAME, b"live"))
        info = decode_export_name_reply(await self._read(EXPORT_NAME_REPLY_BYTES))
        assert info.length == node.length
        self._replies = asyncio.get_running_loop().create_task(self._take_replies())

    async def detach(self, host: SimHost) -> None:
        """See `Door`."""
        self._line.abort()
        self._replies.cancel()
        await self.server.close()
        self.export.close()
        await self.export.quiet()
        await self.export.release(host.graph)

    def received(self, data: bytes) -> None:
        self._input += data
        self._arrived.set()

    async def _read(self, count: int) -> bytes:
        while len(self._input) < count:
            self._arrived.clear()
            await self._arrived.wait()
        data = bytes(self._input[:count])
        del self._input[:count]
        return data

    async def _take_replies(self) -> None:
        while True:
            head = await self._read(4)
            length = reply_bytes(reply_magic(head), structured=self._structured)
            reply = decode_reply(head + await self._read(length - 4))
            request, content, _ = self._waiting[reply.cookie]
            if isinstance(reply, SimpleReply):
                if not reply.error and request.command == Command.READ:
                    content[:] = await self._read(request.length)
                self._settle(reply.cookie, reply.error)
                continue
            self._apply(reply, request, content, await self._read(reply.length))
            if reply.is_done:
                self._settle(reply.cookie, self._errors.pop(reply.cookie, 0))

    def _apply(self, chunk: Chunk, request: Request, content: bytearray, payload: bytes) -> None:
        """One part of a structured reply."""
        if chunk.is_error:
            self._errors[chunk.cookie], _ = decode_error(payload, chunk.type)
        elif chunk.type == ChunkType.OFFSET_DATA:
            at = decode_offset(payload) - request.at
            content[at : at + len(payload) - OFFSET_BYTES] = payload[OFFSET_BYTES:]
        elif chunk.type == ChunkType.OFFSET_HOLE:
            at, count = decode_hole(payload)
            content[at - request.at : at - request.at + count] = bytes(count)

    def _settle(self, cookie: int, error: int) -> None:
        _, content, answer = self._waiting.pop(cookie)
        if error:
            answer.set_exception(IoFailure(host_errno(error) or errno.EIO, "a guest's request"))
        else:
            answer.set_result(bytes(content))

    async def _ask(self, command: Command, span: Span, *, flags: int = 0, content: bytes = b"") -> bytes:
        request = Request(flags, command, next(self._cookies), span.at, span.length)
        answer = asyncio.get_running_loop().create_future()
        room = bytearray(span.length if command is Command.READ else 0)
        self._waiting[request.cookie] = request, room, answer
        self._line.from_client(encode_request(request) + content)
        return await answer

    # --- as `Door`

    @property
    def is_at_rest(self) -> bool:
        return not self.export.is_open and self.export.is_quiet()

    @property
    def node(self) -> Node:
        return self.export.node

    async def read(self, at: int, length: int) -> bytes:
        return await self._ask(Command.READ, Span(at, length))

    async def write(self, at: int, content: bytes, *, fua: bool) -> None:
        flags = CommandFlag.FUA if fua else 0
        await self._ask(Command.WRITE, Span(at, len(content)), flags=flags, content=content)

    async def zero(self, span: Span) -> None:
        flags = CommandFlag.NO_HOLE if self._chance.random() < 0.3 else 0
        await self._ask(Command.WRITE_ZEROES, span, flags=flags)

    async def discard(self, span: Span) -> None:
        await self._ask(Command.TRIM, span)

    async def flush(self) -> None:
        await self._ask(Command.FLUSH, Span(0, 0))
