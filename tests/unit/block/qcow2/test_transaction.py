"""The order of writes and flushes, seen at the file (spec/durability.md §1)."""

import asyncio

import pytest
from tiny_images import in_loop, new_disk, new_file, reopen, write

from blockjobs.base.errors import IoFailure
from blockjobs.base.span import Span
from blockjobs.block.drivers.qcow2.pending import Freed, joined
from blockjobs.block.drivers.qcow2.reads import read_guest
from blockjobs.block.vocabulary import ZeroMode
from blockjobs.testing.child import MemoryChild

SIZE = 4096


class Places:
    """Names the parts of an image, so that a log of writes can be read."""

    def __init__(self, driver):
        self.image = driver.image

    def name(self, at):
        header, image = self.image.header, self.image
        cluster_at = at // SIZE * SIZE
        if at < 512:
            return "header"
        if cluster_at == header.l1_at:
            return "L1"
        if cluster_at == header.refcount_table_at:
            return "refcount table"
        if cluster_at in image.refcounts.root.words:
            return "refcounts"
        if cluster_at in [word & ~(1 << 63) for word in image.mapping.l1.words]:
            return "L2"
        return "data"

    def story(self, log):
        return [self.name(change[1]) if change[0] == "write" else change[0] for change in log if change[0] != "resize"]


def test_an_allocating_write_in_its_order():
    async def body():
        file, driver = await new_disk()
        await write(driver, Span(0, SIZE), b"a" * SIZE)
        assert Places(driver).story(file.log) == ["data"], "metadata waits for a flush"
        await driver.flush()
        assert Places(driver).story(file.log) == ["data", "refcounts", "L2", "flush", "L1", "flush"]
        file.log.clear()
        await write(driver, Span(SIZE, SIZE), b"b" * SIZE)
        await driver.flush()
        assert Places(driver).story(file.log) == ["data", "refcounts", "flush", "L2", "flush"]
        file.log.clear()
        await write(driver, Span(SIZE + 1, 5), b"12345")
        await driver.flush()
        assert Places(driver).story(file.log) == ["data", "flush"], "in place: only the bytes"

    in_loop(body)


def test_a_new_refcount_block_is_reachable_before_what_it_counts():
    async def body():
        file, driver = await new_disk(refcount_bits=64, size=1 << 24)
        await write(driver, Span(0, SIZE), b"a" * SIZE)
        await driver.flush()
        file.log.clear()
        await write(driver, Span(SIZE, 600 * SIZE), b"b" * SIZE * 600)
        await driver.flush()
        story = [what for what in Places(driver).story(file.log) if what != "data"]
        assert story[-6:] == ["flush", "refcount table", "flush", "L2", "L1", "flush"]

    in_loop(body)


def test_the_data_file_is_flushed_before_the_mapping_changes():
    async def body():
        file, data = MemoryChild(), MemoryChild(name="data")
        events = []
        for child in (file, data):

            async def flush(child=child, before=child.flush):
                events.append((child.name, "flush"))
                await before()

            child.flush = flush
        from blockjobs.block.drivers.qcow2.create import NewImage, create_image

        await create_image(file, data, NewImage(size=1 << 18, cluster_size=SIZE, data_file_name="data"))
        driver = await reopen(file, children={"data-file": data})
        await write(driver, Span(3 * SIZE, SIZE), b"a" * SIZE)
        assert bytes(data.content[3 * SIZE : 4 * SIZE]) == b"a" * SIZE
        events.clear()
        file.log.clear()
        await driver.flush()
        assert events == [("data", "flush"), ("file", "flush"), ("file", "flush")]
        assert Places(driver).story(file.log)[-2:] == ["L1", "flush"]

    in_loop(body)


def test_a_freed_cluster_is_not_used_before_its_loss_is_durable():
    async def body():
        file, driver = await new_disk()
        await write(driver, Span(0, SIZE), b"a" * SIZE)
        await driver.flush()
        [old] = await driver.resolve(Span(0, SIZE))
        await driver.zero(Span(0, SIZE), ZeroMode.UNMAP)
        used = {old.child_at}
        for number in range(1, 20):
            await write(driver, Span(number * SIZE, SIZE), b"b" * SIZE)
            used.add((await driver.resolve(Span(number * SIZE, SIZE)))[0].child_at)
        assert len(used) == 20
        assert ("discard", old.child_at, SIZE) not in file.log
        await driver.flush()
        assert file.log[-2:] == [("flush",), ("discard", old.child_at, SIZE)]
        await write(driver, Span(30 * SIZE, SIZE), b"c" * SIZE)
        assert (await driver.resolve(Span(30 * SIZE, SIZE)))[0].child_at == old.child_at

    in_loop(body)


def test_a_failed_flush_frees_nothing():
    async def body():
        file, driver = await new_disk()
        await write(driver, Span(0, SIZE), b"a" * SIZE)
        await driver.flush()
        [old] = await driver.resolve(Span(0, SIZE))
        await driver.discard(Span(0, SIZE))
        file.error, file.fail_at = IoFailure(5), len(file.log)
        with pytest.raises(IoFailure):
            await driver.flush()
        await write(driver, Span(SIZE, SIZE), b"b" * SIZE)
        assert (await driver.resolve(Span(SIZE, SIZE)))[0].child_at != old.child_at
        await driver.flush()
        await write(driver, Span(2 * SIZE, SIZE), b"b" * SIZE)
        assert (await driver.resolve(Span(2 * SIZE, SIZE)))[0].child_at == old.child_at

    in_loop(body)


class SlowChild(MemoryChild):
    """Holds every flush up until the test lets it go."""

    def __init__(self, content):
        super().__init__(content)
        self.waiting = []

    async def flush(self):
        gate = asyncio.Event()
        self.waiting.append(gate)
        await gate.wait()
        await super().flush()

    async def let_one_go(self):
        while not self.waiting:
            await asyncio.sleep(0)
        self.waiting.pop(0).set()
        await asyncio.sleep(0)


def test_flushes_that_wait_share_one_commit():
    async def body():
        file = SlowChild((await new_file()).content)
        driver = await reopen(file)
        async with asyncio.TaskGroup() as tasks:
            first = tasks.create_task(driver.flush())
            while not file.waiting:
                await asyncio.sleep(0)
            others = [tasks.create_task(driver.flush()) for _ in range(10)]
            await asyncio.sleep(0)
            await file.let_one_go()
            await first
            assert not any(other.done() for other in others), "they asked after the first had begun"
            await file.let_one_go()
        assert file.log.count(("flush",)) == 2

    in_loop(body)


def test_what_is_published_during_a_commit_waits_for_the_next():
    async def body():
        file = SlowChild((await new_file()).content)
        driver = await reopen(file)
        await write(driver, Span(0, SIZE), b"a" * SIZE)
        async with asyncio.TaskGroup() as tasks:
            flush = tasks.create_task(driver.flush())
            while not file.waiting:
                await asyncio.sleep(0)
            await write(driver, Span(SIZE, SIZE), b"b" * SIZE)
            while not flush.done():
                await file.let_one_go() if file.waiting else await asyncio.sleep(0)
        again = await reopen(MemoryChild(bytes(file.content)), read_only=True)
        assert await read_guest(again.image, Span(0, 2 * SIZE)) == b"a" * SIZE + bytes(SIZE)
        async with asyncio.TaskGroup() as tasks:
            flush = tasks.create_task(driver.flush())
            while not flush.done():
                await file.let_one_go() if file.waiting else await asyncio.sleep(0)
        again = await reopen(MemoryChild(bytes(file.content)), read_only=True)
        assert await read_guest(again.image, Span(0, 2 * SIZE)) == b"a" * SIZE + b"b" * SIZE

    in_loop(body)


async def some_work(driver):
    """Changes of every kind, with flushes between; returns what the disk shows."""
    shown = bytearray(driver.length)

    async def put(at, content):
        await write(driver, Span(at, len(content)), content)
        shown[at : at + len(content)] = content

    await put(100, b"x" * 30000)
    await driver.flush()
    await driver.zero(Span(0, 2 * SIZE), ZeroMode.UNMAP)
    shown[: 2 * SIZE] = bytes(2 * SIZE)
    await put(600 * SIZE, b"y" * SIZE * 700)
    await driver.flush()
    compress = driver.compressor("fast")
    await driver.write_compressed([(number * SIZE, compress(b"z" * SIZE)) for number in (2, 3, 1400)])
    for number in (2, 3, 1400):
        shown[number * SIZE : (number + 1) * SIZE] = b"z" * SIZE
    await driver.resize(driver.length * 3)
    shown += bytes(driver.length - len(shown))
    await put(driver.length - 3 * SIZE, b"end" * SIZE)
    return bytes(shown)


STEP = 8


@pytest.mark.parametrize("seed", range(STEP))
def test_a_failure_anywhere_is_reported_and_loses_nothing(seed):
    """A write or flush fails once, at every place in turn; whatever failed is simply done again."""

    async def body():
        start = (await new_file(size=8 << 20, refcount_bits=64)).content
        file = MemoryChild(start)
        await some_work(await reopen(file))
        total = len(file.log)
        for fail_at in range(seed, total, STEP):
            file = MemoryChild(start)
            driver = await reopen(file)
            file.error, file.fail_at = IoFailure(28), fail_at
            try:
                shown = await some_work(driver)
            except IoFailure:
                await driver.flush()
                if driver.length > 8 << 20:
                    continue
                shown = await some_work(driver)
            await driver.flush()
            await driver.close()
            assert driver.image.transaction.is_clean
            again = await reopen(MemoryChild(bytes(file.content)), read_only=True)
            assert await read_guest(again.image, Span(0, again.length)) == shown, fail_at

    in_loop(body)


def test_a_moved_table_is_not_written_as_a_whole_once_the_header_may_refer_to_it():
    """The header's write failed and may have landed: new entries must come after what they refer to (I2)."""

    async def body():
        file, driver = await new_disk(size=1 << 20, cluster_size=512)
        image = driver.image

        async def failing(*_):
            raise IoFailure(5)

        image.header_file.switch = failing
        with pytest.raises(IoFailure):
            await driver.resize(3 << 20)
        del image.header_file.switch
        moved = image.mapping.l1
        assert moved.at != image.header.l1_at
        file.log.clear()
        await write(driver, Span(0, 512), b"a" * 512)
        await driver.flush()
        table = range(moved.at, moved.at + len(moved.words) * 8)
        early = file.log[: file.log.index(("flush",))]
        assert not [change for change in early if change[0] == "write" and change[1] in table]
        assert [change for change in file.log if change[0] == "write" and change[1] in table]
        assert image.header.l1_at == moved.at

    in_loop(body)


def test_what_a_guest_sees_scattered_is_given_back_in_runs_of_the_file():
    async def body():
        file, driver = await new_disk(size=64 * SIZE)
        for number in (40, 3, 17, 60, 9, 31, 22, 50):
            await write(driver, Span(number * SIZE, SIZE), b"a" * SIZE)
        await driver.flush()
        file.log.clear()
        await driver.make_empty()
        punched = [change for change in file.log if change[0] == "discard"]
        assert sum(change[2] for change in punched) >= 8 * SIZE
        assert len(punched) <= 2

    in_loop(body)


def test_joined_frees_are_the_same_frees():
    frees = [Freed(7, 2), Freed(1, 3), Freed(4, 3), Freed(9, 1, discards=True), Freed(1, 3), Freed(20, 1), Freed(10, 1)]
    runs = joined(frees)

    def each(some):
        return sorted((cluster, *freed[2:]) for freed in some for cluster in range(freed[0], freed[0] + freed[1]))

    assert each(runs) == each(frees)
    assert runs == sorted(runs)
    assert len(runs) == 5
