"""Between versions 2 and 3: the header is written anew, and what version 2 cannot say is said otherwise before."""

from array import array
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from blockjobs.base.errors import UsageError
from blockjobs.base.span import Span
from blockjobs.block.amend_options import Amending
from blockjobs.block.drivers.qcow2 import resize, snapshot_tree
from blockjobs.block.drivers.qcow2.entries import is_stored, runs_of
from blockjobs.block.drivers.qcow2.image import Image
from blockjobs.block.drivers.qcow2.tables import Table
from blockjobs.wire.qcow2 import V2_BYTES, WRITTEN_V3_BYTES, Header, Incompatible
from blockjobs.wire.qcow2_tables import COMPRESSED, OFFSET, ZERO, SnapshotEntry

if TYPE_CHECKING:
    from blockjobs.block.drivers.qcow2.driver import Qcow2

_MAY_BE_SET: Final = Incompatible.DIRTY
_VM_STATE_END: Final = 1 << 32
"""Version 2 has 32 bits for the length of a machine's state."""


def upgraded(header: Header) -> Header:
    """The header in version 3, with all features off."""
    return replace(header, version=3, header_bytes=WRITTEN_V3_BYTES)


def downgraded(header: Header) -> Header:
    """The header in version 2, which has no place for features."""
    return replace(header, version=2, header_bytes=V2_BYTES, incompatible=0, compatible=0, autoclear=0)


async def upgrade(driver: "Qcow2") -> None:
    """Make a version 2 image one of version 3, with all features off. Waits: writes. Checkpoint: no.

    Raises:
        UsageError, IoFailure: it has the old header or the new one.
    """
    await driver.image.transaction.rewrite_header(upgraded)
    await driver.reload()


def check_may_downgrade(image: Image, snapshots: Iterable[SnapshotEntry], size: int, *, hides_backing: bool) -> None:
    """Refuse what version 2 has no place for.

    Args:
        size: virtual length in bytes that the image is to have then.
        hides_backing: see `downgrade`.

    Raises:
        UsageError: in the words of `qemu-img amend` where it refuses too.
    """
    header = image.header
    if header.has_data_file:
        raise UsageError("Cannot downgrade an image with a data file")
    if features := int(header.incompatible) & ~int(_MAY_BE_SET):
        raise UsageError(f"Cannot downgrade an image with incompatible features {features:#x} set")
    if header.bitmaps is not None:
        raise UsageError("Cannot downgrade an image with persistent dirty bitmaps: remove them first")
    if any(each.disk_size not in (None, size) or each.vm_state_bytes >= _VM_STATE_END for each in snapshots):
        raise UsageError("Internal snapshots prevent downgrade of image")
    if header.snapshots and hides_backing:
        raise UsageError("Cannot downgrade an image with snapshots and a backing file: delete the snapshots first")


async def downgrade(driver: "Qcow2", work: Amending, *, hides_backing: bool, may_stop: bool) -> None:
    """Make a version 3 image one of version 2.

    Clusters that say "zeroes" become absent, or, where a backing file would show through, clusters full of zeroes.

    Args:
        hides_backing: there is a backing file, open or only named, that absent clusters would show.
        may_stop: nothing else has changed, so that a cancel leaves the old image.

    Raises:
        UsageError, IoFailure: the image is one of version 3, and shows what it did.
        JobCancelled: likewise.
    Waits: table I/O, commits; writes of zeroes. Checkpoint: through `work.checkpoint`, if it may stop.
    """
    image = driver.image
    await image.begin_metadata_change()
    trees = [image.mapping.l1.words[:]]
    trees += [await driver.internal_snapshots.l1_of(each) for each in driver.internal_snapshots.table]
    users = Counter(word & OFFSET for words in trees for word in words if word & OFFSET)
    work.expect(users.total())
    for number, words in enumerate(trees):
        async for index, table in snapshot_tree.tables(image, words):
            if may_stop:
                await work.checkpoint()
            if hides_backing and number == 0:
                await _fill_zeroes(image, index, table)
            else:
                _forget_zeroes(image, index * image.geometry.l2_span, table, users[words[index] & OFFSET])
            work.advance(1)
    await image.settle()
    await image.transaction.rewrite_header(downgraded)
    await driver.reload()


def _forget_zeroes(image: Image, guest_at: int, table: Table, users: int) -> None:
    """Nothing is behind this image: absent clusters read as zeroes too.

    Args:
        guest_at: offset of the first byte that the table maps.
        users: how many L1 tables refer to this one; what it refers to is counted once for each of them.
    """
    for run in runs_of(table.items, image.geometry):
        if run.word & COMPRESSED or not run.word & ZERO:
            continue
        image.check_entries(run, guest_at + run.start * image.geometry.cluster_size)
        if is_stored(run, image.geometry):
            for _ in range(users):
                image.free_entries(run, requested=False)
        table.items[run.start : run.end] = array("Q", bytes(8 * (run.end - run.start)))
        image.mapping.l2.touch(table, run.start, run.end)


async def _fill_zeroes(image: Image, index: int, table: Table) -> None:
    """Write zero bytes where the active table says "zeroes"."""
    size, at = image.geometry.cluster_size, index * image.geometry.l2_span
    spans = [
        Span(at + run.start * size, (run.end - run.start) * size)
        for run in runs_of(table.items, image.geometry)
        if run.word & ZERO and not run.word & COMPRESSED
    ]
    for span in spans:
        for piece in span.intersect(Span(0, image.size)).split(1 << 20):
            await image.begin_change()
            await resize.put_zeroes(image, piece)
