"""Span arithmetic against sets of integers."""

import itertools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockjobs.base.span import Span, coalesce, subtract, without
from blockjobs.block.plan import Run, RunKind, clip

spans = st.builds(Span, st.integers(0, 60), st.integers(0, 20))
aligns = st.integers(1, 9)


def bytes_of(span: Span) -> set[int]:
    return set(range(span.at, span.end))


@given(spans, spans)
def test_pairs(a: Span, b: Span) -> None:
    both = bytes_of(a) & bytes_of(b)
    assert bytes_of(a.intersect(b)) == both
    assert a.overlaps(b) == bool(both) or not a or not b
    if b:
        assert a.contains(b) == (bytes_of(b) <= bytes_of(a))


@given(spans, aligns)
def test_alignment(span: Span, align: int) -> None:
    wide, narrow = span.widen(align), span.narrow(align)
    assert wide.is_aligned(align)
    assert wide.contains(span)
    assert narrow.length == 0 or (narrow.is_aligned(align) and span.contains(narrow))
    if span:
        assert wide.length < span.length + 2 * align
    pieces = list(span.split(align))
    assert set().union(*map(bytes_of, pieces)) == bytes_of(span)
    assert sum(piece.length for piece in pieces) == span.length
    assert all(piece.end % align == 0 for piece in pieces[:-1])


@given(st.lists(spans, max_size=8), spans)
def test_lists(many: list[Span], span: Span) -> None:
    union = set().union(*map(bytes_of, many)) if many else set()
    joined = coalesce(many)
    assert set().union(*map(bytes_of, joined)) == union if joined else not union
    assert all(one.end < two.at for one, two in itertools.pairwise(joined))
    left = subtract(span, many)
    assert set().union(set(), *map(bytes_of, left)) == bytes_of(span) - union


@given(st.lists(spans, max_size=8), st.lists(spans, max_size=8))
def test_lists_against_lists(many: list[Span], others: list[Span]) -> None:
    """In both lists neighbours may touch, as the parts of a flight and runs of different kinds do."""
    parts, frames = apart(many), apart(others)
    union = set().union(*map(bytes_of, frames))
    assert [one for part in without(parts, frames) for one in sorted(bytes_of(part))] == [
        one for part in parts for one in sorted(bytes_of(part) - union)
    ]
    runs = [Run(part.at, part.length, RunKind.DATA, None, 1000 + part.at) for part in parts]
    clipped = clip(runs, frames)
    assert [one for run in clipped for one in range(run.at, run.end)] == sorted(
        union & set().union(*map(bytes_of, parts))
    )
    assert all(run.medium_at == 1000 + run.at for run in clipped)


def apart(many: list[Span]) -> list[Span]:
    """Ascending and disjoint: each span without what those before it have."""
    left: list[Span] = []
    for span in many:
        left += subtract(span, left)
    return sorted(left)


@pytest.mark.serial
def test_long_lists_take_linear_time() -> None:
    """A batch has thousands of parts; going through one list for each item of the other took a third of its plan."""
    count = 60_000
    parts = [Span(2 * number, 1) for number in range(count)]
    runs = [Run(number, 1, RunKind.DATA) for number in range(2 * count)]
    began_s = time.process_time()
    assert len(clip(runs, parts)) == count
    assert without(parts, parts) == []
    assert time.process_time() - began_s < 2, "going through the rest of a list each time takes 20 s"
