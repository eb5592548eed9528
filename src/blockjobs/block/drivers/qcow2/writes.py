"""Writing guest bytes: where they go, and the entries that will say so.

A run of clusters that is to be written is one of three things. IN PLACE: the guest reads these very host clusters, and
nobody else does; nothing but the bytes changes. REUSED: the host clusters are the active state's own but do not count
yet (zero flag, unallocated subclusters); the entry changes after the bytes are there. NEW: everything else gets fresh
clusters, and what was there before is freed after the next commit.
"""

from array import array
from collections.abc import Iterator
from enum import Enum, auto
from typing import Final, NamedTuple

from msgspec import Struct, field
from msgspec.structs import replace

from blockjobs.base.span import Span
from blockjobs.block.driver import OwnPlaces
from blockjobs.block.drivers.qcow2.entries import (
    ALL_BITS,
    Mapped,
    is_plain,
    is_stored,
    may_write_in_place,
    runs_of,
)
from blockjobs.block.drivers.qcow2.geometry import Geometry
from blockjobs.block.drivers.qcow2.image import Image, host_run
from blockjobs.block.drivers.qcow2.mapping import Stretch
from blockjobs.block.drivers.qcow2.tables import Table
from blockjobs.block.vocabulary import Placement, Reservation
from blockjobs.wire.qcow2 import SUBCLUSTERS
from blockjobs.wire.qcow2_tables import COMPRESSED, COPIED, OFFSET, ZERO

HOW_STORED: Final = COPIED | COMPRESSED | ZERO
"""Flags of an entry; of clusters that are written in place only COPIED is set."""


class _How(Enum):
    IN_PLACE = auto()
    REUSED = auto()
    NEW = auto()


class _Part(Struct):
    """Clusters of one table that are written in one way: whole ones, or one of which only a part is written.

    Attributes:
        first: index of the first entry in the table.
        span: the guest bytes that are written.
        at: guest offset of the first cluster.
        host_at: host offset of that cluster; unknown until allocation for NEW.
        bitmap: subcluster bits of the entries afterwards.
        fills: guest bytes of the same clusters to be copied.
    """

    table: Table
    first: int
    count: int
    span: Span
    at: int
    how: _How = _How.NEW
    host_at: int = -1
    bitmap: int = 0
    fills: list[Span] = field(default_factory=list)


class _Change(NamedTuple):
    """Entries to be rewritten by `publish`; `taken` says that the host clusters are new."""

    table: Table
    first: int
    clusters: int
    host_at: int
    bitmap: int
    taken: bool


class _Token(Struct):
    """What `publish` and `release` need.

    Attributes:
        tail: bytes past the virtual end of the disk in a new last cluster: they must be zeroes before the entry shows
            them to a disk that has grown.
    """

    changes: list[_Change]
    pinned: list[Table]
    tail: Placement | None = None


IN_PLACE: Final = _Token([], [])
"""Of reservations that change nothing but bytes."""


async def reserve(image: Image, span: Span) -> Reservation:
    """See `FormatDriver.reserve`. Waits: table reads; a commit if too much is dirty. Checkpoint: no."""
    await image.begin_change()
    if not image.geometry.is_extended and not image.geometry.has_data_file and image.mapping.trusts_flags:
        reservation = await _reserve_simply(image, span)
        if reservation is not None:
            return reservation
    parts: list[_Part] = []
    pinned: list[Table] = []
    try:
        stretches = list(image.mapping.stretches(span))
        if len(stretches) > 1:
            await image.mapping.prefetch(stretches[0].l1_index, stretches[-1].l1_index + 1)
        for stretch in stretches:
            table = await image.mapping.writable_table(stretch.l1_index)
            table.pins += 1
            pinned.append(table)
            if not image.mapping.trusts_flags:
                await image.mapping.clear_false_flags(table, stretch)
            parts.extend(_parts_of(image, table, stretch, span))
        await _allocate(image, parts)
    except BaseException:
        unpin(pinned)
        raise
    return _reservation(image, span, parts, pinned)


def own_places_now(image: Image) -> OwnPlaces | None:
    """See `FormatDriver.own_places_now`: for bytes of one cluster IN PLACE whose L2 table is in memory."""
    geometry, mapping = image.geometry, image.mapping
    if geometry.is_extended or geometry.has_data_file or not (mapping.trusts_flags and image.is_changing):
        return None
    bits, entries_mask, inside = geometry.cluster_bits, geometry.l2_entries - 1, geometry.cluster_size - 1
    l1, l2, guarded = mapping.l1.words, mapping.l2, image.allocator.guarded
    span_bits = bits + entries_mask.bit_length()
    known: dict[int, array[int]] = {}

    def own_place(at: int, length: int) -> int | None:
        entry, cluster = l1[at >> span_bits], at >> bits
        if (at + length - 1) >> bits != cluster or not entry & COPIED:
            return None
        if (items := known.get(entry)) is None:
            if (table := l2.peek(entry & OFFSET)) is None:
                return None
            items = known[entry] = table.items
        word = items[cluster & entries_mask]
        host_at = word & OFFSET
        if word & HOW_STORED != COPIED or host_at & inside or host_at >> bits in guarded:
            return None
        return host_at + (at & inside)

    return own_place


async def _reserve_simply(image: Image, span: Span) -> Reservation | None:
    """The two most frequent cases, at a fraction of the price: one cluster in place, or new whole clusters.

    None: neither; nothing is reserved. Raises and waits as `reserve`.
    """
    geometry = image.geometry
    size = geometry.cluster_size
    index, offset = divmod(span.at, geometry.l2_span)
    if offset + span.length > geometry.l2_span:
        return None
    table = await image.mapping.writable_table(index)
    first, end = offset // size, -(-(offset + span.length) // size)
    word = table.items[first]
    if word:
        host_at = word & OFFSET
        in_place = end - first == 1 and word & HOW_STORED == COPIED and host_at % size == 0
        if not in_place or host_at // size in image.allocator.guarded:
            return None
        placement = Placement(span.at, span.length, "file", host_at + offset % size)
        return Reservation(span=span, placements=[placement], token=IN_PLACE)
    if offset % size or span.length % size or (end - first > 1 and any(table.items[first:end])):
        return None
    image.child("file").debug_event("cluster_alloc")
    table.pins += 1
    try:
        runs = await image.allocator.take(end - first)
    except BaseException:
        table.pins -= 1
        raise
    token = _Token([], [table])
    reservation = Reservation(span=span, placements=[], token=token)
    at = span.at
    for cluster, length in runs:
        reservation.placements.append(Placement(at, length * size, "file", cluster * size))
        token.changes.append(_Change(table, first, length, cluster * size, 0, taken=True))
        first += length
        at += length * size
    return reservation


def unpin(pinned: list[Table]) -> None:
    """The tables may be evicted again."""
    for table in pinned:
        table.pins -= 1


def _parts_of(image: Image, table: Table, stretch: Stretch, span: Span) -> Iterator[_Part]:
    """How the clusters of a stretch are to be written."""
    geometry = image.geometry
    size, step = geometry.cluster_size, geometry.entry_words
    words = table.items[stretch.first * step : stretch.end * step]
    for run in runs_of(words, geometry):
        start = stretch.at + run.start * size
        image.check_entries(run, start)
        end = stretch.at + run.end * size
        for piece in _at_edges(Span.between(max(start, span.at), min(end, span.end)), size):
            first = piece.at // size
            skipped = first - start // size
            count = -(-piece.end // size) - first
            part_run = Mapped(0, count, run.word + skipped * size if run.offset else run.word, run.bitmap)
            part = _Part(table, stretch.first + run.start + skipped, count, piece, first * size)
            _decide(geometry, part_run, part)
            yield part


def _at_edges(span: Span, size: int) -> Iterator[Span]:
    """Cut off a first and a last cluster of which only a part is written."""
    whole = span.narrow(size)
    if whole.length in (0, span.length):
        yield from (span,) if whole or span.at // size == (span.end - 1) // size else span.split(size)
        return
    for piece in (Span.between(span.at, whole.at), whole, Span.between(whole.end, span.end)):
        if piece:
            yield piece


def _decide(geometry: Geometry, run: Mapped, part: _Part) -> None:
    """Find out how a part, whose entries are `run`, is written."""
    size = geometry.cluster_size
    own = may_write_in_place(run, geometry)
    if own:
        part.host_at = run.offset
    if own and is_plain(run, geometry):
        part.how = _How.IN_PLACE
    elif geometry.is_extended:
        _decide_subclusters(geometry, run, part, own)
    else:
        part.how = _How.REUSED if own else _How.NEW
        if part.span.length != part.count * size:
            part.fills = [Span.between(part.at, part.span.at), Span.between(part.span.end, part.at + size)]
    if part.how is _How.NEW and geometry.has_data_file:
        part.host_at = part.at


def _decide_subclusters(geometry: Geometry, run: Mapped, part: _Part, own: bool) -> None:
    """The same for a cluster with subclusters, of which some may be in place and others not."""
    sub = geometry.subcluster_size
    is_partial = part.span.length != part.count * geometry.cluster_size
    allocated = run.bitmap & ALL_BITS
    touched = ALL_BITS
    if is_partial:
        low, high = (part.span.at - part.at) // sub, (part.span.end - 1 - part.at) // sub
        touched = (2 << high) - (1 << low)
    if own:
        if touched & allocated == touched:
            part.how = _How.IN_PLACE
            return
        part.how = _How.REUSED
        filled = touched & ~allocated
    else:
        filled = touched
        if run.word & COMPRESSED:
            filled = ALL_BITS
        elif is_stored(run, geometry):
            filled |= allocated
        allocated = 0
    after = allocated | filled
    part.bitmap = (run.bitmap >> SUBCLUSTERS & ~after) << SUBCLUSTERS | after
    if is_partial:
        part.fills.extend(_fills(part, filled, sub))


def _fills(part: _Part, filled: int, sub: int) -> Iterator[Span]:
    """The bytes of the subclusters in `filled` that are not written anyway."""
    for bit in range(SUBCLUSTERS):
        if filled >> bit & 1:
            whole = Span(part.at + bit * sub, sub)
            written = part.span.intersect(whole)
            if not written:
                yield whole
                continue
            yield Span.between(whole.at, written.at)
            yield Span.between(written.end, whole.end)


async def _allocate(image: Image, parts: list[_Part]) -> None:
    """Give the NEW parts their host clusters, splitting them where the space is in pieces."""
    if image.geometry.has_data_file:
        return
    needed = sum(part.count for part in parts if part.how is _How.NEW)
    if not needed:
        return
    image.child("file").debug_event("cluster_alloc")
    runs = await image.allocator.take(needed)
    size = image.geometry.cluster_size
    runs.reverse()
    index = 0
    while index < len(parts):
        part = parts[index]
        if part.how is _How.NEW:
            run = runs.pop()
            if run.length < part.count:
                parts[index : index + 1] = _split(part, run.length, size)
                part = parts[index]
            elif run.length > part.count:
                runs.append(host_run((run.cluster + part.count) * size, run.length - part.count, image.geometry))
            part.host_at = run.cluster * size
        index += 1
    assert not runs


def _split(part: _Part, count: int, size: int) -> tuple[_Part, _Part]:
    """Cut a part of several, hence whole, clusters after `count` of them."""
    cut = part.at + count * size
    assert not part.fills
    head = replace(part, count=count, span=Span.between(part.at, cut))
    rest = Span.between(cut, part.span.end)
    return head, replace(part, first=part.first + count, count=part.count - count, span=rest, at=cut)


def _reservation(image: Image, span: Span, parts: list[_Part], pinned: list[Table]) -> Reservation:
    """Put the parts into the words of the contract."""
    child, size = image.geometry.data_child, image.geometry.cluster_size
    token = _Token([], pinned)
    reservation = Reservation(span=span, placements=[], token=token)
    at = length = host_at = -1
    for part in parts:
        shift = part.host_at - part.at
        if at + length == part.span.at and host_at + length == part.span.at + shift:
            length += part.span.length
            reservation.placements[-1] = Placement(at, length, child, host_at)
        else:
            at, length, host_at = part.span.at, part.span.length, part.span.at + shift
            reservation.placements.append(Placement(at, length, child, host_at))
        if part.how is _How.IN_PLACE:
            continue
        taken = part.how is _How.NEW and not image.geometry.has_data_file
        token.changes.append(_Change(part.table, part.first, part.count, part.host_at, part.bitmap, taken))
        for fill in part.fills:
            inside = Span.between(fill.at, max(fill.at, min(fill.end, image.size)))
            if inside:
                reservation.fills.append(Placement(inside.at, inside.length, child, inside.at + shift))
        end = part.at + part.count * size
        if part.at < image.size < end and not image.geometry.has_data_file:
            token.tail = Placement(image.size, end - image.size, "file", image.size + shift)
    return reservation


def is_in_place(reservation: Reservation) -> bool:
    """Whether publishing it changes nothing: the bytes are shown as soon as they are written."""
    token = reservation.token
    assert isinstance(token, _Token)
    return not (token.changes or token.tail or reservation.fills)


async def publish(image: Image, reservation: Reservation) -> None:
    """See `FormatDriver.publish`. Waits: at most one zero request, at the end of the disk. Checkpoint: no."""
    token = reservation.token
    assert isinstance(token, _Token)
    if token.tail is not None:
        try:
            await image.store_zeroes(token.tail)
        except BaseException:
            await release(image, reservation)
            raise
    _enter(image, token)


def _enter(image: Image, token: _Token) -> None:
    """The entries say that the clusters are where they were reserved."""
    geometry = image.geometry
    size, step = geometry.cluster_size, geometry.entry_words
    for change in token.changes:
        first, end = change.first * step, (change.first + change.clusters) * step
        items = change.table.items
        if change.taken:
            free_old(image, items[first:end], requested=False)
        host_at = change.host_at
        words = array("Q", range(host_at | COPIED, (host_at + change.clusters * size) | COPIED, size))
        if step == 1:
            items[first:end] = words
        else:
            items[first:end:2] = words
            items[first + 1 : end : 2] = array("Q", (change.bitmap,)) * change.clusters
        image.mapping.l2.touch(change.table, first, end)
    unpin(token.pinned)


def check_old(image: Image, table: Table, at: int) -> None:
    """Refuse to overwrite the entry of the cluster at guest offset `at` if it is corrupt: see `check_entries`."""
    geometry = image.geometry
    first = at % geometry.l2_span // geometry.cluster_size * geometry.entry_words
    if table.items[first]:
        [run] = runs_of(table.items[first : first + geometry.entry_words], geometry)
        image.check_entries(run, at)


def free_old(image: Image, words: "array[int]", *, requested: bool) -> None:
    """The entries are about to be overwritten: free what they refer to."""
    if words.tobytes().strip(b"\0"):
        for run in runs_of(words, image.geometry):
            image.free_entries(run, requested=requested)


async def release(image: Image, reservation: Reservation) -> None:
    """See `FormatDriver.release`. Waits: a read of a refcount block at most. Checkpoint: no.

    A raw data file shows already what of a failed write has reached it, and zeroes elsewhere: the disk shows the same.
    """
    token = reservation.token
    assert isinstance(token, _Token)
    if image.geometry.is_data_file_raw and image.encipherment is None:
        _enter(image, token)
        return
    unpin(token.pinned)
    for change in token.changes:
        if change.taken:
            await image.allocator.give_back(host_run(change.host_at, change.clusters, image.geometry))
