"""Coming to terms with an NBD server: options, one after another, until it shows the export.

Servers differ a lot in age and manners. Whatever we would merely like to have is asked for and given up if refused;
texts are QEMU's where users know them.
"""

import ssl
from dataclasses import dataclass
from typing import Final

from blockjobs.base.errors import UsageError, WireError
from blockjobs.base.units import KiB
from blockjobs.block.drivers.nbd.link import ConnectionLost, Link
from blockjobs.block.vocabulary import LENGTH_MAX
from blockjobs.wire.nbd import (
    GREETING_MAGIC,
    OPTION_MAGIC,
    REPLY_ERROR_BIT,
    REQUEST_BYTES_MAX,
    HandshakeFlag,
    InfoType,
    Option,
    OptionReplyType,
    TransmissionFlag,
)
from blockjobs.wire.nbd_options import (
    EXPORT_NAME_PADDING_BYTES,
    EXPORT_NAME_REPLY_BYTES,
    OPTION_REPLY_HEADER_BYTES,
    BlockSizes,
    ExportInfo,
    InfoQuery,
    MetaQuery,
    OptionReplyHeader,
    decode_export_name_reply,
    decode_info,
    decode_meta_context,
    decode_option_reply_header,
    encode_client_flags,
    encode_info_query,
    encode_meta_query,
    encode_option,
)

OPTION_REPLY_BYTES_MAX: Final = 64 * KiB
REPLIES_MAX: Final = 64
"""Answers to one option."""
MINIMUM_BYTES_MAX: Final = 64 * KiB
_OLDSTYLE_MAGIC: Final = 0x0000420281861253
_OLDSTYLE_REST_BYTES: Final = 8 + 4 + 124
_SECTOR: Final = 512
_UNLIMITED: Final = 0xFFFFFFFF


class Denied(UsageError):
    """The server does not let us have the export as we want it; trying again will not help."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What was agreed on.

    Attributes:
        context: number of the block status context that was asked for; None if the server does not have it.
    """

    export: ExportInfo
    sizes: BlockSizes
    structured: bool = False
    extended: bool = False
    context: int | None = None

    def can(self, flag: TransmissionFlag) -> bool:
        """Whether the export has a feature."""
        return bool(self.export.flags & flag)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What we want: an export, how to encrypt (None: not at all), and a context of block status."""

    export: str
    tls: ssl.SSLContext | None
    hostname: str
    context: str


async def negotiate(link: Link, wishes: Wishes) -> Terms:
    """Lead the whole negotiation.

    Raises:
        Denied: the server said no.
        ConnectionLost, WireError: it went away, or makes no sense.
    Waits: for the server. Checkpoint: no.
    """
    magic = int.from_bytes(await link.read(8, "initial magic"))
    if magic != GREETING_MAGIC:
        raise WireError(f"Bad initial magic received: {magic:#018x}")
    style = int.from_bytes(await link.read(8, "server magic"))
    if style == _OLDSTYLE_MAGIC:
        return await _oldstyle(link, wishes)
    if style != OPTION_MAGIC:
        raise WireError(f"Bad server magic received: {style:#018x}")
    offered = HandshakeFlag(int.from_bytes(await link.read(2, "server flags")))
    flags = offered & (HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)
    link.send(encode_client_flags(flags))
    dialogue = _Dialogue(link, padded=not flags & HandshakeFlag.NO_ZEROES)
    if not flags & HandshakeFlag.FIXED_NEWSTYLE:
        if wishes.tls is not None:
            raise Denied("Server does not support STARTTLS")
        return _terms(await dialogue.export_name(wishes.export), None)
    if wishes.tls is not None:
        await dialogue.start_tls(wishes.tls, wishes.hostname)
    extended = await dialogue.accepts(Option.EXTENDED_HEADERS)
    structured = extended or await dialogue.accepts(Option.STRUCTURED_REPLY)
    context = await dialogue.context(wishes.export, wishes.context) if structured else None
    found = await dialogue.go(wishes.export)
    if found is None:
        # Contexts are bound to GO; without it none may be used.
        found, context = (await dialogue.export_name(wishes.export), None), None
    terms = _terms(*found)
    return Terms(export=terms.export, sizes=terms.sizes, structured=structured, extended=extended, context=context)


async def _oldstyle(link: Link, wishes: Wishes) -> Terms:
    """A server of before 2011: one export, no choice."""
    if wishes.export:
        raise Denied("Server does not support non-empty export names")
    if wishes.tls is not None:
        raise Denied("Server does not support STARTTLS")
    rest = await link.read(_OLDSTYLE_REST_BYTES, "export length")
    length, flags = int.from_bytes(rest[:8]), int.from_bytes(rest[8:12])
    return _terms(ExportInfo(length, TransmissionFlag(flags & 0xFFFF)), None)


class _Dialogue:
    """Options and their answers on one link."""

    def __init__(self, link: Link, *, padded: bool) -> None:
        self._link, self._padded = link, padded

    async def _ask(self, option: Option, data: bytes = b"") -> list[tuple[OptionReplyHeader, bytes]]:
        """Send an option and take all its answers; the last one is an ACK or an error."""
        self._link.send(encode_option(option, data))
        replies: list[tuple[OptionReplyHeader, bytes]] = []
        while len(replies) < REPLIES_MAX:
            header = decode_option_reply_header(await self._link.read(OPTION_REPLY_HEADER_BYTES, "option reply"))
            if header.option != option:
                raise WireError(f"Unexpected option type {header.option} expected {option.value}")
            if header.length > OPTION_REPLY_BYTES_MAX:
                raise WireError(f"option reply of {header.length} bytes is too long")
            replies.append((header, await self._link.read(header.length, "option reply")))
            if header.type == OptionReplyType.ACK or header.type & REPLY_ERROR_BIT:
                return replies
        raise WireError(f"more than {REPLIES_MAX} answers to option {option.value}")

    async def accepts(self, option: Option) -> bool:
        """Ask for something that is fine to be refused."""
        header, _ = (await self._ask(option))[-1]
        return header.type == OptionReplyType.ACK

    async def start_tls(self, context: ssl.SSLContext, hostname: str) -> None:
        header, _ = (await self._ask(Option.STARTTLS))[-1]
        if header.type != OptionReplyType.ACK:
            raise Denied(_refusal(header))
        await self._link.start_tls(context, hostname)

    async def context(self, export: str, name: str) -> int | None:
        replies = await self._ask(Option.SET_META_CONTEXT, encode_meta_query(MetaQuery(export, (name,))))
        if replies[-1][0].type != OptionReplyType.ACK:
            return None
        found = [decode_meta_context(data) for header, data in replies if header.type == OptionReplyType.META_CONTEXT]
        if any(context.name != name for context in found) or len(found) > 1:
            raise WireError("the server offers a context that was not asked for")
        return found[0].id if found else None

    async def go(self, export: str) -> tuple[ExportInfo, BlockSizes | None] | None:
        """Enter the export; None: the server is too old for that."""
        replies = await self._ask(Option.GO, encode_info_query(InfoQuery(export, (InfoType.BLOCK_SIZE,))))
        last, _ = replies[-1]
        if last.type == OptionReplyType.ERR_UNSUP:
            return None
        if last.type != OptionReplyType.ACK:
            raise Denied(_refusal(last))
        infos = [decode_info(data) for header, data in replies if header.type == OptionReplyType.INFO]
        exports = [info for info in infos if isinstance(info, ExportInfo)]
        sizes = [info for info in infos if isinstance(info, BlockSizes)]
        if not exports:
            raise WireError("broken server: it shows an export without its length")
        return exports[-1], sizes[-1] if sizes else None

    async def export_name(self, export: str) -> ExportInfo:
        """The old way: a server without such an export hangs up."""
        self._link.send(encode_option(Option.EXPORT_NAME, export.encode()))
        info = decode_export_name_reply(await self._link.read(EXPORT_NAME_REPLY_BYTES, "export length"))
        if self._padded:
            await self._link.read(EXPORT_NAME_PADDING_BYTES, "reserved block")
        return info


def _terms(export: ExportInfo, sizes: BlockSizes | None) -> Terms:
    """Check what the server says of itself.

    Raises:
        WireError: it makes no sense.
    """
    if export.length > LENGTH_MAX:
        raise WireError(f"export length {export.length} is too large")
    if sizes is None:
        return Terms(
            export=export, sizes=BlockSizes(1 if export.length % _SECTOR else _SECTOR, _SECTOR, REQUEST_BYTES_MAX)
        )
    minimum, preferred, maximum = sizes
    if not _is_power_of_two(minimum) or minimum > MINIMUM_BYTES_MAX:
        raise WireError(f"server minimum block size {minimum} is not a power of two, or too large")
    if not _is_power_of_two(preferred) or preferred < minimum:
        raise WireError(f"server preferred block size {preferred} is not a power of two, or below the minimum")
    if maximum < preferred or (maximum != _UNLIMITED and maximum % minimum):
        raise WireError(
            f"server maximum block size {maximum} is below the preferred one, or no multiple of the minimum"
        )
    if export.length % minimum:
        raise WireError(f"export length {export.length} is not a multiple of minimum block size {minimum}")
    return Terms(export=export, sizes=BlockSizes(minimum, preferred, min(maximum, REQUEST_BYTES_MAX)))


def _is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def _refusal(header: OptionReplyHeader) -> str:
    option = f"option {header.option} ({_NAMES.get(header.option, '<unknown>')})"
    match header.type:
        case OptionReplyType.ERR_UNSUP:
            return f"Unsupported {option}"
        case OptionReplyType.ERR_POLICY:
            return f"Denied by server for {option}"
        case OptionReplyType.ERR_INVALID:
            return f"Invalid parameters for {option}"
        case OptionReplyType.ERR_PLATFORM:
            return f"Server lacks support for {option}"
        case OptionReplyType.ERR_TLS_REQD:
            return f"TLS negotiation required before {option}"
        case OptionReplyType.ERR_UNKNOWN:
            return "Requested export not available"
        case OptionReplyType.ERR_SHUTDOWN:
            return f"Server shutting down before {option}"
        case OptionReplyType.ERR_BLOCK_SIZE_REQD:
            return f"Server requires INFO_BLOCK_SIZE for {option}"
    return f"Unknown error code {header.type:#x} when asking for {option}"


_NAMES: Final[dict[int, str]] = {Option.STARTTLS: "starttls", Option.GO: "go", Option.EXPORT_NAME: "export name"}

__all__ = ["ConnectionLost", "Denied", "Terms", "Wishes", "negotiate"]
