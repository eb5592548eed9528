"""Tables that turn out to be wrong while an image is in use: the request fails, the header says so, the event comes."""

import re
import struct

import pytest
from tiny_images import in_loop, is_marked, new_disk, reopen, unmarked, write

from blockjobs.base.errors import ImageCorrupt, IoFailure
from blockjobs.base.offload import InlineOffload
from blockjobs.base.span import Span
from blockjobs.block.amend_options import Amending, Qcow2AmendOptions
from blockjobs.block.bitmap import DirtyBitmap
from blockjobs.block.drivers.qcow2.check import check_image
from blockjobs.block.drivers.qcow2.reads import read_guest
from blockjobs.block.node_bitmap import NodeBitmap
from blockjobs.block.vocabulary import ZeroMode
from blockjobs.testing.child import MemoryChild
from blockjobs.wire.qcow2_tables import COMPRESSED, COPIED, ZERO

SIZE = 4096
DISK = 1 << 18
OFFSET = 0x00FF_FFFF_FFFF_FE00
BEYOND = 1 << 40


class Places:
    """Where things are in an image: an L2 table for the disk, one refcount block, bitmaps and snapshots if any."""

    def __init__(self, raw):
        self.raw = raw
        self.l1, self.reftable, self.snapshots = (self.word(at) for at in (40, 48, 64))
        self.l2, self.block = self.word(self.l1) & OFFSET, self.word(self.reftable)
        if found := re.search(rb"\x23\x85\x28\x75\0\0\0\x18", raw[:SIZE]):
            self.directory = self.word(found.start() + 24)
            self.bitmap_table = self.word(self.directory)
            self.bits = self.word(self.bitmap_table)

    def word(self, at):
        return struct.unpack_from(">Q", self.raw, at)[0]

    def put(self, at, value, size=8):
        self.raw[at : at + size] = value.to_bytes(size)

    def uncount(self, at):
        """The cluster there counts as free."""
        self.put(self.block + at // SIZE * 2, 0, 2)


async def spoiled(spoil, *, bitmap=False, snapshot=False, **options):
    """An image of 32 clusters of data, and whatever else, that `spoil` has changed; and what is said of it, as a list.

    Returns:
        The file, its driver, and the corruption that is reported: (error, whether it is fatal).
    """
    file, driver = await new_disk(size=DISK, **options)
    await write(driver, Span(0, DISK // 2), b"data" * (DISK // 8))
    if snapshot:
        await driver.internal_snapshots.create("s", date_ns=0)
        await write(driver, Span(0, SIZE), b"more" * (SIZE // 4))
    if bitmap:
        await driver.bitmap_store.load([])
        map_ = DirtyBitmap(DISK, 512)
        map_.set(Span(0, 512))
        driver.bitmap_store.bitmaps.append(NodeBitmap(map=map_, name="b", persistent=True))
    await driver.close()
    places = Places(file.content)
    spoil(places)
    driver = await reopen(file)
    if bitmap:
        await driver.bitmap_store.load([])
    said = []
    driver.image.on_corrupt = lambda error, is_fatal: said.append((error, is_fatal))
    return file, driver, said


async def fails_and_marks(file, driver, said, request, match):
    """The request fails; nothing changes but the mark, and whoever comes next is refused, except for reading."""
    before = unmarked(file)
    with pytest.raises(ImageCorrupt, match=match):
        await request
    assert is_marked(file)
    assert [(str(error), is_fatal) for error, is_fatal in said] == [(str(said[0][0]), True)]
    with pytest.raises(IoFailure):
        await driver.reserve(Span(DISK - SIZE, SIZE))
    return before


# --- bitmaps

BITMAP_LIES = {
    "bits on the L2 table": (lambda it: it.put(it.bitmap_table, it.l2), "overlaps with other metadata"),
    "bits on the header": (lambda it: it.put(it.bitmap_table, it.reftable), "overlaps with other metadata"),
    "table on the refcount block": (lambda it: it.put(it.directory, it.block), "overlaps with other metadata"),
    "bits that count as free": (lambda it: it.uncount(it.bits), "count as free"),
    "table that counts as free": (lambda it: it.uncount(it.bitmap_table), "count as free"),
    "directory that counts as free": (lambda it: it.uncount(it.directory), "count as free"),
}


@pytest.mark.parametrize("name", BITMAP_LIES)
def test_bitmaps_at_places_that_are_not_theirs(name):
    async def body():
        spoil, match = BITMAP_LIES[name]

        def also_readable(it):
            it.put(it.directory + 12, 1, 4)  # in use: what its table says is not looked at when it is opened
            spoil(it)

        file, driver, said = await spoiled(also_readable, bitmap=True)
        before = await fails_and_marks(file, driver, said, driver.reserve(Span(DISK - SIZE, SIZE)), match)
        assert unmarked(file) == before

    in_loop(body)


def test_a_directory_on_an_l2_table_is_not_written():
    async def body():
        def spoil(it):
            # The table that a guest's bytes have made look like a directory.
            it.raw[it.l2 : it.l2 + 32] = it.raw[it.directory : it.directory + 32]
            at = re.search(rb"\x23\x85\x28\x75\0\0\0\x18", it.raw[:SIZE]).start()
            it.put(at + 24, it.l2)

        file, driver, said = await spoiled(spoil, bitmap=True)
        before = await fails_and_marks(
            file, driver, said, driver.reserve(Span(DISK - SIZE, SIZE)), "directory overlaps with other metadata"
        )
        assert unmarked(file) == before

    in_loop(body)


def test_a_bitmap_is_not_stored_over_metadata_that_counts_as_free():
    async def body():
        file, driver, said = await spoiled(lambda it: it.uncount(it.l2))
        await driver.bitmap_store.load([])
        map_ = DirtyBitmap(DISK, 512)
        map_.set(Span(0, 512))
        driver.bitmap_store.bitmaps.append(NodeBitmap(map=map_, name="b", persistent=True))
        await driver.image.begin_change()
        driver.image.allocator.is_free(Places(file.content).l2 // SIZE, 1)
        driver.image.allocator.guarded.add(Places(file.content).l2 // SIZE)
        await fails_and_marks(file, driver, said, driver.bitmap_store.store(), "overlaps with active L2 table")

    in_loop(body)


def test_a_bitmap_at_a_place_that_is_not_its_own_can_be_removed():
    async def body():
        def spoil(it):
            it.put(it.directory + 12, 1, 4)
            it.put(it.bitmap_table, it.l2)

        file, driver, said = await spoiled(spoil, bitmap=True)
        await driver.bitmap_store.remove("b")
        await write(driver, Span(0, DISK), b"x" * DISK)
        await driver.close()
        found = await check_image(file, offload=InlineOffload())
        assert not found.corruptions, found.problems
        assert not said

    in_loop(body)


def test_a_write_on_the_directory_is_refused_by_its_name():
    async def body():
        file, driver, said = await spoiled(lambda it: it.put(it.l2 + 248, COPIED | it.directory), bitmap=True)
        await fails_and_marks(file, driver, said, driver.reserve(GONE), "overlaps with bitmap directory")

    in_loop(body)


# --- lengths

TABLE_LIES = {
    "L2 table not at a cluster": (lambda it: it.put(it.l1, COPIED | it.l2 + 512), "unaligned"),
    "L2 table beyond the file": (lambda it: it.put(it.l1, COPIED | BEYOND), "lies beyond the end"),
    "entry not at a cluster": (lambda it: it.put(it.l2 + 248, COPIED | SIZE * 9 + 512), "unaligned"),
    "entry on the L1 table": (lambda it: it.put(it.l2 + 248, COPIED | it.l1), "overlaps with active L1 table"),
    "stream on the header": (lambda it: it.put(it.l2 + 248, COMPRESSED), "overlaps with qcow2_header"),
    "stream on refcounts": (lambda it: it.put(it.l2 + 248, COMPRESSED | it.block), "overlaps with refcount block"),
    "zeroes kept on the L2 table": (lambda it: it.put(it.l2 + 248, ZERO | it.l2), "overlaps with active L2 table"),
}
GONE = Span(DISK // 2 - 2 * SIZE, 2 * SIZE)
"""The last two clusters with data; the entry of the last is one of the lies."""
REQUESTS = {
    "shrink": lambda driver: driver.resize(GONE.at),
    "discard": lambda driver: driver.discard(GONE),
    "zero and unmap": lambda driver: driver.zero(GONE, ZeroMode.UNMAP),
    "write": lambda driver: driver.reserve(GONE),
    "write a part": lambda driver: driver.reserve(Span(GONE.at + SIZE + 512, 512)),
    "compressed write": lambda driver: driver.write_compressed([(GONE.at, b"s" * 99), (GONE.at + SIZE, b"s" * 99)]),
    "empty": lambda driver: driver.make_empty(),
    "preallocate": lambda driver: driver.preallocate(Span(0, DISK), ZeroMode.UNMAP),
    "snapshot": lambda driver: driver.internal_snapshots.create("s", date_ns=0),
}


@pytest.mark.parametrize("request_name", REQUESTS)
@pytest.mark.parametrize("name", TABLE_LIES)
def test_requests_that_meet_a_broken_table(name, request_name):
    async def body():
        spoil, match = TABLE_LIES[name]
        file, driver, said = await spoiled(spoil)
        if request_name == "snapshot" and "overlaps" in match:
            match = "refer to metadata"
        await fails_and_marks(file, driver, said, REQUESTS[request_name](driver), match)
        await driver.close()
        places = Places(file.content)
        assert places.word(48) == places.reftable and places.raw[:4] == b"QFI\xfb"

    in_loop(body)


@pytest.mark.parametrize("request_name", ["shrink", "discard", "write", "compressed write", "snapshot"])
@pytest.mark.parametrize("what", ["reftable", "block", "l1"])
def test_an_l2_table_in_the_place_of_other_metadata_is_not_changed(what, request_name):
    async def body():
        file, driver, said = await spoiled(lambda it: it.put(it.l1, COPIED | getattr(it, what)))
        before = await fails_and_marks(
            file, driver, said, REQUESTS[request_name](driver), "overlaps with other metadata"
        )
        assert unmarked(file) == before

    in_loop(body)


@pytest.mark.parametrize("name", ["L2 table not at a cluster", "L2 table beyond the file"])
def test_a_disk_does_not_grow_over_a_broken_table(name):
    """Its last cluster has a rest that becomes visible, so its table is asked for."""

    async def body():
        def spoil(it):
            it.put(24, DISK // 2 - 512)
            TABLE_LIES[name][0](it)

        file, driver, said = await spoiled(spoil)
        await fails_and_marks(file, driver, said, driver.resize(DISK * 64), TABLE_LIES[name][1])
        assert driver.length == DISK // 2 - 512 == Places(file.content).word(24)

    in_loop(body)


BLOCK_LIES = {
    "refcount block not at a cluster": (lambda it: it.put(it.reftable, it.block + 512), "unaligned"),
    "refcount block beyond the file": (lambda it: it.put(it.reftable, BEYOND), "lies beyond the end"),
    "no refcount block": (lambda it: it.put(it.reftable, 0), "overlaps with qcow2_header"),
}


@pytest.mark.parametrize("name", BLOCK_LIES)
def test_a_disk_does_not_grow_with_broken_refcounts(name):
    async def body():
        spoil, match = BLOCK_LIES[name]
        file, driver, said = await spoiled(spoil)
        await fails_and_marks(file, driver, said, driver.resize(DISK << 20), match)
        assert driver.length == DISK == Places(file.content).word(24)

    in_loop(body)


@pytest.mark.parametrize("name", ["refcount block not at a cluster", "refcount block beyond the file"])
def test_what_cannot_be_counted_down_marks_the_image_when_it_is_flushed(name):
    """The discard has succeeded, and that is durable; the next change is refused."""

    async def body():
        file, driver, said = await spoiled(BLOCK_LIES[name][0])
        await driver.discard(GONE)
        assert not said
        await driver.flush()
        assert is_marked(file) and [is_fatal for _, is_fatal in said] == [True]
        with pytest.raises(IoFailure):
            await driver.discard(Span(0, SIZE))
        await driver.close()
        assert (await read_guest((await reopen(file, read_only=True)).image, GONE)) == bytes(GONE.length)

    in_loop(body)


def test_a_read_marks_what_may_be_written():
    async def body():
        file, driver, said = await spoiled(TABLE_LIES["entry not at a cluster"][0])
        before = await fails_and_marks(file, driver, said, driver.resolve(GONE), "unaligned")
        assert unmarked(file) == before
        assert await read_guest(driver.image, Span(0, SIZE)) == b"data" * (SIZE // 4)

    in_loop(body)


# --- amending


class NobodyWaits:
    """An `Amending` of which no progress is wanted."""

    force = True

    def expect(self, units):
        pass

    def advance(self, units):
        pass

    async def checkpoint(self):
        pass


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *[(name, {"size": GONE.at}) for name in TABLE_LIES],
        ("L2 table not at a cluster", {"version": "v2"}),
        ("L2 table beyond the file", {"version": "v2"}),
        ("zeroes kept on the L2 table", {"version": "v2"}),
    ],
)
def test_amending_an_image_with_a_broken_table(name, options):
    async def body():
        spoil, match = TABLE_LIES[name]
        file, driver, said = await spoiled(spoil)
        work: Amending = NobodyWaits()
        await fails_and_marks(file, driver, said, driver.amend(Qcow2AmendOptions(**options), work), match)
        assert driver.image.header.version == 3

    in_loop(body)


# --- snapshots


def in_snapshot(at_l1, at_l2):
    """Changes the snapshot's first L1 entry, or the last entry in use of its L2 table."""

    def spoil(it):
        l1 = it.word(it.snapshots)
        l2 = it.word(l1) & OFFSET
        if at_l1 is not None:
            it.put(l1, at_l1(it))
        if at_l2 is not None:
            it.put(l2 + 248, at_l2(it))

    return spoil


SNAPSHOT_LIES = {
    "L2 table not at a cluster": (in_snapshot(lambda it: it.l2 + 512, None), "unaligned"),
    "L2 table beyond the file": (in_snapshot(lambda it: BEYOND, None), "lies beyond the end"),
    "L2 table on refcounts": (
        in_snapshot(lambda it: it.block, None),
        "refer to metadata",
    ),
    "entry not at a cluster": (in_snapshot(None, lambda it: SIZE * 9 + 512), "unaligned"),
    "entry on the active L2 table": (in_snapshot(None, lambda it: it.l2), "refer to metadata"),
    "stream on refcounts": (in_snapshot(None, lambda it: COMPRESSED | it.block), "refer to metadata"),
    "entry that counts as free": (in_snapshot(None, lambda it: len(it.raw) // SIZE * SIZE + 9 * SIZE), "count"),
}


@pytest.mark.parametrize("name", SNAPSHOT_LIES)
def test_a_snapshot_with_broken_tables_is_not_applied(name):
    async def body():
        spoil, match = SNAPSHOT_LIES[name]
        file, driver, said = await spoiled(spoil, snapshot=True)
        await fails_and_marks(file, driver, said, driver.internal_snapshots.apply("1"), match)
        assert await read_guest(driver.image, Span(0, 8)) == b"moremore"
        await driver.close()
        assert Places(file.content).word(24) == DISK

    in_loop(body)


@pytest.mark.parametrize("name", [name for name in SNAPSHOT_LIES if "free" not in name])
def test_a_snapshot_with_broken_tables_can_be_deleted(name):
    """What they refer to leaks, and that is said: the image is sound without it."""

    async def body():
        file, driver, said = await spoiled(SNAPSHOT_LIES[name][0], snapshot=True)
        await driver.internal_snapshots.delete("1")
        assert [is_fatal for _, is_fatal in said] == [False]
        assert not is_marked(file) and not driver.internal_snapshots.entries
        await write(driver, Span(0, DISK), b"x" * DISK)
        await driver.close()
        found = await check_image(MemoryChild(bytes(file.content)), offload=InlineOffload())
        assert not found.corruptions and found.leaks, found.problems

    in_loop(body)


def test_a_snapshot_is_not_made_of_what_counts_as_free():
    async def body():
        file, driver, said = await spoiled(lambda it: it.uncount(it.word(it.l2 + 248) & OFFSET))
        request = driver.internal_snapshots.create("s", date_ns=0)
        await fails_and_marks(file, driver, said, request, "which counts as free")
        assert not driver.internal_snapshots.entries

    in_loop(body)
