"""Changing what an image is: version, width of its reference counts, flags, names, length (spec/durability.md §1).

All checks come first, then what takes long and shows nothing: new counts are written where nobody looks, so a pause or
a cancel finds the old image. Then each change is one root change of its own, in an order in which every state between
two of them is a good image: key slots, upgrade, width, flags and names, length, downgrade.
"""

from typing import TYPE_CHECKING

from msgspec.structs import replace

from blockjobs.block.amend_options import Amending, Qcow2AmendOptions, QCryptoBlockAmendOptionsLuks
from blockjobs.block.drivers.qcow2 import amend_version, amend_width, resize
from blockjobs.block.drivers.qcow2.amend_checks import backing_of, check_options, wanted_version, with_data_file
from blockjobs.block.drivers.qcow2.image import Image
from blockjobs.wire.qcow2 import FIELD_FEATURES, Autoclear, Compatible

if TYPE_CHECKING:
    from blockjobs.block.drivers.qcow2.driver import Qcow2


async def amend(driver: "Qcow2", options: Qcow2AmendOptions, work: Amending) -> None:
    """Make the image what the options say; nobody else uses it meanwhile.

    Raises:
        UsageError: in the words of `qemu-img amend`; nothing changed.
        IoFailure: the image is good; some of the changes are made, in the order above.
        JobCancelled: from `work.checkpoint`; nothing changed.
    Waits: I/O. Checkpoint: through `work.checkpoint`.
    """
    image = driver.image
    version = wanted_version(image.header, options)
    check_options(image, options, version, force=work.force)
    hides_backing = image.has_backing or backing_of(image.header, options)[0] is not None
    if version < image.header.version:
        size = image.size if options.size is None else options.size
        amend_version.check_may_downgrade(image, driver.internal_snapshots.table, size, hides_backing=hides_backing)
    image.check_usable()
    await image.settle()
    width = await _new_width(image, options, work)
    try:
        await image.begin_metadata_change()
        if isinstance(options.encrypt, QCryptoBlockAmendOptionsLuks) and driver.volume is not None:
            await driver.volume.amend(image.child("file"), options.encrypt, force=work.force)
        if version > image.header.version:
            await amend_version.upgrade(driver)
    except BaseException:
        if width is not None:
            await width.drop()
        raise
    if width is not None:
        await width.switch(driver)
    is_changed = await _change_the_rest(driver, options) or width is not None or options.encrypt is not None
    if version < driver.image.header.version:
        await amend_version.downgrade(driver, work, hides_backing=hides_backing, may_stop=not is_changed)


async def _new_width(image: Image, options: Qcow2AmendOptions, work: Amending) -> "amend_width.NewWidth | None":
    """Write counts of the new width, if that is another one."""
    if options.refcount_bits is None or options.refcount_bits == image.header.refcount_bits:
        return None
    width = await amend_width.plan_width(image, options.refcount_bits, work)
    await width.write(work)
    return width


async def _change_the_rest(driver: "Qcow2", options: Qcow2AmendOptions) -> bool:
    """Flags, names and length; returns whether there was anything to change."""
    before = driver.image.header
    await _change_flags(driver.image, options)
    if options.data_file is not None:
        await driver.image.transaction.rewrite_header(lambda header: with_data_file(header, options))
    if options.backing_file is not None or options.backing_fmt is not None:
        await driver.image.transaction.name_backing_file(*backing_of(driver.image.header, options))
    if options.size is not None and options.size != driver.image.size:
        await driver.image.begin_change()
        await resize.resize(driver.image, options.size)
    return driver.image.header != before


async def _change_flags(image: Image, options: Qcow2AmendOptions) -> None:
    header = image.header
    compatible, autoclear = int(header.compatible), int(header.autoclear)
    if options.lazy_refcounts is not None:
        lazy = int(Compatible.LAZY_REFCOUNTS)
        compatible = compatible | lazy if options.lazy_refcounts else compatible & ~lazy
    if options.data_file_raw is False:
        autoclear &= ~int(Autoclear.DATA_FILE_RAW)
    if (compatible, autoclear) != (int(header.compatible), int(header.autoclear)):
        await image.transaction.switch_header(
            lambda header: replace(header, compatible=compatible, autoclear=autoclear), FIELD_FEATURES
        )
