"""Reserving many runs of clusters at once: what a copy into an image asks for, thousands of runs a time.

For those of a new image, absent clusters, one allocation serves all of them, so that the target is one run however
scattered the source is, and the entries are made by slices. Those of a full image are written where they are. Anything
else is left to `writes`.
"""

from array import array
from bisect import bisect_left
from collections.abc import Sequence
from functools import reduce
from itertools import chain
from operator import or_

from msgspec import Struct

from blockjobs.base.span import Span
from blockjobs.block.drivers.qcow2.allocate import Run
from blockjobs.block.drivers.qcow2.entries import ALL_BITS, is_stored, runs_in
from blockjobs.block.drivers.qcow2.geometry import Geometry
from blockjobs.block.drivers.qcow2.image import Image
from blockjobs.block.drivers.qcow2.tables import Table
from blockjobs.block.drivers.qcow2.writes import HOW_STORED, IN_PLACE
from blockjobs.block.vocabulary import Placement, Reservation
from blockjobs.wire.qcow2_tables import COPIED


class Claim(Struct):
    """Token of such a reservation.

    Attributes:
        parts: tables, which are pinned, and which of their entries are to be filled, ascending.
        runs: the taken clusters, or those of the data file; they serve the entries in order.
    """

    parts: list[tuple[Table, list[int]]]
    runs: list[Run]

    def unpin(self) -> None:
        """The tables may be evicted again."""
        for table, _ in self.parts:
            table.pins -= 1


async def reserve(image: Image, spans: Sequence[Span]) -> Reservation | None:
    """Take room for `spans`, ascending, if they are whole clusters that the image does not have, or has for itself.

    Returns:
        None if they are neither; nothing is reserved then.

    Raises:
        IoFailure, ImageCorrupt: no space, or tables could not be read; nothing is reserved.
    Waits: table reads; a commit if too much is dirty. Checkpoint: no.
    """
    claim = await _claim(image, [at for at, _ in spans], [length for _, length in spans])
    hull = Span.between(spans[0].at, spans[-1].end)
    if claim is None:
        places = await _own_places(image, spans)
        return None if places is None else Reservation(span=hull, placements=places, token=IN_PLACE)
    return Reservation(span=hull, placements=_placements(spans, claim.runs, image.geometry), token=claim)


async def reserve_in_one(image: Image, at: list[int], length: list[int]) -> Reservation | None:
    """The same for runs in columns, if all get one run of the file: see `Columnar`.

    Raises and waits as `reserve`.
    """
    claim = await _claim(image, at, length)
    if claim is None:
        return None
    hull = Span.between(at[0], at[-1] + length[-1])
    if image.geometry.has_data_file:
        placement = Placement(*hull, image.geometry.data_child, hull.at)
        return Reservation(span=hull, placements=[placement], token=claim)
    if len(claim.runs) > 1:
        await release(image, claim)
        return None
    [(cluster, clusters)] = claim.runs
    size = image.geometry.cluster_size
    placement = Placement(at[0], clusters * size, "file", cluster * size)
    return Reservation(span=hull, placements=[placement], token=claim)


async def _claim(image: Image, at: list[int], length: list[int]) -> Claim | None:
    """Take clusters for these runs; None if they are not whole clusters that the image does not have."""
    geometry = image.geometry
    size = geometry.cluster_size
    if reduce(or_, chain(at, length), 0) % size:
        return None
    await image.begin_change()
    numbers = [
        number
        for start, count in zip(at, length, strict=True)
        for number in range(start // size, (start + count) // size)
    ]
    claim = Claim([], [])
    try:
        if await _find_entries(image, numbers, claim):
            if geometry.has_data_file:
                claim.runs = [Run(start // size, count // size) for start, count in zip(at, length, strict=True)]
            else:
                image.child("file").debug_event("cluster_alloc")
                claim.runs = await image.allocator.take(len(numbers))
    except BaseException:
        claim.unpin()
        raise
    if not claim.runs:
        claim.unpin()
        return None
    return claim


async def _find_entries(image: Image, numbers: list[int], claim: Claim) -> bool:
    """Collect the parts of the claim for guest clusters, ascending; False if an entry is in use."""
    per_table, step = image.geometry.l2_entries, image.geometry.entry_words
    done = 0
    while done < len(numbers):
        index = numbers[done] // per_table
        first = index * per_table
        end = bisect_left(numbers, first + per_table, done)
        table = await image.mapping.writable_table(index)
        table.pins += 1
        entries = [number - first for number in numbers[done:end]]
        claim.parts.append((table, entries))
        items = table.items
        # Most often there is nothing at all between the first and the last of them.
        if items[entries[0] * step : (entries[-1] + 1) * step].tobytes().strip(b"\0") and any(
            items[entry * step] for entry in entries
        ):
            return False
        done = end
    return True


async def _own_places(image: Image, spans: Sequence[Span]) -> list[Placement] | None:
    """Where the clusters of the spans are, if all of them are the active state's own, and show what is stored there.

    Raises and waits as `reserve`.
    """
    geometry, mapping, size = image.geometry, image.mapping, image.geometry.cluster_size
    if geometry.is_extended or not mapping.trusts_flags:
        return None
    await image.begin_change()
    places: list[Placement] = []
    for index, parts in mapping.by_table(spans):
        table = await mapping.writable_table(index)
        for run, part in runs_in(table.items, geometry, parts):
            if run.word & HOW_STORED != COPIED or not is_stored(run, geometry):
                return None
            image.check_entries(run, part.at)
            places.append(Placement(*part, geometry.data_child, run.offset + part.at % size))
    return places


def _placements(spans: Sequence[Span], runs: Sequence[Run], geometry: Geometry) -> list[Placement]:
    """The guest bytes, in order, and where the taken clusters are."""
    size = geometry.cluster_size
    placements: list[Placement] = []
    rest = iter(runs)
    host_at = left = 0
    for at, length in spans:
        while length:
            if not left:
                cluster, clusters = next(rest)
                host_at, left = cluster * size, clusters * size
            here = min(length, left)
            placements.append(Placement(at, here, geometry.data_child, host_at))
            host_at, at, length, left = host_at + here, at + here, length - here, left - here
    return placements


def publish(image: Image, claim: Claim) -> None:
    """Let the entries point at the clusters, now that the bytes are there."""
    size, step = image.geometry.cluster_size, image.geometry.entry_words
    words = array("Q")
    for cluster, length in claim.runs:
        words.extend(range(cluster * size | COPIED, (cluster + length) * size | COPIED, size))
    done = 0
    for table, entries in claim.parts:
        items, start, end = table.items, entries[0] * step, (entries[-1] + 1) * step
        mine = words[done : done + len(entries)]
        if end - start == len(mine) * step:
            items[start:end:step] = mine
        else:
            for entry, word in zip(entries, mine, strict=True):
                items[entry * step] = word
        if step > 1:
            for entry in entries:
                items[entry * step + 1] = ALL_BITS
        done += len(entries)
        image.mapping.l2.touch(table, start, end)
    claim.unpin()


async def release(image: Image, claim: Claim) -> None:
    """The bytes did not arrive: give the clusters back. Waits: a read of a refcount block at most. Checkpoint: no.

    What has reached a raw data file shows there already, so the disk shows it too (see `writes.release`).
    """
    geometry = image.geometry
    if geometry.is_data_file_raw and image.encipherment is None:
        publish(image, claim)
        return
    claim.unpin()
    for run in () if geometry.has_data_file else claim.runs:
        await image.allocator.give_back(run)


async def shorten(image: Image, claim: Claim, clusters: int) -> None:
    """Only the first clusters will get their bytes: give the others back. Raises and waits as `release`."""
    parts, runs = claim.parts, claim.runs
    claim.parts, claim.runs = [], []
    left = clusters
    for table, entries in parts:
        if left:
            claim.parts.append((table, entries[:left]))
            left -= min(left, len(entries))
        else:
            table.pins -= 1
    left = clusters
    for cluster, length in runs:
        here = min(left, length)
        left -= here
        if here:
            claim.runs.append(Run(cluster, here))
        if here < length and not image.geometry.has_data_file:
            await image.allocator.give_back(Run(cluster + here, length - here))
