"""QMP framing without I/O: QEMU's input dialect (spec/qmp.md, Stream and Malformed input).

The input is a stream of JSON values with single-quoted strings allowed, any number of them per packet, split anywhere.
Bad input never ends a connection: it gives one or more `Malformed`, after which reading goes on at the next plausible
place.

Work is linear in the input however it is split: complete tokens are found by one regular expression in bulk, a token
that is cut off by the end of a packet is continued by a small automaton, and a complete value is read by the standard
library's C scanner. Only odd values (see `_is_suspect`) take the slow exact path of `qmp_value`.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, AnyStr, Final, NamedTuple, NoReturn

from blockjobs.base.errors import WireError
from blockjobs.wire.qmp_value import Malformed, parse_tokens, shown

__all__ = ["Limits", "Malformed", "Scanner", "Value", "read_one"]


@dataclass(frozen=True, slots=True)
class Limits:
    """What one value may use. QEMU has 64 MiB of token bytes; ours is lower because nothing in QMP needs that.

    Attributes:
        depth: nested containers.
        token_bytes: of all tokens of a value.
        tokens: in a value.
    """

    depth: int = 1024
    token_bytes: int = 8 * 2**20
    tokens: int = 2 * 2**20


@dataclass(frozen=True, slots=True)
class Value:
    """A complete JSON value that was received."""

    json: object


_DEPTH_EXCEEDED: Final = Malformed("JSON nesting depth limit exceeded")
_BYTES_EXCEEDED: Final = Malformed("JSON token size limit exceeded")
_TOKENS_EXCEEDED: Final = Malformed("JSON token count limit exceeded")
_EXPECTING_VALUE: Final = Malformed.json("expecting value")
_STRAY_STRUCTURE: Final = frozenset({b",", b":", b"}", b"]"})


class _State(Enum):
    """Where the automaton stands inside a token."""

    START = auto()
    RECOVER = auto()  # after a lexical error: skip to a place where a value may plausibly start
    DOUBLE = auto()
    SINGLE = auto()
    MINUS = auto()
    ZERO = auto()
    WHOLE = auto()
    POINT = auto()
    FRACTION = auto()
    EXPONENT = auto()
    SIGN = auto()
    POWER = auto()
    WORD = auto()


class _Rule(NamedTuple):
    """How a number or word goes on: a run of bytes, then a byte that changes the state, or the end of the token."""

    run: re.Pattern[bytes]
    branches: dict[int, _State | None]  # None: this byte makes the token bad
    complete: bool


def _branch(**states: _State | None) -> dict[int, _State | None]:
    kinds = {"digit": b"0123456789", "positive": b"123456789", "zero": b"0", "e": b"eE", "point": b".", "sign": b"+-"}
    return {byte: state for kind, state in states.items() for byte in kinds[kind]}


_NOTHING: Final = re.compile(rb"")
_DIGITS: Final = re.compile(rb"[0-9]*+")
_RULES: Final = {
    _State.MINUS: _Rule(_NOTHING, _branch(zero=_State.ZERO, positive=_State.WHOLE), False),
    _State.ZERO: _Rule(_NOTHING, _branch(point=_State.POINT, e=_State.EXPONENT, digit=None), True),
    _State.WHOLE: _Rule(_DIGITS, _branch(point=_State.POINT, e=_State.EXPONENT), True),
    _State.POINT: _Rule(_NOTHING, _branch(digit=_State.FRACTION), False),
    _State.FRACTION: _Rule(_DIGITS, _branch(e=_State.EXPONENT), True),
    _State.EXPONENT: _Rule(_NOTHING, _branch(sign=_State.SIGN, digit=_State.POWER), False),
    _State.SIGN: _Rule(_NOTHING, _branch(digit=_State.POWER), False),
    _State.POWER: _Rule(_DIGITS, {}, True),
    _State.WORD: _Rule(re.compile(rb"[a-z]*+"), {}, True),
}
_FIRST: Final[dict[int, _State]] = {
    ord('"'): _State.DOUBLE,
    ord("'"): _State.SINGLE,
    ord("-"): _State.MINUS,
    ord("0"): _State.ZERO,
    **dict.fromkeys(b"123456789", _State.WHOLE),
    **dict.fromkeys(range(ord("a"), ord("z") + 1), _State.WORD),
}
# Inside strings: control characters and the bytes FE and FF, which are in no UTF-8 text, are lexical errors.
_DOUBLE_BODY: Final = rb'[^"\\\x00-\x1f\xfe\xff]*+(?:\\[^\x00-\x1f\xfe\xff][^"\\\x00-\x1f\xfe\xff]*+)*+'
_BODIES: Final = {
    _State.DOUBLE: re.compile(_DOUBLE_BODY),
    _State.SINGLE: re.compile(_DOUBLE_BODY.replace(b'"', b"'")),
}
_QUOTES: Final = {_State.DOUBLE: ord('"'), _State.SINGLE: ord("'")}
_FORBIDDEN_IN_STRING: Final = frozenset([*range(0x20), 0xFE, 0xFF])
_BACKSLASH: Final = ord("\\")

_SPACE: Final = re.compile(rb"[ \t\r\n]*+")
_SPACE_OF_TEXT: Final = re.compile(r"[ \t\r\n]*+")
_SKIPPED: Final = re.compile(rb"[^\x00-\x08\x0a-\x1f{}\[\],:\xfe\xff]*+")
# Tokens that are certainly complete: a number or word must show the byte that ends it.
_TOKEN: Final = re.compile(
    rb"[{}\[\],:]"
    rb'|"' + _DOUBLE_BODY + rb'"' + rb"|'" + _DOUBLE_BODY.replace(b'"', b"'") + rb"'"
    rb"|-?+(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?+(?:[eE][-+]?+[0-9]++)?+(?=[^0-9.eE])"
    rb"|[a-z]++(?=[^a-z])"
)
_TOKENS: Final = re.compile(rb"(?:[ \t\r\n]*+(?:" + _TOKEN.pattern + rb"))*+")
_STRINGS: Final = re.compile(rb'"' + _DOUBLE_BODY + rb'"|' + rb"'" + _DOUBLE_BODY.replace(b'"', b"'") + rb"'")
_NO_BRACKETS: Final = bytes(set(range(256)) - set(b"{}[]"))
_STEPS: Final = {ord("{"): (1, 0), ord("}"): (-1, 0), ord("["): (0, 1), ord("]"): (0, -1)}
_ESCAPED: Final = re.compile(rb"\\u[dDfF]")
_RAW_NONCHARACTER: Final = re.compile(rb"\xef\xb7|\xbf[\xbe\xbf]")
_LONG_NUMBER: Final = re.compile(rb"[0-9](?:[0-9]{18}|[0-9.]*+[eE]\+?[0-9]{3})")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("duplicate key")
    return members


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


_decoder: Final = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant)
_strict: Final = _decoder.decode
_strict_start: Final = _decoder.raw_decode


class Scanner:
    """Turns received bytes into values and errors, in order.

    The result depends on the bytes only, never on how they were cut into packets.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self._state = _State.START
        self._escaped = False  # the last byte of the unfinished string was a backslash
        self._partial = bytearray()  # the unfinished token
        self._oversize = False  # the unfinished token was refused for its size, its rest is skipped
        self._uncounted_max = min(self._limits.tokens, self._limits.token_bytes)
        self._parts: list[bytes] = []  # the value so far; each part is one or several complete tokens
        self._bytes_at_most = 0  # of the parts, white space between tokens included
        self._tokens_seen = 0  # these two are kept only beyond _uncounted_max
        self._token_bytes = 0
        self._braces = 0
        self._brackets = 0

    def feed(self, received: bytes) -> list[Value | Malformed]:
        """Take the next bytes; returns what they complete."""
        if self._state is not _State.START or self._parts:
            return list(self._scan(received))
        whole, rest = self._whole(received)
        return [*whole, *self._scan(rest)] if rest else whole

    def _whole(self, received: bytes) -> tuple[list[Value | Malformed], bytes]:
        """The objects that the bytes begin with, if no limit or rule of QEMU's dialect concerns them, and the rest."""
        if len(received) > self._uncounted_max or received[:1] != b"{":
            return [], received
        if received.count(b"{") + received.count(b"[") > self._limits.depth or _is_suspect(received):
            return [], received
        values: list[Value | Malformed] = []
        at = 0
        try:
            text = received.decode("utf-8")
            while text.startswith("{", at):
                value, at = _strict_start(text, at)
                values.append(Value(value))
                if at == len(text):
                    return values, b""
                at = _end(_SPACE_OF_TEXT, text, at)
        except (ValueError, RecursionError):
            if not values:
                return [], received
            # What follows is not whole, or only QEMU's dialect allows it: the tokens tell.
        return values, text[at:].encode("utf-8")

    def _scan(self, received: bytes) -> Iterator[Value | Malformed]:
        at = 0
        while at < len(received):
            if self._state is _State.RECOVER:
                at = _end(_SKIPPED, received, at)
                if at < len(received):
                    self._state = _State.START
            elif self._state is _State.START:
                end = _end(_TOKENS, received, at)
                if end > at:
                    yield from self._take_many(received[at:end].lstrip(b" \t\r\n"))
                at = _end(_SPACE, received, end)
                if at < len(received) and self._begin(received[at]):
                    at += 1
                elif at < len(received):
                    yield self._stray(received[at : at + 1])
                    at += 1
            else:
                start, (at, token, bad) = at, self._continue(received, at)
                yield from self._collect(received[start:at], token, bad)

    def _begin(self, first: int) -> bool:
        """Start a token that `_TOKENS` did not see whole; False if no token starts so."""
        state = _FIRST.get(first)
        if state is None:
            return False
        self._state = state
        self._partial = bytearray([first])
        self._escaped = self._oversize = False
        return True

    def _continue(self, received: bytes, at: int) -> tuple[int, bool, bool]:
        """Go on in the unfinished token; returns the place reached, whether it is complete, whether it is bad."""
        if self._state in _BODIES:
            return self._continue_string(received, at)
        while True:
            rule = _RULES[self._state]
            at = _end(rule.run, received, at)
            if at == len(received):
                return at, False, False
            following = rule.branches.get(received[at], self._state)
            if following is None:
                return at + 1, False, True
            if following is self._state:
                return (at, True, False) if rule.complete else (at + 1, False, True)
            self._state = following
            at += 1

    def _continue_string(self, received: bytes, at: int) -> tuple[int, bool, bool]:
        if self._escaped:
            self._escaped = False
            if received[at] in _FORBIDDEN_IN_STRING:
                return at + 1, False, True
            at += 1
        at = _end(_BODIES[self._state], received, at)
        if at == len(received):
            return at, False, False
        if received[at] == _QUOTES[self._state]:
            return at + 1, True, False
        if received[at] == _BACKSLASH:
            if at + 1 == len(received):
                self._escaped = True
                return at + 1, False, False
            at += 1  # the byte behind it is the forbidden one
        return at + 1, False, True

    def _collect(self, more: bytes, complete: bool, bad: bool) -> Iterator[Value | Malformed]:
        """Add to the unfinished token and pass it on when it ends."""
        if not self._oversize:
            self._partial += more
            if self._would_exceed(len(self._partial)):
                self._oversize = True
                self._drop()
                yield _BYTES_EXCEEDED
        if not complete and not bad:
            return
        token, self._partial = bytes(self._partial), bytearray()
        if bad and not self._oversize:
            yield self._stray(token)
        elif bad:
            self._state = _State.RECOVER
        else:
            self._state = _State.START
            taken = None if self._oversize else self._take(token)
            if taken is not None:
                yield taken

    def _stray(self, token: bytes) -> Malformed:
        self._state = _State.RECOVER
        self._partial = bytearray()
        self._drop()
        return Malformed.json(f"stray '{shown(token)}'")

    def _drop(self) -> None:
        """Forget the value that was being collected."""
        self._parts = []
        self._bytes_at_most = self._tokens_seen = self._token_bytes = self._braces = self._brackets = 0

    def _take_many(self, text: bytes) -> Iterator[Value | Malformed]:
        """Take a text of complete tokens."""
        brackets = _STRINGS.sub(b"", text).translate(None, _NO_BRACKETS)
        if self._is_one_piece(text, brackets):
            self._braces += brackets.count(b"{") - brackets.count(b"}")
            self._brackets += brackets.count(b"[") - brackets.count(b"]")
            self._bytes_at_most += len(text)
            self._parts.append(text)
            if not (self._braces or self._brackets):
                yield self._finish()
            return
        for token in _TOKEN.findall(text + b"\n"):
            taken = self._take(token)
            if taken is not None:
                yield taken

    def _is_one_piece(self, text: bytes, brackets: bytes) -> bool:
        """Whether all of `text` belongs to the present value, ends it at its last byte or not at all, and has room."""
        if self._bytes_at_most + len(text) > self._uncounted_max:
            return False
        open_braces, open_brackets = self._braces, self._brackets
        if not (open_braces or open_brackets) and text[0] not in b"{[":
            return False
        last = len(brackets) - 1
        for index, byte in enumerate(brackets):
            brace, bracket = _STEPS[byte]
            open_braces += brace
            open_brackets += bracket
            if open_braces < 0 or open_brackets < 0 or open_braces + open_brackets > self._limits.depth:
                return False
            if not (open_braces or open_brackets):
                return index == last and text[-1] in b"}]"
        return True

    def _take(self, token: bytes) -> Value | Malformed | None:
        """Take one complete token, minding the limits."""
        braces, brackets = _STEPS.get(token[0], (0, 0))
        self._braces += braces
        self._brackets += brackets
        exceeded = None
        if self._braces + self._brackets > self._limits.depth:
            exceeded = _DEPTH_EXCEEDED
        elif self._bytes_at_most + len(token) > self._uncounted_max:
            exceeded = self._count(token)
        if exceeded is not None:
            self._drop()
            return exceeded
        self._bytes_at_most += len(token)
        self._parts.append(token)
        if self._braces < 0 or self._brackets < 0 or not (self._braces or self._brackets):
            return self._finish()
        return None

    def _count(self, token: bytes) -> Malformed | None:
        """Count exactly, which is only needed once the bytes alone do not exclude that a limit is reached."""
        self._count_parts()
        self._tokens_seen += 1
        self._token_bytes += len(token)
        if self._token_bytes > self._limits.token_bytes:
            return _BYTES_EXCEEDED
        return _TOKENS_EXCEEDED if self._tokens_seen > self._limits.tokens else None

    def _count_parts(self) -> None:
        # Happens once per value: beyond _uncounted_max every token goes through _take and is counted there.
        if not self._tokens_seen:
            for part in self._parts:
                tokens = _TOKEN.findall(part + b"\n")
                self._tokens_seen += len(tokens)
                self._token_bytes += sum(map(len, tokens))

    def _would_exceed(self, length: int) -> bool:
        """Whether an unfinished token of `length` bytes is too much already."""
        if self._bytes_at_most + length <= self._limits.token_bytes:
            return False
        self._count_parts()
        return self._token_bytes + length > self._limits.token_bytes

    def _finish(self) -> Value | Malformed:
        """Read the collected text as one value."""
        if self._bytes_at_most == 1 and self._parts[0] in _STRAY_STRUCTURE:
            self._drop()
            return _EXPECTING_VALUE  # ready-made, because refused input may leave millions of them
        text = b" ".join(self._parts)
        self._drop()
        if not _is_suspect(text):
            try:
                return Value(_strict(text.decode("utf-8")))
            except (ValueError, RecursionError):
                pass  # say what is wrong, or read what only QEMU's dialect allows
        try:
            return Value(parse_tokens(_TOKEN.findall(text + b"\n")))
        except Malformed as error:
            return error.with_traceback(None)


def _is_suspect(text: bytes) -> bool:
    """Whether the strict reader may see `text` otherwise than QEMU.

    It may where surrogates or noncharacters are escaped, where noncharacters are raw, where integers may not fit 64
    bits, and where numbers may not fit a double.
    """
    return (
        (b"\\u" in text and _ESCAPED.search(text) is not None)
        or (not text.isascii() and _RAW_NONCHARACTER.search(text) is not None)
        or _LONG_NUMBER.search(text) is not None
    )


def _end(pattern: re.Pattern[AnyStr], text: AnyStr, at: int) -> int:
    """Where a pattern that matches everywhere, if only nothing, stops."""
    found = pattern.match(text, at)
    assert found is not None
    return found.end()


def read_one(text: str) -> object:
    """Read an option's JSON argument, which may use the same dialect as the monitor.

    Raises:
        WireError: it is not exactly one value; the text is QEMU's.
    """
    results = Scanner().feed(text.encode("utf-8", "surrogateescape") + b"\n")
    for result in results:
        if isinstance(result, Malformed):
            raise WireError(str(result))
    if not results:
        raise WireError("JSON parse error, premature EOI")
    if len(results) > 1:
        raise WireError("Expecting at most one JSON value")
    assert isinstance(results[0], Value)
    return results[0].json
