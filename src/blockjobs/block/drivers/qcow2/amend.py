"""Changing what an image is: version, width of its reference counts, flags, names, length (spec/durability.md §1).

All checks come first. Then each change is one root change of its own, in an order in which every state between two of
them is a good image: upgrade, width, flags and names, length, downgrade.
"""

import errno
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from blockjobs.base.errors import UsageError
from blockjobs.block.amend_options import Amending, Qcow2AmendOptions, QCryptoBlockAmendOptionsLuks
from blockjobs.block.drivers.qcow2 import amend_version, amend_width, resize
from blockjobs.block.drivers.qcow2.image import Image
from blockjobs.wire.qcow2 import (
    BACKING_NAME_MAX,
    EXT_DATA_FILE,
    FIELD_FEATURES,
    Autoclear,
    Compatible,
    Header,
)

if TYPE_CHECKING:
    from blockjobs.block.drivers.qcow2.driver import Qcow2

VERSIONS: Final = {"v2": 2, "v3": 3}
WIDTHS: Final = (1, 2, 4, 8, 16, 32, 64)


async def amend(driver: "Qcow2", options: Qcow2AmendOptions, work: Amending) -> None:
    """Make the image what the options say; nobody else uses it meanwhile.

    Raises:
        UsageError: in the words of `qemu-img amend`; nothing changed.
        IoFailure: the image is good; some of the changes are made, in the order above.
        JobCancelled: from `work.may_stop`; nothing changed that was not complete.
    Waits: I/O. Checkpoint: through `work.may_stop`.
    """
    image = driver.image
    version = _checked_version(image.header, options)
    bits = image.header.refcount_bits if options.refcount_bits is None else options.refcount_bits
    _check(image, options, version, bits, work)
    if version < image.header.version:
        size = image.size if options.size is None else options.size
        amend_version.check_may_downgrade(image, driver.internal_snapshots.table, size)
    await image.begin_metadata_change()
    await image.settle()
    if isinstance(options.encrypt, QCryptoBlockAmendOptionsLuks) and driver.volume is not None:
        await driver.volume.amend(image.child("file"), options.encrypt, force=work.force)
    if version > image.header.version:
        await amend_version.upgrade(driver)
    if bits != driver.image.header.refcount_bits:
        await amend_width.change_width(driver, bits, work)
    await _change_flags(driver.image, options)
    await _change_names(driver, options)
    if options.size is not None and options.size != driver.image.size:
        await driver.image.begin_change()
        await resize.resize(driver.image, options.size)
    if version < driver.image.header.version:
        await amend_version.downgrade(driver, work)


def _checked_version(header: Header, options: Qcow2AmendOptions) -> int:
    if options.version is None:
        return header.version
    if options.version not in VERSIONS:
        raise UsageError(f"Unknown compatibility level {options.version}")
    return VERSIONS[options.version]


def _check(image: Image, options: Qcow2AmendOptions, version: int, bits: int, work: Amending) -> None:
    """Everything that can be known before anything is done."""
    header = image.header
    if options.encrypt is not None and image.header.luks is None:
        raise UsageError("image is not encrypted, can't amend")
    if bits not in WIDTHS:
        raise UsageError("Refcount width must be a power of two and may not exceed 64 bits")
    if version < 3 and bits != 16:
        if options.version is not None:
            raise UsageError("compat=0.10 requires refcount_bits=16")
        raise UsageError(
            "Refcount widths other than 16 bits require compatibility level 1.1 or above (use compat=1.1 or greater)"
        )
    if version < 3 and options.lazy_refcounts:
        raise UsageError(
            "Lazy refcounts only supported with compatibility level 1.1 and above (use compat=1.1 or greater)"
        )
    if options.data_file is not None and not header.has_data_file:
        raise UsageError("data-file can only be set for images that use an external data file")
    if options.data_file_raw and not header.is_data_file_raw:
        raise UsageError("data-file-raw cannot be set on existing images")
    if options.backing_file and header.is_data_file_raw and options.data_file_raw is not False:
        raise UsageError("Backing file and data-file-raw cannot be used at the same time")
    if options.backing_file is not None and len(os.fsencode(options.backing_file)) > BACKING_NAME_MAX:
        raise UsageError(os.strerror(errno.EINVAL))
    if options.backing_fmt is not None and not (options.backing_file or header.backing_file):
        raise UsageError("backing-fmt is the format of a backing file: name one with backing-file")
    if options.size is not None:
        if options.size % 512:
            raise UsageError("The new size must be a multiple of 512")
        if options.size < image.size and not work.force:
            raise UsageError("Shrinking an image deletes the data beyond its new end: say so with 'force'")


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


async def _change_names(driver: "Qcow2", options: Qcow2AmendOptions) -> None:
    header = driver.image.header
    if options.data_file is not None:
        name = options.data_file.encode("utf-8", "surrogateescape")
        await driver.image.transaction.rewrite_header(lambda header: header.with_extension(EXT_DATA_FILE, name))
    if options.backing_file is not None or options.backing_fmt is not None:
        file = header.backing_file if options.backing_file is None else options.backing_file or None
        known = header.backing_format if options.backing_fmt is None else options.backing_fmt
        await driver.image.transaction.name_backing_file(file, known)
