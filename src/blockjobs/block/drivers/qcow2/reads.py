"""Where guest bytes are."""

from array import array

from blockjobs.base.span import Span
from blockjobs.block.columns import ZERO_AT
from blockjobs.block.drivers.qcow2.entries import Segments, add_pieces
from blockjobs.block.drivers.qcow2.image import Image
from blockjobs.block.vocabulary import Kind, Segment
from blockjobs.wire.qcow2_tables import COMPRESSED, COPIED, OFFSET, ZERO


async def resolve(image: Image, span: Span) -> list[Segment]:
    """See `FormatDriver.resolve`. Waits: table reads. Checkpoint: no."""
    if not image.geometry.is_extended and not image.geometry.has_data_file:
        simple = await _resolve_simply(image, span)
        if simple is not None:
            return [simple]
    segments = Segments(image.geometry)
    step = image.geometry.entry_words
    for part, is_absent in image.mapping.steps(span):
        if is_absent:
            segments.add(part.at, part.length, Kind.BACKING)
            continue
        stretches = list(image.mapping.stretches(part))
        await image.mapping.prefetch(stretches[0].l1_index, stretches[-1].l1_index + 1)
        for stretch in stretches:
            table = await image.mapping.table(stretch.l1_index)
            if table is not None:
                words = table.items[stretch.first * step : stretch.end * step]
                segments.add_table(words, stretch.at, span.at, span.end)
                continue
            first = max(stretch.at, span.at)
            end = stretch.at + (stretch.end - stretch.first) * image.geometry.cluster_size
            segments.add(first, min(end, span.end) - first, Kind.BACKING)
    return segments.finish()


async def _resolve_simply(image: Image, span: Span) -> Segment | None:
    """The most frequent case at a fraction of the price: bytes of one plain cluster. Raises and waits as `resolve`."""
    size = image.geometry.cluster_size
    index, offset = divmod(span.at, image.geometry.l2_span)
    first = offset // size
    if not span.length or (offset + span.length - 1) // size != first:
        return None
    table = await image.mapping.table(index)
    word = table.items[first] if table is not None else 0
    host_at = word & OFFSET
    if word & (COMPRESSED | ZERO) or not host_at or host_at % size:
        return None
    return Segment(span.at, span.length, Kind.DATA, "file", host_at + offset % size)


async def pieces(image: Image, span: Span, *, has_zeroes: bool) -> tuple[list[int], list[int], list[int]] | None:
    """See `Columnar.pieces`. Waits: table reads. Checkpoint: no."""
    geometry, mapping = image.geometry, image.mapping
    step = geometry.entry_words
    columns: tuple[list[int], list[int], list[int]] = ([], [], [])
    for part, is_absent in mapping.steps(span):
        if is_absent:
            continue
        stretches = list(mapping.stretches(part))
        await mapping.prefetch(stretches[0].l1_index, stretches[-1].l1_index + 1)
        for stretch in stretches:
            table = await mapping.table(stretch.l1_index)
            if table is not None and not add_pieces(
                table.items[stretch.first * step : stretch.end * step],
                stretch.at,
                geometry,
                columns,
                has_zeroes=has_zeroes,
                shows_zeroes=image.has_backing,
            ):
                return None
    _cut(columns, span)
    return columns


def _cut(columns: tuple[list[int], list[int], list[int]], span: Span) -> None:
    """Leave out what the first and the last cluster have outside of `span`."""
    places, lengths, hosts = columns
    if places and (before := span.at - places[0]) > 0:
        places[0], lengths[0] = span.at, lengths[0] - before
        hosts[0] += before if hosts[0] != ZERO_AT else 0
    if places and (behind := places[-1] + lengths[-1] - span.end) > 0:
        lengths[-1] -= behind


def place_now(image: Image, at: int, length: int) -> tuple[str, int] | None:
    """See `FormatDriver.place_now`: for one cluster that is not compressed, or a run of plain ones that lie together in
    the file, if their L2 table is in memory.
    """
    geometry, mapping = image.geometry, image.mapping
    size = geometry.cluster_size
    index, offset = divmod(at, geometry.l2_span)
    first, last = offset // size, (offset + length - 1) // size
    if geometry.is_extended or geometry.has_data_file or last >= geometry.l2_entries:
        return None
    table_at = mapping.l1.words[index] & OFFSET
    table = mapping.l2.peek(table_at)
    if table is None and table_at:
        return None
    word = table.items[first] if table is not None else 0
    host_at = word & OFFSET
    if word & COMPRESSED or host_at % size or (word & ZERO and geometry.version < 3):
        return None
    if last != first and not (host_at and table is not None and _lie_together(table.items[first : last + 1], size)):
        return None
    if word & ZERO:
        return "", 0
    if host_at:
        return "file", host_at + offset % size
    return ("backing", at) if image.has_backing else ("", 0)


def _lie_together(words: "array[int]", size: int) -> bool:
    """Whether these are plain clusters, one after another in the file."""
    place = words[0] & OFFSET
    for word in words:
        if word & ~COPIED != place:
            return False
        place += size
    return True


async def reads_as_zeroes(image: Image, span: Span) -> bool:
    """Whether this layer alone shows zeroes there. Raises and waits as `resolve`."""
    absent = image.has_backing
    kinds = {segment.kind for segment in await resolve(image, span)}
    return kinds <= ({Kind.ZERO} if absent else {Kind.ZERO, Kind.BACKING})


async def read_guest(image: Image, span: Span) -> bytes:
    """What the guest reads in a short run, for the few places where the driver itself must carry bytes.

    Raises:
        IoFailure, ImageCorrupt: it could not be read.
    Waits: I/O. Checkpoint: no.
    """
    content = bytearray(span.length)
    for segment in await resolve(image, span):
        part = memoryview(content)[segment.at - span.at : segment.at - span.at + segment.length]
        if segment.kind is Kind.DATA:
            await image.read_stored(segment, part)
        elif segment.kind is Kind.SPECIAL:
            from blockjobs.block.drivers.qcow2.streams import read_special  # with its libraries: few images have any

            await read_special(image, segment, part)
        elif segment.kind is Kind.BACKING and image.has_backing:
            backing = image.child("backing")
            inside = max(0, min(segment.length, backing.length - segment.at))
            if inside:
                await backing.read_into(segment.at, part[:inside])
    return bytes(content)
