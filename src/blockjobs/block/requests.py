"""How one request is carried out on a node, by what kind of driver it has (ADR 0002: map, move, watch).

`Node` has done the bookkeeping and picked the route; here limits are applied, tickets taken, and formats' mappings
turned into as few hops to worker threads as possible.
"""

import errno
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING

from msgspec import Struct, field

from blockjobs.base.buffers import Buffer, aligned, zeroes
from blockjobs.base.errors import ImageCorrupt, IoFailure
from blockjobs.base.span import Span
from blockjobs.block.driver import Compressor, FilterDriver, FormatDriver, ProtocolDriver
from blockjobs.block.drivers.file_medium import CACHED_READ_BYTES_MAX
from blockjobs.block.encipherment import Encipherment
from blockjobs.block.medium import Medium
from blockjobs.block.vocabulary import Kind, Limits, Placement, Reservation, Segment, Watch, ZeroMode

if TYPE_CHECKING:
    from blockjobs.block.node import Node

ZERO_WRITE_BYTES_MAX = 1 << 20
"""Zeroes written as bytes go in pieces of this size, so that a huge request needs no huge buffer."""


class _Reads(Struct):
    """What a read comes down to: plain calls for one hop, and requests that other nodes must answer.

    Attributes:
        enciphered: what must be deciphered once the doors have answered.
    """

    plain: list[tuple[Medium, int, memoryview]] = field(default_factory=list)
    doors: list[tuple[Callable[[int, memoryview], Awaitable[None]], int, memoryview]] = field(default_factory=list)
    special: list[tuple[FormatDriver, Segment, memoryview]] = field(default_factory=list)
    enciphered: list[tuple[Encipherment, int, memoryview]] = field(default_factory=list)


async def read(node: "Node", at: int, view: memoryview) -> None:
    """Fill `view` from `at` on; the node has checked the range.

    Raises:
        IoFailure, ImageCorrupt: what `view` holds is unspecified.
    Waits: overlapping writes, then I/O.
    """
    driver = node.driver
    span = Span(at, len(view))
    async with node.tracker.shared(span):
        if isinstance(driver, FormatDriver):
            await _read_whole_units(node, driver, at, view)
        else:
            await _within_limits(node, driver, at, view)


async def _read_whole_units(node: "Node", driver: FormatDriver, at: int, view: memoryview) -> None:
    """A read of a format, of more than was asked for if parts of units that are enciphered were."""
    if driver.encipherment is None or driver.encipherment.fits(at, len(view)):
        await _read_format(node, driver, at, view)
        return
    wide = Span(at, len(view)).widen(driver.encipherment.unit)
    bounce = aligned(wide.length)
    await _read_format(node, driver, wide.at, bounce)
    view[:] = bounce[at - wide.at : at - wide.at + len(view)]


async def _within_limits(node: "Node", driver: object, at: int, view: memoryview) -> None:
    """A read of a protocol or through a filter, in pieces that it takes."""
    assert isinstance(driver, ProtocolDriver | FilterDriver)
    limits = driver.limits
    span = Span(at, len(view))
    wide = _widened(span, limits.request_align, node.length)
    if wide == span:
        for piece in _pieces(span, limits):
            await _read_piece(node, driver, piece.at, view[piece.at - at : piece.end - at])
        return
    bounce = aligned(wide.length)
    for piece in _pieces(wide, limits):
        await _read_piece(node, driver, piece.at, bounce[piece.at - wide.at : piece.end - wide.at])
    view[:] = bounce[at - wide.at : span.end - wide.at]


async def _read_piece(node: "Node", driver: ProtocolDriver | FilterDriver, at: int, view: memoryview) -> None:
    if isinstance(driver, ProtocolDriver):
        await driver.read_into(at, view)
    elif driver.watches & Watch.READ:
        await driver.read_into(at, view, node.children[driver.filtered])
    else:
        await node.children[driver.filtered].read_into(at, view)


async def _read_format(node: "Node", driver: FormatDriver, at: int, view: memoryview) -> None:
    reads = _Reads()
    await _collect(node, driver, at, view, reads)
    if reads.plain and not (
        len(view) <= CACHED_READ_BYTES_MAX
        and all(medium.read_cached(place, part) for medium, place, part in reads.plain)
    ):
        try:
            await node.graph.offload.run(_read_plain, reads.plain)
        except OSError as error:
            raise IoFailure.wrap(error, f"node '{node.name}' at {at}+{len(view)}") from error
    for door, place, part in reads.doors:
        await door(place, part)
    if reads.enciphered:
        await node.graph.offload.run(_decipher, reads.enciphered)
    for special_driver, segment, part in reads.special:
        await special_driver.read_special(segment, part)


def _read_plain(pieces: list[tuple[Medium, int, memoryview]]) -> None:
    for medium, at, view in pieces:
        medium.read_into(at, view)


def _decipher(pieces: list[tuple[Encipherment, int, memoryview]]) -> None:
    for encipherment, at, view in pieces:
        encipherment.decipher(at, view)


async def _collect(node: "Node", driver: FormatDriver, at: int, view: memoryview, reads: _Reads) -> None:
    """Sort the parts of a format's run into `reads`, following children as far as nobody must be asked."""
    for segment in await driver.resolve(Span(at, len(view))):
        part = view[segment.at - at : segment.at - at + segment.length]
        match segment.kind:
            case Kind.DATA:
                child = node.children[segment.child]
                child.debug_event("read_aio")
                cipher = driver.encipherment
                if cipher is not None:
                    cipher = cipher.placed(segment.at, segment.child_at)
                await _follow(child, segment.child_at, part, reads, cipher)
            case Kind.ZERO:
                part[:] = zeroes(segment.length)
            case Kind.SPECIAL:
                reads.special.append((driver, segment, part))
            case Kind.BACKING:
                backing = node.children.get("backing")
                inside = 0 if backing is None else max(0, min(segment.length, backing.length - segment.at))
                part[inside:] = zeroes(segment.length - inside)
                if backing is not None and inside:
                    if "file" in node.children:
                        node.children["file"].debug_event("read_backing_aio")
                    await _follow(backing, segment.at, part[:inside], reads)


async def _follow(
    node: "Node", at: int, view: memoryview, reads: _Reads, encipherment: Encipherment | None = None
) -> None:
    node = node.route(Watch.READ)
    driver = node.driver
    if isinstance(driver, ProtocolDriver):
        medium = plain_medium(driver, at, len(view), encipherment)
        if medium is not None:
            reads.plain.append((medium, at, view))
            return
    # A format that is written to may move its clusters meanwhile, so its own ticket is needed.
    elif (
        isinstance(driver, FormatDriver)
        and encipherment is None
        and (driver.encipherment is None or driver.encipherment.fits(at, len(view)))
        and (node.read_only or driver.write_align == 1)
        and at + len(view) <= node.length
    ):
        await _collect(node, driver, at, view, reads)
        return
    reads.doors.append((node.read_into, at, view))
    if encipherment is not None:
        reads.enciphered.append((encipherment, at, view))


def plain_medium(
    driver: ProtocolDriver, at: int, length: int, encipherment: Encipherment | None = None
) -> Medium | None:
    """The medium of a protocol if plain calls may reach this run, else None.

    Args:
        encipherment: of the format above, whose bytes these are, as it holds there.
    """
    limits = driver.limits
    if driver.medium is None or (at | length) % limits.request_align or length > limits.transfer_bytes_max:
        return None
    if encipherment is None:
        return driver.medium
    return encipherment.over(driver.medium) if encipherment.fits(at, length) else None


async def write(node: "Node", at: int, content: Buffer, *, fua: bool, compressed: bool = False) -> None:
    """Write; the node has checked range and rights.

    Args:
        compressed: a format that can compress stores it so.

    Raises:
        IoFailure, ImageCorrupt: a format shows the old content; of a protocol's run any part may be new.
    Waits: overlapping requests, then I/O.
    """
    driver = node.driver
    span = Span(at, len(content))
    if isinstance(driver, FormatDriver):
        async with node.tracker.exclusive(span.widen(driver.write_align)):
            if compressed and (compress := driver.compressor("default")) is not None:
                await _write_compressed(node, driver, at, content, compress)
            else:
                await write_format(node, driver, at, content)
        if fua:
            await driver.flush()
        return
    assert isinstance(driver, ProtocolDriver | FilterDriver)
    limits = driver.limits
    wide = _widened(span, limits.request_align, node.length)
    if wide == span:
        async with node.tracker.shared(span):
            await _write_pieces(node, driver, at, content, fua=fua, compressed=compressed)
        return
    async with node.tracker.exclusive(wide):
        bounce = aligned(wide.length)
        for edge in (Span.between(wide.at, at), Span.between(span.end, wide.end)):
            if edge:
                block = _widened(edge, limits.request_align, node.length)
                await _read_piece(node, driver, block.at, bounce[block.at - wide.at : block.end - wide.at])
        bounce[at - wide.at : span.end - wide.at] = memoryview(content)
        await _write_pieces(node, driver, wide.at, bounce, fua=fua, compressed=compressed)


class CompressedForward(Struct, frozen=True):
    """The route below a filter for what is to be stored compressed: as the child, but for writes."""

    child: "Node"

    async def read_into(self, at: int, buffer: memoryview) -> None:
        """See `Forward`."""
        await self.child.read_into(at, buffer)

    async def write(self, at: int, content: Buffer, *, fua: bool = False, compressed: bool = True) -> None:
        """See `Forward`."""
        del compressed
        await self.child.write(at, content, fua=fua, compressed=True)

    async def zero(self, span: Span, *, mode: ZeroMode = ZeroMode.UNMAP) -> None:
        """See `Forward`."""
        await self.child.zero(span, mode=mode)

    async def discard(self, span: Span) -> None:
        """See `Forward`."""
        await self.child.discard(span)

    async def flush(self) -> None:
        """See `Forward`."""
        await self.child.flush()

    async def resize(self, length: int) -> None:
        """See `Forward`."""
        await self.child.resize(length)


async def _write_pieces(
    node: "Node", driver: ProtocolDriver | FilterDriver, at: int, content: Buffer, *, fua: bool, compressed: bool
) -> None:
    span = Span(at, len(content))
    for piece in _pieces(span, driver.limits):
        part = content if piece == span else memoryview(content)[piece.at - at : piece.end - at]
        if isinstance(driver, ProtocolDriver):
            await driver.write(piece.at, part, fua=fua)
            continue
        child = node.children[driver.filtered]
        if driver.watches & Watch.WRITE:
            await driver.write(piece.at, part, CompressedForward(child) if compressed else child, fua=fua)
        else:
            await child.write(piece.at, part, fua=fua, compressed=compressed)


async def _write_compressed(node: "Node", driver: FormatDriver, at: int, content: Buffer, compress: Compressor) -> None:
    """Compress whole units, the parts that are not written read before; the caller holds the exclusive ticket.

    Raises:
        IoFailure, ImageCorrupt: each unit is the old one or the new one.
    """
    span = Span(at, len(content))
    wide = _widened(span, driver.write_align, node.length)
    if wide != span:
        filled = memoryview(bytearray(wide.length))
        for edge in (Span.between(wide.at, at), Span.between(span.end, wide.end)):
            if edge:
                await _read_format(node, driver, edge.at, filled[edge.at - wide.at : edge.end - wide.at])
        filled[at - wide.at : span.end - wide.at] = memoryview(content)
        content = filled
    from blockjobs.block.compress_batch import pack_all

    packed = await pack_all(node.graph.offload, compress, wide.at, content, driver.write_align)
    await driver.write_compressed([(each.at, each.stream) for each in packed if each.stream is not None])
    for cluster in packed:
        if cluster.plain is not None:
            await write_format(node, driver, cluster.at, cluster.plain)
        elif cluster.stream is None:
            here = Span(cluster.at, min(driver.write_align, wide.end - cluster.at))
            for part in await driver.zero(here, ZeroMode.UNMAP):
                await write_format(node, driver, part.at, zeroes(part.length))


async def write_format(node: "Node", driver: FormatDriver, at: int, content: Buffer) -> None:
    """Reserve, write payload and fills, publish; the caller holds the exclusive ticket.

    Units that are enciphered are written as a whole, the parts that are not given read before.
    """
    span = Span(at, len(content))
    if driver.encipherment is not None and not driver.encipherment.fits(at, len(content)):
        wide = span.widen(driver.encipherment.unit)
        whole = memoryview(bytearray(wide.length))
        for edge in (Span.between(wide.at, at), Span.between(span.end, wide.end)):
            if edge:
                await _read_whole_units(node, driver, edge.at, whole[edge.at - wide.at : edge.end - wide.at])
        whole[at - wide.at : span.end - wide.at] = memoryview(content)
        span, content = wide, whole
    reservation = await driver.reserve(span)
    try:
        await _write_placements(node, driver, reservation, memoryview(content))
    except BaseException:
        await driver.release(reservation)
        raise
    await driver.publish(reservation)


async def _write_placements(node: "Node", driver: FormatDriver, reservation: Reservation, content: memoryview) -> None:
    start = reservation.span.at
    pieces: list[tuple[Placement, Buffer]] = [
        (place, content[place.at - start : place.at - start + place.length]) for place in reservation.placements
    ]
    for fill in reservation.fills:
        node.children[fill.child].debug_event("cow_read")
        before = memoryview(bytearray(fill.length))
        await _read_format(node, driver, fill.at, before[: max(0, min(fill.length, node.length - fill.at))])
        node.children[fill.child].debug_event("cow_write")
        pieces.append((fill, before))
    plain: list[tuple[Medium, int, list[Buffer]]] = []
    for (at, _, child, child_at), buffers in _contiguous(pieces, on_disk_too=driver.encipherment is not None):
        target = node.children[child]
        target.debug_event("write_aio")
        length = sum(len(buffer) for buffer in buffers)
        target.check_write(child_at, length)
        below = target.route(Watch.WRITE)
        cipher = None if driver.encipherment is None else driver.encipherment.placed(at, child_at)
        medium = None
        if isinstance(below.driver, ProtocolDriver):
            medium = plain_medium(below.driver, child_at, length, cipher)
        if medium is not None and not (target.detects_zeroes or target.bitmaps or below.bitmaps):
            plain.append((medium, child_at, buffers))
            below.tally.reached(child_at + length)
        else:
            joined = buffers[0] if len(buffers) == 1 else b"".join(buffers)
            if cipher is not None:
                joined = await node.graph.offload.run(cipher.encipher, child_at, joined)
            await target.write(child_at, joined)
    if plain:
        try:
            if len(plain) > 1 or not plain[0][0].write_cached(*plain[0][1:]):
                await node.graph.offload.run(_write_plain, plain)
        except OSError as error:
            raise IoFailure.wrap(error, f"node '{node.name}' at {start}+{len(content)}") from error


def _contiguous(pieces: list[tuple[Placement, Buffer]], *, on_disk_too: bool) -> list[tuple[Placement, list[Buffer]]]:
    """Join pieces that lie one after another in the same child; each run with its first place."""
    runs: list[tuple[Placement, list[Buffer]]] = []
    at = child_at = -1
    for place, buffer in sorted(pieces, key=lambda piece: (piece[0].child, piece[0].child_at)):
        follows = place.child_at == child_at and (place.at == at or not on_disk_too)
        if runs and runs[-1][0].child == place.child and follows:
            runs[-1][1].append(buffer)
        else:
            runs.append((place, [buffer]))
        at, child_at = place.at + place.length, place.child_at + place.length
    return runs


def _write_plain(pieces: list[tuple[Medium, int, list[Buffer]]]) -> None:
    for medium, at, buffers in pieces:
        medium.writev(at, buffers)


async def zero(node: "Node", span: Span, mode: ZeroMode) -> None:
    """Make the run read as zeroes; the node has checked range and rights.

    Raises:
        IoFailure, ImageCorrupt: any part of the run may be zeroed.
    Waits: overlapping requests, then I/O.
    """
    driver = node.driver
    if isinstance(driver, FormatDriver):
        async with node.tracker.exclusive(span.widen(driver.write_align)):
            for part in await driver.zero(span, mode):
                for piece in part.split(ZERO_WRITE_BYTES_MAX):
                    await write_format(node, driver, piece.at, zeroes(piece.length))
        return
    assert isinstance(driver, ProtocolDriver | FilterDriver)
    limits = driver.limits
    whole, ragged = _aligned_part(span, max(limits.zero_align, limits.request_align), node.length)
    for part in ragged:
        for piece in part.split(ZERO_WRITE_BYTES_MAX):
            await write(node, piece.at, zeroes(piece.length), fua=False)
    if whole:
        async with node.tracker.shared(whole):
            for piece in _cut(whole, limits.zero_bytes_max, limits.zero_align):
                if isinstance(driver, ProtocolDriver):
                    await driver.zero(piece, mode)
                elif driver.watches & Watch.ZERO:
                    await driver.zero(piece, mode, node.children[driver.filtered])
                else:
                    await node.children[driver.filtered].zero(piece, mode=mode)


async def discard(node: "Node", span: Span) -> None:
    """Give the run back; the node has checked range and rights. Parts of units that the driver has are left alone.

    Raises:
        IoFailure, ImageCorrupt: any part of the run may be discarded.
    Waits: overlapping requests, then I/O.
    """
    driver = node.driver
    if isinstance(driver, FormatDriver):
        async with node.tracker.exclusive(span.widen(driver.write_align)):
            await driver.discard(span)
        return
    assert isinstance(driver, ProtocolDriver | FilterDriver)
    limits = driver.limits
    whole, _ = _aligned_part(span, max(limits.discard_align, limits.request_align), node.length)
    if not whole:
        return
    async with node.tracker.shared(whole):
        for piece in _cut(whole, limits.discard_bytes_max, limits.discard_align):
            if isinstance(driver, ProtocolDriver):
                await driver.discard(piece)
            elif driver.watches & Watch.DISCARD:
                await driver.discard(piece, node.children[driver.filtered])
            else:
                await node.children[driver.filtered].discard(piece)


def _widened(span: Span, align: int, length: int) -> Span:
    """`span` up to whole units, except that the node's own end may be ragged."""
    if align == 1 or span.is_aligned(align):
        return span
    wide = span.widen(align)
    return Span.between(wide.at, max(span.end, min(wide.end, length)))


def _aligned_part(span: Span, align: int, length: int) -> tuple[Span, list[Span]]:
    """The whole units of `span` (the node's end counts as one), and what is left over."""
    if align == 1:
        return span, []
    start = -(-span.at // align) * align
    end = span.end if span.end == length else span.end // align * align
    if start >= end:
        return Span(span.at, 0), [span]
    ragged = [part for part in (Span.between(span.at, start), Span.between(end, span.end)) if part]
    return Span.between(start, end), ragged


def _pieces(span: Span, limits: Limits) -> Iterable[Span]:
    return _cut(span, limits.transfer_bytes_max, limits.request_align)


def _cut(span: Span, bytes_max: int, align: int) -> Iterable[Span]:
    """Consecutive pieces of at most `bytes_max`, which is rounded down to whole units."""
    if span.length <= bytes_max:
        return (span,)
    step = max(align, bytes_max // align * align)
    return (Span(at, min(step, span.end - at)) for at in range(span.at, span.end, step))


def as_failure(error: OSError | ImageCorrupt, node: "Node", span: Span) -> IoFailure:
    """What policies act on: a corrupt image is an I/O error to whoever copies it; its own event tells the story."""
    where = f"node '{node.name}' at {span.at}+{span.length}"
    return IoFailure(errno.EIO, where) if isinstance(error, ImageCorrupt) else IoFailure.wrap(error, where)


def io_error(node: "Node", at: int, length: int, code: int = errno.EIO) -> IoFailure:
    """An error that names the node and the place."""
    return IoFailure(code, f"node '{node.name}' at {at}+{length}")
