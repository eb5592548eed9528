"""Another width for an image's reference counts: a complete new set, then one write of the header.

The new counts are what the tables refer to, counted anew, so leaks go on the way. Until the header's write the image is
the old one: the new set lies behind the end of everything that is counted.
"""

from typing import TYPE_CHECKING

from msgspec.structs import replace

from blockjobs.base.errors import UsageError
from blockjobs.block.amend_options import Amending
from blockjobs.block.drivers.qcow2.check import check_image
from blockjobs.block.drivers.qcow2.image import Image
from blockjobs.block.drivers.qcow2.repair import RebuiltCounts, correct_flags
from blockjobs.wire.qcow2 import FIELD_REFCOUNTS, Header

if TYPE_CHECKING:
    from blockjobs.block.drivers.qcow2.check_tally import Tally
    from blockjobs.block.drivers.qcow2.check_walk import MetadataWalk
    from blockjobs.block.drivers.qcow2.driver import Qcow2


class NewWidth:
    """A set of counts with another width, to which the header does not refer yet."""

    def __init__(self, image: Image, walk: "MetadataWalk", rebuilt: RebuiltCounts) -> None:
        self._file, self._length = image.child("file"), image.child("file").length
        self._walk, self._rebuilt = walk, rebuilt

    async def write(self, work: Amending) -> None:
        """Write the set behind the end of the file.

        Raises:
            IoFailure, JobCancelled: the file is as it was.
        Waits: writes of all counts. Checkpoint: through `work.checkpoint`.
        """

        async def counted(blocks: int) -> None:
            work.advance(blocks)
            await work.checkpoint()

        work.expect(len(self._rebuilt.indexes))
        try:
            await self._rebuilt.write(self._file, advance=counted)
        except BaseException:
            await self.drop()
            raise

    async def drop(self) -> None:
        """It is not wanted: take it off the file again. What cannot be cut off is free space. Checkpoint: no."""
        try:
            await self._file.resize(self._length)
        except OSError:
            return

    async def switch(self, driver: "Qcow2") -> None:
        """Let the header refer to it. No cluster was taken or freed since the counting.

        Raises:
            IoFailure: the counts are the old ones or the new ones.
        Waits: header writes, reads of all metadata. Checkpoint: no.
        """
        image, new = driver.image, self._rebuilt.header

        def with_new_counts(header: Header) -> Header:
            return replace(
                header,
                refcount_order=new.refcount_order,
                refcount_table_at=new.refcount_table_at,
                refcount_table_clusters=new.refcount_table_clusters,
                incompatible=new.incompatible,
            )

        await image.transaction.switch_header(with_new_counts, FIELD_REFCOUNTS)
        image.transaction.is_unsure = True  # what is in memory has counts of the old width
        # What only leaked references kept from being the active state's own is that now.
        await correct_flags(self._walk, self._file, image.offload, setting=True)
        await driver.reload()


async def plan_width(image: Image, bits: int, work: Amending) -> NewWidth:
    """Count all references, to be kept in `bits` bits each. Nothing is written.

    Raises:
        UsageError: a count does not fit, or the image has errors that must be repaired first.
        IoFailure: the image could not be read.
        JobCancelled: it is not wanted any more.
    Waits: reads of all metadata. Checkpoint: through `work.checkpoint`.
    """
    file = image.child("file")

    async def counted(tables: int) -> None:
        work.advance(tables)
        await work.checkpoint()

    work.expect(sum(1 for word in image.mapping.l1.words if word))
    found = await check_image(file, offload=image.offload, advance=counted)
    if found.corruptions or found.check_errors:
        raise UsageError("The image has errors: repair it first (blockjobs check -r all)")
    found.walk.forget_refcount_structures()
    header = replace(image.header, refcount_order=bits.bit_length() - 1)

    async def check_width(tally: "Tally") -> None:
        cluster = tally.counts.first_above((1 << bits) - 1)
        if cluster is not None:
            raise UsageError(
                f"Cannot decrease refcount entry width to {bits} bits: "
                f"Cluster at offset {cluster * header.cluster_size:#x} has a refcount of {tally.counts[cluster]}"
            )

    await found.walk.each_window(check_width)
    return NewWidth(image, found.walk, await RebuiltCounts.plan(header, found.walk))
