import itertools
import random
from array import array

import pytest
from tiny_images import in_loop, new_disk

from blockjobs.base.errors import ImageCorrupt
from blockjobs.base.span import Span, coalesce
from blockjobs.block.drivers.qcow2.entries import ALL_BITS, ALL_ZERO, Segments, runs_in, runs_of
from blockjobs.block.drivers.qcow2.geometry import Geometry
from blockjobs.block.vocabulary import Kind
from blockjobs.wire.qcow2 import Header, Incompatible
from blockjobs.wire.qcow2_tables import COMPRESSED, COPIED, OFFSET, ZERO

SIZE = 65536
STANDARD = Geometry.of(Header(), "disk")
EXTENDED = Geometry.of(Header(incompatible=int(Incompatible.EXTENDED_L2)), "disk")
DATA_FILE = Geometry.of(Header(incompatible=int(Incompatible.DATA_FILE)), "disk")
VERSION_2 = Geometry.of(Header(version=2), "disk")


def words_of(chance, count, kinds):
    """Words as writers leave them: runs of one kind, some continued exactly, some not."""
    words = []
    while len(words) < count:
        first = chance.randrange(1, 1000) * SIZE
        length = min(chance.choice((1, 2, 3, 700)), count - len(words))
        match chance.choice(kinds):
            case "absent":
                words += [0] * length
            case "zero":
                words += [ZERO] * length
            case "kept zero":
                words += [first + number * SIZE | COPIED | ZERO for number in range(length)]
            case "stored":
                words += [first + number * SIZE | COPIED for number in range(length)]
            case "shared":
                words += [first + number * SIZE for number in range(length)]
            case "compressed":
                words += [COMPRESSED | first + number for number in range(length)]
    return array("Q", words)


@pytest.mark.parametrize("seed", range(20))
def test_runs_are_exactly_the_words(seed):
    chance = random.Random(seed)
    kinds = ("absent", "zero", "kept zero", "stored", "shared", "compressed")
    words = words_of(chance, chance.choice((1, 5, 512, 513, 3000)), kinds)
    runs = runs_of(words, STANDARD)
    at = 0
    for run in runs:
        assert run.start == at < run.end
        step = SIZE if run.word & OFFSET else 0
        assert run.end - run.start == 1 or not run.word & COMPRESSED
        assert list(words[run.start : run.end]) == [run.word + n * step for n in range(run.end - run.start)]
        at = run.end
    assert at == len(words)
    for before, after in itertools.pairwise(runs):
        step = SIZE if before.word & OFFSET else 0
        assert before.word & COMPRESSED or before.word + (before.end - before.start) * step != after.word


@pytest.mark.parametrize("seed", range(20))
def test_runs_in_spans_are_what_their_clusters_say(seed):
    chance = random.Random(seed)
    words = words_of(chance, 8192, ("absent", "zero", "kept zero", "stored", "shared", "compressed"))
    table_at = chance.choice((0, STANDARD.l2_span))
    spans, at = [], table_at
    while len(spans) < 50:
        at += chance.choice((0, 1, SIZE // 2, SIZE, 30 * SIZE))
        spans.append(Span(at, chance.choice((1, SIZE // 2, SIZE, 5 * SIZE))))
        at = spans[-1].end
    found = list(runs_in(words, STANDARD, spans))
    assert coalesce(part for _, part in found) == coalesce(spans)
    for run, part in found:
        assert any(span.contains(part) for span in spans)
        assert Span(table_at + run.start * SIZE, (run.end - run.start) * SIZE) == part.widen(SIZE)
        step = SIZE if run.word & OFFSET and not run.word & COMPRESSED else 0
        assert list(words[run.start : run.end]) == [run.word + n * step for n in range(run.end - run.start)]


@pytest.mark.parametrize("seed", range(20))
def test_subclusters_of_any_kind_in_any_order(seed):
    chance = random.Random(seed)
    sub, words, expected = SIZE // 32, [], {}
    while len(words) < 12:
        stored, zeroed = chance.getrandbits(32) | chance.getrandbits(32), chance.getrandbits(32)
        bitmap = stored & ~zeroed | zeroed << 32
        host_at = chance.randrange(1, 1000) * SIZE
        for number in range(chance.choice((1, 1, 2))):  # neighbours that are alike, and together in the file too
            at = len(words) // 2 * SIZE
            words += [host_at + number * SIZE | COPIED, bitmap]
            for bit in range(32):
                kind = Kind.ZERO if zeroed >> bit & 1 else Kind.DATA if stored >> bit & 1 else Kind.BACKING
                expected[at + bit * sub] = kind, host_at + number * SIZE + bit * sub
    start, end = chance.randrange(3 * sub), chance.randrange(4 * SIZE, 5 * SIZE)
    found = segments(EXTENDED, words, start=start, end=end)
    assert found[0][0] == start and found[-1][0] + found[-1][1] == end
    for at, length, kind, child_at in found:
        for each in range(at // sub * sub, at + length, sub):
            assert expected[each][0] is kind
            if kind is not Kind.BACKING:
                assert expected[each][1] == child_at + each - at
    for before, after in itertools.pairwise(found):
        assert before[0] + before[1] == after[0]


def test_a_full_table_is_one_run():
    words = array("Q", range(SIZE | COPIED, (SIZE | COPIED) + 8192 * SIZE, SIZE))
    assert len(runs_of(words, STANDARD)) == 1
    words[5000] += SIZE
    assert [(run.start, run.end) for run in runs_of(words, STANDARD)] == [(0, 5000), (5000, 5001), (5001, 8192)]


def test_words_that_overflow_are_no_progression():
    """A difference that only cancels out beyond 64 bits must not pass for a run."""
    words = array("Q", [SIZE | COPIED] * 512 + [SIZE | COPIED, COPIED | 3 * SIZE, SIZE, 4 * SIZE])
    assert all(
        words[run.start + n] == run.word + n * SIZE
        for run in runs_of(words, STANDARD)
        for n in range(run.end - run.start)
    )


def segments(geometry, words, at=0, start=0, end=1 << 40):
    collected = Segments(geometry)
    collected.add_table(array("Q", words), at, start, end)
    return [(each.at, each.length, each.kind, each.child_at) for each in collected.finish()]


def test_neighbours_are_joined_whatever_their_flags():
    words = [SIZE | COPIED, 2 * SIZE, 3 * SIZE | COPIED, 0, ZERO, 9 * SIZE | ZERO, ZERO | COPIED | SIZE, 7 * SIZE]
    assert segments(STANDARD, words) == [
        (0, 3 * SIZE, Kind.DATA, SIZE),
        (3 * SIZE, SIZE, Kind.BACKING, 0),
        (4 * SIZE, SIZE, Kind.ZERO, 0),
        (5 * SIZE, SIZE, Kind.ZERO, 9 * SIZE),  # zeroes that keep a place say where
        (6 * SIZE, SIZE, Kind.ZERO, SIZE),
        (7 * SIZE, SIZE, Kind.DATA, 7 * SIZE),
    ]


def test_segments_are_cut_at_the_limits():
    assert segments(STANDARD, [SIZE, 2 * SIZE], at=10 * SIZE, start=10 * SIZE + 5, end=11 * SIZE + 7) == [
        (10 * SIZE + 5, SIZE + 2, Kind.DATA, SIZE + 5)
    ]


def test_compressed_neighbours_are_one_segment_that_can_be_cut():
    collected = Segments(STANDARD)
    collected.add_table(array("Q", [0, COMPRESSED | 5, COMPRESSED | 900, COMPRESSED | 77]), 0, SIZE + 10, 4 * SIZE)
    [segment] = collected.finish()
    assert (segment.at, segment.length, segment.kind) == (SIZE + 10, 3 * SIZE - 10, Kind.SPECIAL)
    assert segment.token == (SIZE, (COMPRESSED | 5, COMPRESSED | 900, COMPRESSED | 77))


def test_subclusters():
    sub = SIZE // 32
    bitmap = 0b0101 | 0b1010 << 32
    assert segments(EXTENDED, [SIZE, bitmap, 2 * SIZE, ALL_BITS, 0, ALL_ZERO, 0, 0]) == [
        (0, sub, Kind.DATA, SIZE),
        (sub, sub, Kind.ZERO, SIZE + sub),
        (2 * sub, sub, Kind.DATA, SIZE + 2 * sub),
        (3 * sub, sub, Kind.ZERO, SIZE + 3 * sub),
        (4 * sub, 28 * sub, Kind.BACKING, 0),
        (SIZE, SIZE, Kind.DATA, 2 * SIZE),
        (2 * SIZE, SIZE, Kind.ZERO, 0),
        (3 * SIZE, SIZE, Kind.BACKING, 0),
    ]


def test_the_first_cluster_of_a_data_file_is_a_place():
    assert segments(DATA_FILE, [COPIED, SIZE | COPIED, 0]) == [
        (0, 2 * SIZE, Kind.DATA, 0),
        (2 * SIZE, SIZE, Kind.BACKING, 0),
    ]


@pytest.mark.parametrize(
    ("geometry", "words", "text"),
    [
        (STANDARD, [SIZE + 512], "Cluster allocation offset 0x10200 unaligned (guest offset: 0x0)"),
        (VERSION_2, [ZERO], "Zero cluster entry found in pre-v3 image (guest offset: 0x0)"),
        (EXTENDED, [SIZE, 1 | 1 << 32], "Invalid subcluster bits 0x100000001 (guest offset: 0x0)"),
        (EXTENDED, [0, 1], "Allocated subclusters without cluster (guest offset: 0x0)"),
        (EXTENDED, [COMPRESSED | SIZE, 1], "Compressed cluster with subcluster bits (guest 0x0)"),
        (DATA_FILE, [COMPRESSED | SIZE], "Compressed cluster in an image with data file (guest 0x0)"),
    ],
)
def test_nonsense_is_refused(geometry, words, text):
    with pytest.raises(ImageCorrupt) as caught:
        segments(geometry, words)
    assert caught.value.text == text


def test_an_absent_table_is_one_segment():
    async def body():
        _, driver = await new_disk(size=1 << 40, cluster_size=SIZE)
        assert len(await driver.resolve(Span(0, 1 << 40))) == 1

    in_loop(body)


@pytest.mark.parametrize("count", [2, 511, 513, 8191, 8192, 8193, 16383, 16384, 40000])
def test_a_single_run_of_any_length_is_seen_and_any_exception_too(count):
    chance = random.Random(count)
    for first, step in ((SIZE | COPIED, SIZE), (0, 0), (ZERO, 0), (SIZE * 3 | ZERO, SIZE)):
        words = array("Q", [first + number * step for number in range(count)])
        assert runs_of(words, STANDARD) == [(0, count, first, 0)]
        for place in {0, count - 1, chance.randrange(count), min(count - 1, 8191), min(count - 1, 8192)}:
            changed = words[:]
            changed[place] ^= COPIED
            assert len(runs_of(changed, STANDARD)) == (2 if place in (0, count - 1) else 3)
