"""Another width for an image's reference counts: a complete new set, then one write of the header.

The new counts are what the tables refer to, counted anew, so leaks go on the way. Until the header's write the image is
the old one: the new set lies behind the end of everything that is counted.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from blockjobs.base.errors import UsageError
from blockjobs.block.amend_options import Amending
from blockjobs.block.drivers.qcow2.check import check_image
from blockjobs.block.drivers.qcow2.repair import CopiedFlags, RebuiltCounts, forget_refcount_structures
from blockjobs.wire.qcow2 import FIELD_REFCOUNTS

if TYPE_CHECKING:
    from blockjobs.block.drivers.qcow2.driver import Qcow2


async def change_width(driver: "Qcow2", bits: int, work: Amending) -> None:
    """Let every count have `bits` bits.

    Raises:
        UsageError: a count does not fit, or the image has errors that must be repaired first; nothing changed.
        IoFailure: the counts are the old ones or the new ones.
        JobCancelled: the counts are the old ones.
    Waits: reads of all metadata, and writes of all counts. Checkpoint: through `work.may_stop`.
    """
    image = driver.image
    file = image.child("file")

    def counted(tables: int) -> None:
        work.may_stop()
        work.advance(tables)

    work.expect(sum(1 for word in image.mapping.l1.words if word))
    found = await check_image(file, offload=image.offload, advance=counted)
    if found.corruptions or found.check_errors:
        raise UsageError("The image has errors: repair it first (blockjobs check -r all)")
    await forget_refcount_structures(file, found.tally)
    header = replace(image.header, refcount_order=bits.bit_length() - 1)
    rebuilt = RebuiltCounts(header, found.tally.references, found.tally.clusters)
    work.expect(len(rebuilt.indexes))
    await rebuilt.write(file, advance=counted)
    work.may_stop()
    await image.transaction.switch_header(lambda header: rebuilt.header, FIELD_REFCOUNTS)
    image.transaction.is_unsure = True  # what is in memory has counts of the old width
    # What only leaked references kept from being the active state's own is that now.
    await CopiedFlags(found.tally, setting=True).correct(file, image.offload)
    await driver.reload()
