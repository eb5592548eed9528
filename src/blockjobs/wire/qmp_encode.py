"""QMP lines that go out: values and structs as ASCII, in QEMU's spelling (spec/qmp.md, Stream)."""

import json
from collections.abc import Iterable, Iterator
from typing import Final, TypeVar

import msgspec

T = TypeVar("T")


class Spelled(list[T]):
    """A list whose items are spelled already, for answers that are long and mostly the same each time.

    Attributes:
        texts: of the items, each as `spell` gives it.
    """

    def __init__(self, items: Iterable[T], texts: list[bytes]) -> None:
        super().__init__(items)
        self.texts = texts


def spell(value: object) -> bytes:
    """A value or struct inside a line, see `encode`."""
    return encode(value)[:-2]


_compact: Final = json.JSONEncoder().encode
_indented: Final = json.JSONEncoder(indent=4).encode


def encode(value: object, *, pretty: bool = False) -> bytes:
    """One line for the client: ASCII, CR LF at the end; `pretty` spreads it over several, 4 spaces deep.

    Args:
        value: a plain JSON value, or an object whose members may hold structs. Unpaired surrogates (file names that
            are no UTF-8) become U+FFFD.
        pretty: as the monitor option of that name.

    Raises:
        TypeError: it holds what JSON cannot.
    """
    if not pretty:
        if isinstance(value, dict) and isinstance(answer := value.get("return"), Spelled):
            rest = encode({name: each for name, each in value.items() if name != "return"})
            texts = answer.texts or [b""]
            texts = [b'{"return": [' + texts[0], *texts[1:]]
            texts[-1] += (b"], " if len(value) > 1 else b"]") + rest[1:]
            return b", ".join(texts)
        try:
            line = msgspec.json.format(msgspec.json.encode(value), indent=0)
        except (UnicodeEncodeError, RecursionError):
            pass
        else:
            if line.isascii():
                return line + b"\r\n"
    plain = {name: _plain(each) for name, each in value.items()} if isinstance(value, dict) else _plain(value)
    dump = _indented if pretty else _compact
    try:
        text = dump(plain)
        if "\\ud" in text:
            text = dump(_paired(plain))
    except RecursionError:
        # An id may be as deep as requests may be, which is deeper than the C encoder goes.
        text = "".join(_deep(plain))
    return text.encode("ascii") + b"\r\n"


def _plain(value: object) -> object:
    """Structs as dicts."""
    try:
        return msgspec.to_builtins(value)
    except RecursionError:
        return value  # only what a client sent is so deep, and that is plain


def _deep(value: object) -> Iterator[str]:
    """Encode without recursion, on one line."""
    stack: list[tuple[str, Iterator[object], str]] = [("", iter((value,)), "")]
    separator = ""
    while stack:
        kind, items, end = stack[-1]
        try:
            item = next(items)
        except StopIteration:
            stack.pop()
            separator = ", "
            yield end
            continue
        yield separator
        if kind == "object":
            assert isinstance(item, tuple)
            name, item = item
            yield _compact(_paired(name)) + ": "
        if isinstance(item, dict):
            stack.append(("object", iter(item.items()), "}"))
        elif isinstance(item, list):
            stack.append(("array", iter(item), "]"))
        else:
            yield _compact(_paired(item))
        separator = "" if isinstance(item, (dict, list)) else ", "
        if isinstance(item, (dict, list)):
            yield "{" if isinstance(item, dict) else "["


def _paired(value: object) -> object:
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {_paired(key): _paired(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_paired(item) for item in value]
    return value
