"""How large an image would become, before anybody makes it (`qemu-img measure`)."""

from collections.abc import AsyncIterator, Mapping
from typing import Final, NamedTuple

from msgspec.structs import replace

from blockjobs.base.errors import UsageError
from blockjobs.block.bitmap_store import map_bytes
from blockjobs.block.chain_map import MapRun, map_chain
from blockjobs.block.drivers.file_create import PreallocMode
from blockjobs.block.drivers.qcow2 import create as qcow2
from blockjobs.block.drivers.qcow2.driver import Qcow2
from blockjobs.block.luks import volume
from blockjobs.block.node import Node
from blockjobs.jobs.create_image import new_qcow2, new_volume
from blockjobs.jobs.create_options import (
    CreateOptions,
    FileCreateOptions,
    LuksCreateOptions,
    Qcow2CreateOptions,
    QCryptoBlockCreateOptionsLuks,
)
from blockjobs.wire.qcow2 import L1_BYTES_MAX, SECTOR

_DIRECTORY_ENTRY_BYTES: Final = 24
"""Of a bitmap's entry, without its name; entries are rounded up to 8 bytes."""


class Measured(NamedTuple):
    """Lengths of files in bytes.

    Attributes:
        required: of the image when it is new, with what the source holds.
        fully_allocated: when every byte of the disk has been written.
        bitmaps: what the source's persistent bitmaps would add; None if one of the formats cannot have any.
    """

    required: int
    fully_allocated: int
    bitmaps: int | None = None


async def measure(objects: Mapping[str, object], options: CreateOptions, source: Node | None) -> Measured:
    """Say how large the image would be that `options` describe, as QEMU does; nothing is made.

    Args:
        objects: where the secrets are that `options` name.
        options: for `create_image`, with the source's length as the size; the file is not looked at.
        source: what is to be copied there; the caller may read it. None for an empty disk.

    Raises:
        UsageError: there can be no such image.
        IoFailure, ImageCorrupt: the source's metadata could not be read.
    Waits: metadata reads of the source. Checkpoint: no.
    """
    match options:
        case FileCreateOptions():
            return Measured(_sectors(options.size), _sectors(options.size))
        case LuksCreateOptions():
            volume.secret_of(objects, options.key_secret, "key-secret")
            length = new_volume(options).payload_bytes() + _sectors(options.size)
            return Measured(length, length)
        case Qcow2CreateOptions():
            return await _measure_qcow2(objects, options, source)
    raise UsageError("Block driver does not support size measurement")


def _sectors(size: int) -> int:
    return -(-size // SECTOR) * SECTOR


async def _measure_qcow2(objects: Mapping[str, object], options: Qcow2CreateOptions, source: Node | None) -> Measured:
    wanted = new_qcow2(options, size=_sectors(options.size))
    wanted.check()
    # As if all tables were there: guests make them as they write. QEMU counts an external data file in.
    plan = qcow2.Plan.of(replace(wanted, preallocation=PreallocMode.METADATA, data_file_name=None))
    if plan.header.l1_entries * 8 > L1_BYTES_MAX:
        raise UsageError("The image size is too large (try using a larger cluster size)")
    unit = wanted.cluster_size
    tables = (plan.clusters - plan.data_clusters) * unit
    if isinstance(options.encrypt, QCryptoBlockCreateOptionsLuks):
        volume.secret_of(objects, options.encrypt.key_secret, "encrypt.key-secret")
        tables += -(-new_volume(options.encrypt).payload_bytes() // unit) * unit
    whole = plan.data_clusters * unit
    stored = 0
    if wanted.preallocation in (PreallocMode.FULL, PreallocMode.FALLOC) or (source and wanted.backing_file):
        # What hides the backing file is not known before.
        stored = whole
    elif source is not None:
        stored = await _clusters_with_data(map_chain(source), unit, wanted.size) * unit
    return Measured(tables + stored, tables + whole, _bitmaps(source, wanted))


async def _clusters_with_data(runs: AsyncIterator[MapRun], unit: int, length: int) -> int:
    """How many clusters of `unit` bytes, of the first `length`, have something in them that is not known to be zeroes.

    A snapshot may be longer than the disk.
    """
    count = counted_to = 0
    async for run in runs:
        if run.at >= length:
            break
        if run.is_data and not run.zero:
            first, end = max(run.at // unit, counted_to), -(-min(run.at + run.length, length) // unit)
            count += max(0, end - first)
            counted_to = max(end, counted_to)
    return count


def _bitmaps(source: Node | None, wanted: qcow2.NewImage) -> int | None:
    """Bits, their tables and the directory of all persistent bitmaps."""
    if (
        source is None
        or not isinstance(source.driver, Qcow2)
        or source.driver.image.geometry.version < 3
        or wanted.is_v2
    ):
        return None
    unit = wanted.cluster_size
    clusters = directory = 0
    for bitmap in source.bitmaps:
        if bitmap.name is None or not bitmap.persistent or bitmap.inconsistent:
            continue
        pieces = -(-map_bytes(wanted.size, bitmap.map.granularity) // unit)
        clusters += pieces + -(-pieces * 8 // unit)
        directory += -(-(_DIRECTORY_ENTRY_BYTES + len(bitmap.name.encode("utf-8", "surrogateescape"))) // 8) * 8
    return (clusters + -(-directory // unit)) * unit
