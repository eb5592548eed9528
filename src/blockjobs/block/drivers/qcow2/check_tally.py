"""Counting references to clusters and comparing them with refcounts: no I/O, whole tables at a time (`check_counts`).

Import it only where a check truly begins: numpy comes with it.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from blockjobs.block.drivers.qcow2.check_counts import PAGE_BITS, Counts
from blockjobs.wire.qcow2 import Header
from blockjobs.wire.qcow2_tables import COMPRESSED, COPIED, L1_RESERVED, L2_RESERVED, OFFSET, ZERO

if TYPE_CHECKING:
    from array import array

    from numpy.typing import NDArray

    from blockjobs.block.drivers.qcow2.check_counts import Clusters, Numbers
    from blockjobs.block.drivers.qcow2.check_outline import Outline

    Words = NDArray[np.uint64]

STRAYS_MAX: Final = 1 << 16
"""References to places behind the end of the file that are kept one by one."""
PROBLEMS_MAX: Final = 200
"""Lines that are kept; all problems are counted."""
_COMPARED_PAGES: Final = 16


class Tally:
    """What a walk over an image's metadata has found, all of it or in one window of the file's clusters after another.

    Attributes:
        clusters: length of the file, rounded up.
        references: how often each cluster of the window is referred to.
        refcounts: what the image says about that.
        looks: whether this walk counts what is no matter of single clusters: one walk of several does.
        wrong_flags: how many of the corruptions are COPIED flags that refcounts contradict.
        unread: the last part of the metadata that could not be followed, so that references are missing; normally "".
    """

    references: "Counts | Outline"

    def __init__(self, header: Header, file_bytes: int) -> None:
        self.header = header
        # Looked up once for each table otherwise, and flags are slow.
        self._size = header.cluster_size
        self._is_external = header.has_data_file
        self.clusters = -(-file_bytes // header.cluster_size)
        self.counted_end = 0
        """End of the clusters that have refcounts, which may lie behind the end of the file."""
        self.problems: list[str] = []
        self.unread = ""
        self.wrong_flags = 0
        self._strays: list[tuple[int, int]] = []
        self.corruptions = self.leaks = self.check_errors = 0
        self.allocated = self.compressed = self.fragmented = 0
        self._used_end = 0
        self.begin(0, self.clusters, looks=True)

    def begin(self, first: int, end: int, *, looks: bool, bytes_max: int | None = None) -> None:
        """A walk begins that counts in the window [first, end), in clusters; see `Counts`."""
        self.looks = looks
        self.references = Counts(end, first=first, bytes_max=bytes_max)
        self.refcounts = Counts(end, first=first, bytes_max=bytes_max)
        self._before = self.corruptions, self.leaks, self.wrong_flags, self._used_end, len(self.problems)

    def begin_outline(self, outline: "Outline") -> None:
        """A walk begins that counts what is no matter of single clusters only, and makes an outline of the rest."""
        self.begin(0, 0, looks=True)
        self.references = outline

    def undo(self) -> None:
        """Take back what the walk has found since a `begin` with `looks` false."""
        self.corruptions, self.leaks, self.wrong_flags, self._used_end, lines = self._before
        del self.problems[lines:]

    @property
    def counts(self) -> "Counts":
        """The references, once they are counted."""
        assert isinstance(self.references, Counts)
        return self.references

    def corrupt(self, text: str) -> None:
        """Count a corruption that is no matter of single clusters; the first ones are kept as lines in QEMU's words."""
        self.corrupt_each(1, (text,))

    def corrupt_each(self, count: int, texts: Iterable[str]) -> None:
        """Count `count` corruptions that are no matter of single clusters; only the first texts are looked at."""
        if self.looks:
            self._damage(count, texts)

    def _damage(self, count: int, texts: Iterable[str]) -> None:
        self.corruptions += count
        room = PROBLEMS_MAX - len(self.problems)
        self.problems += [f"ERROR {text}" for text, _ in zip(texts, range(room), strict=False)]

    def set_refcounts(self, index: int, counts: "array[int]") -> None:
        """Enter the content of refcount block number `index`."""
        self.refcounts.put(index * self.header.refcounts_per_block, np.frombuffer(counts, f"u{counts.itemsize}"))

    def add_region(self, at: int, length: int) -> None:
        """Count a reference to every cluster that `length` bytes from `at` on touch."""
        if length <= 0:
            return
        size = self._size
        first, last = at // size, (at + length - 1) // size
        if last >= self.clusters:
            self.corrupt(_outside(at, length))
            self._add_stray(max(first, self.clusters), last + 1)
            last = self.clusters - 1
        if first <= last:
            self.references.add_run(first, last - first + 1)

    def is_used(self, at: int, length: int) -> bool:
        """Whether something that was counted before lies in these bytes of the file."""
        first, end = at // self._size, min(-(-(at + length) // self._size), self.clusters)
        return first < end and bool(self.references.numbers(first, end - first).any())

    def _add_stray(self, first: int, end: int) -> None:
        if not self.looks:
            return
        if len(self._strays) == STRAYS_MAX:
            other, other_end = self._strays.pop()
            first, end = min(first, other), max(end, other_end)
        self._strays.append((first, end))

    def _add_strays(self, firsts: "Clusters", ends: "Clusters") -> None:
        room = max(0, STRAYS_MAX - len(self._strays)) if self.looks else 0
        if len(firsts) > room:  # all that finds no room becomes one long run
            self._add_stray(int(firsts[room:].min()), int(ends[room:].max()))
        firsts, ends = firsts[:room], ends[:room]
        for first, end in zip(firsts.tolist(), ends.tolist(), strict=True):
            self._add_stray(first, end)

    def behind_strays(self, start: int, count: int) -> int:
        """The first cluster from `start` on from which `count` have no reference, though the file ends before them."""
        for first, end in sorted(self._strays):
            if first < start + count and end > start:
                start = end
        return start

    def add_l2_tables(self, raw: bytes, *, is_active: bool) -> None:
        """Count what L2 tables refer to; in the active tree also look at COPIED flags, and at fragmentation.

        Args:
            raw: one or several whole tables.
        """
        words: Words = np.frombuffer(raw, ">u8").astype(np.uint64)
        if self.header.has_extended_l2:
            if self.looks:
                self._check_bitmaps(words[::2], words[1::2])
            words = words[::2]
        if not len(words) or self._add_sound_run(words, is_active=is_active):
            return
        if not self.looks:
            words = self._of_window(words)
        if words.all():
            places = np.arange(len(words))
        else:
            places = np.flatnonzero(words)
            words = words[places]
        if not len(words):
            return
        is_compressed = (words & np.uint64(COMPRESSED)) != 0
        if is_compressed.any():
            self._add_compressed(words[is_compressed], is_active=is_active)
            words, places = words[~is_compressed], places[~is_compressed]
        odd = words[(words & np.uint64(L2_RESERVED)) != 0]
        self.corrupt_each(len(odd), (f"found l2 entry with reserved bits set: {word:x}" for word in _shown(odd)))
        has_place = self._has_place(words)
        if not has_place.all():
            words, places = words[has_place], places[has_place]
        if len(words):
            self._add_standard(words, places // (self._size // self.header.l2_entry_bytes), is_active=is_active)

    def _of_window(self, words: "Words") -> "Words":
        """Of L2 entries those that can matter for the clusters of the window."""
        offsets = words & np.uint64(OFFSET)
        low, high = (max(0, each) * self._size for each in (self.counts.first - 1, self.counts.end))
        chosen: Words = words[(words & np.uint64(COMPRESSED) != 0) | ((offsets >= low) & (offsets < high))]
        return chosen

    def _check_bitmaps(self, words: "Words", bitmaps: "Words") -> None:
        """Look at the bitmaps of subclusters of extended entries."""
        allocated = bitmaps & np.uint64(0xFFFF_FFFF)
        is_wrong = np.where(self._has_place(words), allocated & bitmaps >> np.uint64(32), allocated) != 0
        is_wrong = np.where((words & np.uint64(COMPRESSED)) != 0, bitmaps != 0, is_wrong)
        if is_wrong.any():
            self.corrupt_each(int(is_wrong.sum()), map(self._wrong_bitmap, _shown(words[is_wrong])))

    def _has_place(self, words: "Words") -> "NDArray[np.bool_]":
        has_place: NDArray[np.bool_] = (words & np.uint64(OFFSET | COPIED if self._is_external else OFFSET)) != 0
        return has_place

    def _wrong_bitmap(self, word: int) -> str:
        if word & COMPRESSED:
            return f"compressed cluster with non-zero subcluster allocation bitmap, entry=0x{word:x}"
        if word & (OFFSET | COPIED if self._is_external else OFFSET):
            return f"offset={word & OFFSET:x}: Allocated cluster has corrupted subcluster allocation bitmap"
        return "Unallocated cluster has non-zero subcluster allocation map"

    def _add_sound_run(self, words: "Words", *, is_active: bool) -> bool:
        """Count entries that are one run with nothing wrong, as those of preallocated images; else False."""
        first, count = int(words[0]), len(words)
        cluster, rest = divmod(first & ~COPIED, self._size)
        if self._is_external or not cluster or rest & ~ZERO or cluster + count > self.clusters:
            return False
        if int(words[-1]) - first != (count - 1) * self._size or not (np.diff(words) == self._size).all():
            return False
        if is_active:
            is_once = self.refcounts.numbers(cluster, count) == 1
            if not (is_once.all() if first & COPIED else not is_once.any()):
                return False
            self.allocated += count if self.looks else 0
        self.references.add_run(cluster, count)
        return True

    def _add_standard(self, words: "Words", tables: "NDArray[np.intp]", *, is_active: bool) -> None:
        """Count entries that have clusters, each in the table of that number."""
        size = self._size
        offsets = (words & np.uint64(OFFSET)).astype(np.int64)
        if is_active and self.looks:
            self.allocated += len(words)
            self.fragmented += int(((np.diff(offsets) != size) & (np.diff(tables) == 0)).sum())
        is_aligned = (offsets & (size - 1)) == 0
        if not is_aligned.all():
            self._add_unaligned(words[~is_aligned], offsets[~is_aligned])
            words, offsets = words[is_aligned], offsets[is_aligned]
        if self._is_external or not len(words):
            return
        self._add_clusters(offsets)
        if is_active:
            clusters = offsets // size
            is_inside = clusters < self.clusters
            if not is_inside.all():
                is_uncounted = ~is_inside & (clusters >= self.counted_end)
                self._note_flags_beyond(words[is_uncounted & ((words & np.uint64(COPIED)) != 0)])
            self._check_copied(words, clusters)

    def _add_clusters(self, offsets: "Clusters") -> None:
        """Count a reference to what a cluster's length from each of these bytes on touches."""
        size = self._size
        firsts, lasts = offsets // size, (offsets + (size - 1)) // size
        is_beyond = lasts >= self.clusters
        if is_beyond.any():
            beyond = offsets[is_beyond]
            self.corrupt_each(len(beyond), (_outside(at, size) for at in _shown(beyond)))
            self._add_strays(np.maximum(firsts[is_beyond], self.clusters), lasts[is_beyond] + 1)
            self.references.add(firsts[firsts < self.clusters])
        else:
            self.references.add(firsts)
        is_two = (lasts > firsts) & ~is_beyond
        if is_two.any():
            self.references.add(lasts[is_two])

    def _add_unaligned(self, words: "Words", offsets: "Clusters") -> None:
        texts = (
            f"offset={word & OFFSET:x}: {'Preallocated zero' if word & ZERO else 'Data'} cluster is not properly "
            "aligned; L2 entry corrupted."
            for word in _shown(words)
        )
        self.corrupt_each(len(words), texts)
        if not self._is_external:
            self._add_clusters(offsets)

    def _check_copied(self, words: "Words", clusters: "Clusters") -> None:
        """Compare the flags of entries with the refcounts of their clusters, of those in the window."""
        is_held = self.refcounts.holds(clusters)
        if not is_held.all():
            words, clusters = words[is_held], clusters[is_held]
        refcounts = self.refcounts.of(clusters)
        wrong = np.flatnonzero((refcounts == 1) != (words >> np.uint64(63)).astype(bool))
        if len(wrong):
            self.wrong_flags += len(wrong)
            pairs = zip(_shown(words[wrong]), _shown(refcounts[wrong]), strict=True)
            texts = (f"OFLAG_COPIED data cluster: l2_entry={word:x} refcount={refcount}" for word, refcount in pairs)
            self._damage(len(wrong), texts)

    def _note_flags_beyond(self, words: "Words") -> None:
        if self.looks:
            self.wrong_flags += len(words)
        texts = (f"OFLAG_COPIED data cluster: l2_entry={word:x} refcount=0" for word in _shown(words))
        self.corrupt_each(len(words), texts)

    def _add_compressed(self, words: "Words", *, is_active: bool) -> None:
        bits = self.header.cluster_bits
        shift = np.uint64(62 - (bits - 8))  # as in `unpack_compressed`
        at = (words & ((np.uint64(1) << shift) - np.uint64(1))).astype(np.int64)
        sectors = (words >> shift & np.uint64((1 << bits - 8) - 1)).astype(np.int64) + 1
        copied = at[(words & np.uint64(COPIED)) != 0]
        text = "coffset={:#x}: copied flag must never be set for compressed clusters"
        self.corrupt_each(len(copied), (text.format(each) for each in _shown(copied)))
        if self._is_external:
            text = "compressed cluster at {:#x} in an image with external data file"
            self.corrupt_each(len(at), (text.format(each) for each in _shown(at)))
            return
        if is_active and self.looks:
            self.allocated += len(words)
            self.compressed += len(words)
            self.fragmented += len(words)
        lengths = sectors * 512 - at % 512
        first, last = at >> bits, (at + lengths - 1) >> bits
        beyond = last >= self.clusters
        pairs = zip(_shown(at[beyond]), _shown(lengths[beyond]), strict=True)
        self.corrupt_each(int(beyond.sum()), (_outside(*pair) for pair in pairs))
        self._add_strays(np.maximum(first[beyond], self.clusters), last[beyond] + 1)
        last = np.minimum(last, self.clusters - 1)
        for further in range(3):  # a stream may be two clusters long by what the entry says, and so touch three
            self.references.add((first + further)[first + further <= last])

    def add_l1_entries(self, indexes: "Clusters", words: "Words", *, is_active: bool) -> None:
        """Count the L2 tables that entries of an L1 table name; in the active one also look at COPIED flags.

        Args:
            indexes: where in the table the entries are.
        """
        odd = words[(words & np.uint64(L1_RESERVED)) != 0]
        self.corrupt_each(len(odd), (f"found L1 entry with reserved bits set: {word:x}" for word in _shown(odd)))
        offsets = (words & np.uint64(OFFSET)).astype(np.int64)
        self._add_clusters(offsets)
        unaligned = offsets[(offsets & (self._size - 1)) != 0]
        text = "l2_offset={:x}: Table is not cluster aligned; L1 entry corrupted"
        self.corrupt_each(len(unaligned), (text.format(at) for at in _shown(unaligned)))
        if is_active:
            self._check_l1_flags(indexes, words, offsets // self._size)

    def _check_l1_flags(self, indexes: "Clusters", words: "Words", clusters: "Clusters") -> None:
        """Look at the COPIED flags of entries of the active L1 table."""
        is_held = self.refcounts.holds(clusters)
        refcounts = self.refcounts.of(clusters)
        is_wrong = (refcounts == 1) != (words >> np.uint64(63)).astype(bool)
        is_wrong &= is_held | (clusters >= self.clusters if self.looks else False)
        wrong = np.flatnonzero(is_wrong)
        self.wrong_flags += len(wrong)
        each = zip(*(_shown(numbers[wrong]) for numbers in (indexes, words, refcounts)), strict=True)
        text = "OFLAG_COPIED L2 cluster: l1_index={} l1_entry={:x} refcount={}"
        self._damage(len(wrong), (text.format(*values) for values in each))

    def add_blocks(self, indexes: "Clusters", clusters: "Clusters") -> None:
        """Count refcount blocks, of which each must be the first to be where it is.

        Args:
            indexes: their numbers.
            clusters: where they are, inside the file.
        """
        is_held = self.refcounts.holds(clusters)
        held = clusters[is_held]
        before = self.counts.of(held) if len(held) else np.zeros(0, np.uint8)
        self.references.add(clusters)
        if not len(held):
            return
        references = before + np.uint64(1) + _times_before(held)
        wrong = np.flatnonzero(references != 1)
        pairs = zip(_shown(indexes[is_held][wrong]), _shown(references[wrong]), strict=True)
        self._damage(len(wrong), (f"refcount block {index} refcount={number}" for index, number in pairs))

    def add_bitmap_table(self, words: "Words", name: str) -> None:
        """Count the clusters that a part of the table of a persistent bitmap refers to."""
        places = words & np.uint64(OFFSET)
        is_odd = (words & np.uint64(~(OFFSET | 1) & (1 << 64) - 1)) != 0
        is_odd |= (places != 0) & (words & np.uint64(1) != 0)
        odd = words[is_odd]
        self.corrupt_each(
            len(odd), (f"bitmap '{name}': table entry {word:x} has reserved bits set" for word in _shown(odd))
        )
        self._add_clusters(places[(places != 0) & ~is_odd].astype(np.int64))

    def compare(self) -> int:
        """Count leaks and missing references; returns the end of the last cluster in use up to here, in bytes."""
        pages = np.union1d(self.counts.pages(), self.refcounts.pages())
        for start in range(0, len(pages), _COMPARED_PAGES):
            some = pages[start : start + _COMPARED_PAGES]
            references, refcounts = (each.of_pages(some) for each in (self.counts, self.refcounts))
            differing = np.flatnonzero(references != refcounts)
            if len(differing):
                self._compare_some(_clusters_of(some, differing), references[differing], refcounts[differing])
            used = max(_last_used(references), _last_used(refcounts))
            if used >= 0:
                self._used_end = max(self._used_end, int(_clusters_of(some, np.array([used]))[0]) + 1)
        return self._used_end * self._size

    def leaky_blocks(self) -> set[int]:
        """Numbers of the refcount blocks in which some refcount is higher than it should be."""
        leaky: set[int] = set()
        pages = self.refcounts.pages()
        for start in range(0, len(pages), _COMPARED_PAGES):
            some = pages[start : start + _COMPARED_PAGES]
            is_leaky = self.refcounts.of_pages(some) > self.counts.of_pages(some)
            clusters = _clusters_of(some, np.flatnonzero(is_leaky))
            leaky.update(np.unique(clusters // self.header.refcounts_per_block).tolist())
        return leaky

    def lower(self, index: int, counts: "array[int]") -> None:
        """Lower what is too high in `counts`, the content of refcount block number `index`."""
        first = index * self.header.refcounts_per_block
        references = self.counts.numbers(first, min(len(counts), self.clusters - first))
        numbers = np.frombuffer(counts, f"u{counts.itemsize}")[: len(references)]
        numbers[:] = np.minimum(numbers, references)

    def _compare_some(self, clusters: "Clusters", references: "Numbers", refcounts: "Numbers") -> None:
        leaks = int((refcounts > references).sum())
        self.leaks += leaks
        self.corruptions += len(clusters) - leaks
        shown = slice(max(0, PROBLEMS_MAX - len(self.problems)))
        numbers = (each[shown].tolist() for each in (clusters, references, refcounts))
        for cluster, reference, refcount in zip(*numbers, strict=True):
            kind = "ERROR" if refcount < reference else "Leaked"
            self.problems.append(f"{kind} cluster {cluster} refcount={refcount} reference={reference}")


def _shown(numbers: "NDArray[Any]") -> list[int]:
    """Those of which lines may be kept."""
    shown: list[int] = numbers[:PROBLEMS_MAX].tolist()
    return shown


def _outside(at: int, length: int) -> str:
    return (
        "counting reference for region exceeding the end of the file by one cluster or more: "
        f"offset {at:#x} size {length:#x}"
    )


def _last_used(numbers: "Numbers") -> int:
    """Index of the last number that is not zero, or -1."""
    return (len(numbers.tobytes().rstrip(b"\0")) - 1) // numbers.itemsize


def _clusters_of(pages: "Clusters", places: "NDArray[np.intp]") -> "Clusters":
    """The clusters at these places among those of the pages, one page's after the other's."""
    clusters: Clusters = (pages[places >> PAGE_BITS] << PAGE_BITS) + (places & ((1 << PAGE_BITS) - 1))
    return clusters


def _times_before(clusters: "Clusters") -> "Words":
    """How often each of these was there before, further to the left."""
    order = np.argsort(clusters, kind="stable")
    is_first = np.diff(clusters[order], prepend=-1) != 0
    places = np.arange(len(clusters))
    times = np.empty(len(clusters), np.uint64)
    times[order] = places - np.maximum.accumulate(np.where(is_first, places, 0))
    return times
