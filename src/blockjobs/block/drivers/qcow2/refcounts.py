"""Refcounts: how often each cluster of the image file is referred to, in two levels: table and blocks.

All changes are made in memory, at once; a commit writes them (`transaction.py`). Counts go up when space is taken and
go down only after the reference is durably gone, so what the file says is never too low (spec/durability.md §1, I1).
"""

import errno
import sys
from array import array
from collections.abc import Awaitable, Callable

from blockjobs.base.errors import ImageCorrupt, IoFailure
from blockjobs.block.drivers.qcow2.geometry import Geometry
from blockjobs.block.drivers.qcow2.roots import RootTable
from blockjobs.block.drivers.qcow2.tables import Table, TableCache
from blockjobs.wire.qcow2 import REFCOUNT_TABLE_BYTES_MAX
from blockjobs.wire.qcow2_tables import REFCOUNT_BLOCK_OFFSET, decode_refcounts, encode_refcounts, refcount_array


class Refcounts:
    """The refcount table and its blocks.

    Attributes:
        root: the refcount table: offsets of the blocks, 0 where there is none: none of its clusters is in use then.
        blocks: the blocks in memory.
    """

    def __init__(
        self,
        geometry: Geometry,
        root: RootTable,
        *,
        cache_bytes: int,
        read: Callable[[int, int], Awaitable[bytes]],
    ) -> None:
        width = geometry.refcount_bits
        self._geometry = geometry
        self.root = root
        self.blocks = TableCache(
            table_bytes=geometry.cluster_size,
            item_bits=width,
            budget_bytes=cache_bytes,
            decode=lambda raw: decode_refcounts(raw, width),
            encode=lambda items: encode_refcounts(items, width),
            read=read,
        )

    @property
    def per_block(self) -> int:
        """Clusters that one block counts."""
        return self._geometry.refcounts_per_block

    @property
    def table_clusters(self) -> int:
        """Length of the table in clusters."""
        return len(self.root.words) * 8 // self._geometry.cluster_size

    async def block(self, region: int) -> Table | None:
        """The block of the `region`-th run of `per_block` clusters; None if there is none.

        Raises:
            ImageCorrupt: the table points at nonsense.
            IoFailure: it could not be read.
        Waits: one read. Checkpoint: no.
        """
        if region >= len(self.root.words):
            return None
        while at := self.root.words[region] & REFCOUNT_BLOCK_OFFSET:
            if at % self._geometry.cluster_size:
                name = self._geometry.name
                raise ImageCorrupt(name, f"Refblock offset {at:#x} unaligned (reftable index: {region:#x})")
            block = await self.blocks.load(at)
            if self.root.words[region] & REFCOUNT_BLOCK_OFFSET == at:
                return block
        return None

    async def count(self, cluster: int) -> int:
        """References to one cluster. Raises and waits as `block`."""
        region, index = divmod(cluster, self.per_block)
        block = await self.block(region)
        return 0 if block is None else block.items[index]

    def set_run(self, block: Table, index: int, length: int, value: int) -> None:
        """Give `length` clusters of a block the same count."""
        items = block.items
        if length == 1:
            items[index] = value
        else:
            items[index : index + length] = array(items.typecode, (value,)) * length
        self.blocks.touch(block, index, index + length)

    async def add(self, cluster: int, references: int) -> None:
        """Count `references` more to a cluster in use.

        Raises:
            IoFailure: the count would not fit (ERANGE), or the block could not be read; nothing changed.
        Waits: one read. Checkpoint: no.
        """
        region, index = divmod(cluster, self.per_block)
        block = await self.block(region)
        assert block is not None, "only clusters that were taken get further references"
        if block.items[index] + references > self._geometry.refcount_max:
            raise IoFailure(errno.ERANGE, f"node '{self._geometry.name}' refcount of cluster {cluster}")
        self.set_run(block, index, 1, block.items[index] + references)

    async def add_run(self, cluster: int, length: int, *, least: int = 0) -> None:
        """Count one reference more to each of `length` clusters.

        Args:
            least: how many each must have already.

        Raises:
            IoFailure, ImageCorrupt: a count would not fit (ERANGE) or is less than that, or a block could not be read;
                nothing changed.
        Waits: reads. Checkpoint: no.
        """
        parts: list[tuple[Table, int, int]] = []
        end = cluster + length
        while cluster < end:
            region, index = divmod(cluster, self.per_block)
            here = min(end - cluster, self.per_block - index)
            block = await self.block(region)
            if block is None:
                text = f"references to cluster {cluster}, which no refcount block counts"
                raise ImageCorrupt(self._geometry.name, text)
            counts = block.items[index : index + here]
            if min(counts) < least:
                text = f"references to cluster {cluster + counts.index(min(counts))}, which counts as free"
                raise ImageCorrupt(self._geometry.name, text)
            if max(counts) >= self._geometry.refcount_max:
                raise IoFailure(errno.ERANGE, f"node '{self._geometry.name}' refcount of cluster {cluster}")
            block.pins += 1
            parts.append((block, index, here))
            cluster += here
        for block, index, here in parts:
            self._add_in(block, index, here)

    def _add_in(self, block: Table, index: int, length: int) -> None:
        """`add_run` inside one block, which was pinned until now."""
        block.pins -= 1
        counts = block.items[index : index + length]
        if counts == array(counts.typecode, counts[:1]) * length:
            self.set_run(block, index, length, counts[0] + 1)
            return
        block.items[index : index + length] = _each_plus(counts, 1)
        self.blocks.touch(block, index, index + length)

    async def drop(self, cluster: int, length: int) -> list[tuple[int, int]]:
        """Count one reference less to each of `length` clusters, whose references are durably gone.

        Counts that are 0 already stay 0: the image was wrong before, and a lower count cannot be said.

        Returns:
            Runs (cluster, length) that are not in use any more.

        Raises:
            IoFailure, ImageCorrupt: a block could not be read. Runs before it are done, the others leak.
        Waits: reads. Checkpoint: no.
        """
        unused: list[tuple[int, int]] = []
        end = cluster + length
        while cluster < end:
            region, index = divmod(cluster, self.per_block)
            here = min(end - cluster, self.per_block - index)
            block = await self.block(region)
            if block is not None:
                self._drop_in(block, index, here, cluster, unused)
            cluster += here
        return unused

    def _drop_in(self, block: Table, index: int, length: int, cluster: int, unused: list[tuple[int, int]]) -> None:
        """`drop` inside one block."""
        counts = block.items[index : index + length]
        if counts[0] and counts == array(counts.typecode, counts[:1]) * length:
            self.set_run(block, index, length, counts[0] - 1)
            if counts[0] == 1:
                unused.append((cluster, length))
            return
        if 0 in counts:
            lower = array(counts.typecode, [count - 1 if count else 0 for count in counts])
        else:
            lower = _each_plus(counts, -1)
        block.items[index : index + length] = lower
        self.blocks.touch(block, index, index + length)
        _append_ones(unused, cluster, counts)

    async def last_uses(self, cluster: int, length: int) -> list[tuple[int, int]]:
        """The runs (cluster, length) of those clusters that have exactly one reference. Raises and waits as `block`."""
        runs: list[tuple[int, int]] = []
        end = cluster + length
        while cluster < end:
            region, index = divmod(cluster, self.per_block)
            here = min(end - cluster, self.per_block - index)
            block = await self.block(region)
            counts = block.items[index : index + here] if block is not None else array("B")
            _append_ones(runs, cluster, counts)
            cluster += here
        return runs

    async def least(self, cluster: int, length: int) -> int:
        """The lowest count of those clusters. Raises and waits as `block`."""
        lowest, end = self._geometry.refcount_max, cluster + length
        while cluster < end:
            region, index = divmod(cluster, self.per_block)
            here = min(end - cluster, self.per_block - index)
            block = await self.block(region)
            lowest = min(lowest, min(block.items[index : index + here]) if block is not None else 0)
            cluster += here
        return lowest

    def add_block(self, region: int, cluster: int) -> Table:
        """A new block for a region that has none, all zero, to live in `cluster`; its own count is not yet set.

        The table must be long enough.
        """
        assert not self.root.words[region], region
        at = cluster * self._geometry.cluster_size
        block = self.blocks.create(at, refcount_array(self._geometry.refcount_bits, self.per_block))
        self.root.words[region] = at
        self.root.mark(region)
        return block

    def clusters_for(self, regions: int) -> int:
        """Length in clusters of a new table that has room for `regions` blocks, and for growth.

        Raises:
            IoFailure: more than the format's limit of 8 MiB (EFBIG).
        """
        size = self._geometry.cluster_size
        most = REFCOUNT_TABLE_BYTES_MAX // size
        needed = -(-regions * 8 // size)
        if needed > most:
            raise IoFailure(errno.EFBIG, f"node '{self._geometry.name}' refcount table")
        return max(needed, min(most, self.table_clusters * 3 // 2))


def _each_plus(counts: "array[int]", change: int) -> "array[int]":
    """All counts one higher or lower, by one addition of long integers; none may pass its type's limits by it."""
    ones = int.from_bytes((array(counts.typecode, (1,)) * len(counts)).tobytes(), sys.byteorder)
    raw = counts.tobytes()
    changed = array(counts.typecode)
    total = int.from_bytes(raw, sys.byteorder) + change * ones
    changed.frombytes(total.to_bytes(len(raw), sys.byteorder))
    return changed


def _append_ones(runs: list[tuple[int, int]], cluster: int, counts: "array[int]") -> None:
    """Add the clusters whose count is 1 at the end of ascending runs; the counts are those from `cluster` on."""
    ones = counts.count(1)
    if ones == len(counts) > 0:
        _append(runs, cluster, ones)
    elif ones:
        for offset, count in enumerate(counts):
            if count == 1:
                _append(runs, cluster + offset, 1)


def _append(runs: list[tuple[int, int]], cluster: int, length: int) -> None:
    if runs and sum(runs[-1]) == cluster:
        runs[-1] = (runs[-1][0], runs[-1][1] + length)
    else:
        runs.append((cluster, length))
