"""Internal snapshots: machine state past the end of the disk, and tables that somebody made up."""

import errno

import pytest
from msgspec import structs
from msgspec.structs import replace
from tiny_images import in_loop, is_marked, new_disk, reopen, unmarked, write

from blockjobs.base.errors import ImageCorrupt, IoFailure, UsageError
from blockjobs.base.offload import InlineOffload
from blockjobs.base.span import Span
from blockjobs.block.drivers.qcow2 import transaction
from blockjobs.block.drivers.qcow2.check import check_image
from blockjobs.block.drivers.qcow2.reads import read_guest
from blockjobs.testing.child import MemoryChild
from blockjobs.wire.qcow2 import HostAt
from blockjobs.wire.qcow2_tables import OFFSET, encode_table

SIZE = 96 << 10
"""A multiple of what an L2 table of a 512-byte cluster maps: the vm state area begins at the disk's end."""
STATE = bytes(range(1, 251)) * 40


async def small_disk(**options):
    file, driver = await new_disk(**{"size": SIZE, "cluster_size": 512} | options)
    await write(driver, Span(0, 8192), b"d" * 8192)
    await driver.flush()
    return file, driver


async def found_wrong(file, driver):
    await driver.close()
    return (await check_image(file, offload=InlineOffload())).problems


@pytest.mark.parametrize("length", [SIZE * 2, SIZE // 2])
def test_machine_state_past_the_end_is_neither_shown_nor_leaked_by_a_resize(length):
    async def body():
        file, driver = await small_disk()
        await driver.internal_snapshots.write_vm_state(0, STATE)
        await driver.flush()
        await driver.resize(length)
        shown = await read_guest(driver.image, Span(0, length))
        assert shown == (b"d" * 8192).ljust(length, b"\0")
        assert not await found_wrong(file, driver)

    in_loop(body)


def test_machine_state_that_a_resize_has_emptied_is_not_kept():
    async def body():
        file, driver = await small_disk()
        snapshots = driver.internal_snapshots
        for lengths in ([SIZE * 2], [SIZE, SIZE * 2]):
            await snapshots.write_vm_state(0, STATE)
            for length in lengths:
                await driver.resize(length)
            with pytest.raises(IoFailure) as caught:
                await snapshots.write_vm_state(len(STATE), STATE)
            assert caught.value.errno == errno.ESPIPE
            with pytest.raises(IoFailure):
                await snapshots.create("s", date_ns=0, vm_state_bytes=len(STATE))
        await snapshots.drop_vm_state()
        with pytest.raises(IoFailure):
            await snapshots.create("more than was written", date_ns=0, vm_state_bytes=1)
        assert not snapshots.entries
        assert not await found_wrong(file, driver)

    in_loop(body)


def test_machine_state_goes_in_steps_without_freeing_too_early(monkeypatch):
    """Commits on the way are made when much waits to be free; the references must be gone by then."""

    async def body():
        file, driver = await small_disk()
        await driver.internal_snapshots.write_vm_state(0, STATE * 8)
        await driver.flush()
        monkeypatch.setattr(transaction, "PENDING_FREES_MAX", 0)
        commit = driver.image.transaction.commit

        async def checked_commit():
            await commit()
            wrong = (await check_image(file, offload=InlineOffload())).corruptions
            assert not wrong

        monkeypatch.setattr(driver.image.transaction, "commit", checked_commit)
        await driver.internal_snapshots.drop_vm_state()
        monkeypatch.undo()
        assert not await found_wrong(file, driver)

    in_loop(body)


def test_machine_state_in_some_subclusters():
    async def body():
        _, driver = await new_disk(size=1 << 18, cluster_size=16384, extended_l2=True)
        snapshots = driver.internal_snapshots
        state = b"s" * 40_000
        await snapshots.write_vm_state(0, state)
        entry = await snapshots.create("s", date_ns=0, vm_state_bytes=len(state))
        words = await snapshots.l1_of(snapshots.table[0])
        area = max(index for index, word in enumerate(words) if word)
        table = await driver.image.mapping.l2.load(words[area] & OFFSET)
        table.items[3] = 0b101  # of the second cluster, subclusters 0 and 2 of 512 bytes
        found = await snapshots.read_vm_state(entry.id, 16384, 2000)
        assert found == b"s" * 512 + bytes(512) + b"s" * 512 + bytes(464)
        assert await snapshots.read_vm_state(entry.id, 16000, 500) == b"s" * 500
        assert await snapshots.read_vm_state(entry.id, 39_900, 100) == b"s" * 100

    in_loop(body)


# --- tables that no program has written


def test_a_name_for_terminals_is_escaped_in_errors():
    async def body():
        _, _, snapshots = await with_a_snapshot()
        snapshots.table[0] = replace(snapshots.table[0], name=b"\x1b[2J\xe8", l1_at=HostAt(0))
        with pytest.raises(ImageCorrupt) as caught:
            await snapshots.l1_of(snapshots.table[0])
        assert str(caught.value).isprintable()
        assert caught.value.text.isprintable()

    in_loop(body)


async def with_a_snapshot():
    file, driver = await small_disk()
    await driver.internal_snapshots.create("s", date_ns=0)
    await write(driver, Span(0, 4096), b"e" * 4096)
    await driver.image.settle()
    return file, driver, driver.internal_snapshots


@pytest.mark.parametrize(
    "what", ["header", "L1 table", "refcount table", "refcount block", "active L2 table", "snapshot table"]
)
def test_a_snapshot_cannot_give_away_what_the_image_lives_on(what):
    async def body():
        file, driver, _ = await with_a_snapshot()
        header = driver.image.header
        places = {
            "header": 0,
            "L1 table": header.l1_at,
            "refcount table": header.refcount_table_at,
            "refcount block": driver.image.refcounts.root.words[0],
            "active L2 table": driver.image.mapping.table_at(0),
            "snapshot table": header.snapshots_at,
        }
        await driver.close()
        for refused in (("delete", "1"), ("apply", "1"), ("read_vm_state", "1", 0, 0)):
            file = MemoryChild(bytes(file.content))
            driver = await reopen(file)
            snapshots = driver.internal_snapshots
            snapshots.table[0] = replace(snapshots.table[0], l1_at=HostAt(places[what]))
            before = bytes(file.content)
            with pytest.raises(ImageCorrupt, match="L1 table at no place for one"):
                await getattr(snapshots, refused[0])(*refused[1:])
            assert is_marked(file)
            assert unmarked(file) == before
            file.content[:] = before

    in_loop(body)


@pytest.mark.parametrize("what", ["refcount table", "refcount block", "active L2 table"])
@pytest.mark.parametrize("level", ["L1", "L2"])
def test_tables_of_a_snapshot_that_refer_to_metadata(what, level):
    """Applying is refused; deleting forgets the snapshot, and what its tables refer to leaks."""

    async def body():
        file, driver, snapshots = await with_a_snapshot()
        image = driver.image
        places = {
            "refcount table": image.header.refcount_table_at,
            "refcount block": image.refcounts.root.words[0],
            "active L2 table": image.mapping.table_at(0),
        }
        if (what, level) == ("active L2 table", "L1"):
            return  # shared tables are what snapshots are made of
        at = snapshots.table[0].l1_at
        if level == "L2":
            [word, *_] = await snapshots.l1_of(snapshots.table[0])
            at = HostAt(word & OFFSET)
        await file.write(at, encode_table(type(image.mapping.l1.words)("Q", [places[what]])))
        copy = MemoryChild(bytes(file.content))
        driver = await reopen(copy)
        with pytest.raises(ImageCorrupt, match="refer to metadata"):
            await driver.internal_snapshots.apply("1")
        shown = b"e" * 4096 + b"d" * 4096
        assert await read_guest(driver.image, Span(0, 8192)) == shown
        assert is_marked(copy)
        driver = await reopen(file)
        snapshots = driver.internal_snapshots
        await snapshots.delete("1")
        assert not is_marked(file)
        assert not snapshots.entries
        for at in range(0, SIZE, 4096):
            await write(driver, Span(at, 4096), b"f" * 4096)
        await driver.close()
        result = await check_image(file, offload=InlineOffload())
        assert (result.corruptions, result.check_errors) == (0, 0)
        assert result.leaks
        assert await read_guest((await reopen(file)).image, Span(0, SIZE)) == b"f" * SIZE

    in_loop(body)


@pytest.mark.parametrize(
    ("length", "text"),
    [
        (12345, "must be a multiple of 512"),
        ((1 << 64) - 512, "File too large"),
        (1 << 62, "File too large"),
    ],
)
def test_a_snapshot_of_a_disk_of_impossible_length(length, text):
    async def body():
        file, driver, snapshots = await with_a_snapshot()
        snapshots.table[0] = replace(snapshots.table[0], disk_size=length)
        with pytest.raises(UsageError, match=text):
            await snapshots.apply("1")
        assert driver.length == SIZE
        assert not await found_wrong(file, driver)

    in_loop(body)


def test_numbers_of_snapshots_follow_the_highest_that_is_one():
    async def body():
        _, _, snapshots = await with_a_snapshot()
        for odd in (b"9" * 6000, b"x7", b"", b"\xff"):
            snapshots.table.append(replace(snapshots.table[0], id=odd))
        snapshots.table.append(replace(snapshots.table[0], id=b"41"))
        assert (await snapshots.create("n", date_ns=0)).id == "42"
        [broken] = [each.id for each in snapshots.entries if "\ufffd" in each.id]
        with pytest.raises(UsageError, match="does not exist"):
            await snapshots.mark("not there", None)
        await snapshots.mark(broken, None)

    in_loop(body)


def test_an_external_data_file_has_no_snapshots():
    async def body():
        _, driver = await small_disk()
        driver.image.geometry = structs.replace(driver.image.geometry, has_data_file=True)
        with pytest.raises(UsageError, match="Operation not supported"):
            await driver.internal_snapshots.create("s", date_ns=0)

    in_loop(body)


def test_deleting_a_snapshot_of_a_large_disk_changes_few_refcount_blocks_at_a_time(monkeypatch):
    length, cache_bytes = 1 << 20, 2048

    async def body():
        file, driver = await new_disk(size=length, cluster_size=512)
        await write(driver, Span(0, length), b"d" * length)
        await driver.close()
        driver = await reopen(file, refcount_cache_size=cache_bytes)
        blocks = driver.image.refcounts.blocks
        assert len(driver.image.refcounts.root.words) >= 8
        waiting, take_dirty = [], blocks.take_dirty

        def take():
            waiting.append(blocks.dirty_bytes)
            return take_dirty()

        snapshot = await driver.internal_snapshots.create("s", date_ns=0)
        monkeypatch.setattr(blocks, "take_dirty", take)
        await driver.internal_snapshots.delete(snapshot.id)
        assert max(waiting) <= cache_bytes, "whatever the length of the disk"
        assert await read_guest(driver.image, Span(0, length)) == b"d" * length
        await driver.discard(Span(0, length))
        assert not await found_wrong(file, driver)

    in_loop(body)
