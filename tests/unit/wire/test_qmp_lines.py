"""QMP framing: the input dialect, QEMU's texts for bad input, recovery, limits, speed; and output."""

import json
import time
from typing import Any

import msgspec
import pytest

from blockjobs.base.errors import WireError
from blockjobs.wire.qmp_encode import Spelled, encode, spell
from blockjobs.wire.qmp_lines import Limits, Malformed, Scanner, Value, read_one


def scan(text: bytes, limits: Limits | None = None) -> list[Any]:
    """What the bytes give: values as they are, errors as `!text` without QEMU's prefix."""
    found = Scanner(limits).feed(text + b"\n")
    return [
        each.json if isinstance(each, Value) else "!" + str(each).removeprefix("JSON parse error, ") for each in found
    ]


VALUE = "!expecting value"
LIST = "!expected separator in list"
DICT = "!expected separator in dict"
UTF8 = "!invalid UTF-8 sequence in string"


@pytest.mark.parametrize(
    ("text", "values"),
    [
        (b"{'execute':'it\\'s',\"b\":'\"'}", [{"execute": "it's", "b": '"'}]),
        (b'{}[]{"a":1}1 null"x"', [{}, [], {"a": 1}, 1, None, "x"]),
        (b"[true,false,null]", [[True, False, None]]),
        (b'"\\u0000\\ud83d\\ude00\\/\\b\\f\\n\\r\\t\\\\\\"\\\'"', ["\0\U0001f600/\b\f\n\r\t\\\"'"]),
        (b'"\xc0\x80\x7f\xf0\x9f\x98\x80"', ["\0\x7f\U0001f600"]),
        (b"[18446744073709551615,-9223372036854775808]", [[2**64 - 1, -(2**63)]]),
        (b"[18446744073709551616,-9223372036854775809,1.5,1E+2,-0]", [[2.0**64, -(2.0**63), 1.5, 100.0, 0]]),
        # QEMU goes on with an infinity that it cannot send back as JSON
        (b"[1e999,-1e999]", [[1.7976931348623157e308, -1.7976931348623157e308]]),
        (b"1" * 400, [1.7976931348623157e308]),
        (b"1x", [1, "!invalid keyword 'x'"]),
        (b"0x10", [0, "!invalid keyword 'x'", 10]),
    ],
)
def test_values(text: bytes, values: list[Any]) -> None:
    found = scan(text)
    assert found == values
    assert [type(each) for each in found] == [type(each) for each in values]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        # every line was sent to qemu-storage-daemon 7.2.22
        (b"}", [VALUE]),
        (b"]", [VALUE]),
        (b",", [VALUE]),
        (b":", [VALUE]),
        (b'{"a" 1}', ["!missing : in object pair"]),
        (b'{"a"}', ["!missing : in object pair"]),
        (b'{"a":1,}', [VALUE]),
        (b"{,}", [VALUE]),
        (b"[1,]", [VALUE]),
        (b'{"a":1 "b":2}', [DICT]),
        (b"[1 2]", [LIST]),
        (b"foo", ["!invalid keyword 'foo'"]),
        (b"truex", ["!invalid keyword 'truex'"]),
        (b"[true false]", [LIST]),
        (b'{"a":1,"a":2}', ["!duplicate key"]),
        (b'{"a":1,"a":foo}', ["!invalid keyword 'foo'"]),
        (b'{"a":1,"b":{"c":1,"c":2},"a":3}', ["!duplicate key"]),
        (b"{{}:1}", ["!key is not a string in object"]),
        (b"{1:2}", ["!key is not a string in object"]),
        (b'{"a":1,,"b":1}', [VALUE]),
        (b'{"a"::1}', [VALUE]),
        (b'{"a":1:2}', [DICT]),
        (b"[:]", [VALUE]),
        (b"[}", [VALUE]),
        (b"{]", [VALUE]),
        (b"[{]}", [VALUE]),
        (b"{[}]", [VALUE]),
        (b'{"a":[1}]', [LIST]),
        (b"[1}", [LIST]),
        (b'{"a":1]', [DICT]),
        (b'{"a":1}}', [{"a": 1}, VALUE]),
        (b'"\\ud83d"', ["!\\ud83d is not a valid Unicode character"]),
        (b'"\\udc00"', ["!\\udc00 is not a valid Unicode character"]),
        (b'"\\uD83D\\u0041"', ["!\\uD83D is not a valid Unicode character"]),
        (b'"\\ud83f\\udfff"', ["!\\ud83f\\udfff is not a valid Unicode character"]),
        (b'"\\uFDD0"', ["!\\uFDD0 is not a valid Unicode character"]),
        (b'"\\ufffe"', ["!\\ufffe is not a valid Unicode character"]),
        (b'"\\u12xyz"', ["!\\u12xy is not a valid Unicode character"]),
        (b'"\\u12"', ['!\\u12" is not a valid Unicode character']),
        (b'"\\u"', ['!\\u" is not a valid Unicode character']),
        (b'"\\x"', ["!invalid escape sequence in string"]),
        (b'"\\\xc3\xa9"', ["!invalid escape sequence in string"]),
        (b'"\xc0\x81"', [UTF8]),
        (b'"\xed\xa0\x80"', [UTF8]),
        (b'"\xf4\x90\x80\x80"', [UTF8]),
        (b'"\xe2\x82"', [UTF8]),
        (b'"\xef\xbf\xbf"', [UTF8]),
        (b'"\xef\xb7\x90"', [UTF8]),
        (b'"\x80"', [UTF8]),
        (b'"\t"', ["!stray '\"\t'"]),
        (b'"a\tb"', ["!stray '\"a\t'"]),
        (b'"\xff"', ["!stray '\"\ufffd'"]),
        (b'"\\\x01"', ["!stray '\"\\\x01'"]),
        (b"{'a':'b\tc'}", ["!stray ''b\t'", VALUE]),
        (b'"abc', ["!stray '\"abc\n'"]),
        (b'"abc\x00def" foo', ["!stray '\"abc'"]),
        (b'"abc\xe2\x82\x01" foo {}', ["!stray '\"abc\ufffd\x01'", {}]),
        (b"01", ["!stray '01'"]),
        (b"[01]", ["!stray '01'", VALUE]),
        (b"-01", ["!stray '-01'"]),
        (b"-a", ["!stray '-a'"]),
        (b"1.", ["!stray '1.\n'"]),
        (b"1.a", ["!stray '1.a'"]),
        (b"1ea", ["!stray '1ea'"]),
        (b"1e+a", ["!stray '1e+a'"]),
        (b"[1.5.5]", ["!stray '.'", VALUE]),
        (b"[1-2]", [LIST]),
        (b".5", ["!stray '.'"]),
        (b"+1", ["!stray '+'"]),
        (b"NULL", ["!stray 'N'"]),
        (b"// x", ["!stray '/'"]),
        (b'{"a": %lld}', ["!stray '%'", VALUE]),
        (b"\x00", ["!stray ''"]),
        (b"\x00\x00", ["!stray ''", "!stray ''"]),
        (b'\x00{"a":1}', ["!stray ''", {"a": 1}]),
        (b'{"a":\x00"b"}', ["!stray ''", VALUE]),
        (b'{"exec\x00ute":"x"}', ["!stray '\"exec'", VALUE, "x", VALUE]),
        (b"@ foo\tbar \"x\" 'y' 12 -3\x0b", ["!stray '@'", "!stray '\x0b'"]),
        (b"@ foo,bar", ["!stray '@'", VALUE, "!invalid keyword 'bar'"]),
        (b"@\rnull", ["!stray '@'", None]),
        (b"@\xfenull", ["!stray '@'", "!stray '\ufffd'"]),
        (b"@\x7f\x80null", ["!stray '@'"]),
        (b"\xef\xbb\xbf{}", ["!stray '\ufffd'", {}]),
        (b'"\x01"\x01"\x01', ["!stray '\"\x01'", "!stray '\x01'", "!stray '\x01'"]),
    ],
)
def test_bad_input(text: bytes, found: list[Any]) -> None:
    assert scan(text) == found
    one_by_one = Scanner()
    results = [each for byte in text + b"\n" for each in one_by_one.feed(bytes([byte]))]
    assert results == Scanner().feed(text + b"\n")
    assert scan(text + b"\n{}\n")[-1] == {}, "the next line is read"


def test_depth() -> None:
    deep = scan(b"[" * 1024 + b"]" * 1024)
    assert len(deep) == 1
    for _ in range(1023):
        (deep,) = deep
    assert deep == [[]]
    assert scan(b'{"a":' + b"[" * 1024) == ["!JSON nesting depth limit exceeded"]
    assert scan(b"[" * 1025 + b"]" * 1025) == ["!JSON nesting depth limit exceeded"] + [VALUE] * 1025


def test_token_count() -> None:
    limits = Limits(tokens=101)
    assert scan(b"[" + b"1," * 49 + b"1]", limits) == [[1] * 50]
    assert scan(b"[" + b"1," * 50 + b"1]", limits) == ["!JSON token count limit exceeded", VALUE]
    many = scan(b"[" + b"1," * (2**16 + 10_000), Limits(tokens=2**17))
    assert many[0] == "!JSON token count limit exceeded"
    assert set(many[1:]) == {1, VALUE}


def test_token_bytes() -> None:
    exceeded = "!JSON token size limit exceeded"
    assert scan(b'["' + b"x" * 16 + b'"]', Limits(token_bytes=20)) == [["x" * 16]]
    assert scan(b'["' + b"x" * 17 + b'"]', Limits(token_bytes=20)) == [exceeded]
    assert scan(b'["' + b"x" * 18 + b'"]{}', Limits(token_bytes=20)) == [exceeded, VALUE, {}]
    assert scan(b'[ "a", ' + b" " * 100 + b'"b"]', Limits(token_bytes=20)) == [["a", "b"]], "white space is free"
    scanner = Scanner()
    found = scanner.feed(b'"')
    for _ in range(20):
        found += scanner.feed(b"x" * 2**20)
    assert [str(each) for each in found] == ["JSON token size limit exceeded"]
    assert len(scanner._partial) <= 2**23 + 2**20, "what is refused is not kept"
    assert scanner.feed(b'"{}') == [Value({})]


def test_long_bad_tokens_are_shown_in_part() -> None:
    (error,) = Scanner().feed(b'"' + b"x" * 100_000 + b"\x01")
    assert len(str(error)) < 1100


def test_several_whole_values_in_one_packet_are_not_taken_token_by_token(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [{"execute": f"command-{n}", "arguments": {"text": "{é", "n": [n]}} for n in range(9)]
    packet = b"\r\n".join(json.dumps(value, ensure_ascii=False).encode() for value in values)
    tokens: list[bytes] = []
    take = Scanner._take

    def counting(self: Scanner, token: bytes) -> Any:
        tokens.append(token)
        return take(self, token)

    monkeypatch.setattr(Scanner, "_take", counting)
    assert Scanner().feed(packet) == [Value(value) for value in values]
    scanner = Scanner()
    assert scanner.feed(packet + b'{"cut": "of') == [Value(value) for value in values]
    assert scanner.feed(b'f"}') == [Value({"cut": "off"})]
    assert scanner.feed(packet + b"\n") == [Value(value) for value in values]
    assert len(tokens) < 9


@pytest.mark.serial
@pytest.mark.parametrize("chunk", [1 << 22, 1 << 16, 4096])
def test_a_megabyte_is_quick(chunk: int) -> None:
    many = [{"type": "abort", "data": {"n": n}} for n in range(26_000)]
    for value in ({"execute": "transaction", "arguments": {"actions": many}}, {"execute": "x" * 2**20}):
        text = json.dumps(value).encode()
        assert len(text) > 2**20
        scanner = Scanner()
        before_s = time.process_time()
        found = [each for at in range(0, len(text), chunk) for each in scanner.feed(text[at : at + chunk])]
        took_s = time.process_time() - before_s
        assert found == [Value(value)]
        assert took_s < 0.5, f"{took_s:.2f} s"


@pytest.mark.serial
def test_small_pieces_stay_linear() -> None:
    def cost_s(length: int) -> float:
        scanner = Scanner()
        before_s = time.process_time()
        for _ in range(length // 16):
            scanner.feed(b"1" * 16)
        return time.process_time() - before_s

    cost_s(2**16)
    assert cost_s(2**20) < 40 * max(cost_s(2**16), 0.005)


def test_encode() -> None:
    assert encode({"a": [1, None, "\u00e9\U0001f600\n"]}) == b'{"a": [1, null, "\\u00e9\\ud83d\\ude00\\n"]}\r\n'
    assert encode({"a": [1]}, pretty=True) == b'{\n    "a": [\n        1\n    ]\n}\r\n'
    assert json.loads(encode({"name": "bad\udc80", "ok": "\\ud83d", "x": ["\U0001f600"]})) == {
        "name": "bad\ufffd",
        "ok": "\\ud83d",
        "x": ["\U0001f600"],
    }


def test_encode_deep() -> None:
    text = b'{"a": ' + b"[" * 1020 + b'{"b": 1, "c": [], "d": [2, "x"]}' + b"]" * 1020 + b', "e": {}}'
    (deep,) = Scanner().feed(text)
    assert isinstance(deep, Value)
    assert encode(deep.json) == text + b"\r\n"


def test_read_one() -> None:
    assert read_one("{'a': 1}") == {"a": 1}
    for text, error in [
        ('{"a"', "JSON parse error, premature EOI"),
        ("{} {}", "Expecting at most one JSON value"),
        ("{]", "JSON parse error, expecting value"),
    ]:
        with pytest.raises(WireError) as caught:
            read_one(text)
        assert str(caught.value) == error


def test_malformed_compares_by_text() -> None:
    assert Malformed("a") == Malformed("a") != Malformed("b")
    assert len({Malformed("a"), Malformed("a")}) == 1


@pytest.mark.parametrize("items", [[], [{"a": 1}], ["\u00e9 \ud800", {"b": [{"c": "d"}]}, 5, None]])
@pytest.mark.parametrize("echo", [{}, {"id": ["\u20ac", {"deep": [0.5]}]}])
@pytest.mark.parametrize("pretty", [False, True])
def test_items_that_are_spelled_already_give_the_same_line(items: list[object], echo: Any, pretty: bool) -> None:
    spelled = Spelled(items, [spell(each) for each in items])
    assert encode({"return": spelled, **echo}, pretty=pretty) == encode({"return": items, **echo}, pretty=pretty)
    assert msgspec.to_builtins(spelled) == items
