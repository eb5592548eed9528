"""DirtyBitmap against a set of granule numbers."""

from hypothesis import given, settings
from hypothesis import strategies as st

from blockjobs.base.span import Span, coalesce
from blockjobs.block.bitmap import DirtyBitmap

LENGTH, GRANULARITY = 4000, 64
spans = st.builds(Span, st.integers(0, LENGTH + 200), st.integers(0, 900))
operations = st.lists(st.tuples(st.sampled_from(("set", "clear")), spans), max_size=30)


def granules(span: Span) -> set[int]:
    end = min(span.end, LENGTH)
    return set(range(span.at // GRANULARITY, -(-end // GRANULARITY))) if span and span.at < end else set()


@settings(max_examples=150, deadline=None)
@given(operations, spans, st.integers(1, 1000))
def test_any_history_agrees_with_a_set(history: list[tuple[str, Span]], probe: Span, length_max: int) -> None:
    bitmap, model = DirtyBitmap(LENGTH, GRANULARITY), set[int]()
    for verb, span in history:
        getattr(bitmap, verb)(span)
        model = model | granules(span) if verb == "set" else model - granules(span)
    whole = Span(0, LENGTH)
    expected = coalesce(Span(n * GRANULARITY, GRANULARITY).intersect(whole) for n in model)
    assert list(bitmap.runs()) == expected
    assert bitmap.dirty_bytes() == sum(span.length for span in expected)
    assert bitmap.count_bytes() == len(model) * GRANULARITY
    assert bitmap.any(probe) == bool(granules(probe) & model)
    run = bitmap.next_run(probe.at, length_max)
    later = [n for n in model if n >= probe.at // GRANULARITY and probe.at < LENGTH]
    if not later:
        assert run is None
    else:
        assert run is not None and run.at == min(later) * GRANULARITY
        assert granules(run) <= model
        assert run.length <= max(length_max, GRANULARITY)
