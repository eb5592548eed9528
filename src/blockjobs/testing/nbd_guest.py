"""A guest whose disk is an NBD export: for tests, in virtual time or real.

    host.exports.server = NbdServer([])
    await host.exports.add(NbdExportOptions(id="e", node_name="disk", writable=True))
    guest = await host.nbd_guest("disk")        # of a SimHost
    await guest.write(0, b"..." * 100)
    await guest.close()

It has its own idea of the protocol only as far as the codecs go, and checks everything that the server says.
"""

import asyncio
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field

from blockjobs.base.errors import IoFailure, WireError
from blockjobs.export.connection import Connection
from blockjobs.export.server import NbdServer
from blockjobs.wire import nbd_options as options
from blockjobs.wire import nbd_requests as requests
from blockjobs.wire.nbd import ChunkType, Command, CommandFlag, HandshakeFlag, Option, OptionReplyType
from blockjobs.wire.nbd_options import BlockSizes, ExportInfo, InfoQuery, MetaQuery
from blockjobs.wire.nbd_requests import Chunk, Extent, Request, SimpleReply

OPTION_ERROR = 1 << 31


@dataclass(slots=True)
class Answer:
    """What has come for one request so far."""

    request: Request
    done: asyncio.Future[None]
    content: bytearray = field(default_factory=bytearray)
    filled: int = 0
    statuses: dict[int, list[Extent]] = field(default_factory=dict)
    error: tuple[int, str] | None = None


class Wire(asyncio.Protocol):
    """The client's end of a connection, byte by byte; closes itself when the server hangs up."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._more = asyncio.Event()
        self._ended = False
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        self._buffer += data
        self._more.set()

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        del exc
        self._ended = True
        self._more.set()

    def write(self, data: bytes) -> None:
        """Send."""
        self.transport.write(data)

    def abort(self) -> None:
        """Hang up."""
        self.transport.abort()

    async def exactly(self, count: int) -> bytes:
        """The next so many bytes.

        Raises:
            EOFError: the server hung up before.
        """
        while len(self._buffer) < count:
            if self._ended:
                raise EOFError(f"{len(self._buffer)} of {count} bytes")
            self._more.clear()
            await self._more.wait()
        data = bytes(self._buffer[:count])
        del self._buffer[:count]
        return data

    async def to_the_end(self) -> bytes:
        """All that the server sends before it hangs up."""
        while not self._ended:
            self._more.clear()
            await self._more.wait()
        return bytes(self._buffer)


async def attach(server: NbdServer) -> Wire:
    """A bare connection to a server, without any listener; the greeting is still to be read."""
    ours, theirs = socket.socketpair()
    loop = asyncio.get_running_loop()
    wire = Wire()
    await loop.create_connection(lambda: wire, sock=ours)
    await loop.connect_accepted_socket(lambda: Connection(server, theirs), theirs)
    return wire


class NbdGuest:
    """One connection in the transmission phase; any number of requests at once.

    Attributes:
        wire: the bare connection.
        info: what the export can do.
        sizes: its block sizes.
    """

    info: ExportInfo
    sizes: BlockSizes

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self._structured = self._extended = False
        self._contexts: dict[int, str] = {}
        self._waiting: dict[int, Answer] = {}
        self._cookie = 0
        self._listening: asyncio.Task[None] | None = None

    async def negotiate(
        self,
        name: str,
        *,
        structured: bool = True,
        extended: bool = False,
        contexts: Sequence[str] = (),
        listens: bool = True,
    ) -> None:
        """Everything up to the first request.

        Args:
            name: of the export.
            structured, extended, contexts: what is asked for.
            listens: take replies apart; otherwise they stay in `wire`.

        Raises:
            WireError: the server refuses something; its text is the error's.
        """
        await self.greet()
        if extended:
            await self.option(Option.EXTENDED_HEADERS)
            self._extended = self._structured = True
        elif structured:
            await self.option(Option.STRUCTURED_REPLY)
            self._structured = True
        if contexts:
            query = options.encode_meta_query(MetaQuery(name, tuple(contexts)))
            for data in await self.option(Option.SET_META_CONTEXT, query):
                context = options.decode_meta_context(data)
                self._contexts[context.id] = context.name
        await self.go(name, listens=listens)

    async def greet(self) -> None:
        """Take the greeting and answer it."""
        flags = options.decode_greeting(await self.wire.exactly(options.GREETING_BYTES))
        assert flags == HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES
        self.wire.write(options.encode_client_flags(flags))

    async def option(self, option: int, data: bytes = b"") -> list[bytes]:
        """Ask for an option; the data of all replies before the last.

        Raises:
            WireError: the server refuses; the text is the server's.
        """
        self.wire.write(options.encode_option(option, data))
        found: list[bytes] = []
        while True:
            raw = await self.wire.exactly(options.OPTION_REPLY_HEADER_BYTES)
            header = options.decode_option_reply_header(raw)
            content = await self.wire.exactly(header.length)
            assert header.option == option, header
            if header.type & OPTION_ERROR:
                raise WireError(options.decode_error_text(content))
            if header.type == OptionReplyType.ACK:
                return found
            found.append(content)

    async def go(self, name: str, *, listens: bool = True) -> None:
        """Begin with requests. Raises: as `option`."""
        for data in await self.option(Option.GO, options.encode_info_query(InfoQuery(name, ()))):
            info = options.decode_info(data)
            if isinstance(info, ExportInfo):
                self.info = info
            elif isinstance(info, BlockSizes):
                self.sizes = info
        if listens:
            self._listening = asyncio.get_running_loop().create_task(self._listen(), name="nbd-guest")

    # --- requests

    async def read(self, at: int, length: int, *, flags: int = 0) -> bytes:
        """Bytes of the run.

        Raises:
            IoFailure: the server says so, or is gone (ESHUTDOWN).
        """
        answer = await self._ask(Command.READ, at, length, flags)
        assert answer.filled == length, f"{answer.filled} of {length} bytes"
        return bytes(answer.content)

    async def write(self, at: int, content: bytes, *, fua: bool = False) -> None:
        """Write. Raises: as `read`."""
        flags = (CommandFlag.FUA if fua else 0) | (CommandFlag.PAYLOAD_LEN if self._extended else 0)
        await self._ask(Command.WRITE, at, len(content), flags, content)

    async def zero(self, at: int, length: int, *, flags: int = 0) -> None:
        """Make the run read as zeroes. Raises: as `read`."""
        await self._ask(Command.WRITE_ZEROES, at, length, flags)

    async def discard(self, at: int, length: int) -> None:
        """Give the run back. Raises: as `read`."""
        await self._ask(Command.TRIM, at, length, 0)

    async def flush(self) -> None:
        """What was answered before is durable. Raises: as `read`."""
        await self._ask(Command.FLUSH, 0, 0, 0)

    async def status(self, at: int, length: int, *, flags: int = 0) -> dict[str, list[Extent]]:
        """Extents by context. Raises: as `read`."""
        answer = await self._ask(Command.BLOCK_STATUS, at, length, flags)
        return {self._contexts[context]: extents for context, extents in answer.statuses.items()}

    async def raw(self, request: Request, payload: bytes = b"") -> Answer:
        """Send any request, sensible or not, under its own cookie. Raises: as `read`."""
        return await self._send(request, payload)

    async def close(self) -> None:
        """Say goodbye."""
        request = Request(0, Command.DISCONNECT, 0, 0, 0)
        self.wire.write(requests.encode_request(request, extended=self._extended))
        await self._hang_up()

    async def abort(self) -> None:
        """Hang up without a word."""
        self.wire.abort()
        await self._hang_up()

    async def _hang_up(self) -> None:
        if self._listening is not None:
            await asyncio.wait([self._listening])
        self.wire.abort()

    async def _ask(self, command: Command, at: int, length: int, flags: int, payload: bytes = b"") -> Answer:
        self._cookie += 1
        return await self._send(Request(flags, command, self._cookie, at, length), payload)

    async def _send(self, request: Request, payload: bytes) -> Answer:
        answer = Answer(request, asyncio.get_running_loop().create_future())
        if request.command == Command.READ:
            answer.content = bytearray(request.length)
        if self._listening is None or self._listening.done():
            raise IoFailure(108, "the server is gone")
        self._waiting[request.cookie] = answer
        self.wire.write(requests.encode_request(request, extended=self._extended) + payload)
        await answer.done
        if answer.error is not None:
            raise IoFailure(*answer.error)
        return answer

    # --- replies

    async def _listen(self) -> None:
        try:
            while True:
                await self._take()
        except EOFError:
            pass
        finally:
            for answer in self._waiting.values():
                answer.error = 108, "the server is gone"
                if not answer.done.done():
                    answer.done.set_result(None)
            self._waiting.clear()

    async def _take(self) -> None:
        raw = await self.wire.exactly(4)
        rest = requests.reply_bytes(
            requests.reply_magic(raw), structured=self._structured, extended=self._extended
        ) - len(raw)
        reply = requests.decode_reply(raw + await self.wire.exactly(rest))
        answer = self._waiting[reply.cookie]
        if isinstance(reply, SimpleReply):
            assert not (self._structured and answer.request.command == Command.READ), "reads must be structured"
            if reply.error:
                answer.error = reply.error, ""
            elif answer.request.command == Command.READ:
                answer.content[:] = await self.wire.exactly(answer.request.length)
                answer.filled = answer.request.length
            self._finish(answer)
            return
        self._take_chunk(answer, reply, await self.wire.exactly(reply.length))
        if reply.is_done:
            self._finish(answer)

    def _take_chunk(self, answer: Answer, chunk: Chunk, payload: bytes) -> None:
        start = answer.request.at
        if self._extended:
            assert chunk.at == start, "an extended chunk repeats the request's offset"
        if chunk.is_error:
            answer.error = requests.decode_error(payload, chunk.type)
        elif chunk.type == ChunkType.OFFSET_DATA:
            at = requests.decode_offset(payload) - start
            content = payload[requests.OFFSET_BYTES :]
            assert at >= 0 and at + len(content) <= answer.request.length
            answer.content[at : at + len(content)] = content
            answer.filled += len(content)
        elif chunk.type == ChunkType.OFFSET_HOLE:
            at, length = requests.decode_hole(payload)
            assert at - start >= 0 and at - start + length <= answer.request.length
            answer.filled += length
        elif chunk.type == (ChunkType.BLOCK_STATUS_EXT if self._extended else ChunkType.BLOCK_STATUS):
            context, extents = requests.decode_status(payload, extended=self._extended)
            answer.statuses[context] = extents
        else:
            assert chunk.type == ChunkType.NONE, chunk

    def _finish(self, answer: Answer) -> None:
        del self._waiting[answer.request.cookie]
        if not answer.done.done():
            answer.done.set_result(None)
