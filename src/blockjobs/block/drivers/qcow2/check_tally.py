"""Counting references to clusters and comparing them with refcounts: no I/O, arrays instead of dictionaries.

A cluster's references and its refcount are kept in arrays of one refcount block's length each, made when first needed;
so a sparse file costs nothing, and 1 TiB of 64 KiB clusters costs 64 MiB. Runs of neighbouring clusters are counted by
slices: an L2 table of 8192 entries in order takes a fraction of a millisecond.
"""

from array import array
from collections.abc import Iterator
from typing import Final

from blockjobs.base.buffers import is_zero
from blockjobs.base.errors import UsageError
from blockjobs.wire.qcow2 import Header
from blockjobs.wire.qcow2_tables import (
    COMPRESSED,
    COPIED,
    L2_RESERVED,
    OFFSET,
    ZERO,
    decode_table,
    refcount_array,
    unpack_compressed,
)

PROBLEMS_MAX: Final = 200
"""Lines that are kept; all problems are counted."""
TALLY_BYTES_MAX: Final = 1 << 30
"""Enough for 16 TiB of 64 KiB clusters; a hostile sparse file gets an error instead of all memory."""
_COMPARED_AT_ONCE: Final = 512
_EMPTY: Final = frozenset((0, ZERO, COPIED, COPIED | ZERO))
"""Entries without a cluster, in images without external data file."""


class Counts:
    """A number for each cluster of the file, zero unless said otherwise."""

    def __init__(self, width: int, per_block: int) -> None:
        self._zeroes = refcount_array(max(width, 16), per_block)
        self.kind = self._zeroes.typecode
        self.limit = (1 << 8 * self._zeroes.itemsize) - 1
        self.per_block = per_block
        self.blocks: dict[int, array[int]] = {}

    @property
    def bytes(self) -> int:
        """Memory in use."""
        return len(self.blocks) * self.per_block * self._zeroes.itemsize

    def block(self, index: int) -> "array[int]":
        """The numbers of a block's clusters, to be read only."""
        return self.blocks.get(index, self._zeroes)

    def writable(self, index: int) -> "array[int]":
        """The numbers of a block's clusters, to be changed."""
        if index not in self.blocks:
            self.blocks[index] = self._zeroes[:]
        return self.blocks[index]

    def __getitem__(self, cluster: int) -> int:
        return self.block(cluster // self.per_block)[cluster % self.per_block]

    def pieces(self, first: int, count: int) -> Iterator[tuple[int, int, int]]:
        """Cut a run of clusters at block ends: (block, first in the block, end in the block)."""
        end = first + count
        while first < end:
            index, start = divmod(first, self.per_block)
            stop = min(self.per_block, start + end - first)
            yield index, start, stop
            first += stop - start


class Tally:
    """What a walk over an image's metadata has found.

    Attributes:
        references: how often each cluster is referred to.
        refcounts: what the image says about that.
        clusters: length of the file, rounded up.
        unread: the last part of the metadata that could not be followed, so that references are missing; normally "".
    """

    def __init__(self, header: Header, file_bytes: int) -> None:
        self.header = header
        # Looked up once for each entry otherwise, and flags are slow.
        self._size = header.cluster_size
        self._is_external = header.has_data_file
        self.clusters = -(-file_bytes // header.cluster_size)
        # One refcount block may count far more clusters than a small file has.
        per_block = max(1, min(header.refcounts_per_block, self.clusters))
        self.references = Counts(header.refcount_bits, per_block)
        self.refcounts = Counts(header.refcount_bits, per_block)
        self.problems: list[str] = []
        self.unread = ""
        self.corruptions = self.leaks = self.check_errors = 0
        self.allocated = self.compressed = self.fragmented = 0

    def corrupt(self, text: str) -> None:
        """Count a corruption; the first ones are kept as lines in QEMU's words."""
        self.corruptions += 1
        self._note(f"ERROR {text}")

    def _note(self, text: str) -> None:
        if len(self.problems) < PROBLEMS_MAX:
            self.problems.append(text)

    def set_refcounts(self, index: int, counts: "array[int]") -> None:
        """Enter the content of refcount block number `index`."""
        self.refcounts.blocks[index] = array(self.refcounts.kind, counts[: self.refcounts.per_block])
        self._check_memory()

    def add_region(self, at: int, length: int) -> None:
        """Count a reference to every cluster that `length` bytes from `at` on touch."""
        if length <= 0:
            return
        size = self._size
        first, last = at // size, (at + length - 1) // size
        if last >= self.clusters:
            self.corrupt(
                "counting reference for region exceeding the end of the file by one cluster or more: "
                f"offset {at:#x} size {length:#x}"
            )
            last = self.clusters - 1
        if first <= last:
            self._add_run(first, last - first + 1)

    def _add_run(self, first: int, count: int) -> None:
        references = self.references
        if count == 1:  # not by slices: images written at random consist of such runs
            index, place = divmod(first, references.per_block)
            if index in references.blocks:
                block = references.blocks[index]
                block[place] = min(block[place] + 1, references.limit)
                return
        for index, start, stop in references.pieces(first, count):
            if index not in references.blocks:
                references.writable(index)
                self._check_memory()
            block = references.blocks[index]
            part = block[start:stop]
            raw = part.tobytes()
            before = part[0]
            if before < references.limit and raw == raw[: part.itemsize] * len(part):
                block[start:stop] = array(references.kind, [before + 1]) * len(part)
            else:
                block[start:stop] = array(references.kind, [min(each + 1, references.limit) for each in part])

    def _check_memory(self) -> None:
        if self.references.bytes + self.refcounts.bytes > TALLY_BYTES_MAX:
            raise UsageError("The image refers to places too far apart to be checked")

    def add_l2_table(self, raw: bytes, *, is_active: bool) -> None:
        """Count what an L2 table refers to; in the active tree also look at COPIED flags, and at fragmentation."""
        if is_zero(raw):
            return
        table = decode_table(raw)
        size = self._size
        first = expected = -1  # the run of neighbours being collected, as entries; none at first
        for entry in table[::2] if self.header.has_extended_l2 else table:
            if entry == expected:
                expected += size
                continue
            if entry in _EMPTY and not (self._is_external and entry & COPIED):
                continue
            if entry & COMPRESSED:
                self._add_compressed(entry, is_active=is_active)
                continue
            if entry & L2_RESERVED:
                self.corrupt(f"found l2 entry with reserved bits set: {entry:x}")
            if expected >= 0:
                self._add_data(first, (expected - first) // size, is_active=is_active)
                if is_active and (entry ^ expected) & OFFSET:
                    self.fragmented += 1
            first, expected = entry, entry + size
        if expected >= 0:
            self._add_data(first, (expected - first) // size, is_active=is_active)

    def _add_compressed(self, entry: int, *, is_active: bool) -> None:
        stream = unpack_compressed(entry, self.header.cluster_bits)
        if entry & COPIED:
            self.corrupt(f"coffset={stream.at:#x}: copied flag must never be set for compressed clusters")
        if self._is_external:
            self.corrupt(f"compressed cluster at {stream.at:#x} in an image with external data file")
            return
        if is_active:
            self.allocated += 1
            self.compressed += 1
            self.fragmented += 1
        self.add_region(stream.at, stream.length)

    def _add_data(self, entry: int, count: int, *, is_active: bool) -> None:
        """Count `count` standard entries: the one given and its successors, with the same flags."""
        at = entry & OFFSET
        size = self._size
        if is_active:
            self.allocated += count
        if at % size:
            kind = "Preallocated zero" if entry & ZERO else "Data"
            for place in range(at, at + count * size, size):
                self.corrupt(f"offset={place:x}: {kind} cluster is not properly aligned; L2 entry corrupted.")
                if not self._is_external:
                    self.add_region(place, size)
            return
        if self._is_external:
            return
        first = at // size
        inside = max(0, min(count, self.clusters - first))
        for place in range(at + inside * size, at + count * size, size):
            self.add_region(place, size)
        if inside:
            self._add_run(first, inside)
            if is_active:
                self._check_copied(first, inside, entry)

    def _check_copied(self, first: int, count: int, entry: int) -> None:
        copied = bool(entry & COPIED)
        if count == 1 and (self.refcounts[first] == 1) == copied:
            return
        for index, start, stop in self.refcounts.pieces(first, count):
            part = self.refcounts.block(index)[start:stop]
            once = part.count(1)
            if once == (len(part) if copied else 0):
                continue
            for place, refcount in enumerate(part, index * self.refcounts.per_block + start):
                if (refcount == 1) != copied:
                    shown = entry + (place - first) * self._size
                    self.corrupt(f"OFLAG_COPIED data cluster: l2_entry={shown:x} refcount={refcount}")

    def check_l2_flag(self, l1_index: int, entry: int) -> None:
        """Look at the COPIED flag of an entry of the active L1 table."""
        refcount = self.refcounts[(entry & OFFSET) // self._size]
        if (refcount == 1) != bool(entry & COPIED):
            self.corrupt(f"OFLAG_COPIED L2 cluster: l1_index={l1_index} l1_entry={entry:x} refcount={refcount}")

    def compare(self) -> int:
        """Count leaks and missing references; returns the end of the last cluster in use, in bytes."""
        last = -1
        for index in sorted(self.references.blocks.keys() | self.refcounts.blocks.keys()):
            start = index * self.references.per_block
            inside = min(self.references.per_block, self.clusters - start)
            if inside <= 0:
                continue
            references, refcounts = self.references.block(index)[:inside], self.refcounts.block(index)[:inside]
            for at in range(0, inside, _COMPARED_AT_ONCE):
                end = at + _COMPARED_AT_ONCE
                if references[at:end] != refcounts[at:end]:
                    self._compare_piece(start + at, references[at:end], refcounts[at:end])
            used = max(_last_used(references), _last_used(refcounts))
            last = max(last, start + used if used >= 0 else -1)
        return (last + 1) * self._size

    def _compare_piece(self, start: int, references: "array[int]", refcounts: "array[int]") -> None:
        for cluster, (reference, refcount) in enumerate(zip(references, refcounts, strict=True), start):
            if refcount < reference:
                self.corrupt(f"cluster {cluster} refcount={refcount} reference={reference}")
            elif refcount > reference:
                self.leaks += 1
                self._note(f"Leaked cluster {cluster} refcount={refcount} reference={reference}")


def _last_used(counts: "array[int]") -> int:
    """Index of the last number that is not zero, or -1."""
    return (len(counts.tobytes().rstrip(b"\0")) - 1) // counts.itemsize
