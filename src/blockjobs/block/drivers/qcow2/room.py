"""Room in the file for a longer disk, taken before anything of the image changes.

If there is none, that is known while the image is still what it was. Else the file is longer meanwhile than its image
needs, which harms nobody, also if it stays so because the program dies: what no refcount counts is free.
"""

from blockjobs.base.errors import UsageError
from blockjobs.base.span import Span
from blockjobs.block.driver import Child
from blockjobs.block.drivers.qcow2.image import Image
from blockjobs.block.vocabulary import ZeroMode


async def take_room(image: Image, length: int, *, with_data: bool) -> None:
    """Lengthen the files by what `preallocate` will need at most for a disk of `length` bytes; `leave_room` ends it.

    Args:
        length: what the disk will have.
        with_data: there is to be space for what the disk holds, too, not only for the tables.

    Raises:
        IoFailure: there is no such room; the files are as they were.
    Waits: writes. Checkpoint: no.
    """
    file, unit = image.child("file"), image.geometry.cluster_size
    data = 0 if image.geometry.has_data_file else -(-length // unit) - image.size // unit
    tables = _tables(image, length, data)
    if not file.open_ended:
        return  # a device has the room that it has
    before = file.length
    await _lengthen(file, before + (data + tables) * unit, (data * with_data + tables) * unit)
    if image.geometry.has_data_file and with_data:
        beside = image.child("data-file")
        try:
            if beside.open_ended and beside.length < length:
                await _lengthen(beside, length, length - beside.length)
        except BaseException:
            await file.resize(before)
            raise
    if not with_data:
        # The tables will lie between clusters without space. That there is some for them is all that can be known.
        await file.resize(before)


async def leave_room(image: Image, least_bytes: int) -> None:
    """Cut off what is in no use at the end of the file; nothing of the image may be dirty.

    Args:
        least_bytes: the length that is left in any case.

    Raises:
        IoFailure, ImageCorrupt: the file is as it was.
    Waits: table reads. Checkpoint: no.
    """
    file, refcounts = image.child("file"), image.refcounts
    if not file.open_ended:
        return
    end = 0
    for region in range(len(refcounts.root.words) - 1, -1, -1):
        block = await refcounts.block(region)
        if block is not None and any(block.items):
            raw = block.items.tobytes().rstrip(b"\0")
            end = region * refcounts.per_block + -(-len(raw) // block.items.itemsize)
            break
    needed = max(end * image.geometry.cluster_size, least_bytes)
    if needed < file.length:
        await file.resize(needed)


def _tables(image: Image, length: int, data: int) -> int:
    """No fewer clusters than the new tables take: L2, L1, refcount blocks and their table."""
    unit, refcounts = image.geometry.cluster_size, image.refcounts
    l2 = -(-length // image.geometry.l2_span) - image.size // image.geometry.l2_span
    have, wanted = len(image.mapping.l1.words), -(-length // image.geometry.l2_span)
    l1 = -(-max(wanted, have * 3 // 2) * 8 // unit) if wanted > have else 0
    used = -(-image.child("file").length // unit) + data + l2 + l1
    blocks = -(-(data + l2 + l1) // (refcounts.per_block - 1)) + 1
    regions = -(-(used + blocks) // refcounts.per_block) + 1
    table = (
        0 if regions <= len(refcounts.root.words) else -(-regions * 8 // unit) + refcounts.table_clusters * 3 // 2 + 1
    )
    return l2 + l1 + blocks + table


async def _lengthen(file: Child, length: int, stored: int) -> None:
    """Make a file longer, with space for the first `stored` bytes of what is new.

    Raises:
        IoFailure: it cannot be; the file is as it was.
    """
    before = file.length
    try:
        await file.resize(length)
        await file.zero(Span(before, stored), mode=ZeroMode.KEEP)
    except UsageError:
        return  # such a file does not take another length
    except BaseException:
        await file.resize(before)
        raise
