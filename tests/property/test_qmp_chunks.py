"""QMP framing gives the same whatever the packets are, reads back what it writes, and agrees with strict JSON."""

import json
from itertools import pairwise
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from blockjobs.wire.qmp_encode import encode
from blockjobs.wire.qmp_lines import Limits, Malformed, Scanner, Value

PIECES = [
    *(bytes([byte]) for byte in b"{}[],:\"'\\-.e+ 0l@\n\t\x00\xff"),
    *(b'"a"', b"'b'", b'"\\u', b"12", b"true", b"nul", b"\xc3\xa9", b"\xef\xbf\xbf", b"1e999", b"18446744073709551616"),
    *(b'{"execute":"x"}', b"[[1,2],{'a':[]}]", b'{"a":1,"a":2}', b'"long string here"', b'{"k":'),
]
inputs = st.lists(st.sampled_from(PIECES), max_size=14).map(b"".join) | st.binary(max_size=40)
limits = st.builds(
    Limits,
    depth=st.sampled_from([2, 1024]),
    token_bytes=st.sampled_from([12, 40, 10_000]),
    tokens=st.sampled_from([4, 9, 1000]),
)
scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text()
values = st.recursive(
    scalars | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


def feed(scanner: Scanner, *chunks: bytes) -> list[Any]:
    found = [each for chunk in chunks for each in scanner.feed(chunk)]
    return [each if isinstance(each, Malformed) else repr(each.json) for each in found]


@settings(max_examples=100, deadline=None)
@given(inputs, limits, st.lists(st.integers(0, 60), max_size=4))
@example(b"[1 2]", Limits(), [3])
@example(b'["x" ,"\\u12"', Limits(token_bytes=12), [4, 8])
def test_packets_do_not_matter(text: bytes, limit: Limits, cuts: list[int]) -> None:
    whole = feed(Scanner(limit), text)
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    assert feed(Scanner(limit), *(text[a:b] for a, b in pairwise(places))) == whole
    assert feed(Scanner(limit), *(bytes([byte]) for byte in text)) == whole


@settings(max_examples=100, deadline=None)
@given(values, st.booleans())
def test_round_trip(value: Any, pretty: bool) -> None:
    text = encode(value, pretty=pretty)
    text.decode("ascii")
    assert text.endswith(b"\r\n")
    (found,) = Scanner().feed(text)
    if isinstance(found, Malformed):  # QEMU refuses noncharacters, strict JSON does not
        assert "Unicode" in str(found)
    else:
        assert found == Value(value)


@settings(max_examples=100, deadline=None)
@given(inputs)
def test_what_is_read_as_one_value_is_what_strict_json_reads(text: bytes) -> None:
    found = Scanner().feed(text + b"\n")
    try:
        strict = json.loads(text.decode())
    except ValueError:
        return
    if len(found) == 1 and isinstance(found[0], Value) and abs(getattr(strict, "real", 0) or 0) < 2**63:
        assert repr(found[0].json) == repr(strict) or b"e" in text or b"18446744073709551616" in text
