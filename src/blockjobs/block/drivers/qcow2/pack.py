"""Storing compressed clusters: streams lie one after another, across the borders of host clusters.

Every stream counts as a reference to each host cluster it touches. A batch is written by one request, begins at a
512-byte sector of its own, and leaves nothing else in its last one, so no sector that a durable entry refers to is
ever written again (spec/durability.md §1).
"""

from collections.abc import Sequence
from typing import NamedTuple

from blockjobs.block.drivers.qcow2.allocate import Run
from blockjobs.block.drivers.qcow2.image import Image
from blockjobs.block.drivers.qcow2.tables import Table
from blockjobs.block.drivers.qcow2.writes import check_old, free_old, unpin
from blockjobs.wire.qcow2 import SECTOR
from blockjobs.wire.qcow2_tables import pack_compressed


class _Shelf(NamedTuple):
    """Places of a batch's streams relative to its first host cluster, and how many of them touch each cluster."""

    places: list[int]
    counts: list[int]
    end: int


async def write_compressed(image: Image, clusters: Sequence[tuple[int, bytes]]) -> None:
    """See `FormatDriver.write_compressed`.

    Raises:
        IoFailure, ImageCorrupt: nothing of the batch is visible, the space is given back.
    Waits: table reads, one write; a commit if too much is dirty. Checkpoint: no.
    """
    if not clusters:
        return
    await image.begin_change()
    size, l2_span = image.geometry.cluster_size, image.geometry.l2_span
    tables: dict[int, Table] = {}
    try:
        for at, stream in clusters:
            assert at % size == 0 and 0 < len(stream) < size, (at, len(stream))
            index = at // l2_span
            if index not in tables:
                table = await image.mapping.writable_table(index)
                table.pins += 1
                tables[index] = table
            check_old(image, tables[index], at)
        await _store(image, clusters, tables)
    finally:
        unpin(list(tables.values()))


async def _store(image: Image, clusters: Sequence[tuple[int, bytes]], tables: dict[int, Table]) -> None:
    """Find space, write the streams, and let the entries of `tables`, by L1 index, point at them."""
    geometry = image.geometry
    lengths = [len(stream) for _, stream in clusters]
    async with image.packing:
        first, shelf = await _make_place(image, lengths)
    base = first * geometry.cluster_size
    start = shelf.places[0]
    content = bytearray(-(-shelf.end // SECTOR) * SECTOR - start)
    for (_, stream), place in zip(clusters, shelf.places, strict=True):
        content[place - start : place - start + len(stream)] = stream
    file = image.child("file")
    file.debug_event("write_compressed")
    try:
        await file.write(base + start, content)
    except BaseException:
        await _give_back(image, first, shelf.counts)
        raise
    step, l2_span = geometry.entry_words, geometry.l2_span
    for (at, stream), place in zip(clusters, shelf.places, strict=True):
        table = tables[at // l2_span]
        index = at % l2_span // geometry.cluster_size * step
        if table.items[index]:
            free_old(image, table.items[index : index + step], requested=False)
        table.items[index] = pack_compressed(base + place, len(stream), geometry.cluster_bits)
        if step > 1:
            table.items[index + 1] = 0
        image.mapping.l2.touch(table, index, index + step)


async def _make_place(image: Image, lengths: list[int]) -> tuple[int, _Shelf]:
    """Take host clusters for a batch, and count its references; returns the first cluster and the places."""
    size, most = image.geometry.cluster_size, image.geometry.refcount_max
    image.child("file").debug_event("cluster_alloc_bytes")
    placed = await _place_at_tail(image, lengths)
    if placed is not None:
        return placed
    shelf = shelve(lengths, 0, 0, size, most)
    [run] = await image.allocator.take(len(shelf.counts), in_one=True)
    await _count(image, run.cluster, shelf, counted=[])
    return run.cluster, shelf


async def _place_at_tail(image: Image, lengths: list[int]) -> tuple[int, _Shelf] | None:
    """Go on where the last batch ended, if there is room there and behind it."""
    tail, refcounts = image.allocator.tail, image.refcounts
    if tail is None:
        return None
    cluster, used = tail
    region, index = divmod(cluster, refcounts.per_block)
    block = await refcounts.block(region)
    if block is None or image.allocator.tail != tail:
        return None
    size = image.geometry.cluster_size
    shelf = shelve(lengths, used, block.items[index], size, image.geometry.refcount_max)
    if shelf.places[0] >= size:
        return None
    # Counted before anything is awaited: from here on nobody can free the cluster below us.
    refcounts.set_run(block, index, 1, block.items[index] + shelf.counts[0])
    further = len(shelf.counts) - 1
    try:
        fits = not further or await image.allocator.take_after(cluster + 1, further)
    except BaseException:
        await _give_back(image, cluster, shelf.counts[:1])
        raise
    if not fits:
        await _give_back(image, cluster, shelf.counts[:1])
        return None
    await _count(image, cluster, shelf, counted=shelf.counts[:1])
    return cluster, shelf


async def _count(image: Image, first: int, shelf: _Shelf, *, counted: list[int]) -> None:
    """Add the references that taking the clusters has not counted, which is all but one each, and move the tail.

    Args:
        counted: references of the first clusters that have all been counted before.
    """
    counted = list(counted)
    try:
        for number in range(len(counted), len(shelf.counts)):
            if shelf.counts[number] > 1:
                await image.refcounts.add(first + number, shelf.counts[number] - 1)
            counted.append(shelf.counts[number])
    except BaseException:
        await _give_back(image, first, counted + [1] * (len(shelf.counts) - len(counted)))
        raise
    last = len(shelf.counts) - 1
    used = -(-shelf.end // SECTOR) * SECTOR - last * image.geometry.cluster_size
    image.allocator.tail = (first + last, used) if used < image.geometry.cluster_size else None


async def _give_back(image: Image, first: int, counts: list[int]) -> None:
    for number, count in enumerate(counts):
        for _ in range(count):
            await image.allocator.give_back(Run(first + number, 1))


def shelve(lengths: Sequence[int], used: int, references: int, size: int, most: int) -> _Shelf:
    """Lay streams one after another into clusters.

    Args:
        lengths: of the streams, each shorter than a cluster.
        used: bytes taken in the first cluster.
        references: it has already.
        size: of a cluster.
        most: references a cluster can have; a stream that would be one more begins in the next cluster.
    """
    places: list[int] = []
    counts = [0]
    base = references
    at = used
    for length in lengths:
        while True:
            first, last = at // size, (at + length - 1) // size
            counts.extend([0] * (last + 1 - len(counts)))
            if counts[first] + (base if first == 0 else 0) < most:
                break
            at = (first + 1) * size
        for cluster in range(first, last + 1):
            counts[cluster] += 1
        places.append(at)
        at += length
    return _Shelf(places, counts[: (at - 1) // size + 1], at)
