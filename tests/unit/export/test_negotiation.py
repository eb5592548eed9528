from types import SimpleNamespace
from typing import Any

import pytest

from blockjobs.base.errors import WireError
from blockjobs.export.contexts import Contexts
from blockjobs.export.negotiation import (
    OPTION_BYTES_MAX,
    OPTIONS_MAX,
    SKIPPED_BYTES_MAX,
    Negotiation,
    Outcome,
    Tls,
)
from blockjobs.wire import nbd_options as codec
from blockjobs.wire.nbd import REPLY_ERROR_BIT, InfoType, Option, OptionReplyType, TransmissionFlag
from blockjobs.wire.nbd_options import BlockSizes, ExportInfo, InfoQuery, MetaContext, MetaQuery

FLAGS = b"\x00\x00\x00\x03"
DISK = ExportInfo(4096, TransmissionFlag.HAS_FLAGS)


def export(name: str, description: str = "", *, depth: bool = False) -> Any:
    return SimpleNamespace(
        name=name,
        description=description,
        request_bytes_max=32 << 20,
        info=lambda *, structured: DISK._replace(flags=DISK.flags | (TransmissionFlag.SEND_DF if structured else 0)),
        contexts=Contexts(depth, ()),
    )


class Offers:
    def __init__(self, *exports: Any, refusal: str | None = None) -> None:
        self._exports, self._refusal = exports, refusal

    def exports(self) -> list[Any]:
        return list(self._exports)

    def export(self, name: str) -> Any:
        return next((each for each in self._exports if each.name == name), None)

    def refuses(self) -> str | None:
        return self._refusal


class Peer:
    """Feeds a negotiation and takes its answers apart."""

    def __init__(self, *exports: Any, tls: Tls = Tls.NONE, refusal: str | None = None) -> None:
        self.negotiation = Negotiation(Offers(*(exports or (export("disk"),)), refusal=refusal), tls=tls)
        assert self.negotiation.feed(FLAGS) == b""

    def ask(self, option: int, data: bytes = b"") -> list[tuple[OptionReplyType, bytes]]:
        answer = self.negotiation.feed(codec.encode_option(option, data))
        found = []
        while answer:
            header = codec.decode_option_reply_header(answer[: codec.OPTION_REPLY_HEADER_BYTES])
            assert header.option == option
            answer = answer[codec.OPTION_REPLY_HEADER_BYTES :]
            found.append((OptionReplyType(header.type), answer[: header.length]))
            answer = answer[header.length :]
        return found

    def refusal(self, option: int, data: bytes = b"") -> tuple[OptionReplyType, str]:
        [(type, text)] = self.ask(option, data)
        return type, text.decode()


def go(name: str, *infos: int) -> bytes:
    return codec.encode_info_query(InfoQuery(name, infos))


def meta(name: str, *queries: str) -> bytes:
    return codec.encode_meta_query(MetaQuery(name, queries))


ACK = (OptionReplyType.ACK, b"")


def test_go_tells_about_the_export_and_begins() -> None:
    peer = Peer(export("disk", "of a guest"))
    replies = peer.ask(Option.GO, go("disk", InfoType.NAME, InfoType.BLOCK_SIZE))
    assert replies.pop() == ACK
    assert [codec.decode_info(data) for _, data in replies] == [
        (InfoType.NAME, "disk"),
        (InfoType.DESCRIPTION, "of a guest"),
        BlockSizes(1, 4096, 32 << 20),
        DISK,
    ]
    assert peer.negotiation.outcome is Outcome.TRANSMISSION
    agreed = peer.negotiation.agreed
    assert agreed is not None and agreed.export.name == "disk" and not agreed.structured and not agreed.extended


def test_info_tells_the_same_and_does_not_begin() -> None:
    peer = Peer()
    assert peer.ask(Option.INFO, go("disk"))[-1] == ACK
    assert peer.negotiation.outcome is None
    assert peer.refusal(Option.INFO, go("nope")) == (OptionReplyType.ERR_UNKNOWN, "export 'nope' not present")


def test_requests_sent_behind_go_are_kept() -> None:
    peer = Peer()
    peer.negotiation.feed(codec.encode_option(Option.GO, go("disk")) + b"first request")
    assert peer.negotiation.rest == b"first request"


@pytest.mark.parametrize("flags", [b"\x00\x00\x00\x03", b"\x00\x00\x00\x01", b"\x00\x00\x00\x02", b"\x00\x00\x00\x00"])
def test_export_name_is_padded_unless_agreed(flags: bytes) -> None:
    negotiation = Negotiation(Offers(export("disk")))
    answer = negotiation.feed(flags + codec.encode_option(Option.EXPORT_NAME, b"disk"))
    assert codec.decode_export_name_reply(answer[:10]) == DISK
    assert answer[10:] == (b"" if flags[3] & 2 else bytes(124))
    assert negotiation.outcome is Outcome.TRANSMISSION


def test_export_name_cannot_be_refused_but_by_hanging_up() -> None:
    with pytest.raises(WireError, match="not found"):
        Peer().ask(Option.EXPORT_NAME, b"nope")
    with pytest.raises(WireError, match="too many"):
        Peer(refusal="too many clients").ask(Option.EXPORT_NAME, b"disk")
    with pytest.raises(WireError, match="TLS"):
        Peer(tls=Tls.REQUIRED).ask(Option.EXPORT_NAME, b"disk")


def test_a_full_server_refuses_go_but_not_info() -> None:
    peer = Peer(refusal="too many clients")
    assert peer.refusal(Option.GO, go("disk")) == (OptionReplyType.ERR_POLICY, "too many clients")
    assert peer.ask(Option.INFO, go("disk"))[-1] == ACK


def test_list_names_all_exports() -> None:
    peer = Peer(export("a"), export("b", "the second"))
    replies = peer.ask(Option.LIST)
    assert [codec.decode_server(data) for _, data in replies[:-1]] == [("a", ""), ("b", "the second")]
    assert replies[-1] == ACK
    assert peer.refusal(Option.LIST, b"x") == (OptionReplyType.ERR_INVALID, "option 'list' has unexpected length")


def test_abort_is_acknowledged() -> None:
    peer = Peer()
    assert peer.ask(Option.ABORT, b"whatever") == [ACK]
    assert peer.negotiation.outcome is Outcome.GONE


def test_unknown_options_are_refused_and_skipped() -> None:
    peer = Peer()
    assert peer.refusal(99, b"abc") == (OptionReplyType.ERR_UNSUP, "Unsupported option 99 (<unknown>)")
    assert peer.refusal(4)[0] is OptionReplyType.ERR_UNSUP
    assert peer.ask(Option.LIST)[-1] == ACK


def test_structured_replies_and_extended_headers() -> None:
    peer = Peer()
    assert peer.ask(Option.STRUCTURED_REPLY) == [ACK]
    assert peer.refusal(Option.STRUCTURED_REPLY)[0] is OptionReplyType.ERR_INVALID
    assert peer.ask(Option.EXTENDED_HEADERS) == [ACK]
    assert peer.refusal(Option.EXTENDED_HEADERS)[0] is OptionReplyType.ERR_INVALID
    peer.ask(Option.GO, go("disk"))
    agreed = peer.negotiation.agreed
    assert agreed is not None and agreed.structured and agreed.extended


def test_contexts_are_listed_by_name_space_and_chosen_by_name() -> None:
    peer = Peer(export("disk", depth=True))

    def names(option: Option, *queries: str) -> list[MetaContext]:
        replies = peer.ask(option, meta("disk", *queries))
        assert replies.pop() == ACK
        return [codec.decode_meta_context(data) for _, data in replies]

    both = [MetaContext(0, "base:allocation"), MetaContext(0, "qemu:allocation-depth")]
    assert names(Option.LIST_META_CONTEXT) == both
    assert names(Option.LIST_META_CONTEXT, "qemu:") == both[1:]
    assert names(Option.LIST_META_CONTEXT, "base:", "qemu:x") == both[:1]
    assert peer.refusal(Option.SET_META_CONTEXT, meta("disk"))[0] is OptionReplyType.ERR_INVALID
    peer.ask(Option.STRUCTURED_REPLY)
    assert names(Option.SET_META_CONTEXT, "qemu:") == []
    chosen = [MetaContext(1, "qemu:allocation-depth")]
    assert names(Option.SET_META_CONTEXT, "qemu:allocation-depth", "foo:bar") == chosen
    peer.ask(Option.GO, go("disk"))
    agreed = peer.negotiation.agreed
    assert agreed is not None and list(agreed.contexts) == chosen


def test_contexts_count_for_their_export_only_and_not_after_a_failed_choice() -> None:
    for spoil in (meta("nope", "base:allocation"), b"\x00"):
        peer = Peer(export("disk"), export("other"))
        peer.ask(Option.STRUCTURED_REPLY)
        peer.ask(Option.SET_META_CONTEXT, meta("disk", "base:allocation"))
        assert peer.refusal(Option.SET_META_CONTEXT, spoil)[0] & REPLY_ERROR_BIT
        peer.ask(Option.GO, go("disk"))
        assert peer.negotiation.agreed is not None and peer.negotiation.agreed.contexts == ()
    peer = Peer(export("disk"), export("other"))
    peer.ask(Option.STRUCTURED_REPLY)
    peer.ask(Option.SET_META_CONTEXT, meta("disk", "base:allocation"))
    peer.ask(Option.GO, go("other"))
    assert peer.negotiation.agreed is not None and peer.negotiation.agreed.contexts == ()


def test_tls_comes_first_and_makes_all_that_was_said_void() -> None:
    peer = Peer(tls=Tls.REQUIRED)
    for option in (Option.LIST, Option.STRUCTURED_REPLY, 99):
        assert peer.refusal(option)[0] is OptionReplyType.ERR_TLS_REQD
    peer.negotiation.feed(codec.encode_option(Option.STARTTLS) + codec.encode_option(Option.ABORT) + b"IHAVE")
    assert peer.negotiation.outcome is Outcome.START_TLS and peer.negotiation.rest == b""
    peer.negotiation.secured()
    assert peer.ask(Option.STRUCTURED_REPLY) == [ACK]
    assert peer.refusal(Option.STARTTLS)[0] is OptionReplyType.ERR_INVALID
    peer.ask(Option.GO, go("disk"))
    assert peer.negotiation.agreed is not None and peer.negotiation.agreed.structured


def test_without_credentials_there_is_no_tls() -> None:
    assert Peer().refusal(Option.STARTTLS) == (OptionReplyType.ERR_POLICY, "TLS not configured")


def test_a_long_option_is_refused_skipped_and_the_next_is_understood() -> None:
    peer = Peer()
    assert peer.refusal(Option.GO, bytes(OPTION_BYTES_MAX + 1))[0] is OptionReplyType.ERR_TOO_BIG
    assert peer.ask(Option.LIST)[-1] == ACK


def test_a_giant_option_and_many_long_ones_end_the_conversation() -> None:
    with pytest.raises(WireError):
        Peer().negotiation.feed(b"IHAVEOPT\x00\x00\x00\x06\xff\xff\xff\xff")
    peer = Peer()
    for _ in range(SKIPPED_BYTES_MAX // (1 << 20)):
        peer.ask(99, bytes(1 << 20))
    with pytest.raises(WireError):
        peer.ask(99, bytes(1 << 20))


def test_too_many_options_end_the_conversation() -> None:
    peer = Peer()
    for _ in range(OPTIONS_MAX):
        peer.ask(99)
    with pytest.raises(WireError, match="too many options"):
        peer.ask(99)


def test_clients_without_fixed_newstyle_get_no_options() -> None:
    negotiation = Negotiation(Offers(export("disk")))
    with pytest.raises(WireError, match="fixed newstyle"):
        negotiation.feed(b"\x00\x00\x00\x00" + codec.encode_option(Option.LIST))


def test_every_cut_of_the_conversation_gives_the_same_answers() -> None:
    said = FLAGS + b"".join(
        codec.encode_option(option, data)
        for option, data in [
            (Option.LIST, b""),
            (99, b"abc"),
            (Option.STRUCTURED_REPLY, b""),
            (Option.SET_META_CONTEXT, meta("disk", "base:allocation")),
            (Option.INFO, b"\x00"),
            (Option.GO, go("disk", InfoType.NAME)),
        ]
    )
    whole = Negotiation(Offers(export("disk"))).feed(said)
    for cut in range(len(said) + 1):
        negotiation = Negotiation(Offers(export("disk")))
        assert negotiation.feed(said[:cut]) + negotiation.feed(said[cut:]) == whole
        assert negotiation.outcome is Outcome.TRANSMISSION
    negotiation = Negotiation(Offers(export("disk")))
    assert b"".join(negotiation.feed(said[at : at + 1]) for at in range(len(said))) == whole
