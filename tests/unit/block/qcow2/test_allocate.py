import errno
import random
from array import array

import pytest
from tiny_images import in_loop, new_disk, new_file, reopen

from blockjobs.base.errors import ImageCorrupt, IoFailure
from blockjobs.block.drivers.qcow2.allocate import Run, find_free


def clusters(runs):
    return [cluster for run in runs for cluster in range(run.cluster, run.end)]


@pytest.mark.parametrize("kind", ["B", "H", "I", "Q"])
def test_find_free_against_a_plain_loop(kind):
    chance = random.Random(kind)
    for _ in range(300):
        counts = array(kind, [chance.choice((0, 0, 1, 1, 255)) for _ in range(60)])
        if kind != "B":
            counts[chance.randrange(60)] = 256  # a byte of it is zero
        index, most, least = chance.randrange(60), chance.randrange(1, 20), chance.randrange(1, 6)
        least = min(least, most)
        expected = None
        for start in range(index, 60 - least + 1):
            if not any(counts[start : start + least]) and (start == index or counts[start - 1]):
                length = next((n for n in range(60 - start) if counts[start + n]), 60 - start)
                expected = (start, min(length, most))
                break
        assert find_free(counts, index, most, least) == expected


def test_nothing_is_taken_twice_and_all_comes_back():
    async def body():
        _, driver = await new_disk(cluster_size=512, refcount_bits=64)
        allocator, chance = driver.image.allocator, random.Random(1)
        held: list[Run] = []
        for _ in range(300):
            if held and chance.random() < 0.4:
                await allocator.give_back(held.pop(chance.randrange(len(held))))
            else:
                in_one = chance.random() < 0.3
                runs = await allocator.take(chance.choice((1, 2, 15, 16, 40, 200)), in_one=in_one)
                assert not in_one or len(runs) == 1
                held += runs
            taken = clusters(held)
            assert len(set(taken)) == len(taken)
            assert not set(taken) & allocator.guarded

    in_loop(body)


def test_long_requests_leave_small_holes_to_small_ones():
    async def body():
        _, driver = await new_disk()
        allocator = driver.image.allocator
        [first] = await allocator.take(100)
        for cluster in range(first.cluster, first.end, 2):
            await allocator.give_back(Run(cluster, 1))
        assert len(await allocator.take(64)) == 1
        assert clusters(await allocator.take(1)) == [first.cluster]
        assert clusters(await allocator.take(1)) == [first.cluster + 2]

    in_loop(body)


def test_the_refcount_table_grows_and_moves():
    async def body():
        file, driver = await new_disk(cluster_size=512, refcount_bits=64)
        before = driver.image.header.refcount_table_at
        held = []
        for _ in range(12):
            held += await driver.image.allocator.take(1000)
        taken = clusters(held)
        assert len(set(taken)) == 12000
        await driver.flush()
        await driver.flush()
        assert driver.image.header.refcount_table_at != before
        again = await reopen(file)
        for cluster in taken[::97]:
            assert await again.image.refcounts.count(cluster) == 1
        assert await again.image.refcounts.count(before // 512) == 0, "the old table is free"
        at, length = again.image.header.refcount_table_at, again.image.header.refcount_table_clusters
        for cluster in range(at // 512, at // 512 + length):
            assert await again.image.refcounts.count(cluster) == 1
            assert cluster not in taken

    in_loop(body)


def test_a_run_longer_than_a_refcount_block_counts():
    async def body():
        file, driver = await new_disk(cluster_size=512, refcount_bits=64)
        [long] = await driver.image.allocator.take(5000, in_one=True)
        assert long.length == 5000
        await driver.flush()
        again = await reopen(file)
        assert [await again.image.refcounts.count(n) for n in (long.cluster, long.end - 1)] == [1, 1]
        assert not set(clusters([long])) & set(clusters(await again.image.allocator.take(300)))

    in_loop(body)


def test_there_is_an_end_to_growth():
    async def body():
        _, driver = await new_disk(cluster_size=512, refcount_bits=64)
        with pytest.raises(IoFailure) as caught:
            await driver.image.allocator.take(1 << 27, in_one=True)
        assert caught.value.errno == errno.EFBIG

    in_loop(body)


def test_take_after_wants_exactly_those():
    async def body():
        _, driver = await new_disk()
        allocator = driver.image.allocator
        [first] = await allocator.take(3)
        assert await allocator.take_after(first.end, 2)
        assert not await allocator.take_after(first.end + 1, 2)
        [next_one] = await allocator.take(1)
        assert next_one.cluster == first.end + 2

    in_loop(body)


def test_metadata_that_counts_as_free_is_not_handed_out():
    async def body():
        file = await new_file()
        blocks_at = 2 * 4096
        file.content[blocks_at : blocks_at + 4096] = bytes(4096)
        driver = await reopen(file)
        await driver.image.begin_change()
        with pytest.raises(ImageCorrupt) as caught:
            await driver.image.allocator.take(1)
        assert caught.value.text == "Preventing invalid write on metadata (overlaps with qcow2_header)"

    in_loop(body)
