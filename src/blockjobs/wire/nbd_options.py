"""NBD negotiation as bytes: greeting, options and their replies, both directions, without I/O.

`decode_*` of a header takes exactly the header's bytes and gives the length of what follows; whoever reads the stream
checks that length before waiting for so much. Decoders of data take all of it. They raise `WireError` for whatever
the protocol document does not allow.
"""

import struct
from typing import Final, NamedTuple

from blockjobs.base.errors import WireError
from blockjobs.wire.nbd import (
    GREETING_MAGIC,
    OPTION_MAGIC,
    OPTION_REPLY_MAGIC,
    STRING_BYTES_MAX,
    HandshakeFlag,
    InfoType,
    TransmissionFlag,
)

_GREETING: Final = struct.Struct(">QQH")
_CLIENT_FLAGS: Final = struct.Struct(">I")
_OPTION: Final = struct.Struct(">QII")
_OPTION_REPLY: Final = struct.Struct(">QIII")
_EXPORT: Final = struct.Struct(">QH")
_INFO_EXPORT: Final = struct.Struct(">HQH")
_INFO_BLOCK_SIZE: Final = struct.Struct(">HIII")
_U16: Final = struct.Struct(">H")
_U32: Final = struct.Struct(">I")

GREETING_BYTES: Final = _GREETING.size
CLIENT_FLAGS_BYTES: Final = _CLIENT_FLAGS.size
OPTION_HEADER_BYTES: Final = _OPTION.size
OPTION_REPLY_HEADER_BYTES: Final = _OPTION_REPLY.size
EXPORT_NAME_REPLY_BYTES: Final = _EXPORT.size
EXPORT_NAME_PADDING_BYTES: Final = 124


def encode_greeting(flags: HandshakeFlag) -> bytes:
    """The first bytes that a newstyle server sends."""
    return _GREETING.pack(GREETING_MAGIC, OPTION_MAGIC, flags)


def decode_greeting(data: bytes) -> HandshakeFlag:
    """What the server offers.

    Raises:
        WireError: no NBD server, or one that speaks oldstyle.
    """
    magic, style, flags = _GREETING.unpack(data)
    if magic != GREETING_MAGIC:
        raise WireError("Bad initial magic received")
    if style != OPTION_MAGIC:
        raise WireError("the server does not speak newstyle NBD")
    return HandshakeFlag(flags)


def encode_client_flags(flags: HandshakeFlag) -> bytes:
    """The client's answer to the greeting."""
    return _CLIENT_FLAGS.pack(flags)


def decode_client_flags(data: bytes) -> HandshakeFlag:
    """The client's answer to the greeting.

    Raises:
        WireError: bits that were not offered.
    """
    (flags,) = _CLIENT_FLAGS.unpack(data)
    if flags & ~int(HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES):
        raise WireError(f"client sent unknown flags {flags:#x}")
    return HandshakeFlag(flags)


# --- options


class OptionHeader(NamedTuple):
    """An option's number, which may be unknown to us, and how many bytes of data follow."""

    option: int
    length: int


def encode_option(option: int, data: bytes = b"") -> bytes:
    """A whole option."""
    return _OPTION.pack(OPTION_MAGIC, option, len(data)) + data


def decode_option_header(data: bytes | memoryview) -> OptionHeader:
    """The fixed part of an option.

    Raises:
        WireError: the magic is wrong.
    """
    magic, option, length = _OPTION.unpack(data)
    if magic != OPTION_MAGIC:
        raise WireError("bad option magic")
    return OptionHeader(option, length)


class OptionReplyHeader(NamedTuple):
    """Which option is answered, how (see `OptionReplyType`), and how many bytes of data follow."""

    option: int
    type: int
    length: int


def encode_option_reply(option: int, type: int, data: bytes = b"") -> bytes:
    """A whole reply to an option."""
    return _OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, type, len(data)) + data


def encode_option_error(option: int, type: int, text: str) -> bytes:
    """A whole error reply; a long text is cut."""
    return encode_option_reply(option, type, cut_text(text))


def decode_option_reply_header(data: bytes | memoryview) -> OptionReplyHeader:
    """The fixed part of a reply to an option.

    Raises:
        WireError: the magic is wrong.
    """
    magic, option, type, length = _OPTION_REPLY.unpack(data)
    if magic != OPTION_REPLY_MAGIC:
        raise WireError("Unexpected option reply magic")
    return OptionReplyHeader(option, type, length)


# --- data of options


class InfoQuery(NamedTuple):
    """Data of INFO and GO: the export's name and what else the client would like to know."""

    name: str
    infos: tuple[int, ...]


def encode_info_query(query: InfoQuery) -> bytes:
    """Data of INFO and GO."""
    name = query.name.encode()
    return b"".join(
        (_U32.pack(len(name)), name, _U16.pack(len(query.infos)), *(_U16.pack(info) for info in query.infos))
    )


def decode_info_query(data: bytes) -> InfoQuery:
    """Data of INFO and GO.

    Raises:
        WireError: lengths do not add up, or the name is too long or no UTF-8.
    """
    name, at = _string(data, 0)
    (count,) = _unpack(_U16, data, at)
    at += _U16.size
    if len(data) != at + count * _U16.size:
        raise WireError("the number of information requests does not fit the option's length")
    return InfoQuery(name, tuple(value for (value,) in _U16.iter_unpack(data[at:])))


class MetaQuery(NamedTuple):
    """Data of LIST_META_CONTEXT and SET_META_CONTEXT: the export's name and what contexts are looked for."""

    name: str
    queries: tuple[str, ...]


def encode_meta_query(query: MetaQuery) -> bytes:
    """Data of LIST_META_CONTEXT and SET_META_CONTEXT."""
    return _packed(query.name) + _U32.pack(len(query.queries)) + b"".join(map(_packed, query.queries))


def decode_meta_query(data: bytes) -> MetaQuery:
    """Data of LIST_META_CONTEXT and SET_META_CONTEXT.

    Raises:
        WireError: lengths do not add up, or a string is too long or no UTF-8.
    """
    name, at = _string(data, 0)
    (count,) = _unpack(_U32, data, at)
    at += _U32.size
    if count * _U32.size > len(data) - at:
        raise WireError("the number of queries does not fit the option's length")
    queries = []
    for _ in range(count):
        query, at = _string(data, at)
        queries.append(query)
    if at != len(data):
        raise WireError("bytes after the last query")
    return MetaQuery(name, tuple(queries))


def decode_export_name(data: bytes) -> str:
    """Data of EXPORT_NAME.

    Raises:
        WireError: too long or no UTF-8.
    """
    return _text(data)


# --- data of replies


def encode_server(name: str, description: str = "") -> bytes:
    """Data of a SERVER reply: one export of a list."""
    return _packed(name) + cut_text(description)


def decode_server(data: bytes) -> tuple[str, str]:
    """Name and description of one export of a list.

    Raises:
        WireError: the data makes no sense.
    """
    name, at = _string(data, 0)
    return name, _text(data[at:])


class ExportInfo(NamedTuple):
    """An export's length in bytes and what it can do."""

    length: int
    flags: TransmissionFlag


def encode_export_name_reply(info: ExportInfo, *, padded: bool) -> bytes:
    """The whole answer to EXPORT_NAME; padded unless both sides agreed on NO_ZEROES."""
    return _EXPORT.pack(*info) + bytes(EXPORT_NAME_PADDING_BYTES if padded else 0)


def decode_export_name_reply(data: bytes) -> ExportInfo:
    """The answer to EXPORT_NAME, without its padding."""
    length, flags = _EXPORT.unpack(data)
    return ExportInfo(length, TransmissionFlag(flags))


class BlockSizes(NamedTuple):
    """What requests an export takes, in bytes: multiples of `minimum`, best `preferred`, at most `maximum`."""

    minimum: int
    preferred: int
    maximum: int


Info = ExportInfo | BlockSizes | tuple[InfoType, str]


def encode_info(info: Info) -> bytes:
    """Data of an INFO reply."""
    if isinstance(info, ExportInfo):
        return _INFO_EXPORT.pack(InfoType.EXPORT, *info)
    if isinstance(info, BlockSizes):
        return _INFO_BLOCK_SIZE.pack(InfoType.BLOCK_SIZE, *info)
    type, text = info
    return _U16.pack(type) + cut_text(text)


def decode_info(data: bytes) -> Info | None:
    """Data of an INFO reply; None for a type that we do not know.

    Raises:
        WireError: the data does not fit its type.
    """
    (type,) = _unpack(_U16, data, 0)
    match type:
        case InfoType.EXPORT:
            _, length, flags = _unpack_all(_INFO_EXPORT, data)
            return ExportInfo(length, TransmissionFlag(flags))
        case InfoType.BLOCK_SIZE:
            _, minimum, preferred, maximum = _unpack_all(_INFO_BLOCK_SIZE, data)
            return BlockSizes(minimum, preferred, maximum)
        case InfoType.NAME | InfoType.DESCRIPTION:
            return InfoType(type), _text(data[_U16.size :])
    return None


class MetaContext(NamedTuple):
    """A context of block status: the number that replies use for it, and its name."""

    id: int
    name: str


def encode_meta_context(context: MetaContext) -> bytes:
    """Data of a META_CONTEXT reply."""
    return _U32.pack(context.id) + context.name.encode()


def decode_meta_context(data: bytes) -> MetaContext:
    """Data of a META_CONTEXT reply.

    Raises:
        WireError: too short, or the name is too long or no UTF-8.
    """
    (number,) = _unpack(_U32, data, 0)
    return MetaContext(number, _text(data[_U32.size :]))


def decode_error_text(data: bytes) -> str:
    """What an error reply says, for people: whatever a peer sends becomes text of bounded length."""
    return data[:STRING_BYTES_MAX].decode(errors="replace")


# --- strings


def cut_text(text: str) -> bytes:
    """UTF-8 of at most `STRING_BYTES_MAX` bytes, cut between characters."""
    return text.encode()[:STRING_BYTES_MAX].decode(errors="ignore").encode()


def _packed(text: str) -> bytes:
    data = text.encode()
    return _U32.pack(len(data)) + data


def _text(data: bytes) -> str:
    if len(data) > STRING_BYTES_MAX:
        raise WireError(f"a string of {len(data)} bytes, {STRING_BYTES_MAX} are allowed")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise WireError("a string is not UTF-8") from error


def _string(data: bytes, at: int) -> tuple[str, int]:
    """A counted string and where it ends."""
    (length,) = _unpack(_U32, data, at)
    at += _U32.size
    if length > len(data) - at:
        raise WireError("a string is longer than the option")
    return _text(data[at : at + length]), at + length


def _unpack(layout: struct.Struct, data: bytes, at: int) -> tuple[int, ...]:
    if len(data) < at + layout.size:
        raise WireError("the option's data is too short")
    return layout.unpack_from(data, at)


def _unpack_all(layout: struct.Struct, data: bytes) -> tuple[int, ...]:
    if len(data) != layout.size:
        raise WireError(f"an information of {len(data)} bytes, expected {layout.size}")
    return layout.unpack(data)
