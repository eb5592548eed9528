"""What amending an image refuses, all of it known before anything is written; texts are those of `qemu-img amend`."""

import errno
import os
from typing import Final

from msgspec.structs import replace

from blockjobs.base.errors import UsageError
from blockjobs.block.amend_options import Qcow2AmendOptions, QCryptoBlockAmendOptions, QCryptoBlockAmendOptionsQcow
from blockjobs.block.drivers.qcow2 import amend_version, resize
from blockjobs.block.drivers.qcow2.header import BACKING_FORMAT_MAX
from blockjobs.block.drivers.qcow2.header_update import lay_out, tail_of, with_backing
from blockjobs.block.drivers.qcow2.image import Image
from blockjobs.wire.qcow2 import BACKING_NAME_MAX, CRYPT_NONE, EXT_DATA_FILE, Header

VERSIONS: Final = {"v2": 2, "v3": 3}
WIDTHS: Final = (1, 2, 4, 8, 16, 32, 64)


def wanted_version(header: Header, options: Qcow2AmendOptions) -> int:
    """The version that the image is to have.

    Raises:
        UsageError: there is none like that.
    """
    if options.version is None:
        return header.version
    if options.version not in VERSIONS:
        raise UsageError(f"Unknown compatibility level {options.version}")
    return VERSIONS[options.version]


def check_options(image: Image, options: Qcow2AmendOptions, version: int, *, force: bool) -> None:
    """Refuse options that contradict the image or each other.

    Raises:
        UsageError: they do.
    """
    header = image.header
    if options.encrypt is not None:
        _check_encryption(header, options.encrypt)
    _check_counts(header, options, version)
    _check_files(header, options)
    if options.size is not None:
        if options.size != image.size:
            resize.check_length(image, options.size)
        if max(version, header.version) < 3 and header.snapshots and options.size != image.size:
            raise UsageError("Can't resize a v2 image which has snapshots")
        if options.size < image.size and not force:
            raise UsageError("Shrinking an image deletes the data beyond its new end: say so with 'force'")
    _check_room(header, options, version)


def _check_encryption(header: Header, wanted: QCryptoBlockAmendOptions) -> None:
    if header.crypt_method == CRYPT_NONE:
        raise UsageError("image is not encrypted, can't amend")
    if isinstance(wanted, QCryptoBlockAmendOptionsQcow):
        raise UsageError("Amend can't be used to change the qcow2 encryption format")
    if header.luks is None:
        raise UsageError("Only LUKS encryption options can be amended for qcow2 with blockdev-amend")


def _check_counts(header: Header, options: Qcow2AmendOptions, version: int) -> None:
    bits = header.refcount_bits if options.refcount_bits is None else options.refcount_bits
    if bits not in WIDTHS:
        raise UsageError("Refcount width must be a power of two and may not exceed 64 bits")
    if version < 3 and bits != 16:
        if options.refcount_bits is None:
            raise UsageError("compat=0.10 requires refcount_bits=16")
        raise UsageError(
            "Refcount widths other than 16 bits require compatibility level 1.1 or above (use compat=1.1 or greater)"
        )
    if version < 3 and options.lazy_refcounts:
        raise UsageError(
            "Lazy refcounts only supported with compatibility level 1.1 and above (use compat=1.1 or greater)"
        )


def _check_files(header: Header, options: Qcow2AmendOptions) -> None:
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
    if options.backing_fmt is not None and len(os.fsencode(options.backing_fmt)) > BACKING_FORMAT_MAX:
        raise UsageError(f"backing-fmt: no format has a name of more than {BACKING_FORMAT_MAX} bytes")


def _check_room(header: Header, options: Qcow2AmendOptions, version: int) -> None:
    """Lay out each header that is to be written, one after the other, as they would lie in the file."""
    before = header
    if version > header.version:
        before = _placed(amend_version.upgraded(before), before)
    if options.data_file is not None:
        before = _placed(with_data_file(before, options), before)
    if options.backing_file is not None or options.backing_fmt is not None:
        before = _placed(with_backing(before, *backing_of(before, options)), before)
    if version < header.version:
        _placed(amend_version.downgraded(replace(before, refcount_order=4)), before)


def _placed(header: Header, before: Header) -> Header:
    return lay_out(header, tail_of(before)).header


def with_data_file(header: Header, options: Qcow2AmendOptions) -> Header:
    """The header that names that data file; with an empty name none, so that whoever opens the image must name it."""
    name = (options.data_file or "").encode("utf-8", "surrogateescape")
    return header.with_extension(EXT_DATA_FILE, name or None)


def backing_of(header: Header, options: Qcow2AmendOptions) -> tuple[str | None, str | None]:
    """Name and format of the backing file that the image is to have."""
    file = header.backing_file if options.backing_file is None else options.backing_file or None
    return file, header.backing_format if options.backing_fmt is None else options.backing_fmt
