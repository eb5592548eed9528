"""One client's negotiation: bytes in, bytes out, no I/O (the public protocol document; texts are QEMU's)."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, Final, Protocol

from blockjobs.base.errors import WireError
from blockjobs.wire import nbd_options as codec
from blockjobs.wire.nbd import HandshakeFlag, InfoType, Option, OptionReplyType
from blockjobs.wire.nbd_options import BlockSizes, MetaContext, OptionHeader

if TYPE_CHECKING:
    from blockjobs.export.nbd_export import NbdExport

OPTION_BYTES_MAX: Final = 64 << 10
"""Longer data of an option is not looked at."""
SKIPPED_BYTES_MAX: Final = 4 << 20
"""So much of options that are too long is read and forgotten before the client is dropped."""
OPTIONS_MAX: Final = 1024
"""More options than any client needs."""
PREFERRED_BYTES: Final = 4096
_BEFORE_TLS: Final = (Option.STARTTLS, Option.ABORT)
_NAMES: Final = {
    Option.EXPORT_NAME: "export name",
    Option.ABORT: "abort",
    Option.LIST: "list",
    Option.STARTTLS: "starttls",
    Option.INFO: "info",
    Option.GO: "go",
    Option.STRUCTURED_REPLY: "structured reply",
    Option.LIST_META_CONTEXT: "list meta context",
    Option.SET_META_CONTEXT: "set meta context",
    Option.EXTENDED_HEADERS: "extended headers",
}


class Offers(Protocol):
    """What a server has."""

    def exports(self) -> "list[NbdExport]":
        """All exports that clients may see, oldest first."""
        ...

    def export(self, name: str) -> "NbdExport | None":
        """The export of that name."""
        ...

    def refuses(self) -> str | None:
        """Why no further client may begin to work, if so."""
        ...


class Tls(Enum):
    """Where this connection stands with encryption."""

    NONE = auto()
    REQUIRED = auto()
    ACTIVE = auto()


class Outcome(Enum):
    """What comes after the negotiation."""

    GONE = auto()
    """Nothing: send what is to be sent and close."""
    START_TLS = auto()
    """The TLS handshake, then the negotiation begins anew (`secured`)."""
    TRANSMISSION = auto()
    """Requests, on `agreed`."""


@dataclass(frozen=True, slots=True)
class Agreed:
    """What was negotiated.

    Attributes:
        export: what the client works on.
        structured: it takes structured replies.
        extended: requests and replies have extended headers.
        contexts: of block status.
    """

    export: "NbdExport"
    structured: bool
    extended: bool
    contexts: tuple[MetaContext, ...]


class Refused(Exception):
    """An option cannot be had; the client may go on negotiating."""

    def __init__(self, type: OptionReplyType, text: str) -> None:
        self.type = type
        super().__init__(text)


class Negotiation:
    """Server's side of the handshake.

    Attributes:
        outcome: None while it goes on.
        agreed: set with `Outcome.TRANSMISSION`.
        rest: bytes received behind the last option: the first requests of a client that does not wait.
    """

    def __init__(self, offers: Offers, *, tls: Tls = Tls.NONE) -> None:
        self._offers, self._tls = offers, tls
        self._buffer = bytearray()
        self._flags: HandshakeFlag | None = None
        self._skip = 0
        self._skipped_bytes = 0
        self._options = 0
        self.outcome: Outcome | None = None
        self.agreed: Agreed | None = None
        self._forget()

    def greeting(self) -> bytes:
        """What the server says first."""
        return codec.encode_greeting(HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)

    @property
    def rest(self) -> bytes:
        """See the class."""
        return bytes(self._buffer)

    def secured(self) -> None:
        """The TLS handshake is done: what was said before it does not count, since anybody may have said it."""
        self._tls = Tls.ACTIVE
        self.outcome = None
        self._buffer.clear()
        self._forget()

    def feed(self, data: bytes) -> bytes:
        """Take what the client sent; returns what to send.

        Raises:
            WireError: the client does not speak NBD, or asks for too much: drop it.
        """
        self._buffer += data
        answers: list[bytes] = []
        while self.outcome is None and (option := self._next()) is not None:
            answers.append(self._answer(*option))
        return b"".join(answers)

    def _forget(self) -> None:
        self._structured = self._extended = False
        self._chosen: tuple[NbdExport, tuple[MetaContext, ...]] | None = None

    def _next(self) -> tuple[OptionHeader, bytes | None] | None:
        """The next option, if all of it is there; None for data that is too long and not yet skipped."""
        buffer = self._buffer
        if self._flags is None:
            if len(buffer) < codec.CLIENT_FLAGS_BYTES:
                return None
            self._flags = codec.decode_client_flags(bytes(buffer[: codec.CLIENT_FLAGS_BYTES]))
            del buffer[: codec.CLIENT_FLAGS_BYTES]
        if self._skip:
            skipped = min(self._skip, len(buffer))
            del buffer[:skipped]
            self._skip -= skipped
        if self._skip or len(buffer) < codec.OPTION_HEADER_BYTES:
            return None
        header = codec.decode_option_header(bytes(buffer[: codec.OPTION_HEADER_BYTES]))
        if header.length > OPTION_BYTES_MAX:
            self._skipped_bytes += header.length
            if self._skipped_bytes > SKIPPED_BYTES_MAX:
                raise WireError(f"an option of {header.length} bytes")
            del buffer[: codec.OPTION_HEADER_BYTES]
            self._skip = header.length
            return header, None
        end = codec.OPTION_HEADER_BYTES + header.length
        if len(buffer) < end:
            return None
        data = bytes(buffer[codec.OPTION_HEADER_BYTES : end])
        del buffer[:end]
        return header, data

    def _answer(self, header: OptionHeader, data: bytes | None) -> bytes:
        self._options += 1
        if self._options > OPTIONS_MAX:
            raise WireError("too many options")
        option = header.option
        if option == Option.EXPORT_NAME:
            return self._export_name(data)
        assert self._flags is not None
        if not self._flags & HandshakeFlag.FIXED_NEWSTYLE:
            raise WireError(f"option {option} without fixed newstyle negotiation")
        try:
            if self._tls is Tls.REQUIRED and option not in _BEFORE_TLS:
                raise Refused(OptionReplyType.ERR_TLS_REQD, f"Option 0x{option:x} not permitted before TLS")
            if option not in _ANSWERS:
                raise Refused(OptionReplyType.ERR_UNSUP, f"Unsupported option {option} (<unknown>)")
            if data is None:
                raise Refused(OptionReplyType.ERR_TOO_BIG, f"option '{_NAMES[Option(option)]}' is too long")
            return _ANSWERS[Option(option)](self, Option(option), data)
        except Refused as refused:
            return codec.encode_option_error(option, refused.type, str(refused))
        except WireError as error:
            return codec.encode_option_error(option, OptionReplyType.ERR_INVALID, str(error))

    # --- one option each

    def _export_name(self, data: bytes | None) -> bytes:
        """There is no way to refuse it but to hang up."""
        if self._tls is Tls.REQUIRED:
            raise WireError("an export was asked for before TLS")
        export = self._offers.export(codec.decode_export_name(data)) if data is not None else None
        if export is None:
            raise WireError("export not found")
        if (reason := self._offers.refuses()) is not None:
            raise WireError(reason)
        assert self._flags is not None
        self._begin(export)
        padded = not self._flags & HandshakeFlag.NO_ZEROES
        return codec.encode_export_name_reply(export.info(structured=self._structured), padded=padded)

    def _abort(self, option: Option, data: bytes) -> bytes:
        del data
        self.outcome = Outcome.GONE
        return codec.encode_option_reply(option, OptionReplyType.ACK)

    def _start_tls(self, option: Option, data: bytes) -> bytes:
        _demand_empty(option, data)
        if self._tls is Tls.NONE:
            raise Refused(OptionReplyType.ERR_POLICY, "TLS not configured")
        if self._tls is Tls.ACTIVE:
            raise Refused(OptionReplyType.ERR_INVALID, "TLS already enabled")
        self.outcome = Outcome.START_TLS
        self._buffer.clear()  # said in clear behind STARTTLS: whoever said it, it does not count
        return codec.encode_option_reply(option, OptionReplyType.ACK)

    def _list(self, option: Option, data: bytes) -> bytes:
        _demand_empty(option, data)
        lines = [
            codec.encode_option_reply(
                option, OptionReplyType.SERVER, codec.encode_server(export.name, export.description)
            )
            for export in self._offers.exports()
        ]
        return b"".join(lines) + codec.encode_option_reply(option, OptionReplyType.ACK)

    def _info(self, option: Option, data: bytes) -> bytes:
        query = codec.decode_info_query(data)
        export = self._find(query.name)
        if option is Option.GO and (reason := self._offers.refuses()) is not None:
            raise Refused(OptionReplyType.ERR_POLICY, reason)
        infos: list[codec.Info] = []
        if InfoType.NAME in query.infos:
            infos.append((InfoType.NAME, export.name))
        if export.description:
            infos.append((InfoType.DESCRIPTION, export.description))
        infos.append(BlockSizes(1, PREFERRED_BYTES, export.request_bytes_max))
        infos.append(export.info(structured=self._structured))
        if option is Option.GO:
            self._begin(export)
        lines = [codec.encode_option_reply(option, OptionReplyType.INFO, codec.encode_info(info)) for info in infos]
        return b"".join(lines) + codec.encode_option_reply(option, OptionReplyType.ACK)

    def _structured_reply(self, option: Option, data: bytes) -> bytes:
        _demand_empty(option, data)
        if self._structured:
            raise Refused(OptionReplyType.ERR_INVALID, "structured reply already negotiated")
        self._structured = True
        return codec.encode_option_reply(option, OptionReplyType.ACK)

    def _extended_headers(self, option: Option, data: bytes) -> bytes:
        _demand_empty(option, data)
        if self._extended:
            raise Refused(OptionReplyType.ERR_INVALID, "extended headers already negotiated")
        self._structured = self._extended = True
        return codec.encode_option_reply(option, OptionReplyType.ACK)

    def _meta_context(self, option: Option, data: bytes) -> bytes:
        setting = option is Option.SET_META_CONTEXT
        if setting:
            self._chosen = None  # whatever becomes of this
            if not self._structured:
                raise Refused(
                    OptionReplyType.ERR_INVALID,
                    "request option 'set meta context' when structured reply is not negotiated",
                )
        query = codec.decode_meta_query(data)
        export = self._find(query.name)
        found = export.contexts.chosen(query.queries) if setting else export.contexts.listed(query.queries)
        if setting:
            self._chosen = export, tuple(found)
        lines = [
            codec.encode_option_reply(
                option,
                OptionReplyType.META_CONTEXT,
                codec.encode_meta_context(context if setting else MetaContext(0, context.name)),
            )
            for context in found
        ]
        return b"".join(lines) + codec.encode_option_reply(option, OptionReplyType.ACK)

    def _find(self, name: str) -> "NbdExport":
        export = self._offers.export(name)
        if export is None:
            raise Refused(OptionReplyType.ERR_UNKNOWN, f"export '{name}' not present")
        return export

    def _begin(self, export: "NbdExport") -> None:
        """Contexts count only for the export that they were chosen for."""
        contexts = self._chosen[1] if self._chosen is not None and self._chosen[0] is export else ()
        self.agreed = Agreed(export, self._structured, self._extended, contexts)
        self.outcome = Outcome.TRANSMISSION


def _demand_empty(option: Option, data: bytes) -> None:
    if data:
        raise Refused(OptionReplyType.ERR_INVALID, f"option '{_NAMES[option]}' has unexpected length")


_ANSWERS: Final[dict[Option, Callable[[Negotiation, Option, bytes], bytes]]] = {
    Option.ABORT: Negotiation._abort,
    Option.LIST: Negotiation._list,
    Option.STARTTLS: Negotiation._start_tls,
    Option.INFO: Negotiation._info,
    Option.GO: Negotiation._info,
    Option.STRUCTURED_REPLY: Negotiation._structured_reply,
    Option.EXTENDED_HEADERS: Negotiation._extended_headers,
    Option.LIST_META_CONTEXT: Negotiation._meta_context,
    Option.SET_META_CONTEXT: Negotiation._meta_context,
}
