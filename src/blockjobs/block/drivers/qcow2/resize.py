"""Changing the virtual length: the L1 table grows by a copy, the header's one write makes the new length visible."""

from blockjobs.base.errors import UsageError
from blockjobs.base.span import Span
from blockjobs.block.drivers.qcow2 import erase, reads, snapshot_tree, writes
from blockjobs.block.drivers.qcow2.image import Image
from blockjobs.block.vocabulary import ZeroMode
from blockjobs.wire.qcow2 import L1_BYTES_MAX, SECTOR


async def resize(image: Image, length: int) -> None:
    """Set the virtual length; on return it is durable.

    What a growing image shows is zeroes, whatever the backing file or an old last cluster has there.

    Raises:
        UsageError: not to that length; nothing changed.
        IoFailure, ImageCorrupt: the length is as before; when shrinking, what lies beyond may be gone already.
    Waits: table I/O and commits. Checkpoint: no.
    """
    check_length(image, length)
    if image.geometry.version < 3 and image.header.snapshots:
        raise UsageError("Can't resize a v2 image which has snapshots")
    if length == image.size:
        return
    await image.begin_change()
    if length > image.size:
        await _grow(image, length)
    else:
        await _shrink(image, length)
    if image.geometry.is_data_file_raw:
        await image.child("data-file").resize(length)


def check_length(image: Image, length: int) -> None:
    """Refuse lengths that no disk in this image can have.

    Raises:
        UsageError: it is one.
    """
    if length % SECTOR:
        raise UsageError(f"The new size must be a multiple of {SECTOR}")
    if -(-length // image.geometry.l2_span) * 8 > L1_BYTES_MAX or length >= 1 << 63:
        raise UsageError("Failed to grow the L1 table: File too large")


async def _grow(image: Image, length: int) -> None:
    before = image.size
    await _zero_tail(image)
    if image.geometry.is_data_file_raw:
        await _zero_raw_file(image, Span.between(before, length))
    await snapshot_tree.drop_past(image, before)
    await grow_l1(image, -(-length // image.geometry.l2_span))
    await _hide_backing(image, Span.between(before, length))
    image.transaction.size = length
    try:
        await image.transaction.commit()
    except BaseException:
        image.transaction.size = before
        raise


async def _zero_raw_file(image: Image, new: Span) -> None:
    """Another program may have left bytes behind the end of a data file that is to show what the disk shows."""
    data = image.child("data-file")
    if data.length > new.at:
        await data.zero(Span.between(new.at, min(new.end, data.length)), mode=ZeroMode.UNMAP)


async def grow_l1(image: Image, entries: int) -> None:
    """Make room for `entries` L1 entries."""
    l1, size = image.mapping.l1, image.geometry.cluster_size
    have = len(l1.words)
    if entries <= have:
        return
    entries = min(max(entries, have * 3 // 2), L1_BYTES_MAX // 8)
    clusters = -(-entries * 8 // size)
    old_at, old_clusters = l1.at, -(-have * 8 // size)
    [run] = await image.allocator.take(clusters, in_one=True)
    l1.move(run.cluster * size, entries)
    image.allocator.guarded.update(range(run.cluster, run.end))
    if have:
        image.pending.add(old_at // size, old_clusters)


async def _zero_tail(image: Image) -> None:
    """Make the rest of the last cluster zero, which becomes visible.

    Another program may have left bytes there, or the backing file may have some.
    """
    size = image.geometry.cluster_size
    end = -(-image.size // size) * size
    tail = Span.between(image.size, end)
    if not tail or await reads.reads_as_zeroes(image, tail):
        return
    await put_zeroes(image, tail)


async def preallocate(image: Image, span: Span, mode: ZeroMode) -> None:
    """Give clusters to a run that reads as zeroes, and go on reading so; on return they are durable.

    Args:
        span: inside the disk; a first cluster of which it is only a part is left as it is.
        mode: UNMAP: no space below them yet; KEEP: with space. Enciphered zeroes must be written in any case.

    Raises:
        IoFailure, ImageCorrupt: part of the run may have its clusters.
    Waits: table I/O and commits. Checkpoint: no.
    """
    size = image.geometry.cluster_size
    span = Span.between(min(-(-span.at // size) * size, span.end), span.end)
    data = image.child(image.geometry.data_child)
    if image.geometry.has_data_file and data.length < span.end:
        await data.resize(span.end)
    for piece in span.split(image.geometry.l2_span):
        await image.begin_change()
        await put_zeroes(image, piece, mode=mode)
    await image.transaction.commit()


async def put_zeroes(image: Image, span: Span, *, mode: ZeroMode = ZeroMode.UNMAP) -> None:
    """Zero bytes in clusters of their own, past the end of the disk or where it reads so; `mode` says with which space
    below.
    """
    reservation = await writes.reserve(image, span)
    try:
        for fill in reservation.fills:
            content = await reads.read_guest(image, Span(fill.at, fill.length))
            await image.store(fill, content)
        for place in reservation.placements:
            await image.store_zeroes(place, mode=mode)
    except BaseException:
        await writes.release(image, reservation)
        raise
    await writes.publish(image, reservation)


async def _hide_backing(image: Image, new: Span) -> None:
    """Where a longer backing file would show through behind the old end, zeroes are put first."""
    if not image.has_backing:
        return
    start = -(-new.at // image.geometry.cluster_size) * image.geometry.cluster_size
    end = min(new.end, image.child("backing").length)
    if start < end and image.geometry.version < 3:
        for piece in Span.between(start, end).split(image.geometry.l2_span):
            await put_zeroes(image, piece)
    elif start < end:
        await erase.erase(image, Span.between(start, end), erase.Erasure.UNMAP)


async def _shrink(image: Image, length: int) -> None:
    """Entries and L2 tables beyond go first, ▷ then the length."""
    size = image.geometry.cluster_size
    start = -(-length // size) * size
    beyond = Span.between(start, max(start, image.size))
    if beyond and image.geometry.is_data_file_raw:
        # If the length then cannot be written, the file alone must show the zeroes that the disk shows.
        await image.child("data-file").zero(beyond, mode=ZeroMode.UNMAP)
    await erase.erase(image, beyond, erase.Erasure.FORGET)
    await snapshot_tree.drop_past(image, length)
    await image.transaction.commit()
    before, image.transaction.size = image.size, length
    try:
        await image.transaction.commit()
    except BaseException:
        image.transaction.size = before
        raise
