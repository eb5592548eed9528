"""Internal snapshots and persistent bitmaps as listings show them; nothing here changes them."""

from typing import Any, Final

from blockjobs.base.errors import UsageError
from blockjobs.block.driver import Child
from blockjobs.wire.qcow2 import Header
from blockjobs.wire.qcow2_tables import BITMAP_AUTO, BITMAP_IN_USE, NO_ICOUNT, BitmapEntry, SnapshotEntry

SNAPSHOT_TABLE_BYTES_MAX: Final = 64 << 20
"""65,536 snapshots with names of a usual length. The table's own size is not in the header."""
_READ_STEP: Final = 1 << 20
_SNAPSHOT_BYTES_MIN: Final = 40


async def read_snapshots(file: Child, header: Header) -> list[SnapshotEntry]:
    """The snapshot table.

    Raises:
        UsageError: it is cut off or too large.
        IoFailure: it could not be read.
    Waits: reads. Checkpoint: no.
    """
    raw = bytearray()
    entries: list[SnapshotEntry] = []
    at = 0
    while len(entries) < header.snapshots:
        try:
            entry, at = SnapshotEntry.decode(memoryview(raw), at)
        except ValueError as error:
            place = header.snapshots_at + len(raw)
            missing = file.length - place
            if missing <= 0 or "cut off" not in str(error):
                raise UsageError(f"Could not read snapshots: {error}") from None
            if len(raw) >= SNAPSHOT_TABLE_BYTES_MAX:
                raise UsageError("Snapshot table is too big") from None
            wanted = max(_SNAPSHOT_BYTES_MIN, min(_READ_STEP, 128 * (header.snapshots - len(entries))))
            raw = raw + await file.read(place, min(wanted, missing))
        else:
            entries.append(entry)
    return entries


def snapshot_info(entry: SnapshotEntry) -> dict[str, Any]:
    """A member of ImageInfo's `snapshots`."""
    shown: dict[str, Any] = {
        "id": entry.id.decode("utf-8", "replace"),
        "name": entry.name.decode("utf-8", "replace"),
        "vm-state-size": entry.vm_state_bytes,
        "date-sec": entry.date_s,
        "date-nsec": entry.date_ns,
        "vm-clock-sec": entry.vm_clock_ns // 10**9,
        "vm-clock-nsec": entry.vm_clock_ns % 10**9,
    }
    if entry.icount not in (None, NO_ICOUNT):
        shown["icount"] = entry.icount
    return shown


async def read_bitmaps(file: Child, header: Header) -> list[BitmapEntry]:
    """The directory of persistent bitmaps; empty if they are not valid any more.

    Raises:
        UsageError: it is broken.
        IoFailure: it could not be read.
    Waits: one read of at most 64 MiB. Checkpoint: no.
    """
    place = header.bitmaps
    if place is None:
        return []
    if place.directory_at + place.directory_bytes > file.length:
        raise UsageError("Broken bitmap directory")
    raw = await file.read(place.directory_at, place.directory_bytes)
    entries: list[BitmapEntry] = []
    at = 0
    try:
        for _ in range(place.bitmaps):
            entry, at = BitmapEntry.decode(raw, at)
            entries.append(entry)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return entries


def bitmap_info(entry: BitmapEntry) -> dict[str, Any]:
    """A member of the format-specific `bitmaps`."""
    flags = [name for name, bit in (("in-use", BITMAP_IN_USE), ("auto", BITMAP_AUTO)) if entry.flags & bit]
    granularity = 1 << min(entry.granularity_bits, 63)
    return {"name": entry.name.decode("utf-8", "replace"), "granularity": granularity, "flags": flags}
