"""Reserving many runs of absent clusters at once: what a copy into a new image asks for, thousands of runs a time.

One allocation serves all of them, so that the target is one run however scattered the source is, and the entries are
made by slices. Anything else, such as clusters that exist already, is left to `writes`.
"""

from array import array
from collections.abc import Sequence
from itertools import groupby
from operator import attrgetter
from typing import Final, NamedTuple

from msgspec import Struct

from blockjobs.base.span import Span
from blockjobs.block.drivers.qcow2.allocate import Run
from blockjobs.block.drivers.qcow2.image import Image
from blockjobs.block.drivers.qcow2.tables import Table
from blockjobs.block.vocabulary import Placement, Reservation
from blockjobs.wire.qcow2_tables import COPIED


class _Piece(NamedTuple):
    """Entries of one table that `clusters` of the new clusters go to, for the guest bytes from `at` on."""

    table: Table
    first: int
    clusters: int
    at: int


_TABLE: Final = attrgetter("table")


class Claim(Struct):
    """Token of such a reservation: the taken clusters serve the pieces in order. The tables are pinned."""

    tables: list[Table]
    pieces: list[_Piece]
    runs: list[Run]

    def unpin(self) -> None:
        """The tables may be evicted again."""
        for table in self.tables:
            table.pins -= 1


async def reserve(image: Image, spans: Sequence[Span]) -> Reservation | None:
    """Take room for `spans`, ascending, if they are whole clusters that the image does not have.

    Returns:
        None if they are not; nothing is reserved then.

    Raises:
        IoFailure, ImageCorrupt: no space, or tables could not be read; nothing is reserved.
    Waits: table reads; a commit if too much is dirty. Checkpoint: no.
    """
    geometry = image.geometry
    if (
        geometry.is_extended
        or geometry.has_data_file
        or any((at | length) % geometry.cluster_size for at, length in spans)
    ):
        return None
    await image.begin_change()
    claim = Claim([], [], [])
    try:
        if await _find_entries(image, spans, claim):
            image.child("file").debug_event("cluster_alloc")
            claim.runs = await image.allocator.take(sum(piece.clusters for piece in claim.pieces))
    except BaseException:
        claim.unpin()
        raise
    if not claim.runs:
        claim.unpin()
        return None
    hull = Span.between(spans[0].at, spans[-1].end)
    return Reservation(span=hull, placements=_placements(claim, geometry.cluster_size), token=claim)


async def _find_entries(image: Image, spans: Sequence[Span], claim: Claim) -> bool:
    """Collect the pieces of the claim; False if an entry is in use."""
    size, l2_span = image.geometry.cluster_size, image.geometry.l2_span
    tables = claim.tables
    known = -1
    for span in spans:
        at, end = span.at, span.at + span.length
        while at < end:
            index, offset = divmod(at, l2_span)
            if index != known:
                table = await image.mapping.writable_table(index)
                table.pins += 1
                tables.append(table)
                items, known = table.items, index
            first = offset // size
            count = min(end - at, l2_span - offset) // size
            if items[first] or (count > 1 and items[first : first + count].tobytes().strip(b"\0")):
                return False
            claim.pieces.append(_Piece(table, first, count, at))
            at += count * size
    return True


def _placements(claim: Claim, size: int) -> list[Placement]:
    """The guest bytes of the pieces, in order, and where the taken clusters are."""
    placements: list[Placement] = []
    runs = iter(claim.runs)
    host_at = left = 0
    for _, _, count, at in claim.pieces:
        while count:
            if not left:
                cluster, left = next(runs)
                host_at = cluster * size
            here = min(count, left)
            placements.append(Placement(at, here * size, "file", host_at))
            host_at += here * size
            at += here * size
            count -= here
            left -= here
    return placements


def publish(image: Image, claim: Claim) -> None:
    """Let the entries point at the clusters, now that the bytes are there."""
    size = image.geometry.cluster_size
    words = array("Q")
    for cluster, length in claim.runs:
        words.extend(range(cluster * size | COPIED, (cluster + length) * size | COPIED, size))
    done = 0
    for table, pieces in groupby(claim.pieces, key=_TABLE):
        items, start, end = table.items, -1, 0
        for _, first, count, _ in pieces:
            if count == 1:
                items[first] = words[done]
            else:
                items[first : first + count] = words[done : done + count]
            done += count
            start, end = first if start < 0 else start, first + count
        image.mapping.l2.touch(table, start, end)
    claim.unpin()


async def release(image: Image, claim: Claim) -> None:
    """The bytes did not arrive: give the clusters back. Waits: a read of a refcount block at most. Checkpoint: no."""
    claim.unpin()
    for run in claim.runs:
        await image.allocator.give_back(run)
