"""What the cache options do to the memory of an open image."""

import asyncio
from array import array

import pytest
from tiny_images import new_file, reopen

from blockjobs.base.errors import UsageError
from blockjobs.base.span import Span
from blockjobs.testing.clock import run
from blockjobs.wire.qcow2_tables import COPIED

CLUSTER = 4096
L2_SPAN = CLUSTER // 8 * CLUSTER
TABLES = 64
SIZE = TABLES * L2_SPAN


async def filled_image():
    """A file with a small write under each of `TABLES` L2 tables."""
    file = await new_file(size=SIZE, cluster_size=CLUSTER)
    driver = await reopen(file)
    for number in range(TABLES):
        [place] = (reservation := await driver.reserve(Span(number * L2_SPAN, CLUSTER))).placements
        await file.write(place.child_at, bytes([number]) * CLUSTER)
        await driver.publish(reservation)
    await driver.close()
    return file


@pytest.mark.parametrize(
    ("options", "l2_bytes"),
    [
        ({}, TABLES * CLUSTER),
        ({"l2_cache_size": 8 * CLUSTER}, 8 * CLUSTER),
        ({"l2_cache_size": 0}, 2 * CLUSTER),
        ({"cache_size": 24 * CLUSTER}, 20 * CLUSTER),
        ({"cache_size": 24 * CLUSTER, "refcount_cache_size": 14 * CLUSTER}, 10 * CLUSTER),
    ],
)
def test_memory_stays_within_the_cache_size_and_no_byte_is_wrong(options, l2_bytes):
    async def body():
        driver = await reopen(await filled_image(), **options)
        for at in range(0, SIZE, L2_SPAN):
            [first, *_] = await driver.resolve(Span(at, L2_SPAN))
            assert first.child == "file"
            assert driver.image.mapping.l2.memory_bytes <= l2_bytes
        assert driver.image.mapping.l2.memory_bytes == l2_bytes

    run(body())


def test_dirty_tables_are_written_rather_than_kept_past_the_cache_size():
    async def body():
        file = await new_file(size=SIZE, cluster_size=CLUSTER)
        driver = await reopen(file, l2_cache_size=8 * CLUSTER)
        for at in range(0, SIZE, L2_SPAN):
            await driver.publish(await driver.reserve(Span(at, CLUSTER)))
            assert driver.image.mapping.l2.memory_bytes <= 8 * CLUSTER
        await driver.close()
        words = (await reopen(file)).image.mapping.l1.words
        assert all(word & COPIED for word in words) and words != array("Q", [0]) * TABLES

    run(body())


@pytest.mark.parametrize(("options", "interval_s"), [({}, 600), ({"cache_clean_interval": 7}, 7)])
def test_tables_that_nobody_uses_leave_memory(options, interval_s):
    async def body():
        driver = await reopen(await filled_image(), **options)
        l2 = driver.image.mapping.l2
        await driver.resolve(Span(0, SIZE))
        assert l2.memory_bytes == TABLES * CLUSTER
        await asyncio.sleep(interval_s * 1.5)
        assert l2.memory_bytes == TABLES * CLUSTER, "used in the interval before"
        await driver.resolve(Span(0, 2 * L2_SPAN))
        await asyncio.sleep(interval_s)
        assert l2.memory_bytes == 2 * CLUSTER
        await asyncio.sleep(interval_s)
        assert l2.memory_bytes == 0
        await driver.resolve(Span(0, CLUSTER))
        assert l2.memory_bytes == CLUSTER
        await asyncio.sleep(interval_s * 3)
        assert l2.memory_bytes == 0, "it begins anew with the next table"

    run(body())


def test_what_is_dirty_stays_until_it_is_written():
    async def body():
        driver = await reopen(await filled_image(), cache_clean_interval=1)
        await driver.discard(Span(0, CLUSTER))
        await asyncio.sleep(5)
        assert driver.image.mapping.l2.memory_bytes == CLUSTER
        await driver.flush()
        await asyncio.sleep(5)
        assert driver.image.mapping.l2.memory_bytes == 0
        await driver.close()

    run(body())


def test_no_interval_keeps_everything():
    async def body():
        driver = await reopen(await filled_image(), cache_clean_interval=0)
        await driver.resolve(Span(0, SIZE))
        await asyncio.sleep(10**6)
        assert driver.image.mapping.l2.memory_bytes == TABLES * CLUSTER

    run(body())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"l2_cache_size": 1 << 62}, None),
        ({"cache_size": 1 << 62}, "Refcount cache size too big"),
        ({"refcount_cache_size": CLUSTER << 31}, "Refcount cache size too big"),
        ({"refcount_cache_size": (CLUSTER << 31) - 1}, None),
        ({"cache_size": 1 << 62, "l2_cache_size": 1 << 61}, "Refcount cache size too big"),
        ({"cache_size": 1 << 62, "refcount_cache_size": 1 << 20}, "L2 cache size too big"),
        ({"cache_size": 1 << 62, "refcount_cache_size": 1 << 61}, "L2 cache size too big"),
        ({"cache_size": 1 << 20, "l2_cache_size": 2 << 20}, "l2-cache-size may not exceed cache-size"),
    ],
)
def test_sizes_are_refused_as_the_storage_daemon_of_qemu_refuses_them(options, text):
    async def body():
        file = await new_file(size=SIZE, cluster_size=CLUSTER)
        if text is None:
            await reopen(file, **options)
            return
        with pytest.raises(UsageError, match=text):
            await reopen(file, **options)

    run(body())
