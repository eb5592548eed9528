"""From the tokens of one JSON value to the value, with QEMU's words for what is wrong (spec/qmp.md, Commands).

This is the slow and exact reading. `qmp_lines` asks for it only when the fast strict reader refused the text, or when
the text contains something that the two might see differently.
"""

import re
from collections.abc import Iterable
from enum import Enum, auto
from typing import Final

_WORDS: Final = {b"true": True, b"false": False, b"null": None}
_ESCAPES: Final = {
    b"b": "\b",
    b"f": "\f",
    b"n": "\n",
    b"r": "\r",
    b"t": "\t",
    b"/": "/",
    b"\\": "\\",
    b'"': '"',
    b"'": "'",
}
_PIECE: Final = re.compile(rb"[^\\]+|\\u[0-9A-Fa-f]{4}|\\[^u]|\\u", re.DOTALL)
_UNICODE: Final = re.compile(rb"\\u([0-9A-Fa-f]{4})")
_INTEGER: Final = re.compile(rb"-?[0-9]+")
# Code points that Unicode reserves for internal use: QEMU refuses them raw and escaped.
_NONCHARACTERS: Final = re.compile(
    "[\ufdd0-\ufdef" + "".join(chr(plane * 0x10000 + low) for plane in range(17) for low in (0xFFFE, 0xFFFF)) + "]"
)
_SHOWN_BYTES_MAX: Final = 1024  # of a bad token; ours: QEMU shows all of it
_DOUBLE_MAX: Final = float.fromhex("0x1.fffffffffffffp+1023")


class Malformed(Exception):
    """Input that is no JSON; the text is the `desc` of QEMU's reply."""

    @classmethod
    def json(cls, text: str) -> "Malformed":
        """A parse error with QEMU's prefix."""
        return cls(f"JSON parse error, {text}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Malformed) and self.args == other.args

    def __hash__(self) -> int:
        return hash(self.args)


def shown(token: bytes) -> str:
    """A token as error texts show it: up to the first NUL, bad UTF-8 replaced."""
    return token.partition(b"\0")[0][:_SHOWN_BYTES_MAX].decode("utf-8", "replace")


class _Expect(Enum):
    VALUE = auto()
    FIRST_VALUE = auto()  # or the end of the list
    FIRST_KEY = auto()  # or the end of the object
    KEY = auto()
    COLON = auto()
    SEPARATOR = auto()


class _Frame:
    """A container that is being filled; `key` waits for its value."""

    __slots__ = ("container", "key")

    def __init__(self, container: "dict[str, object] | list[object]") -> None:
        self.container = container
        self.key: str | None = None


def parse_tokens(tokens: Iterable[bytes]) -> object:
    """Read the tokens of exactly one value whose brackets balance in number, if not in kind.

    Raises:
        Malformed: the first thing wrong, in reading order.
    """
    stack: list[_Frame] = []
    expect = _Expect.VALUE
    for token in tokens:
        value: object
        if expect is _Expect.COLON:
            if token != b":":
                raise Malformed.json("missing : in object pair")
            expect = _Expect.VALUE
            continue
        if expect is _Expect.SEPARATOR:
            in_object = isinstance(stack[-1].container, dict)
            if token == b",":
                expect = _Expect.KEY if in_object else _Expect.VALUE
                continue
            if token != (b"}" if in_object else b"]"):
                raise Malformed.json(f"expected separator in {'dict' if in_object else 'list'}")
            value = stack.pop().container
        elif token in (b"{", b"["):
            stack.append(_Frame({} if token == b"{" else []))
            expect = _Expect.FIRST_KEY if token == b"{" else _Expect.FIRST_VALUE
            continue
        elif (expect is _Expect.FIRST_KEY and token == b"}") or (expect is _Expect.FIRST_VALUE and token == b"]"):
            value = stack.pop().container
        else:
            value = _scalar(token)
        if not stack:
            return value
        expect = _put(stack[-1], value)
    raise AssertionError("tokens end inside a value")


def _put(frame: _Frame, value: object) -> _Expect:
    if isinstance(frame.container, list):
        frame.container.append(value)
    elif frame.key is None:
        if not isinstance(value, str):
            raise Malformed.json("key is not a string in object")
        frame.key = value
        return _Expect.COLON
    else:
        if frame.key in frame.container:
            raise Malformed.json("duplicate key")
        frame.container[frame.key] = value
        frame.key = None
    return _Expect.SEPARATOR


def _scalar(token: bytes) -> object:
    first = token[:1]
    if first in (b'"', b"'"):
        return _string(token)
    if first == b"-" or first.isdigit():
        return _number(token)
    if first.isalpha():
        if token not in _WORDS:
            raise Malformed.json(f"invalid keyword '{shown(token)}'")
        return _WORDS[token]
    raise Malformed.json("expecting value")


def _number(token: bytes) -> int | float:
    # Twenty characters hold every 64-bit integer; longer ones are not worth converting exactly.
    if len(token) <= 20 and _INTEGER.fullmatch(token):
        whole = int(token)
        if -(2**63) <= whole < 2**64:
            return whole
    # Beyond the range of a double QEMU goes on with infinity, which JSON could not carry back in an id.
    return max(-_DOUBLE_MAX, min(_DOUBLE_MAX, float(token)))


def _string(token: bytes) -> str:
    body = token[1:-1]
    parts: list[str] = []
    at = 0
    while at < len(body):
        piece = _PIECE.match(body, at)
        assert piece is not None
        escape = piece[0]
        if not escape.startswith(b"\\"):
            parts.append(_plain(escape))
        elif escape[1:2] == b"u":
            character, at = _unicode(token, at + 1)
            parts.append(character)
            continue
        elif escape[1:] in _ESCAPES:
            parts.append(_ESCAPES[escape[1:]])
        else:
            raise Malformed.json("invalid escape sequence in string")
        at = piece.end()
    return "".join(parts)


def _plain(raw: bytes) -> str:
    # C0 80 is how QEMU itself spells U+0000; it is the only overlong form it takes.
    try:
        text = raw.replace(b"\xc0\x80", b"\0").decode("utf-8")
    except UnicodeDecodeError:
        text = "\ufffe"
    if _NONCHARACTERS.search(text):
        raise Malformed.json("invalid UTF-8 sequence in string")
    return text


def _unicode(token: bytes, at: int) -> tuple[str, int]:
    r"""The character of `\uXXXX` or of a surrogate pair at `token[at:]`, and the place in the body behind it."""
    length = 6
    code = _hex(token, at)
    if code is not None and 0xD800 <= code < 0xDC00:
        low = _hex(token, at + 6)
        if low is not None and 0xDC00 <= low < 0xE000:
            code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00)
            length = 12
    if code is None or 0xD800 <= code < 0xE000 or _NONCHARACTERS.match(chr(code)):
        raise Malformed.json(f"{shown(token[at : at + length])} is not a valid Unicode character")
    return chr(code), at + length - 1


def _hex(token: bytes, at: int) -> int | None:
    found = _UNICODE.match(token, at)
    return int(found[1], 16) if found else None
