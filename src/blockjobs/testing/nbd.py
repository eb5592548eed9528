"""An NBD server in memory, as polite or as hostile as a test wants, and the port that leads to it.

    server = MemoryNbdServer(b"..." * 1000)
    host.graph.dial = server.dial
    node = await host.blockdev_add(server.options(node_name="nbd0"))
    server.is_up = False; server.hang_up()           # the machine over there has gone

Everything happens in the loop's own thread, without sockets, so it works in virtual time.
"""

import asyncio
import errno
from collections.abc import Awaitable, Callable
from typing import Any, Final, cast

from blockjobs.block.dial import ConnectFailed
from blockjobs.block.socket_address import SocketAddress
from blockjobs.wire.nbd import (
    BASE_ALLOCATION,
    Allocation,
    ChunkFlag,
    ChunkType,
    Command,
    HandshakeFlag,
    Option,
    OptionReplyType,
    TransmissionFlag,
)
from blockjobs.wire.nbd_options import (
    CLIENT_FLAGS_BYTES,
    OPTION_HEADER_BYTES,
    BlockSizes,
    ExportInfo,
    MetaContext,
    decode_option_header,
    encode_greeting,
    encode_info,
    encode_meta_context,
    encode_option_error,
    encode_option_reply,
)
from blockjobs.wire.nbd_requests import (
    Chunk,
    Extent,
    Request,
    decode_request,
    encode_chunk,
    encode_error,
    encode_offset,
    encode_simple_reply,
    encode_status,
    request_bytes,
)

_HIGH_WATER_BYTES: Final = 1 << 20
ALL_FLAGS: Final = (
    TransmissionFlag.HAS_FLAGS
    | TransmissionFlag.SEND_FLUSH
    | TransmissionFlag.SEND_FUA
    | TransmissionFlag.SEND_TRIM
    | TransmissionFlag.SEND_WRITE_ZEROES
)


class Gone(Exception):
    """The client has closed its end."""


class MemoryStream(asyncio.Transport):
    """Both ends of a connection: a transport for the client, `read` and `send` for the server.

    Attributes:
        piece: the client receives at most so many bytes at once.
        is_open: neither side has closed.
    """

    def __init__(self, protocol: asyncio.BufferedProtocol, *, piece: int) -> None:
        super().__init__()
        self.piece, self.is_open = piece, True
        self._protocol = protocol
        self._to_server = bytearray()
        self._to_client = bytearray()
        self._arrived = asyncio.Event()
        self._paused = self._scheduled = False

    # --- the client's end

    def write(self, data: "bytes | bytearray | memoryview[Any]") -> None:
        """See `asyncio.WriteTransport`."""
        if self.is_open:
            self._to_server += data
            self._arrived.set()
            if len(self._to_server) > _HIGH_WATER_BYTES and not self._paused:
                self._paused = True
                self._protocol.pause_writing()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """See `asyncio.WriteTransport`; there is one limit here."""

    def close(self) -> None:
        """See `asyncio.BaseTransport`."""
        self._end(None)

    def abort(self) -> None:
        """See `asyncio.WriteTransport`."""
        self._end(None)

    # --- the server's end

    @property
    def unread_bytes(self) -> int:
        """What the client has sent and nobody read."""
        return len(self._to_server)

    async def read(self, count: int) -> bytes:
        """The client's next bytes.

        Raises:
            Gone: it will not send so many.
        """
        while len(self._to_server) < count:
            if not self.is_open:
                raise Gone
            self._arrived.clear()
            await self._arrived.wait()
        found = bytes(self._to_server[:count])
        del self._to_server[:count]
        if self._paused and len(self._to_server) <= _HIGH_WATER_BYTES:
            self._paused = False
            self._protocol.resume_writing()
        return found

    def send(self, data: bytes) -> None:
        """Let the client receive something, in pieces."""
        self._to_client += data
        self._schedule()

    def reset(self) -> None:
        """Break off; what was sent and not yet received is lost."""
        self._to_client.clear()
        self._end(ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"))

    def hang_up(self) -> None:
        """Close after everything sent has been received."""
        while self._to_client and self.is_open:
            self._deliver_some()
        self._end(None)

    def _schedule(self) -> None:
        if not self._scheduled and self._to_client and self.is_open:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._deliver)

    def _deliver(self) -> None:
        self._scheduled = False
        if self.is_open and self._to_client:
            self._deliver_some()
            self._schedule()

    def _deliver_some(self) -> None:
        buffer = cast("memoryview[int]", self._protocol.get_buffer(-1))
        count = min(len(buffer), self.piece, len(self._to_client))
        buffer[:count] = self._to_client[:count]
        del self._to_client[:count]
        self._protocol.buffer_updated(count)

    def _end(self, error: Exception | None) -> None:
        if self.is_open:
            self.is_open = False
            self._arrived.set()
            asyncio.get_running_loop().call_soon(self._protocol.connection_lost, error)


Answer = Callable[[MemoryStream, Request, bytes], Awaitable[None]]


class MemoryNbdServer:
    """One export over a bytearray.

    Attributes:
        content: the export's bytes.
        is_up: whether connections are accepted.
        answer: what is done with a request; replace it to misbehave, and fall back on `serve`.
        greeting: sent in place of a negotiation if not None.
        requests: everything asked, in order.
        connections: how many there have been.
        streams: those that there are.
        zero_runs: what the block status shows as zeroes, as (offset, length) pairs; the rest is data.
    """

    def __init__(
        self,
        content: bytes = b"",
        *,
        structured: bool = True,
        extended: bool = False,
        flags: TransmissionFlag = ALL_FLAGS,
        sizes: BlockSizes | None = None,
        piece: int = 1 << 30,
    ) -> None:
        self.content, self.flags, self.sizes, self.piece = bytearray(content), flags, sizes, piece
        self.length = len(content)
        self.structured, self.extended = structured, extended
        self.is_up = True
        self.answer: Answer = self.serve
        self.greeting: bytes | None = None
        self.requests: list[Request] = []
        self.connections = 0
        self.zero_runs: list[tuple[int, int]] = []
        self.streams: list[MemoryStream] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_extended = self._is_structured = False

    def options(self, node_name: str = "nbd0", **more: object) -> dict[str, object]:
        """For `blockdev_add`; `more` in Python's spelling."""
        address = {"type": "unix", "path": "/memory"}
        named = {name.replace("_", "-"): value for name, value in more.items()}
        return {"driver": "nbd", "node-name": node_name, "server": address, "export": "disk", **named}

    async def dial(self, address: SocketAddress, protocol: asyncio.BaseProtocol) -> asyncio.Transport:
        """See `block.dial`."""
        del address
        await asyncio.sleep(0)
        if not self.is_up:
            raise ConnectFailed("Failed to connect to '/memory': Connection refused")
        self.connections += 1
        stream = MemoryStream(cast("asyncio.BufferedProtocol", protocol), piece=self.piece)
        protocol.connection_made(stream)
        self.streams.append(stream)
        task = asyncio.get_running_loop().create_task(self._converse(stream))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return stream

    def hang_up(self) -> None:
        """Break all connections."""
        for stream in self.streams:
            stream.reset()
        self.streams.clear()

    async def _converse(self, stream: MemoryStream) -> None:
        try:
            if self.greeting is not None:
                stream.send(self.greeting)
                await stream.read(1 << 40)
            await self._negotiate(stream)
            while True:
                request = decode_request(
                    await stream.read(request_bytes(extended=self._is_extended)), extended=self._is_extended
                )
                payload = await stream.read(request.length) if request.command == Command.WRITE else b""
                self.requests.append(request)
                await self.answer(stream, request, payload)
        except Gone:
            return

    async def _negotiate(self, stream: MemoryStream) -> None:
        stream.send(encode_greeting(HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES))
        await stream.read(CLIENT_FLAGS_BYTES)
        self._is_structured = self._is_extended = False
        while True:
            option, length = decode_option_header(await stream.read(OPTION_HEADER_BYTES))
            await stream.read(length)
            if option == Option.GO:
                stream.send(self._info(encode_info(ExportInfo(self.length, self.flags))))
                if self.sizes is not None:
                    stream.send(self._info(encode_info(self.sizes)))
            elif option == Option.EXTENDED_HEADERS and self.extended:
                self._is_extended = self._is_structured = True
            elif option == Option.STRUCTURED_REPLY and self.structured:
                self._is_structured = True
            elif option == Option.SET_META_CONTEXT and self._is_structured:
                context = encode_meta_context(MetaContext(7, BASE_ALLOCATION))
                stream.send(encode_option_reply(option, OptionReplyType.META_CONTEXT, context))
            else:
                stream.send(encode_option_error(option, OptionReplyType.ERR_UNSUP, "no"))
                continue
            stream.send(encode_option_reply(option, OptionReplyType.ACK))
            if option == Option.GO:
                return

    def _info(self, data: bytes) -> bytes:
        return encode_option_reply(Option.GO, OptionReplyType.INFO, data)

    async def serve(self, stream: MemoryStream, request: Request, payload: bytes) -> None:
        """Do as asked, and say so."""
        at, length = request.at, request.length
        match request.command:
            case Command.READ:
                self.send_data(stream, request, bytes(self.content[at : at + length]))
                return
            case Command.WRITE:
                self.content[at : at + length] = payload
            case Command.WRITE_ZEROES | Command.TRIM:
                self.content[at : at + length] = bytes(length)
            case Command.BLOCK_STATUS:
                status = encode_status(7, self._extents(at, length), extended=self._is_extended)
                kind = ChunkType.BLOCK_STATUS_EXT if self._is_extended else ChunkType.BLOCK_STATUS
                self.send_chunk(stream, request, kind, status)
                return
        self.send_done(stream, request)

    def send_done(self, stream: MemoryStream, request: Request) -> None:
        """The reply of a request that gives nothing back."""
        if self._is_extended:
            self.send_chunk(stream, request, ChunkType.NONE, b"")
        else:
            stream.send(encode_simple_reply(request.cookie))

    def send_data(self, stream: MemoryStream, request: Request, content: bytes) -> None:
        """The reply of a read."""
        if self._is_structured:
            self.send_chunk(stream, request, ChunkType.OFFSET_DATA, encode_offset(request.at) + content)
        else:
            stream.send(encode_simple_reply(request.cookie) + content)

    def send_error(self, stream: MemoryStream, request: Request, code: int, text: str = "") -> None:
        """The reply of a request that failed."""
        if self._is_structured:
            self.send_chunk(stream, request, ChunkType.ERROR, encode_error(code, text))
        else:
            stream.send(encode_simple_reply(request.cookie, code))

    def send_chunk(
        self,
        stream: MemoryStream,
        request: Request,
        type: int,
        payload: bytes,
        *,
        is_last: bool = True,
        length: int | None = None,
    ) -> None:
        """One chunk of a structured reply, of a stated `length` that may be a lie."""
        flags = ChunkFlag.DONE if is_last else 0
        stated = len(payload) if length is None else length
        header = Chunk(flags, type, request.cookie, stated, request.at)
        stream.send(encode_chunk(header, extended=self._is_extended) + payload)

    def _extents(self, at: int, length: int) -> list[Extent]:
        extents: list[Extent] = []
        end = at + length
        for zero_at, zero_length in [*self.zero_runs, (end, 1)]:
            begin, stop = max(at, min(zero_at, end)), min(zero_at + zero_length, end)
            if begin > at:
                extents.append(Extent(begin - at, 0))
            if stop > begin:
                extents.append(Extent(stop - begin, Allocation.HOLE | Allocation.ZERO))
            at = max(at, stop)
        return extents
