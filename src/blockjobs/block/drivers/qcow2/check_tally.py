"""Counting references to clusters and comparing them with refcounts: no I/O, whole tables at a time (`check_counts`).

Import it only where a check truly begins: numpy comes with it.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

import numpy as np

from blockjobs.block.drivers.qcow2.check_counts import CHUNK_BITS, Counts
from blockjobs.wire.qcow2 import Header
from blockjobs.wire.qcow2_tables import COMPRESSED, COPIED, L2_RESERVED, OFFSET, ZERO

if TYPE_CHECKING:
    from array import array

    from numpy.typing import NDArray

    from blockjobs.block.drivers.qcow2.check_counts import Clusters, Numbers

    Words = NDArray[np.uint64]

STRAYS_MAX: Final = 1 << 16
"""References to places behind the end of the file that are kept one by one."""
PROBLEMS_MAX: Final = 200
"""Lines that are kept; all problems are counted."""


class Tally:
    """What a walk over an image's metadata has found.

    Attributes:
        references: how often each cluster is referred to.
        refcounts: what the image says about that.
        clusters: length of the file, rounded up.
        wrong_flags: how many of the corruptions are COPIED flags that refcounts contradict.
        unread: the last part of the metadata that could not be followed, so that references are missing; normally "".
    """

    def __init__(self, header: Header, file_bytes: int) -> None:
        self.header = header
        # Looked up once for each table otherwise, and flags are slow.
        self._size = header.cluster_size
        self._is_external = header.has_data_file
        self.clusters = -(-file_bytes // header.cluster_size)
        self.references = Counts(self.clusters)
        self.refcounts = Counts(self.clusters)
        self._counted_end = 0
        """End of the clusters that have refcounts, which may lie behind the end of the file."""
        self.problems: list[str] = []
        self.unread = ""
        self.wrong_flags = 0
        self._strays: list[tuple[int, int]] = []
        self.corruptions = self.leaks = self.check_errors = 0
        self.allocated = self.compressed = self.fragmented = 0

    def corrupt(self, text: str) -> None:
        """Count a corruption; the first ones are kept as lines in QEMU's words."""
        self.corruptions += 1
        self._note(f"ERROR {text}")

    def _corrupt_each(self, count: int, texts: Iterable[str]) -> None:
        """Count `count` corruptions, of which only the first texts are looked at."""
        self.corruptions += count
        room = PROBLEMS_MAX - len(self.problems)
        self.problems += [f"ERROR {text}" for text, _ in zip(texts, range(room), strict=False)]

    def _note(self, text: str) -> None:
        if len(self.problems) < PROBLEMS_MAX:
            self.problems.append(text)

    def set_refcounts(self, index: int, counts: "array[int]") -> None:
        """Enter the content of refcount block number `index`."""
        first = index * self.header.refcounts_per_block
        numbers = np.frombuffer(counts, f"u{counts.itemsize}")[: max(0, self.clusters - first)]
        self._counted_end = max(self._counted_end, first + len(counts))
        if len(numbers):
            self.refcounts.put(first, numbers)

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
        if len(self._strays) == STRAYS_MAX:
            other, other_end = self._strays.pop()
            first, end = min(first, other), max(end, other_end)
        self._strays.append((first, end))

    def _add_strays(self, firsts: "Clusters", ends: "Clusters") -> None:
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
            self._check_bitmaps(words[::2], words[1::2])
            words = words[::2]
        if self._add_sound_run(words, is_active=is_active):
            return
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
        self._corrupt_each(len(odd), (f"found l2 entry with reserved bits set: {word:x}" for word in odd.tolist()))
        has_place = self._has_place(words)
        if not has_place.all():
            words, places = words[has_place], places[has_place]
        if len(words):
            self._add_standard(words, places // (self._size // self.header.l2_entry_bytes), is_active=is_active)

    def _check_bitmaps(self, words: "Words", bitmaps: "Words") -> None:
        """Look at the bitmaps of subclusters of extended entries."""
        allocated = bitmaps & np.uint64(0xFFFF_FFFF)
        is_wrong = np.where(self._has_place(words), allocated & bitmaps >> np.uint64(32), allocated) != 0
        is_wrong = np.where((words & np.uint64(COMPRESSED)) != 0, bitmaps != 0, is_wrong)
        if is_wrong.any():
            self._corrupt_each(int(is_wrong.sum()), map(self._wrong_bitmap, words[is_wrong].tolist()))

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
            self.allocated += count
        self.references.add_run(cluster, count)
        return True

    def _add_standard(self, words: "Words", tables: "NDArray[np.intp]", *, is_active: bool) -> None:
        """Count entries that have clusters, each in the table of that number."""
        size = self._size
        offsets = (words & np.uint64(OFFSET)).astype(np.int64)
        if is_active:
            self.allocated += len(words)
            self.fragmented += int(((np.diff(offsets) != size) & (np.diff(tables) == 0)).sum())
        is_aligned = (offsets & (size - 1)) == 0
        if not is_aligned.all():
            self._add_unaligned(words[~is_aligned])
            words, offsets = words[is_aligned], offsets[is_aligned]
        if self._is_external or not len(words):
            return
        clusters = offsets // size
        is_inside = clusters < self.clusters
        if not is_inside.all():
            beyond = words[~is_inside]
            self._corrupt_each(len(beyond), (_outside(word & OFFSET, size) for word in beyond.tolist()))
            self._add_strays(clusters[~is_inside], clusters[~is_inside] + 1)
            if is_active:
                is_uncounted = (beyond & np.uint64(OFFSET)) >= self._counted_end * size
                flagged = beyond[is_uncounted & ((beyond & np.uint64(COPIED)) != 0)]
                self._note_flags(flagged, np.zeros(len(flagged), np.uint8))
            words, clusters = words[is_inside], clusters[is_inside]
        if not len(words):
            return
        self.references.add(clusters)
        if is_active:
            self._check_copied(words, clusters)

    def _add_unaligned(self, words: "Words") -> None:
        for word in words.tolist():
            kind = "Preallocated zero" if word & ZERO else "Data"
            self.corrupt(f"offset={word & OFFSET:x}: {kind} cluster is not properly aligned; L2 entry corrupted.")
            if not self._is_external:
                self.add_region(word & OFFSET, self._size)

    def _check_copied(self, words: "Words", clusters: "Clusters") -> None:
        refcounts = self.refcounts.of(clusters)
        wrong = np.flatnonzero((refcounts == 1) != (words >> np.uint64(63)).astype(bool))
        if len(wrong):
            self._note_flags(words[wrong], refcounts[wrong])

    def _note_flags(self, words: "Words", refcounts: "Numbers") -> None:
        self.wrong_flags += len(words)
        pairs = zip(words.tolist(), refcounts.tolist(), strict=True)
        self._corrupt_each(
            len(words),
            (f"OFLAG_COPIED data cluster: l2_entry={word:x} refcount={refcount}" for word, refcount in pairs),
        )

    def _add_compressed(self, words: "Words", *, is_active: bool) -> None:
        bits = self.header.cluster_bits
        shift = np.uint64(62 - (bits - 8))  # as in `unpack_compressed`
        at = (words & ((np.uint64(1) << shift) - np.uint64(1))).astype(np.int64)
        sectors = (words >> shift & np.uint64((1 << bits - 8) - 1)).astype(np.int64) + 1
        copied = at[(words & np.uint64(COPIED)) != 0]
        text = "coffset={:#x}: copied flag must never be set for compressed clusters"
        self._corrupt_each(len(copied), (text.format(each) for each in copied.tolist()))
        if self._is_external:
            text = "compressed cluster at {:#x} in an image with external data file"
            self._corrupt_each(len(at), (text.format(each) for each in at.tolist()))
            return
        if is_active:
            self.allocated += len(words)
            self.compressed += len(words)
            self.fragmented += len(words)
        lengths = sectors * 512 - at % 512
        first, last = at >> bits, (at + lengths - 1) >> bits
        beyond = last >= self.clusters
        pairs = zip(at[beyond].tolist(), lengths[beyond].tolist(), strict=True)
        self._corrupt_each(int(beyond.sum()), (_outside(*pair) for pair in pairs))
        self._add_strays(np.maximum(first[beyond], self.clusters), last[beyond] + 1)
        last = np.minimum(last, self.clusters - 1)
        for further in range(3):  # a stream may be two clusters long by what the entry says, and so touch three
            self.references.add((first + further)[first + further <= last])

    def check_l2_flag(self, l1_index: int, entry: int) -> None:
        """Look at the COPIED flag of an entry of the active L1 table."""
        refcount = self.refcounts[(entry & OFFSET) // self._size]
        if (refcount == 1) != bool(entry & COPIED):
            self.wrong_flags += 1
            self.corrupt(f"OFLAG_COPIED L2 cluster: l1_index={l1_index} l1_entry={entry:x} refcount={refcount}")

    def compare(self) -> int:
        """Count leaks and missing references; returns the end of the last cluster in use, in bytes."""
        last = -1
        for index in sorted({*self.references.chunks(), *self.refcounts.chunks()}):
            references, refcounts = (each.chunk(index, self.clusters) for each in (self.references, self.refcounts))
            start = index << CHUNK_BITS
            differing = np.flatnonzero(references != refcounts)
            if len(differing):
                self._compare_some(differing + start, references[differing], refcounts[differing])
            used = max(_last_used(references), _last_used(refcounts))
            last = max(last, start + used if used >= 0 else -1)
        return (last + 1) * self._size

    def leaky_blocks(self) -> set[int]:
        """Numbers of the refcount blocks in which some refcount is higher than it should be."""
        leaky: set[int] = set()
        for index in self.refcounts.chunks():
            references, refcounts = (each.chunk(index, self.clusters) for each in (self.references, self.refcounts))
            clusters = np.flatnonzero(refcounts > references) + (index << CHUNK_BITS)
            leaky.update(np.unique(clusters // self.header.refcounts_per_block).tolist())
        return leaky

    def lower(self, index: int, counts: "array[int]") -> None:
        """Lower what is too high in `counts`, the content of refcount block number `index`."""
        first = index * self.header.refcounts_per_block
        references = self.references.numbers(first, min(len(counts), self.clusters - first))
        numbers = np.frombuffer(counts, f"u{counts.itemsize}")[: len(references)]
        numbers[:] = np.minimum(numbers, references)

    def _compare_some(self, clusters: "Clusters", references: "Numbers", refcounts: "Numbers") -> None:
        leaks = int((refcounts > references).sum())
        self.leaks += leaks
        self.corruptions += len(clusters) - leaks
        shown = slice(PROBLEMS_MAX - len(self.problems))
        numbers = (each[shown].tolist() for each in (clusters, references, refcounts))
        for cluster, reference, refcount in zip(*numbers, strict=True):
            kind = "ERROR" if refcount < reference else "Leaked"
            self._note(f"{kind} cluster {cluster} refcount={refcount} reference={reference}")


def _outside(at: int, length: int) -> str:
    return (
        "counting reference for region exceeding the end of the file by one cluster or more: "
        f"offset {at:#x} size {length:#x}"
    )


def _last_used(numbers: "Numbers") -> int:
    """Index of the last number that is not zero, or -1."""
    return (len(numbers.tobytes().rstrip(b"\0")) - 1) // numbers.itemsize
