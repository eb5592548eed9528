"""`overlap-check`: whoever asks for it has the L2 tables of snapshots guarded, whatever the reference counts say.

Everything else is guarded whatever is asked for (docs/adr/0017-counts-are-always-exact.md).
"""

import random
import struct

import pytest
from tiny_images import in_loop, is_marked, new_disk, reopen, unmarked, write

from blockjobs.base.errors import ImageCorrupt, IoFailure
from blockjobs.base.offload import InlineOffload
from blockjobs.base.span import Span
from blockjobs.block.drivers.qcow2 import inactive_tables
from blockjobs.block.drivers.qcow2.check import check_image
from blockjobs.block.drivers.qcow2.create import NewImage
from blockjobs.block.drivers.qcow2.options import Qcow2Options, Qcow2OverlapCheckFlags, tuning_of
from blockjobs.block.drivers.qcow2.options import Qcow2OverlapCheckMode as Mode
from blockjobs.block.drivers.qcow2.reads import read_guest
from blockjobs.block.options import BlockdevOptions
from blockjobs.block.reopen_plan import reopen as reopen_nodes
from blockjobs.schema.command import convert
from blockjobs.testing.child import MemoryChild
from blockjobs.testing.clock import run
from blockjobs.testing.host import SimHost
from blockjobs.wire.qcow2 import Header
from blockjobs.wire.qcow2_tables import COPIED

SIZE = 4096
DISK = 1 << 18
OFFSET = 0x00FF_FFFF_FFFF_FE00
DATA = b"data" * (SIZE // 4)
REFUSAL = r"Preventing invalid write on metadata \(overlaps with inactive L2 table\)"
FLAGS = Qcow2OverlapCheckFlags
GUARDED = [Mode.ALL, FLAGS(inactive_l2=True), FLAGS(template=Mode.ALL), FLAGS(template=Mode.NONE, inactive_l2=True)]
NOT_GUARDED = [None, *(each for each in Mode if each is not Mode.ALL), FLAGS(), FLAGS(template=Mode.CACHED)]
NOT_GUARDED.append(FLAGS(template=Mode.ALL, inactive_l2=False))


class Places:
    """Where things are in an image with a snapshot; `inactive` is the cluster of the snapshot's L2 table."""

    def __init__(self, raw):
        self.raw = raw
        self.l1, reftable, snapshots = (self.word(at) for at in (40, 48, 64))
        self.l2, self.block = self.word(self.l1) & OFFSET, self.word(reftable)
        self.snapshot_l1 = self.word(snapshots)
        self.inactive = self.word(self.snapshot_l1) & OFFSET

    def word(self, at):
        return struct.unpack_from(">Q", self.raw, at)[0]

    def put(self, at, value, size=8):
        self.raw[at : at + size] = value.to_bytes(size)

    def count(self, at, references):
        """The cluster there has that many references, it says."""
        self.put(self.block + at // SIZE * 2, references, 2)


async def with_snapshot(spoil=lambda it: None, **options):
    """An image of 8 clusters, written before and after a snapshot, that `spoil` has changed: its file and driver."""
    file, driver = await new_disk(size=DISK)
    await write(driver, Span(0, 8 * SIZE), DATA * 8)
    await driver.internal_snapshots.create("s", date_ns=0)
    await write(driver, Span(0, 8 * SIZE), DATA * 8)
    await driver.close()
    spoil(Places(file.content))
    file.log.clear()
    return file, await reopen(file, **options)


@pytest.mark.parametrize("checks", [*GUARDED, *NOT_GUARDED], ids=str)
def test_which_options_ask_for_it(checks):
    async def body():
        file, _ = await with_snapshot()
        header = Header.decode_fields(bytes(file.content))
        assert tuning_of(Qcow2Options(file="f", overlap_check=checks), header).guards_inactive_l2 is (checks in GUARDED)

    in_loop(body)


LIES = {
    "data": lambda it: it.put(it.l2, COPIED | it.inactive),
    "free": lambda it: it.count(it.inactive, 0),
    "L2 table": lambda it: it.put(it.l1, COPIED | it.inactive),
    "refcount block": lambda it: it.put(it.snapshot_l1, it.block),
}
"""Tables that have the L2 table of the snapshot be something else too."""
WRITTEN = {"data": Span(0, SIZE)}
NEW = Span(DISK - SIZE, SIZE)


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("checks", [Mode.ALL, FLAGS(template=Mode.NONE, inactive_l2=True)], ids=str)
def test_no_write_reaches_an_l2_table_of_a_snapshot(lie, checks):
    async def body():
        file, driver = await with_snapshot(LIES[lie], overlap_check=checks)
        before = unmarked(file)
        said = []
        driver.image.on_corrupt = lambda error, is_fatal: said.append((error.text, is_fatal))
        with pytest.raises(ImageCorrupt, match=REFUSAL) as caught:
            await write(driver, WRITTEN.get(lie, NEW), b"y" * SIZE)
        assert said == [(caught.value.text, True)]
        assert is_marked(file) and unmarked(file) == before
        with pytest.raises(IoFailure):
            await write(driver, NEW, b"y" * SIZE)
        await driver.close()
        assert unmarked(file) == before

    in_loop(body)


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("checks", NOT_GUARDED, ids=str)
def test_without_it_the_reference_counts_are_believed(lie, checks):
    """As by QEMU; and nothing is read for what nobody asked for."""

    async def body():
        file, driver = await with_snapshot(LIES[lie], overlap_check=checks)
        reads = []
        plain_read = file.read

        async def read(at, length):
            reads.append(at)
            return await plain_read(at, length)

        file.read = read
        await write(driver, WRITTEN.get(lie, NEW), b"y" * SIZE)
        assert not is_marked(file) and Places(file.content).snapshot_l1 not in reads
        assert not driver.image.allocator.inactive_l2

    in_loop(body)


@pytest.mark.parametrize("checks", [Mode.NONE, FLAGS(template=Mode.NONE), FLAGS(active_l1=False)], ids=str)
def test_what_is_guarded_by_default_always_is(checks):
    async def body():
        file, driver = await with_snapshot(lambda it: it.put(it.l2, COPIED | it.l1), overlap_check=checks)
        with pytest.raises(ImageCorrupt, match="overlaps with active L1 table"):
            await write(driver, Span(0, SIZE), b"y" * SIZE)
        assert is_marked(file)

    in_loop(body)


def tables_of_snapshots(raw, snapshots):
    """The clusters of all L2 tables that the L1 tables in the file name."""
    words = (struct.unpack_from(f">{each.l1_entries}Q", raw, each.l1_at) for each in snapshots.table)
    return {(word & OFFSET) // SIZE for table in words for word in table if word & OFFSET}


@pytest.mark.parametrize("seed", range(12))
def test_what_is_guarded_follows_the_snapshots(seed):
    """And nothing that a sound image has to write is ever refused."""

    async def body():
        chance = random.Random(seed)
        span = SIZE * SIZE // 8
        file, driver = await new_disk(size=4 * span)
        driver = await reopen(file, overlap_check=Mode.ALL)
        content, kept = {}, {}
        for _ in range(60):
            snapshots, step = driver.internal_snapshots, chance.choice(["write"] * 6 + ["snap", "drop", "go", "close"])
            at = chance.randrange(4) * span + chance.randrange(3) * SIZE
            if step == "write":
                content[at] = chance.randbytes(SIZE)
                await write(driver, Span(at, SIZE), content[at])
            elif step == "snap":
                kept[(await snapshots.create("s", date_ns=0)).id] = dict(content)
            elif step == "close":
                await driver.close()
                driver = await reopen(file, overlap_check=Mode.ALL)
                await driver.image.begin_change()
            elif kept:
                id = chance.choice(sorted(kept))
                if step == "go":
                    await snapshots.apply(id)
                    content = dict(kept[id])
                else:
                    await snapshots.delete(id)
                    del kept[id]
            await driver.flush()
            allocator = driver.image.allocator
            true = tables_of_snapshots(file.content, driver.internal_snapshots)
            if driver.image.is_changing:
                assert allocator.inactive_l2 == true
                assert allocator.guarded >= true | driver.image.metadata_clusters()
        for at in range(0, 4 * span, span):
            expected = b"".join(content.get(at + index * SIZE, bytes(SIZE)) for index in range(3))
            assert await read_guest(driver.image, Span(at, 3 * SIZE)) == expected
        await driver.close()
        found = await check_image(MemoryChild(bytes(file.content)), offload=InlineOffload())
        assert not found.corruptions and not found.leaks, found.problems

    in_loop(body)


async def write_all_clusters(driver):
    """One by one, so that the smallest holes are used."""
    for at in range(0, DISK, SIZE):
        await write(driver, Span(at, SIZE), b"y" * SIZE)


@pytest.mark.parametrize("action", ["delete", "apply"])
def test_a_table_that_was_given_up_while_another_snapshot_has_it_stays_guarded(action):
    """Its count was too low by one, so it counts as free after that."""

    async def body():
        file, driver = await new_disk(size=DISK)
        snapshots = driver.internal_snapshots
        if action == "apply":
            await snapshots.create("empty", date_ns=0)
        await write(driver, Span(0, SIZE), DATA)
        await snapshots.create("shares", date_ns=0)
        if action == "delete":
            await snapshots.create("shares too", date_ns=0)
            await write(driver, Span(0, SIZE), DATA)
        await driver.close()
        places = Places(file.content)
        table = places.word(snapshots.table[-1].l1_at) & OFFSET
        places.count(table, 1)
        driver = await reopen(file, overlap_check=Mode.ALL)
        await getattr(driver.internal_snapshots, action)("1")
        before = bytes(file.content[table : table + SIZE])
        with pytest.raises(ImageCorrupt, match=REFUSAL):
            await write_all_clusters(driver)
        await driver.close()
        assert is_marked(file) and file.content[table : table + SIZE] == before

    in_loop(body)


def test_the_active_tables_are_guarded_after_a_snapshot_was_applied():
    async def body():
        _, driver = await with_snapshot()
        await driver.internal_snapshots.apply("1")
        assert driver.image.allocator.guarded >= driver.image.metadata_clusters()

    in_loop(body)


def test_bitmaps_are_not_believed_to_be_there():
    async def body():
        _, driver = await with_snapshot(overlap_check=Mode.ALL)
        await driver.image.begin_change()
        assert driver.bitmap_store._other_metadata() >= driver.image.allocator.inactive_l2 > set()

    in_loop(body)


def test_nothing_is_written_before_the_tables_could_be_read():
    async def body():
        file, driver = await with_snapshot(overlap_check=Mode.ALL)
        plain_read, at = file.read, Places(file.content).snapshot_l1

        async def read(place, length):
            if place == at:
                raise IoFailure(5, "broken")
            return await plain_read(place, length)

        file.read, before = read, bytes(file.content)
        for _ in range(2):
            with pytest.raises(IoFailure):
                await write(driver, NEW, b"y" * SIZE)
        assert bytes(file.content) == before
        file.read = plain_read
        await write(driver, NEW, b"y" * SIZE)
        assert driver.image.allocator.inactive_l2

    in_loop(body)


def test_what_is_read_and_kept_is_bounded(monkeypatch):
    async def body():
        file = MemoryChild(b"".join(struct.pack(">Q", SIZE * number) for number in range(1, 1025)))
        places = [Span(at, 2048) for at in range(0, 8192, 2048)]

        async def found(**kept):
            with monkeypatch.context() as patch:
                for name, value in kept.items():
                    patch.setattr(inactive_tables, name, value)
                return await inactive_tables.l2_clusters(file, places, SIZE)

        assert await found() == set(range(1, 1025))
        assert await found(L1_BYTES_READ_MAX=4096) == set(range(1, 513))
        assert len(await found(GUARDED_TABLES_MAX=700)) == 700
        assert await inactive_tables.l2_clusters(file, [Span(8184, 4096), Span(1 << 40, 4096)], SIZE) == {1024}
        some = {1, 2}
        monkeypatch.setattr(inactive_tables, "GUARDED_TABLES_MAX", 3)
        inactive_tables.add_clusters(some, [SIZE * 7, SIZE * 8], SIZE)
        assert len(some) == 3

    in_loop(body)


def test_a_reopen_changes_it() -> None:
    def options(checks: object) -> BlockdevOptions:
        words = {"driver": "qcow2", "node-name": "disk", "file": "disk-file", "backing": None, "overlap-check": checks}
        return convert(words, BlockdevOptions)

    async def main() -> None:
        async with SimHost(1) as host:
            node = await host.image("disk", NewImage(size=1 << 20, cluster_size=SIZE))
            async with host.access(node, write=True) as user:
                await user.node.write(0, DATA)
                await node.driver.internal_snapshots.create("s", date_ns=0)
                await user.node.write(0, DATA)
                for checks in ("all", "cached", {"template": "none", "inactive-l2": True}):
                    await reopen_nodes(host.graph, [options(checks)])
                    await user.node.write(0, DATA)
                    assert bool(node.driver.image.allocator.inactive_l2) is (checks != "cached")
            await host.close_nodes(node)

    run(main())
