"""What L2 entries mean: words of a table to runs and segments, many at a time.

A 64 KiB table has 8192 entries, and its decoding steers every read; so the inner loop only looks for places where the
next word is not the one expected, and everything else works on those runs.
"""

import sys
from array import array
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Final, NamedTuple

from blockjobs.base.errors import ImageCorrupt
from blockjobs.base.span import Span
from blockjobs.block.columns import ZERO_AT
from blockjobs.block.drivers.qcow2.geometry import Geometry
from blockjobs.block.vocabulary import PLACED, Kind, Segment
from blockjobs.wire.qcow2 import SUBCLUSTERS
from blockjobs.wire.qcow2_tables import COMPRESSED, COPIED, OFFSET, ZERO

ALL_BITS: Final = (1 << SUBCLUSTERS) - 1
ALL_ZERO: Final = ALL_BITS << SUBCLUSTERS
"""Bitmap of an extended entry whose subclusters all read as zeroes."""

_SPECIAL: Final = COMPRESSED | ZERO
CHUNK: Final = 512
"""Words that are compared at once."""
_COMPARED_MAX: Final = 8192
"""Words that are compared at once if they look like a single run: a table of 64 KiB."""
_ONES: Final = int.from_bytes(array("Q", (1,)) * (_COMPARED_MAX - 1), sys.byteorder)


class Mapped(NamedTuple):
    """Entries `start` to `end` (within the words looked at) that follow from `word`: a run in the host file too.

    `word` is the first entry; those after it have the same flags and the next clusters. `bitmap` is the same for all of
    them, and 0 without extended entries. A compressed entry is a run of its own.
    """

    start: int
    end: int
    word: int
    bitmap: int

    @property
    def offset(self) -> int:
        """Host place of the first cluster; 0 usually means none."""
        return self.word & OFFSET


def runs_of(words: "array[int]", geometry: Geometry) -> list[Mapped]:
    """Cut the entries into runs, in order and without gaps."""
    if geometry.is_extended:
        return _extended_runs(words, geometry.cluster_size)
    starts = _starts_of(words, geometry.cluster_size)
    return [Mapped(start, end, word, 0) for (start, word), (end, _) in pairwise(starts)]


def runs_in(words: "array[int]", geometry: Geometry, spans: Sequence[Span]) -> Iterator[tuple[Mapped, Span]]:
    """The runs of a table's entries, which are not extended, with what of each lies in one of the spans.

    Args:
        words: of the whole table.
        spans: guest bytes that it maps, ascending.

    Yields:
        The entries of the clusters that a part is in, as a run of their own, and the part.
    """
    size, table_at = geometry.cluster_size, spans[0].at // geometry.l2_span * geometry.l2_span
    first, last = (spans[0].at - table_at) // size, -(-(spans[-1].end - table_at) // size)
    runs = runs_of(words[first:last], geometry)
    index = 0
    for span in spans:
        start, end = (span.at - table_at) // size - first, -(-(span.end - table_at) // size) - first
        while runs[index].end <= start:
            index += 1
        while True:
            run_start, run_end, word, bitmap = runs[index]
            here, stop = max(run_start, start), min(run_end, end)
            if here > run_start and word & OFFSET and not word & COMPRESSED:
                word += (here - run_start) * size
            at = max(span.at, table_at + (first + here) * size)
            part = Span(at, min(span.end, table_at + (first + stop) * size) - at)
            yield Mapped(first + here, first + stop, word, bitmap), part
            if run_end >= end:
                break
            index += 1


def _starts_of(words: "array[int]", cluster_size: int) -> list[tuple[int, int]]:
    """Where runs of plain entries start, and their first words; the last of the list marks the end."""
    if _is_one_run(words, cluster_size):
        return [(0, words[0]), (len(words), 0)]
    starts: list[tuple[int, int]] = []
    expected = -1
    step = 0
    for chunk_at in range(0, len(words), CHUNK):
        chunk = words[chunk_at : chunk_at + CHUNK]
        if chunk[0] == expected and _is_progression(chunk, step):
            expected += step * len(chunk)
            continue
        for index, word in enumerate(chunk, chunk_at):
            if word == expected:
                expected += step
                continue
            starts.append((index, word))
            if word & COMPRESSED:
                expected = -1
            else:
                step = cluster_size if word & OFFSET else 0
                expected = word + step
    starts.append((len(words), 0))
    return starts


def _is_one_run(words: "array[int]", cluster_size: int) -> bool:
    """Whether plain entries are a single run, as in preallocated images; costs next to nothing if not."""
    count = len(words)
    if not count or words[0] & COMPRESSED:
        return False
    step = cluster_size if words[0] & OFFSET else 0
    if words[-1] - words[0] != step * (count - 1):
        return False
    return all(
        _is_progression(words[at : at + _COMPARED_MAX], step)
        for at in range(0, max(1, count - 1), _COMPARED_MAX - 1)  # parts share a word
    )


def _is_progression(words: "array[int]", step: int) -> bool:
    """Whether each word is the one before plus `step`, by one subtraction of the words as long integers.

    Single differences could only cancel each other out beyond 64 bits, which words without the compressed flag, and
    words that follow from those, cannot reach.
    """
    further = len(words) - 1
    whole = int.from_bytes(words.tobytes(), sys.byteorder)
    difference = (whole >> 64) - (whole & (1 << 64 * further) - 1)
    ones = _ONES if len(words) == _COMPARED_MAX else _ONES >> 64 * (_COMPARED_MAX - len(words))
    steps = step * ones
    return difference == (steps if sys.byteorder == "little" else -steps)


def _extended_runs(words: "array[int]", cluster_size: int) -> list[Mapped]:
    runs: list[Mapped] = []
    start = expected = word_then = bitmap_then = -1
    step = 0
    for index, (word, bitmap) in enumerate(zip(words[0::2], words[1::2], strict=True)):
        if word == expected and bitmap == bitmap_then:
            expected += step
            continue
        if start >= 0:
            runs.append(Mapped(start, index, word_then, bitmap_then))
        start, word_then, bitmap_then = index, word, bitmap
        step = cluster_size if word & OFFSET else 0
        expected = -1 if word & COMPRESSED else word + step
    if start >= 0:
        runs.append(Mapped(start, len(words) // 2, word_then, bitmap_then))
    return runs


def is_stored(run: Mapped, geometry: Geometry) -> bool:
    """Whether the run has host clusters of its own, not compressed, whatever they mean."""
    if run.word & COMPRESSED:
        return False
    # With an external data file, cluster 0 of it is a place like any other; the copied flag tells it from "none".
    return bool(run.offset) or (geometry.has_data_file and bool(run.word & COPIED))


def is_plain(run: Mapped, geometry: Geometry) -> bool:
    """Whether the guest reads the host clusters as they are, all of them."""
    if geometry.is_extended:
        return is_stored(run, geometry) and run.bitmap == ALL_BITS
    return is_stored(run, geometry) and not run.word & ZERO


def may_write_in_place(run: Mapped, geometry: Geometry) -> bool:
    """Whether its host clusters belong to the active state alone."""
    return is_stored(run, geometry) and (geometry.has_data_file or bool(run.word & COPIED))


def check(run: Mapped, geometry: Geometry, guest_at: int) -> None:
    """Refuse entries that no writer may have made.

    Raises:
        ImageCorrupt: an offset that is no cluster's, zero clusters before version 3, contradicting subcluster bits.
    """
    if run.word & COMPRESSED:
        if geometry.has_data_file:
            raise ImageCorrupt(geometry.name, f"Compressed cluster in an image with data file (guest {guest_at:#x})")
        if run.bitmap:
            raise ImageCorrupt(geometry.name, f"Compressed cluster with subcluster bits (guest {guest_at:#x})")
        return
    if run.offset % geometry.cluster_size:
        text = f"Cluster allocation offset {run.offset:#x} unaligned (guest offset: {guest_at:#x})"
        raise ImageCorrupt(geometry.name, text)
    if geometry.is_extended:
        if run.bitmap & ALL_BITS & run.bitmap >> SUBCLUSTERS:
            raise ImageCorrupt(geometry.name, f"Invalid subcluster bits {run.bitmap:#x} (guest offset: {guest_at:#x})")
        if run.bitmap & ALL_BITS and not is_stored(run, geometry):
            raise ImageCorrupt(geometry.name, f"Allocated subclusters without cluster (guest offset: {guest_at:#x})")
    elif run.word & ZERO and geometry.version < 3:
        text = f"Zero cluster entry found in pre-v3 image (guest offset: {guest_at:#x})"
        raise ImageCorrupt(geometry.name, text)


def add_pieces(
    words: "array[int]",
    at: int,
    geometry: Geometry,
    columns: tuple[list[int], list[int], list[int]],
    *,
    has_zeroes: bool = True,
    shows_zeroes: bool = False,
) -> bool:
    """Append the plain clusters among entries: guest offset, bytes and host offset of each run.

    Args:
        words: entries for guest offset `at` and following.
        has_zeroes: zero ones are passed over like absent ones.
        shows_zeroes: they are appended too, with ZERO_AT as host offset.

    Returns:
        False if there are others than plain, absent and zero ones, or such as no writer may have made.
    """
    if geometry.is_extended:
        plain = _plain_words(words, has_zeroes=has_zeroes)
        if plain is None:
            return False
        words = plain
    size = geometry.cluster_size
    placed = COPIED if geometry.has_data_file else OFFSET  # cluster 0 of a data file is a place like any other
    odd = COMPRESSED | (size - 1 & OFFSET) | (0 if geometry.version >= 3 and has_zeroes else ZERO)
    places, lengths, hosts = columns
    expected_at = places[-1] + lengths[-1] if places else -1
    expected = ZERO_AT if not places or hosts[-1] == ZERO_AT else hosts[-1] + lengths[-1]
    for guest_at, word in zip(range(at, at + len(words) * size, size), words, strict=True):
        if not word:
            continue
        if word & odd:
            return False
        host = word & OFFSET
        if word & ZERO and shows_zeroes:
            host = ZERO_AT
        elif word & ZERO or not word & (placed | OFFSET):
            continue
        if host == expected and guest_at == expected_at:
            lengths[-1] += size
        else:
            places.append(guest_at)
            lengths.append(size)
            hosts.append(host)
        expected, expected_at = ZERO_AT if host == ZERO_AT else host + size, guest_at + size
    return True


def _plain_words(words: "array[int]", *, has_zeroes: bool) -> "array[int] | None":
    """The words of extended entries as those of entries that are not.

    Returns:
        None if a cluster is not all bytes, all zeroes or all absent.
    """
    bitmaps = words[1::2]
    kinds = set(bitmaps)
    if not kinds <= ({0, ALL_BITS, ALL_ZERO} if has_zeroes else {0, ALL_BITS}):
        return None
    words = words[::2]
    if any(word & _SPECIAL for word in words):
        return None
    if kinds == {ALL_BITS}:
        return words if all(words) else None
    if any(bitmap == ALL_BITS and not word for word, bitmap in zip(words, bitmaps, strict=True)):
        return None
    without = {0: 0, ALL_ZERO: ZERO}
    return array("Q", [without.get(bitmap, word) for word, bitmap in zip(words, bitmaps, strict=True)])


class Segments:
    """Collects segments in guest order, joining neighbours of one kind and place.

    ZERO segments whose clusters have a place, which a later write will fill, get PLACED as `token`, and that place.
    SPECIAL segments get the tuple of L2 entries of their clusters as `token`, so that any part of them can be read:
    `read_special` finds the entry from the part's guest offset, since such segments start at a cluster or where the
    whole question did.
    """

    def __init__(self, geometry: Geometry) -> None:
        self._geometry = geometry
        self._child = geometry.data_child
        self.done: list[Segment] = []
        self._words: list[int] = []
        self._first = self._at = self._length = 0

    def add_table(self, words: "array[int]", at: int, limit_at: int, limit_end: int) -> None:
        """Append what `words`, entries for guest offset `at` and following, say of the bytes between the limits.

        Raises:
            ImageCorrupt: see `check`.
        """
        geometry, size = self._geometry, self._geometry.cluster_size
        if geometry.is_extended or geometry.has_data_file:
            for run in runs_of(words, geometry):
                self._add_run(run, at, limit_at, limit_end)
            return
        special = _SPECIAL | size - 1 & OFFSET
        done, child = self.done, self._child
        # What the last one of `done` is: (kind, end in the child); only a run that fits it needs `add`.
        kind_before: Kind | None = None
        child_end = -1
        for (index, word), (index_end, _) in pairwise(_starts_of(words, size)):
            if word & special:
                self._add_run(Mapped(index, index_end, word, 0), at, limit_at, limit_end)
                kind_before = None
                continue
            start, end = at + index * size, at + index_end * size
            first = start if start > limit_at else limit_at
            end = end if end < limit_end else limit_end
            if first >= end:
                continue
            offset = word & OFFSET
            kind = Kind.DATA if offset else Kind.BACKING
            place = offset + first - start if offset else 0
            if kind_before is None or (kind is kind_before and (not offset or place == child_end)):
                self.add(first, end - first, kind, place)
            else:
                done.append(Segment(first, end - first, kind, child if offset else "file", place))
            kind_before, child_end = kind, place + end - first

    def add(self, at: int, length: int, kind: Kind, child_at: int = 0, token: object = None) -> None:
        """Append bytes of one kind that are not compressed."""
        if self._words:
            self._close()
        done = self.done
        is_placed = kind is Kind.DATA or token is PLACED
        if done:
            last_at, last_length, last_kind, child, last_child_at, last_token = done[-1]
            follows = not is_placed or last_child_at + last_length == child_at
            if last_kind is kind and last_token is token and follows:
                done[-1] = Segment(last_at, last_length + length, kind, child, last_child_at, token)
                return
        done.append(Segment(at, length, kind, self._child if is_placed else "file", child_at, token))

    def _add_run(self, run: Mapped, at: int, limit_at: int, limit_end: int) -> None:
        size = self._geometry.cluster_size
        start, end = at + run.start * size, min(at + run.end * size, limit_end)
        first = max(start, limit_at)
        check(run, self._geometry, start)
        if first >= end:
            return
        if run.word & COMPRESSED:
            if not self._words:
                self._first, self._at, self._length = start, first, 0
            self._words.append(run.word)
            self._length += end - first
        elif self._geometry.is_extended and run.bitmap not in (0, ALL_BITS, ALL_ZERO):
            self._add_subclusters(run, start, first, end)
        elif is_plain(run, self._geometry):
            self.add(first, end - first, Kind.DATA, run.offset + first - start)
        elif run.bitmap == ALL_ZERO or (run.word & ZERO and not self._geometry.is_extended):
            self._add_without_bytes(run, start, first, end, is_zero=True)
        else:
            self._add_without_bytes(run, start, first, end, is_zero=False)

    def _add_without_bytes(self, run: Mapped, start: int, first: int, end: int, *, is_zero: bool) -> None:
        if is_zero and is_stored(run, self._geometry):
            self.add(first, end - first, Kind.ZERO, run.offset + first - start, PLACED)
        else:
            self.add(first, end - first, Kind.ZERO if is_zero else Kind.BACKING)

    def _add_subclusters(self, run: Mapped, start: int, first: int, end: int) -> None:
        """Clusters whose subclusters differ, all in the same way."""
        size, unit = self._geometry.cluster_size, self._geometry.subcluster_size
        alike = list(_alike(run.bitmap))
        for cluster_at in range(first - (first - start) % size, end, size):
            for index, stop, kind in alike:
                at, until = max(first, cluster_at + index * unit), min(end, cluster_at + stop * unit)
                if at >= until:
                    continue
                if kind is Kind.DATA:
                    self.add(at, until - at, Kind.DATA, run.offset + at - start)
                else:
                    self._add_without_bytes(run, start, at, until, is_zero=kind is Kind.ZERO)

    def _close(self) -> None:
        token = CompressedRun(self._first, tuple(self._words))
        self._words.clear()
        self.done.append(Segment(self._at, self._length, Kind.SPECIAL, "file", 0, token))

    def finish(self) -> list[Segment]:
        """All segments, in order, without gaps."""
        if self._words:
            self._close()
        return self.done


def _alike(bitmap: int) -> Iterator[tuple[int, int, Kind]]:
    """Runs of a cluster's subclusters that are of one kind: the first one, the one behind the last, and the kind."""
    stored, zeroed = bitmap & ALL_BITS, bitmap >> SUBCLUSTERS
    index = 0
    while index < SUBCLUSTERS:
        if stored >> index & 1:
            kind, others = Kind.DATA, ~stored >> index
        elif zeroed >> index & 1:
            kind, others = Kind.ZERO, ~zeroed >> index
        else:
            kind, others = Kind.BACKING, (stored | zeroed) >> index
        # The lowest bit of `others` is the first subcluster of another kind.
        stop = min(SUBCLUSTERS, index + (others & -others).bit_length() - 1) if others else SUBCLUSTERS
        yield index, stop, kind
        index = stop


class CompressedRun(NamedTuple):
    """The token of a SPECIAL segment: L2 entries of the clusters from guest offset `at` on."""

    at: int
    words: tuple[int, ...]
