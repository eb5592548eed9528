"""NBD transmission as bytes: requests, simple and structured replies, compact and extended, without I/O.

Extended headers (64-bit lengths) replace both requests and structured replies once they are negotiated; every function
that differs takes `extended`. Payload is never copied here: encoders make headers only, and the payload follows.
"""

import struct
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Final, NamedTuple

from blockjobs.base.errors import WireError
from blockjobs.wire.nbd import (
    CHUNK_ERROR_BIT,
    CHUNK_MAGIC,
    EXTENDED_CHUNK_MAGIC,
    EXTENDED_REQUEST_MAGIC,
    REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRING_BYTES_MAX,
    ChunkFlag,
    ChunkType,
)

REQUEST: Final = struct.Struct(">IHHQQI")
EXTENDED_REQUEST: Final = struct.Struct(">IHHQQQ")
SIMPLE_REPLY: Final = struct.Struct(">IIQ")
CHUNK: Final = struct.Struct(">IHHQI")
EXTENDED_CHUNK: Final = struct.Struct(">IHHQQQ")
_DATA: Final = struct.Struct(">IHHQIQ")
_EXTENDED_DATA: Final = struct.Struct(">IHHQQQQ")
_U32: Final = struct.Struct(">I")
_U64: Final = struct.Struct(">Q")
_OFFSET_HOLE: Final = struct.Struct(">QI")
_ERROR: Final = struct.Struct(">IH")
_STATUS_EXT: Final = struct.Struct(">II")

OFFSET_BYTES: Final = _U64.size
"""Of an OFFSET_DATA chunk's payload, before the bytes that were read."""


class Request(NamedTuple):
    """One request of a client.

    Attributes:
        flags: bits of `CommandFlag`; unknown ones are kept.
        command: a `Command`, or a number that we do not know.
        cookie: the client's own name for the request, repeated in replies.
        at, length: in bytes of the export.
    """

    flags: int
    command: int
    cookie: int
    at: int
    length: int


def request_bytes(*, extended: bool) -> int:
    """How long a request's header is."""
    return EXTENDED_REQUEST.size if extended else REQUEST.size


def encode_request(request: Request, *, extended: bool = False) -> bytes:
    """A request's header; the payload of a write follows."""
    if extended:
        return EXTENDED_REQUEST.pack(EXTENDED_REQUEST_MAGIC, *request)
    return REQUEST.pack(REQUEST_MAGIC, *request)


def decode_request(buffer: bytes | bytearray | memoryview, at: int = 0, *, extended: bool = False) -> Request:
    """A request's header at byte `at` of `buffer`.

    Raises:
        WireError: the magic is wrong, so that nothing that follows can be understood.
    """
    layout, wanted = (EXTENDED_REQUEST, EXTENDED_REQUEST_MAGIC) if extended else (REQUEST, REQUEST_MAGIC)
    fields = layout.unpack_from(buffer, at)
    if fields[0] != wanted:
        raise WireError(f"invalid request magic {fields[0]:#x}")
    return Request._make(fields[1:])


# --- replies


class SimpleReply(NamedTuple):
    """The answer to one request; after a read without error the bytes follow."""

    error: int
    cookie: int


def encode_simple_reply(cookie: int, error: int = 0) -> bytes:
    """A whole simple reply, or its header if it answers a read."""
    return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, error, cookie)


class Chunk(NamedTuple):
    """Header of one part of a structured reply.

    Attributes:
        flags: bits of `ChunkFlag`.
        type: a `ChunkType`, or a number that we do not know.
        cookie: of the request.
        length: bytes of payload that follow.
        at: the request's offset; only extended headers carry it, otherwise 0.
    """

    flags: int
    type: int
    cookie: int
    length: int
    at: int = 0

    @property
    def is_done(self) -> bool:
        """Whether it is the request's last chunk."""
        return bool(self.flags & ChunkFlag.DONE)

    @property
    def is_error(self) -> bool:
        """Whether it says that the request failed; true of unknown types too, if they have the bit."""
        return bool(self.type & CHUNK_ERROR_BIT)


def encode_chunk(chunk: Chunk, *, extended: bool = False) -> bytes:
    """A chunk's header; its payload follows."""
    flags, type, cookie, length, at = chunk
    if extended:
        return EXTENDED_CHUNK.pack(EXTENDED_CHUNK_MAGIC, flags, type, cookie, at, length)
    return CHUNK.pack(CHUNK_MAGIC, flags, type, cookie, length)


def encode_data(request: Request, *, extended: bool = False) -> bytes:
    """Header of the one chunk that answers a read: an OFFSET_DATA chunk up to its bytes."""
    _, _, cookie, at, length = request
    length += OFFSET_BYTES
    if extended:
        return _EXTENDED_DATA.pack(EXTENDED_CHUNK_MAGIC, ChunkFlag.DONE, ChunkType.OFFSET_DATA, cookie, at, length, at)
    return _DATA.pack(CHUNK_MAGIC, ChunkFlag.DONE, ChunkType.OFFSET_DATA, cookie, length, at)


def reply_magic(buffer: bytes | bytearray | memoryview, at: int = 0) -> int:
    """The magic that tells what kind of reply begins at byte `at`."""
    (magic,) = _U32.unpack_from(buffer, at)
    return int(magic)


def reply_bytes(magic: int, *, structured: bool, extended: bool = False) -> int:
    """How long the header of the reply is that begins with `magic`.

    Raises:
        WireError: such a reply may not come in what was negotiated.
    """
    if extended:
        if magic == EXTENDED_CHUNK_MAGIC:
            return EXTENDED_CHUNK.size
    elif magic == SIMPLE_REPLY_MAGIC:
        return SIMPLE_REPLY.size
    elif magic == CHUNK_MAGIC and structured:
        return CHUNK.size
    raise WireError(f"invalid reply magic {magic:#x}")


def decode_reply(buffer: bytes | bytearray | memoryview, at: int = 0) -> SimpleReply | Chunk:
    """The header of a reply, whose magic `reply_bytes` has approved."""
    magic = reply_magic(buffer, at)
    if magic == SIMPLE_REPLY_MAGIC:
        _, error, cookie = SIMPLE_REPLY.unpack_from(buffer, at)
        return SimpleReply(error, cookie)
    if magic == EXTENDED_CHUNK_MAGIC:
        _, flags, type, cookie, offset, length = EXTENDED_CHUNK.unpack_from(buffer, at)
        return Chunk(flags, type, cookie, length, offset)
    _, flags, type, cookie, length = CHUNK.unpack_from(buffer, at)
    return Chunk(flags, type, cookie, length)


# --- payload of chunks


def encode_offset(at: int) -> bytes:
    """What precedes the bytes in the payload of OFFSET_DATA."""
    return _U64.pack(at)


def decode_offset(payload: bytes | memoryview) -> int:
    """Where the bytes of OFFSET_DATA belong; they begin `OFFSET_BYTES` later.

    Raises:
        WireError: there is no byte after the offset.
    """
    if len(payload) <= _U64.size:
        raise WireError("a data chunk without data")
    return int(_U64.unpack_from(payload)[0])


def encode_hole(at: int, length: int) -> bytes:
    """Payload of OFFSET_HOLE."""
    return _OFFSET_HOLE.pack(at, length)


def decode_hole(payload: bytes | memoryview) -> tuple[int, int]:
    """Offset and length of OFFSET_HOLE.

    Raises:
        WireError: wrong length, or an empty hole.
    """
    if len(payload) != _OFFSET_HOLE.size:
        raise WireError(f"a hole chunk of {len(payload)} bytes")
    at, length = _OFFSET_HOLE.unpack(payload)
    if not length:
        raise WireError("an empty hole")
    return at, length


def encode_error(code: int, text: str, at: int | None = None) -> bytes:
    """Payload of ERROR, or with `at` of ERROR_OFFSET; a long text is cut."""
    data = text.encode()[:STRING_BYTES_MAX].decode(errors="ignore").encode()
    return _ERROR.pack(code, len(data)) + data + (b"" if at is None else _U64.pack(at))


def decode_error(payload: bytes | memoryview, type: int) -> tuple[int, str]:
    """Number and text of an error chunk of any type.

    Raises:
        WireError: lengths do not add up, or it is no error.
    """
    payload = bytes(payload)
    if len(payload) < _ERROR.size:
        raise WireError("an error chunk is too short")
    code, length = _ERROR.unpack_from(payload)
    rest = len(payload) - _ERROR.size - length
    allowed = {ChunkType.ERROR: rest == 0, ChunkType.ERROR_OFFSET: rest == _U64.size}
    if not allowed.get(ChunkType(type) if type in tuple(ChunkType) else ChunkType.NONE, rest >= 0) or not code:
        raise WireError("an error chunk makes no sense")
    return code, payload[_ERROR.size : _ERROR.size + min(length, STRING_BYTES_MAX)].decode(errors="replace")


class Extent(NamedTuple):
    """A run of block status: its length in bytes and the context's flags."""

    length: int
    flags: int


def encode_status(context: int, extents: Sequence[Extent], *, extended: bool = False) -> bytes:
    """Payload of BLOCK_STATUS, or of BLOCK_STATUS_EXT if extended; at least one extent."""
    numbers = chain.from_iterable(extents)
    if extended:
        return _STATUS_EXT.pack(context, len(extents)) + struct.pack(f">{2 * len(extents)}Q", *numbers)
    return _U32.pack(context) + struct.pack(f">{2 * len(extents)}I", *numbers)


def decode_status(payload: bytes | memoryview, *, extended: bool = False) -> tuple[int, list[Extent]]:
    """Context and extents of BLOCK_STATUS, or of BLOCK_STATUS_EXT if extended.

    Raises:
        WireError: lengths do not add up, no extent, or an empty one.
    """
    payload = bytes(payload)
    head, each = (_STATUS_EXT.size, 16) if extended else (_U32.size, 8)
    count, rest = divmod(len(payload) - head, each)
    if count < 1 or rest:
        raise WireError(f"a block status chunk of {len(payload)} bytes")
    if extended:
        context, announced = _STATUS_EXT.unpack_from(payload)
        if announced != count:
            raise WireError("a block status chunk with another number of extents than it says")
    else:
        (context,) = _U32.unpack_from(payload)
    numbers = struct.unpack_from(f">{2 * count}{'Q' if extended else 'I'}", payload, head)
    extents = [Extent(length, flags) for length, flags in zip(numbers[::2], numbers[1::2], strict=True)]
    if not all(extent.length for extent in extents):
        raise WireError("an empty extent")
    return context, extents


class StatusQuery(NamedTuple):
    """Payload of a BLOCK_STATUS request: how much to look at, and which contexts to report."""

    length: int
    contexts: tuple[int, ...]


def encode_status_query(length: int, contexts: Iterable[int]) -> bytes:
    """Payload of a BLOCK_STATUS request with PAYLOAD_LEN."""
    return _U64.pack(length) + b"".join(map(_U32.pack, contexts))


def decode_status_query(payload: bytes | memoryview) -> StatusQuery:
    """Payload of a BLOCK_STATUS request with PAYLOAD_LEN.

    Raises:
        WireError: lengths do not add up.
    """
    payload = bytes(payload)
    count, rest = divmod(len(payload) - _U64.size, _U32.size)
    if count < 0 or rest:
        raise WireError("a block status request's payload has a wrong length")
    return StatusQuery(int(_U64.unpack_from(payload)[0]), struct.unpack_from(f">{count}I", payload, _U64.size))
