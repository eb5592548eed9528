"""Whether an image was preallocated: its clusters are in use, and its file has no space for many of them."""

from blockjobs.base.errors import ImageCorrupt, IoFailure
from blockjobs.block.drivers.qcow2.image import Image


async def is_sparse(image: Image, stored_bytes: int) -> bool:
    """See `Counting`: at least two clusters, and a ninth, more than are stored.

    Those are the numbers at which qemu-img 7.2 begins to show holes, for files of 5 to 205 clusters. Counting ends as
    soon as the answer is known; for a file without holes nothing is read.

    Returns:
        False also if the counts cannot be read: what is asked for is a description of the disk, not of them.

    Waits: table reads. Checkpoint: no.
    """
    unit, refcounts = image.geometry.cluster_size, image.refcounts
    stored = stored_bytes // unit
    needed = max(stored * 10 // 9, stored + 2)
    left = -(-image.child("file").length // unit)
    region = 0
    try:
        while 0 < needed <= left and region < len(refcounts.root.words):
            counted = min(refcounts.per_block, left)
            block = await refcounts.block(region)
            if block is not None:
                items = block.items if counted == len(block.items) else block.items[:counted]
                needed -= counted - items.count(0)
            left -= counted
            region += 1
    except (ImageCorrupt, IoFailure):
        return False
    return needed <= 0
