"""The NBD protocol's numbers: magics, options, commands, flags and errors (the public protocol document).

The codecs are in `nbd_options` (negotiation) and `nbd_requests` (transmission); server and client driver share them.
"""

import errno
from enum import IntEnum, IntFlag
from typing import Final

GREETING_MAGIC: Final = 0x4E42444D41474943
OPTION_MAGIC: Final = 0x49484156454F5054
OPTION_REPLY_MAGIC: Final = 0x0003E889045565A9
REQUEST_MAGIC: Final = 0x25609513
EXTENDED_REQUEST_MAGIC: Final = 0x21E41C71
SIMPLE_REPLY_MAGIC: Final = 0x67446698
CHUNK_MAGIC: Final = 0x668E33EF
EXTENDED_CHUNK_MAGIC: Final = 0x6E8A278C

STRING_BYTES_MAX: Final = 4096
"""Names, descriptions, queries and error texts."""
REQUEST_BYTES_MAX: Final = 32 << 20
"""The most payload that one request may carry or ask for."""
DEFAULT_PORT: Final = 10809


class HandshakeFlag(IntFlag):
    """What the server offers in its greeting; the client's answer uses the same bits."""

    FIXED_NEWSTYLE = 1
    NO_ZEROES = 2


class TransmissionFlag(IntFlag):
    """What an export can do."""

    HAS_FLAGS = 1
    READ_ONLY = 2
    SEND_FLUSH = 4
    SEND_FUA = 8
    ROTATIONAL = 16
    SEND_TRIM = 32
    SEND_WRITE_ZEROES = 64
    SEND_DF = 128
    CAN_MULTI_CONN = 256
    SEND_RESIZE = 512
    SEND_CACHE = 1024
    SEND_FAST_ZERO = 2048
    BLOCK_STATUS_PAYLOAD = 4096


class Option(IntEnum):
    """What a client may ask for while negotiating."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


REPLY_ERROR_BIT: Final = 1 << 31


class OptionReplyType(IntEnum):
    """Answers to options; those with the top bit are errors."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = REPLY_ERROR_BIT + 1
    ERR_POLICY = REPLY_ERROR_BIT + 2
    ERR_INVALID = REPLY_ERROR_BIT + 3
    ERR_PLATFORM = REPLY_ERROR_BIT + 4
    ERR_TLS_REQD = REPLY_ERROR_BIT + 5
    ERR_UNKNOWN = REPLY_ERROR_BIT + 6
    ERR_SHUTDOWN = REPLY_ERROR_BIT + 7
    ERR_BLOCK_SIZE_REQD = REPLY_ERROR_BIT + 8
    ERR_TOO_BIG = REPLY_ERROR_BIT + 9
    ERR_EXT_HEADER_REQD = REPLY_ERROR_BIT + 10


class InfoType(IntEnum):
    """What an INFO reply tells about an export."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class Command(IntEnum):
    """Requests of the transmission phase."""

    READ = 0
    WRITE = 1
    DISCONNECT = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7
    RESIZE = 8


class CommandFlag(IntFlag):
    """How a request is to be done."""

    FUA = 1
    NO_HOLE = 2
    DF = 4
    REQ_ONE = 8
    FAST_ZERO = 16
    PAYLOAD_LEN = 32


class ChunkFlag(IntFlag):
    """Bits of a structured reply."""

    DONE = 1


CHUNK_ERROR_BIT: Final = 1 << 15


class ChunkType(IntEnum):
    """What a chunk of a structured reply carries; those with the top bit are errors."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    BLOCK_STATUS_EXT = 6
    ERROR = CHUNK_ERROR_BIT + 1
    ERROR_OFFSET = CHUNK_ERROR_BIT + 2


class Allocation(IntFlag):
    """Status flags of the context `base:allocation`."""

    HOLE = 1
    ZERO = 2


BASE_ALLOCATION: Final = "base:allocation"
QEMU_ALLOCATION_DEPTH: Final = "qemu:allocation-depth"
QEMU_DIRTY_BITMAP: Final = "qemu:dirty-bitmap:"

_SAME_ON_THE_WIRE: Final = frozenset(
    {errno.EPERM, errno.EIO, errno.ENOMEM, errno.EINVAL, errno.ENOSPC, errno.EOVERFLOW, errno.ENOTSUP, errno.ESHUTDOWN}
)
_NEAREST: Final = {errno.EROFS: errno.EPERM, errno.EDQUOT: errno.ENOSPC, errno.EFBIG: errno.ENOSPC}


def wire_errno(code: int) -> int:
    """The error number that the protocol has for a host's errno."""
    code = _NEAREST.get(code, code)
    return code if code in _SAME_ON_THE_WIRE else errno.EINVAL


def host_errno(code: int) -> int:
    """The host's errno for an error number from a peer, which may send anything."""
    return code if code in _SAME_ON_THE_WIRE else errno.EINVAL
