"""Servers that break the protocol, one way after another (spec/durability.md §3, client side).

Whatever they send: the request or the open fails with one line, in bounded time, and a server that mends its ways is
used again.
"""

import asyncio
import errno
import struct
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockjobs.base.errors import IoFailure, UsageError, WireError
from blockjobs.base.span import Span
from blockjobs.block.drivers.nbd.replies import STATUS_BYTES_MAX, Operation, Refused, ReplyParser
from blockjobs.testing.clock import run
from blockjobs.testing.little_host import LittleHost
from blockjobs.testing.nbd import MemoryNbdServer, MemoryStream
from blockjobs.wire.nbd import (
    CHUNK_ERROR_BIT,
    ChunkType,
    Command,
    HandshakeFlag,
    InfoType,
    Option,
    OptionReplyType,
)
from blockjobs.wire.nbd_options import (
    BlockSizes,
    encode_greeting,
    encode_option_reply,
)
from blockjobs.wire.nbd_requests import (
    Chunk,
    Extent,
    Request,
    encode_chunk,
    encode_error,
    encode_hole,
    encode_offset,
    encode_simple_reply,
    encode_status,
)

GREETING = encode_greeting(HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)


def reply(option: int, type: int, data: bytes = b"") -> bytes:
    return encode_option_reply(option, type, data)


def info(length: int, flags: int = 1) -> bytes:
    return reply(Option.GO, OptionReplyType.INFO, struct.pack(">HQH", InfoType.EXPORT, length, flags))


def sizes(*numbers: int) -> bytes:
    return reply(Option.GO, OptionReplyType.INFO, struct.pack(">HIII", InfoType.BLOCK_SIZE, *numbers))


ACK = reply(Option.GO, OptionReplyType.ACK)
NO_EXTRAS = reply(Option.EXTENDED_HEADERS, OptionReplyType.ERR_UNSUP) + reply(
    Option.STRUCTURED_REPLY, OptionReplyType.ERR_UNSUP
)
HAND = GREETING + NO_EXTRAS


async def refusal(greeting: bytes, *, then_close: bool, **options: object) -> tuple[str, float]:
    """The text that opening fails with, and how long it took."""
    server = MemoryNbdServer(bytes(512))
    server.greeting = greeting
    async with LittleHost() as host:
        host.graph.dial = server.dial
        began = asyncio.get_running_loop().time()
        opening = asyncio.get_running_loop().create_task(host.add(**server.options(**options)))
        if then_close:
            while not server.streams:
                await asyncio.sleep(0)
            await asyncio.sleep(0.01)
            server.streams[0].hang_up()
        with pytest.raises(UsageError) as caught:
            await opening
        assert host.graph.nodes() == []
        return str(caught.value), asyncio.get_running_loop().time() - began


@pytest.mark.parametrize(
    ("greeting", "text"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "Bad initial magic received: 0x485454502f312e31"),
        (b"NBDMAGICnonsense..", "Bad server magic received: 0x6e6f6e73656e7365"),
        (b"NBDMAGIC\0\0B\2\x81\x86\x12\x53" + bytes(200), "Server does not support non-empty export names"),
        (HAND + info(1 << 63) + ACK, "export length 9223372036854775808 is too large"),
        (HAND + info((1 << 64) - 1) + ACK, "export length 18446744073709551615 is too large"),
        (
            HAND + info(1000) + sizes(512, 512, 512) + ACK,
            "export length 1000 is not a multiple of minimum block size 512",
        ),
        (
            HAND + info(1024) + sizes(0, 512, 512) + ACK,
            "server minimum block size 0 is not a power of two, or too large",
        ),
        (
            HAND + info(1024) + sizes(3, 512, 512) + ACK,
            "server minimum block size 3 is not a power of two, or too large",
        ),
        (
            HAND + info(1 << 20) + sizes(1 << 17, 1 << 17, 1 << 20) + ACK,
            "server minimum block size 131072 is not a power of two, or too large",
        ),
        (
            HAND + info(1024) + sizes(512, 513, 1024) + ACK,
            "server preferred block size 513 is not a power of two, or below the minimum",
        ),
        (
            HAND + info(1024) + sizes(512, 512, 1000) + ACK,
            "server maximum block size 1000 is below the preferred one, or no multiple of the minimum",
        ),
        (HAND + ACK, "broken server: it shows an export without its length"),
        (HAND + reply(Option.LIST, OptionReplyType.ACK), "Unexpected option type 3 expected 7"),
        (
            HAND + struct.pack(">QIII", 0x0003E889045565A9, 7, 3, 1 << 31),
            "option reply of 2147483648 bytes is too long",
        ),
        (HAND + bytes(20), "Unexpected option reply magic"),
        (HAND + info(512) * 65, "more than 64 answers to option 7"),
        (HAND + info(512) + ACK + b"?" * 100, "the server answers before it was asked"),
        (HAND + reply(Option.GO, OptionReplyType.ERR_UNKNOWN, b"x" * 9000), "Requested export not available"),
        (HAND + reply(Option.GO, OptionReplyType.ERR_POLICY), "Denied by server for option 7 (go)"),
        (HAND + reply(Option.GO, OptionReplyType.ERR_TLS_REQD), "TLS negotiation required before option 7 (go)"),
        (HAND + reply(Option.GO, 0x8000FFFF), "Unknown error code 0x8000ffff when asking for option 7 (go)"),
        (GREETING + bytes(1 << 20), "Unexpected option reply magic"),
    ],
)
def test_negotiations_that_fail(greeting: bytes, text: str) -> None:
    found, took_s = run(refusal(greeting, then_close=False, open_timeout=0))
    assert found == text
    assert "\n" not in found
    assert took_s < 1


def test_a_server_that_never_answers() -> None:
    for greeting in (b"", GREETING[:9], GREETING, HAND + info(512)):
        text, took_s = run(refusal(greeting, then_close=False))
        assert text == "the NBD server did not answer within 10 seconds"
        assert took_s == pytest.approx(10, abs=0.1)


def test_hanging_up_at_every_byte_of_the_negotiation() -> None:
    whole = HAND + info(512) + sizes(1, 512, 1024) + ACK
    for end in range(len(whole)):
        text, took_s = run(refusal(whole[:end], then_close=True))
        assert text.startswith("Failed to read "), end
        assert text.endswith(": Unexpected end-of-file before all data were read")
        assert took_s < 1


# --- after the negotiation


Misbehave = Callable[[MemoryNbdServer, MemoryStream, Request], None]


def read_in_chunks(*chunks: tuple[int, bytes] | tuple[int, bytes, int]) -> Misbehave:
    def answer(server: MemoryNbdServer, stream: MemoryStream, request: Request) -> None:
        for index, (type, payload, *length) in enumerate(chunks):
            is_last = index == len(chunks) - 1
            server.send_chunk(stream, request, type, payload, is_last=is_last, length=length[0] if length else None)

    return answer


def raw(make: Callable[[Request], bytes]) -> Misbehave:
    def answer(server: MemoryNbdServer, stream: MemoryStream, request: Request) -> None:
        stream.send(make(request))

    return answer


DATA, HOLE, STATUS = ChunkType.OFFSET_DATA, ChunkType.OFFSET_HOLE, ChunkType.BLOCK_STATUS
AT0, AT512 = encode_offset(0), encode_offset(512)


async def misbehaving(misbehave: Misbehave, *, asks_status: bool = False, extended: bool = False) -> None:
    """A read of 1024 bytes (or its status) fails with EIO, at once; then the server is used again."""
    server = MemoryNbdServer(b"x" * 4096, extended=extended)
    is_evil = True

    async def answer(stream: MemoryStream, request: Request, payload: bytes) -> None:
        if is_evil:
            misbehave(server, stream, request)
        else:
            await server.serve(stream, request, payload)

    server.answer = answer
    async with LittleHost() as host:
        host.graph.dial = server.dial
        node = await host.add(**server.options(read_only=True))
        with pytest.raises(IoFailure) as caught:
            async with asyncio.timeout(5):
                await (node.status(Span(0, 1024)) if asks_status else node.read(0, 1024))
        assert caught.value.errno == errno.EIO
        is_evil = False
        await asyncio.sleep(10)
        assert await node.read(0, 1024) == b"x" * 1024


@pytest.mark.parametrize(
    "misbehave",
    [
        raw(lambda request: b"\0" * 100),
        raw(lambda request: encode_simple_reply(request.cookie + 1)),
        raw(lambda request: encode_simple_reply(request.cookie) + b"x" * 1024),
        raw(lambda request: encode_chunk(Chunk(1, DATA, request.cookie ^ 1 << 63, 1032)) + AT0 + b"x" * 1024),
        read_in_chunks((DATA, AT0 + b"x" * 1023)),
        read_in_chunks((DATA, AT0 + b"x" * 1025)),
        read_in_chunks((DATA, AT0 + b"x" * 100, 1 << 31)),
        read_in_chunks((DATA, AT0, 8)),
        read_in_chunks((DATA, b"", 0)),
        read_in_chunks((DATA, AT512 + b"x" * 1024)),
        read_in_chunks((DATA, encode_offset((1 << 64) - 512) + b"x" * 1024)),
        read_in_chunks((DATA, AT0 + b"x" * 512), (DATA, encode_offset(511) + b"x" * 512)),
        read_in_chunks((DATA, AT0 + b"x" * 1024), (DATA, AT0 + b"x" * 1024)),
        read_in_chunks((DATA, AT0 + b"x" * 512), (ChunkType.NONE, b"")),
        read_in_chunks((ChunkType.NONE, b"")),
        read_in_chunks((ChunkType.NONE, b"x")),
        read_in_chunks((ChunkType.NONE, b""), (DATA, AT0 + b"x" * 1024)),
        read_in_chunks((HOLE, encode_hole(0, 1025))),
        read_in_chunks((HOLE, encode_hole(0, 0))),
        read_in_chunks((HOLE, encode_hole(0, (1 << 32) - 1))),
        read_in_chunks((HOLE, b"x" * 11)),
        read_in_chunks((STATUS, encode_status(7, [Extent(1024, 0)]))),
        read_in_chunks((42, b"x" * 10)),
        read_in_chunks(*[(DATA, encode_offset(at) + b"x") for at in range(1024)]),
        read_in_chunks((ChunkType.ERROR, encode_error(errno.EIO, "bad\nnews " * 400))),
        read_in_chunks((ChunkType.ERROR, struct.pack(">IH", 5, 65535) + b"e" * 65535)),
        read_in_chunks((ChunkType.ERROR, struct.pack(">IH", 5, 100) + b"short")),
        read_in_chunks((ChunkType.ERROR, struct.pack(">IH", 0, 0))),
        read_in_chunks((ChunkType.ERROR, b"x", 1 << 31)),
        read_in_chunks((ChunkType.ERROR_OFFSET, encode_error(errno.EIO, "there", 100))),
        read_in_chunks((DATA, AT0 + b"x" * 1024), (CHUNK_ERROR_BIT + 99, struct.pack(">IH", 5, 0))),
    ],
)
def test_answers_to_a_read(misbehave: Misbehave) -> None:
    run(misbehaving(misbehave))


@pytest.mark.parametrize(
    "misbehave",
    [
        read_in_chunks((STATUS, encode_status(8, [Extent(1024, 0)]))),
        read_in_chunks((STATUS, encode_status(7, []))),
        read_in_chunks((STATUS, encode_status(7, [Extent(0, 0)]))),
        read_in_chunks((STATUS, encode_status(7, [Extent(1024, 0)]) + b"x")),
        read_in_chunks((STATUS, encode_status(7, [Extent(512, 0)])), (STATUS, encode_status(7, [Extent(512, 0)]))),
        read_in_chunks((STATUS, b"x", STATUS_BYTES_MAX + 1)),
        read_in_chunks((ChunkType.BLOCK_STATUS_EXT, encode_status(7, [Extent(1024, 0)], extended=True))),
        read_in_chunks((ChunkType.NONE, b"")),
        read_in_chunks((DATA, AT0 + b"x" * 1024)),
        raw(lambda request: encode_simple_reply(request.cookie)),
    ],
)
def test_answers_to_a_block_status(misbehave: Misbehave) -> None:
    run(misbehaving(misbehave, asks_status=True))


def test_compact_answers_where_extended_ones_were_agreed_on() -> None:
    def compact(request: Request) -> bytes:
        return encode_chunk(Chunk(1, DATA, request.cookie, 1032)) + AT0 + b"x" * 1024

    run(misbehaving(raw(compact), extended=True))
    run(misbehaving(raw(lambda request: encode_simple_reply(request.cookie) + b"x" * 1024), extended=True))
    too_many = struct.pack(">II", 7, 3) + struct.pack(">QQ", 1024, 0)
    run(misbehaving(read_in_chunks((ChunkType.BLOCK_STATUS_EXT, too_many)), asks_status=True, extended=True))


def test_hanging_up_at_every_byte_of_an_answer() -> None:
    async def scenario() -> None:
        whole = 20 + 8 + 64
        server = MemoryNbdServer(b"x" * 512)
        limits = list(range(whole))

        async def answer(stream: MemoryStream, request: Request, payload: bytes) -> None:
            reply = encode_chunk(Chunk(1, DATA, request.cookie, 8 + 512)) + AT0 + b"x" * 512
            stream.send(reply[: limits.pop()])
            stream.hang_up()

        server.answer = answer
        async with LittleHost() as host:
            host.graph.dial = server.dial
            node = await host.add(**server.options(read_only=True))
            while limits:
                with pytest.raises(IoFailure) as caught:
                    async with asyncio.timeout(1):
                        await node.read(0, 512)
                assert caught.value.errno == errno.EIO
                await asyncio.sleep(1)

    run(scenario())


# --- the parser alone: pieces of any size


ANSWER = b"".join(
    [
        encode_chunk(Chunk(0, DATA, 1, 8 + 300)) + encode_offset(4000) + b"a" * 300,
        encode_chunk(Chunk(1, STATUS, 2, 4 + 16)) + encode_status(7, [Extent(100, 0), Extent(5000, 3)]),
        encode_chunk(Chunk(0, HOLE, 1, 12)) + encode_hole(4300, 212),
        encode_simple_reply(3),
        encode_chunk(Chunk(1, ChunkType.NONE, 1, 0)),
        encode_chunk(Chunk(0, ChunkType.ERROR, 4, 9)) + encode_error(28, "nil"),
        encode_chunk(Chunk(1, ChunkType.NONE, 4, 0)),
    ]
)


def parsed(cuts: list[int], answer: bytes = ANSWER) -> tuple[ReplyParser, dict[int, Operation], bytearray, bytes]:
    """Feed the answer in pieces, as a transport does: into the sink if there is one."""
    parser = ReplyParser(structured=True, extended=False, context=7)
    buffer = bytearray(b"?" * 512)
    operations = {
        1: Operation(Command.READ, 4000, 512, memoryview(buffer)),
        2: Operation(Command.BLOCK_STATUS, 0, 4096),
        3: Operation(Command.WRITE, 0, 10),
        4: Operation(Command.WRITE, 0, 10),
    }
    parser.pending.update(operations)
    waiting = b""
    ends = sorted({min(cut, len(answer)) for cut in cuts} | {len(answer)})
    for begin, end in zip([0, *ends], ends, strict=False):
        piece = answer[begin:end]
        if parser.sink is not None and not waiting and len(parser.sink) >= len(piece):
            parser.sink[: len(piece)] = piece
            parser.sunk(len(piece))
            continue
        waiting += piece
        waiting = waiting[parser.feed(memoryview(waiting)) :]
    return parser, operations, buffer, waiting


@given(st.lists(st.integers(1, len(ANSWER)), max_size=12))
def test_answers_come_in_pieces_of_any_size(cuts: list[int]) -> None:
    async def scenario() -> None:
        parser, operations, buffer, left = parsed(cuts)
        assert not left
        assert not parser.pending
        assert parser.answered == 4
        assert bytes(buffer) == b"a" * 300 + bytes(212)
        assert operations[1].done.result() is None
        assert operations[2].done.result() == [Extent(100, 0), Extent(5000, 3)]
        assert operations[3].done.result() is None
        with pytest.raises(Refused, match="nil"):
            operations[4].done.result()

    run(scenario())


@given(st.lists(st.tuples(st.integers(0, len(ANSWER) - 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_answers_with_wrong_bytes_end_in_a_wire_error_or_in_answers(changes: list[tuple[int, int]]) -> None:
    """No other exception, and nothing outside the caller's own bytes."""

    async def scenario() -> None:
        answer = bytearray(ANSWER)
        for at, value in changes:
            answer[at] = value
        try:
            parser, operations, _, _ = parsed([], bytes(answer))
        except WireError:
            return
        parser.lose(ConnectionError("over"))
        for operation in operations.values():
            assert operation.done.done()
            operation.abandon()

    run(scenario())


def test_sizes_of_a_sensible_server_are_taken() -> None:
    async def scenario() -> None:
        server = MemoryNbdServer(bytes(1 << 20), sizes=BlockSizes(512, 4096, 0xFFFFFFFF))
        async with LittleHost() as host:
            host.graph.dial = server.dial
            node = await host.add(**server.options(read_only=True))
            limits = node.driver.limits
            assert (limits.request_align, limits.transfer_bytes_max) == (512, 32 << 20)

    run(scenario())
