import pytest

from blockjobs.base.span import Span
from blockjobs.block.bitmap import DirtyBitmap


def test_spans_are_widened_to_granules_and_cut_at_the_end() -> None:
    bitmap = DirtyBitmap(1000, 256)
    bitmap.set(Span(300, 1))
    bitmap.set(Span(900, 4096))
    assert list(bitmap.runs()) == [Span(256, 256), Span(768, 232)]
    assert bitmap.count_bytes() == 512
    assert bitmap.dirty_bytes() == 256 + 232
    bitmap.clear(Span(999, 1))
    assert list(bitmap.runs()) == [Span(256, 256)]


def test_an_empty_span_touches_nothing() -> None:
    bitmap = DirtyBitmap(1000, 256)
    bitmap.set(Span(300, 0))
    bitmap.set(Span(1000, 10))
    assert not bitmap.any()


def test_next_run_is_cut_but_never_below_a_granule() -> None:
    bitmap = DirtyBitmap(1024, 256)
    bitmap.set_all()
    assert bitmap.next_run(0, 1) == Span(0, 256)
    assert bitmap.next_run(0, 700) == Span(0, 512)
    assert bitmap.next_run(300) == Span(256, 768)
    assert bitmap.next_run(0, end=257) == Span(0, 512)
    assert bitmap.next_run(1024) is None


def test_bytes_of_a_span_are_those_of_its_granules() -> None:
    bitmap = DirtyBitmap(1000, 256)
    bitmap.set_all()
    assert bitmap.dirty_bytes(Span(0, 300)) == 512
    assert bitmap.dirty_bytes(Span(800, 1)) == 232
    assert bitmap.dirty_bytes(Span(800, 0)) == 0
    bitmap.clear(Span(999, 1))
    assert bitmap.dirty_bytes(Span(512, 4096)) == 256


def test_an_empty_node_has_no_runs() -> None:
    bitmap = DirtyBitmap(0, 65536)
    bitmap.set_all()
    assert bitmap.next_run() is None
    assert bitmap.count_bytes() == bitmap.dirty_bytes() == 0
    assert not bitmap.any()


def test_any_looks_only_at_the_span() -> None:
    bitmap = DirtyBitmap(4096, 512)
    bitmap.set(Span(1024, 512))
    assert bitmap.any(Span(1500, 1))
    assert not bitmap.any(Span(0, 1024))
    assert not bitmap.any(Span(1536, 4096))


@pytest.mark.parametrize("granularity", [512, 1024])
@pytest.mark.parametrize("length", [3000, 4096, 9000])
def test_merge_goes_as_far_as_the_map(length: int, granularity: int) -> None:
    into, other = DirtyBitmap(4000, 512), DirtyBitmap(length, granularity)
    into.set(Span(0, 1))
    for at in range(1024, length, 2048):
        other.set(Span(at, 1))
    into.merge_inside(other)
    expected = [Span(0, 512)] + [Span(at, min(granularity, 4000 - at)) for at in range(1024, min(length, 4000), 2048)]
    assert list(into.runs()) == expected
    assert into.length == 4000


def test_merge_crosses_granularities() -> None:
    fine, coarse = DirtyBitmap(4096, 512), DirtyBitmap(4096, 2048)
    fine.set(Span(2600, 1))
    coarse.merge(fine)
    assert list(coarse.runs()) == [Span(2048, 2048)]
    twin = fine.copy()
    twin.merge(coarse.copy())
    assert list(twin.runs()) == [Span(2048, 2048)]
    assert list(fine.runs()) == [Span(2560, 512)]
