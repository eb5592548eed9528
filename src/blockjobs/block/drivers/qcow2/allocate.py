"""Finding free clusters: next fit, so that a long request gets long runs and small holes are filled by small requests.

Every method marks what it takes in the refcounts before anything else can run, so two requests never get the same
cluster. Clusters whose last reference is not durably gone still have their count, hence are never found
(spec/durability.md §1, I3).
"""

from array import array
from collections.abc import Callable
from typing import Final, NamedTuple

from blockjobs.base.errors import ImageCorrupt
from blockjobs.block.drivers.qcow2.geometry import Geometry
from blockjobs.block.drivers.qcow2.refcounts import Refcounts

LONG_RUN_CLUSTERS: Final = 16
"""Requests of this many clusters leave smaller holes to smaller requests: a copy in tiny pieces costs more than the
holes, and 1 MiB in one piece is where copies reach full speed (64 KiB clusters)."""

OVERLAPS: Final = "Preventing invalid write on metadata (overlaps with {})"
INACTIVE_L2: Final = "inactive L2 table"


class Run(NamedTuple):
    """`length` clusters of the image file from `cluster` on."""

    cluster: int
    length: int

    @property
    def end(self) -> int:
        """The cluster after the run."""
        return self.cluster + self.length


class Allocator:
    """Takes free clusters of the image file and gives them back.

    Attributes:
        guarded: clusters that the header, L1 and the refcount table say are metadata. Taking one of them, or writing
            guest bytes there, would destroy the image: its refcounts or L2 entries are wrong.
        inactive_l2: those of them that hold L2 tables of snapshots, in use by the active state too or not; empty unless
            they are to be guarded.
        name_of: what a guarded cluster holds, in QEMU's words.
        moved_tables: refcount tables that were replaced; a commit frees them.
        tail: where the next compressed stream may go: (cluster, bytes used in it), in a cluster that has some already.
    """

    def __init__(self, geometry: Geometry, refcounts: Refcounts) -> None:
        self._geometry = geometry
        self._refcounts = refcounts
        self._small_from = 0
        self._long_from = 0
        self.guarded: set[int] = set()
        self.inactive_l2: set[int] = set()
        self.name_of: Callable[[int], str] = lambda cluster: "metadata"
        self.moved_tables: list[Run] = []
        self.tail: tuple[int, int] | None = None

    async def take(self, count: int, *, in_one: bool = False) -> list[Run]:
        """Take `count` clusters in as few runs as is cheap, in ascending order where possible.

        Args:
            count: how many.
            in_one: one run only.

        Raises:
            IoFailure, ImageCorrupt: the refcounts could not be read or cannot grow; nothing is taken.
        Waits: reads of refcount blocks. Checkpoint: no.
        """
        if in_one and count > self._refcounts.per_block // 2:
            return [self.append(count)]
        runs: list[Run] = []
        left = count
        try:
            while left:
                run = await self._take_run(left, count if in_one else min(left, LONG_RUN_CLUSTERS))
                left -= run.length
                if runs and runs[-1].end == run.cluster:
                    runs[-1] = Run(runs[-1].cluster, runs[-1].length + run.length)
                else:
                    runs.append(run)
                self.check_not_metadata(run)
        except BaseException:
            for run in runs:
                await self.give_back(run)
            raise
        return runs

    def check_not_metadata(self, run: Run) -> None:
        """Refuse to use clusters that hold metadata.

        Raises:
            ImageCorrupt: the image's tables contradict each other.
        """
        if not self.guarded.isdisjoint(range(run.cluster, run.end)):
            first = next(cluster for cluster in range(run.cluster, run.end) if cluster in self.guarded)
            raise self._overlap(run, self.name_of(first))

    def check_not_inactive(self, cluster: int) -> None:
        """Refuse to change an L2 table in place that a snapshot has too.

        Raises:
            ImageCorrupt: a snapshot has it, as far as that is known, which its reference count does not say.
        """
        if cluster in self.inactive_l2:
            raise self._overlap(Run(cluster, 1), INACTIVE_L2)

    def _overlap(self, run: Run, what: str) -> ImageCorrupt:
        size = self._geometry.cluster_size
        return ImageCorrupt(self._geometry.name, OVERLAPS.format(what), at=run.cluster * size, length=run.length * size)

    async def _take_run(self, most: int, least: int) -> Run:
        """Take the first run of at least `least` free clusters, and at most `most` of it."""
        per_block = self._refcounts.per_block
        is_small = least == 1
        start = cluster = self._small_from if is_small else max(self._small_from, self._long_from)
        while True:
            region, index = divmod(cluster, per_block)
            block = await self._refcounts.block(region)
            if block is None:
                cluster = self._open_region(cluster)
                continue
            found = find_free(block.items, index, most, min(least, per_block - 1))
            if found is None:
                cluster = (region + 1) * per_block
                continue
            run = Run(region * per_block + found[0], found[1])
            self._refcounts.set_run(block, found[0], run.length, 1)
            if is_small and self._small_from == start:
                self._small_from = run.end
            elif not is_small and max(self._small_from, self._long_from) == start:
                self._long_from = run.end
            return run

    def _open_region(self, cluster: int) -> int:
        """Give the region of `cluster`, which has no refcount block, a block in that very cluster.

        Returns:
            The next cluster that may be free.
        """
        region, index = divmod(cluster, self._refcounts.per_block)
        if region >= len(self._refcounts.root.words):
            self._grow_table(cluster, region + 1)
            return cluster
        self.check_not_metadata(Run(cluster, 1))
        block = self._refcounts.add_block(region, cluster)
        self._refcounts.set_run(block, index, 1, 1)
        self.guarded.add(cluster)
        return cluster + 1

    def _grow_table(self, cluster: int, regions: int) -> None:
        """Replace the refcount table by one with room for `regions` blocks and more.

        It lives from `cluster` on, behind all clusters that were ever counted.
        """
        counts = self._refcounts
        size = self._geometry.cluster_size
        old = Run(counts.root.at // size, counts.table_clusters)
        blocks = 1
        while True:
            clusters = counts.clusters_for(max(regions, cluster // counts.per_block + blocks))
            needed = -(-(cluster % counts.per_block + blocks + clusters) // counts.per_block)
            if needed <= blocks:
                break
            blocks = needed
        self.check_not_metadata(Run(cluster, blocks + clusters))
        # The place is needed for the move, the longer table for taking the place.
        counts.root.move((cluster + blocks) * size, clusters * size // 8)
        start = self._take_fresh(cluster, blocks, clusters)
        self.moved_tables.append(old)
        self.guarded.update(range(start, start + clusters))

    def append(self, count: int) -> Run:
        """Take `count` clusters in one run behind all that were ever counted, however many blocks that needs.

        Raises:
            IoFailure: the refcount table cannot grow that far (EFBIG); nothing is taken.
            ImageCorrupt: there is metadata where nothing is counted; nothing is taken.
        """
        counts = self._refcounts
        table = counts.root.words
        region = next((index + 1 for index in range(len(table) - 1, -1, -1) if table[index]), 0)
        blocks = 1
        while blocks < (needed := -(-(count + blocks) // counts.per_block)):
            blocks = needed
        if region + blocks > len(table):
            self._grow_table(region * counts.per_block, region + blocks)
            return self.append(count)
        self.check_not_metadata(Run(region * counts.per_block, blocks + count))
        return Run(self._take_fresh(region * counts.per_block, blocks, count), count)

    def _take_fresh(self, cluster: int, blocks: int, count: int) -> int:
        """Take `blocks` clusters for new refcount blocks, then `count` more, from `cluster` on; returns their first.

        The regions from that of `cluster` on have no blocks yet.
        """
        counts = self._refcounts
        first_region = cluster // counts.per_block
        for offset in range(blocks):
            counts.add_block(first_region + offset, cluster + offset)
            self.guarded.add(cluster + offset)
        end = cluster + blocks + count
        at = cluster
        while at < end:
            region, index = divmod(at, counts.per_block)
            here = min(end - at, counts.per_block - index)
            block = counts.blocks.peek(counts.root.words[region])
            assert block is not None, "new blocks stay in memory until they are written"
            counts.set_run(block, index, here, 1)
            at += here
        return cluster + blocks

    async def take_after(self, cluster: int, count: int) -> bool:
        """Take exactly the `count` clusters from `cluster` on if all are free; returns whether it did.

        Raises:
            IoFailure, ImageCorrupt: as `take`.
        Waits: as `take`. Checkpoint: no.
        """
        region, index = divmod(cluster, self._refcounts.per_block)
        if index + count > self._refcounts.per_block:
            return False
        block = await self._refcounts.block(region)
        if block is None or find_free(block.items[: index + count], index, count, count) != (index, count):
            return False
        run = Run(cluster, count)
        self.check_not_metadata(run)
        self._refcounts.set_run(block, index, count, 1)
        return True

    async def give_back(self, run: Run) -> None:
        """Clusters that were taken but to which nothing durable ever pointed are free again at once.

        Never raises: what cannot be given back leaks.
        """
        self.forget_tail(run.cluster, run.length)
        try:
            for unused in await self._refcounts.drop(run.cluster, run.length):
                self.is_free(*unused)
        except (OSError, ImageCorrupt):
            return

    def is_free(self, cluster: int, length: int) -> None:
        """The counts of these clusters have become 0: look there again."""
        self.guarded.difference_update(range(cluster, cluster + length))
        self._small_from = min(self._small_from, cluster)
        if length >= LONG_RUN_CLUSTERS:
            self._long_from = min(self._long_from, cluster)

    def forget_tail(self, cluster: int, length: int) -> None:
        """Some reference to these clusters is about to go: put no further stream there."""
        if self.tail is not None and cluster <= self.tail[0] < cluster + length:
            self.tail = None


def find_free(counts: "array[int]", index: int, most: int, least: int) -> tuple[int, int] | None:
    """The first run of at least `least` zeroes from `index` on, cut at `most`: (index, length) or None."""
    width = counts.itemsize
    chunk = counts[index : index + most].tobytes()
    length = leading_zero_bytes(chunk) // width
    if length >= least:
        return index, length
    zero = bytes(width)
    raw = counts[index:].tobytes()
    at = length * width
    while True:
        at = raw.find(zero, at)
        while at % width and at >= 0:
            at = raw.find(zero, at - at % width + width)
        if at < 0:
            return None
        length = leading_zero_bytes(raw[at : at + most * width]) // width
        if length >= least:
            return index + at // width, length
        at += max(1, length) * width


def leading_zero_bytes(raw: bytes) -> int:
    """How many zero bytes `raw` begins with."""
    return len(raw) - len(raw.lstrip(b"\0"))
