import errno
import socket
import subprocess
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockjobs.base.errors import WireError
from blockjobs.wire import nbd_options as options
from blockjobs.wire import nbd_requests as requests
from blockjobs.wire.nbd import (
    REQUEST_BYTES_MAX,
    STRING_BYTES_MAX,
    ChunkFlag,
    ChunkType,
    Command,
    HandshakeFlag,
    InfoType,
    Option,
    OptionReplyType,
    TransmissionFlag,
    host_errno,
    wire_errno,
)

TEXT = st.text(max_size=64)
U16 = st.integers(0, (1 << 16) - 1)
U32 = st.integers(0, (1 << 32) - 1)
U64 = st.integers(0, (1 << 64) - 1)


@given(TEXT, st.lists(U16, max_size=8))
def test_info_query_comes_back(name: str, infos: list[int]) -> None:
    query = options.InfoQuery(name, tuple(infos))
    assert options.decode_info_query(options.encode_info_query(query)) == query


@given(TEXT, st.lists(TEXT, max_size=8))
def test_meta_query_comes_back(name: str, queries: list[str]) -> None:
    query = options.MetaQuery(name, tuple(queries))
    assert options.decode_meta_query(options.encode_meta_query(query)) == query


@given(st.binary(max_size=80))
def test_any_bytes_as_option_data_are_a_value_or_a_wire_error(data: bytes) -> None:
    for decode in (
        options.decode_info_query,
        options.decode_meta_query,
        options.decode_export_name,
        options.decode_server,
        options.decode_info,
        options.decode_meta_context,
        requests.decode_offset,
        requests.decode_hole,
        requests.decode_status,
        requests.decode_status_query,
        lambda payload: requests.decode_status(payload, extended=True),
        lambda payload: requests.decode_error(payload, ChunkType.ERROR),
        lambda payload: requests.decode_error(payload, ChunkType.ERROR_OFFSET),
        lambda payload: requests.decode_error(payload, 40000),
    ):
        try:
            decode(data)
        except WireError:
            pass


@given(st.binary(max_size=60), st.binary(min_size=1, max_size=5))
def test_every_cut_and_every_addition_to_queries_is_refused(name: bytes, extra: bytes) -> None:
    meta = options.encode_meta_query(options.MetaQuery(name.hex(), ("base:", "qemu:x")))
    info = options.encode_info_query(options.InfoQuery(name.hex(), (1, 3)))
    for length in range(len(meta)):
        with pytest.raises(WireError):
            options.decode_meta_query(meta[:length])
    for length in range(len(info)):
        with pytest.raises(WireError):
            options.decode_info_query(info[:length])
    with pytest.raises(WireError):
        options.decode_meta_query(meta + extra)
    with pytest.raises(WireError):
        options.decode_info_query(info + extra)


def test_a_giant_count_of_queries_is_refused_at_once() -> None:
    with pytest.raises(WireError, match="number of queries"):
        options.decode_meta_query(bytes(4) + b"\xff\xff\xff\xff")


def test_names_longer_than_the_protocol_allows_are_refused() -> None:
    fits = "n" * STRING_BYTES_MAX
    assert options.decode_info_query(options.encode_info_query(options.InfoQuery(fits, ()))).name == fits
    with pytest.raises(WireError, match="4097 bytes"):
        options.decode_info_query(options.encode_info_query(options.InfoQuery(fits + "n", ())))
    with pytest.raises(WireError, match="UTF-8"):
        options.decode_export_name(b"\xff\xfe")


@pytest.mark.parametrize(
    "info",
    [
        options.ExportInfo(1 << 40, TransmissionFlag.HAS_FLAGS | TransmissionFlag.SEND_TRIM),
        options.BlockSizes(1, 4096, 32 << 20),
        (InfoType.NAME, "disk"),
        (InfoType.DESCRIPTION, "ä disk"),
    ],
)
def test_infos_come_back(info: options.Info) -> None:
    assert options.decode_info(options.encode_info(info)) == info


def test_an_unknown_info_is_skipped() -> None:
    assert options.decode_info(b"\x00\x63what") is None


def test_texts_are_cut_between_characters() -> None:
    reply = options.encode_option_error(Option.GO, OptionReplyType.ERR_UNKNOWN, "ü" * 4096)
    header = options.decode_option_reply_header(reply[: options.OPTION_REPLY_HEADER_BYTES])
    assert header == (Option.GO, OptionReplyType.ERR_UNKNOWN, STRING_BYTES_MAX)
    text = reply[options.OPTION_REPLY_HEADER_BYTES :]
    assert text.decode() == "ü" * (STRING_BYTES_MAX // 2)
    code, text_back = requests.decode_error(requests.encode_error(errno.EIO, "ü" * 4096), ChunkType.ERROR)
    assert (code, text_back) == (errno.EIO, "ü" * (STRING_BYTES_MAX // 2))


def test_greeting_and_flags() -> None:
    flags = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES
    greeting = options.encode_greeting(flags)
    assert greeting == b"NBDMAGICIHAVEOPT\x00\x03"
    assert options.decode_greeting(greeting) == flags
    assert options.decode_client_flags(options.encode_client_flags(flags)) == flags
    with pytest.raises(WireError, match="initial magic"):
        options.decode_greeting(b"SSH-2.0-OpenSSH_10")
    with pytest.raises(WireError, match="newstyle"):
        options.decode_greeting(b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53\x00\x00")
    with pytest.raises(WireError, match="flags"):
        options.decode_client_flags(b"\x00\x00\x00\x07")


@given(U16, U16, U64, U64, U32, st.booleans())
def test_requests_come_back(flags: int, command: int, cookie: int, at: int, length: int, extended: bool) -> None:
    request = requests.Request(flags, command, cookie, at, length)
    data = requests.encode_request(request, extended=extended)
    assert len(data) == requests.request_bytes(extended=extended)
    assert requests.decode_request(b"before" + data, 6, extended=extended) == request
    with pytest.raises(WireError, match="request magic"):
        requests.decode_request(b"\x00" + data, extended=extended)


@given(U16, U16, U64, U32, U64, st.booleans())
def test_chunks_come_back(flags: int, type: int, cookie: int, length: int, at: int, extended: bool) -> None:
    chunk = requests.Chunk(flags, type, cookie, length, at if extended else 0)
    data = requests.encode_chunk(chunk, extended=extended)
    magic = requests.reply_magic(data)
    assert requests.reply_bytes(magic, structured=True, extended=extended) == len(data)
    assert requests.decode_reply(data) == chunk
    assert chunk.is_done == bool(flags & ChunkFlag.DONE) and chunk.is_error == (type >= 1 << 15)


@given(U64, U64, U32, st.booleans())
def test_the_header_of_data_is_a_chunk_and_an_offset(cookie: int, at: int, length: int, extended: bool) -> None:
    length = min(length, REQUEST_BYTES_MAX)
    data = requests.encode_data(requests.Request(0, Command.READ, cookie, at, length), extended=extended)
    chunk = requests.Chunk(ChunkFlag.DONE, ChunkType.OFFSET_DATA, cookie, length + 8, at if extended else 0)
    assert data == requests.encode_chunk(chunk, extended=extended) + requests.encode_offset(at)


def test_replies_that_were_not_negotiated_are_refused() -> None:
    simple = requests.encode_simple_reply(7, errno.EIO)
    assert requests.decode_reply(simple) == requests.SimpleReply(errno.EIO, 7)
    chunk = requests.encode_chunk(requests.Chunk(1, ChunkType.NONE, 7, 0))
    for data, structured, extended in ((chunk, False, False), (simple, True, True), (chunk, True, True)):
        with pytest.raises(WireError, match="reply magic"):
            requests.reply_bytes(requests.reply_magic(data), structured=structured, extended=extended)


@given(U32, st.lists(st.tuples(st.integers(1, 1 << 31), U32), min_size=1, max_size=20), st.booleans())
def test_extents_come_back(context: int, pairs: list[tuple[int, int]], extended: bool) -> None:
    extents = [requests.Extent(*pair) for pair in pairs]
    payload = requests.encode_status(context, extents, extended=extended)
    assert requests.decode_status(payload, extended=extended) == (context, extents)
    with pytest.raises(WireError):
        requests.decode_status(payload[:-1], extended=extended)


def test_empty_extents_and_holes_are_refused() -> None:
    with pytest.raises(WireError, match="empty extent"):
        requests.decode_status(requests.encode_status(1, [requests.Extent(0, 1)]))
    with pytest.raises(WireError, match="empty hole"):
        requests.decode_hole(requests.encode_hole(4096, 0))
    assert requests.decode_hole(requests.encode_hole(4096, 512)) == (4096, 512)
    assert requests.decode_error(requests.encode_error(errno.EIO, "no", 4096), ChunkType.ERROR_OFFSET) == (5, "no")


def test_status_queries_come_back() -> None:
    query = requests.decode_status_query(requests.encode_status_query(1 << 40, [1, 3]))
    assert query == (1 << 40, (1, 3))


def test_errors_are_those_of_the_protocol() -> None:
    assert [wire_errno(code) for code in (errno.EROFS, errno.EDQUOT, errno.EIO, errno.EBADF)] == [1, 28, 5, 22]
    assert host_errno(errno.ENOSPC) == errno.ENOSPC and host_errno(12345) == errno.EINVAL


@pytest.mark.qemu
def test_qemu_nbd_and_libnbd_understand_us(tmp_path: Path) -> None:
    """Against a real server: greeting, GO and a read, spoken with these codecs over a plain socket."""
    image = tmp_path / "disk.raw"
    image.write_bytes(b"A" * 4096 + bytes(4096))
    path = tmp_path / "n.sock"
    server = subprocess.Popen(["qemu-nbd", "-r", "-f", "raw", "-x", "disk", "-k", str(path), str(image), "-t"])
    try:
        with _connected(path) as peer:
            _talk(peer)
    finally:
        server.terminate()
        server.wait()


def _connected(path: Path) -> socket.socket:
    for _ in range(200):
        peer = socket.socket(socket.AF_UNIX)
        peer.settimeout(10)
        try:
            peer.connect(str(path))
            return peer
        except OSError:
            peer.close()
            threading.Event().wait(0.05)
    raise AssertionError("the server does not come up")


def _exactly(peer: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = peer.recv(count - len(data))
        assert part
        data += part
    return data


def _talk(peer: socket.socket) -> None:
    flags = options.decode_greeting(_exactly(peer, options.GREETING_BYTES))
    peer.sendall(options.encode_client_flags(flags))
    query = options.InfoQuery("disk", (InfoType.BLOCK_SIZE,))
    peer.sendall(options.encode_option(Option.GO, options.encode_info_query(query)))
    seen = []
    while True:
        header = options.decode_option_reply_header(_exactly(peer, options.OPTION_REPLY_HEADER_BYTES))
        data = _exactly(peer, header.length)
        if header.type == OptionReplyType.ACK:
            break
        assert header.type == OptionReplyType.INFO
        seen.append(options.decode_info(data))
    assert any(isinstance(info, options.ExportInfo) and info.length == 8192 for info in seen)
    assert options.BlockSizes(1, 4096, 32 << 20) in seen
    peer.sendall(requests.encode_request(requests.Request(0, Command.READ, 77, 4090, 12)))
    reply = _exactly(peer, requests.reply_bytes(requests.reply_magic(peer.recv(4, socket.MSG_PEEK)), structured=False))
    assert requests.decode_reply(reply) == requests.SimpleReply(0, 77)
    assert _exactly(peer, 12) == b"A" * 6 + bytes(6)
    peer.sendall(requests.encode_request(requests.Request(0, Command.WRITE, 78, 0, 4)) + b"oops")
    assert requests.decode_reply(_exactly(peer, 16)) == requests.SimpleReply(errno.EINVAL, 78)
