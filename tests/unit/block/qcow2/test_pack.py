import random

import pytest
from tiny_images import in_loop, new_disk, write

from blockjobs.base.errors import IoFailure
from blockjobs.base.span import Span
from blockjobs.block.drivers.qcow2.pack import shelve
from blockjobs.block.drivers.qcow2.reads import read_guest

SIZE = 4096
NOISE = random.Random(3).randbytes(SIZE)


def streams_of(driver, *numbers, incompressible=1500):
    """Clusters of that many noisy bytes, which deflate cannot shrink, then zeroes."""
    compress = driver.compressor("fast")
    contents = {number: (bytes([number]) + NOISE[:incompressible]).ljust(SIZE, b"\0") for number in numbers}
    return contents, [(number * SIZE, compress(content)) for number, content in contents.items()]


@pytest.mark.parametrize("most", [1, 2, 3, 65535])
def test_streams_never_overlap_and_counts_hold(most):
    chance = random.Random(most)
    for _ in range(200):
        used = chance.choice((0, 512, 4000))
        before = 0 if used == 0 else chance.randrange(1, most + 1)
        lengths = [chance.randrange(1, SIZE) for _ in range(chance.randrange(1, 12))]
        shelf = shelve(lengths, used, before, SIZE, most)
        counts = [0] * len(shelf.counts)
        end = used
        for place, length in zip(shelf.places, lengths, strict=True):
            assert place >= end
            end = place + length
            for cluster in range(place // SIZE, (end - 1) // SIZE + 1):
                counts[cluster] += 1
        assert shelf.end == end
        assert shelf.counts == counts
        assert counts[0] + before <= most
        assert max(counts) <= most


def test_batches_share_clusters_but_not_sectors():
    async def body():
        file, driver = await new_disk()
        first, streams = streams_of(driver, 1, 2)
        await driver.write_compressed(streams)
        second, more = streams_of(driver, 5, 6, 7)
        file.log.clear()
        await driver.write_compressed(more)
        [(_, at, content)] = [change for change in file.log if change[0] == "write"]
        end_of_first = sum(len(stream) for _, stream in streams)
        assert at % SIZE == -(-end_of_first // 512) * 512, "goes on in the same host cluster, in the next sector"
        assert len(content) % 512 == 0
        assert await driver.image.refcounts.count(at // SIZE) == 3
        await driver.flush()
        for number, expected in {**first, **second}.items():
            assert await read_guest(driver.image, Span(number * SIZE, SIZE)) == expected

    in_loop(body)


def test_streams_that_are_gone_take_their_cluster_with_them():
    async def body():
        _, driver = await new_disk()
        _, streams = streams_of(driver, 1, 2)
        await driver.write_compressed(streams)
        host = driver.image.allocator.tail[0]
        await write(driver, Span(SIZE, 2 * SIZE), b"p" * 2 * SIZE)
        await driver.flush()
        assert driver.image.allocator.tail is None
        assert await driver.image.refcounts.count(host) == 0
        await driver.write_compressed(streams_of(driver, 9)[1])
        assert await read_guest(driver.image, Span(SIZE, 2 * SIZE)) == b"p" * 2 * SIZE

    in_loop(body)


def test_compressed_over_plain_and_over_compressed():
    async def body():
        _, driver = await new_disk()
        await write(driver, Span(0, 3 * SIZE), b"p" * 3 * SIZE)
        contents, streams = streams_of(driver, 0, 1)
        await driver.write_compressed(streams)
        newer, streams = streams_of(driver, 1, incompressible=100)
        await driver.write_compressed(streams)
        expected = contents[0] + newer[1] + b"p" * SIZE
        assert await read_guest(driver.image, Span(0, 3 * SIZE)) == expected
        assert await read_guest(driver.image, Span(SIZE - 7, 20)) == expected[SIZE - 7 : SIZE + 13]

    in_loop(body)


def test_a_failed_batch_leaves_nothing():
    async def body():
        file, driver = await new_disk()
        await driver.write_compressed(streams_of(driver, 1)[1])
        host = driver.image.allocator.tail[0]
        file.error, file.fail_at = IoFailure(28), len(file.log)
        with pytest.raises(IoFailure):
            await driver.write_compressed(streams_of(driver, 2, 3, 4)[1])
        assert await driver.image.refcounts.count(host) == 1
        assert await driver.image.refcounts.count(host + 1) == 0
        assert await read_guest(driver.image, Span(2 * SIZE, 3 * SIZE)) == bytes(3 * SIZE)

    in_loop(body)


def test_narrow_refcounts_do_not_overflow():
    async def body():
        for bits in (1, 2):
            _, driver = await new_disk(refcount_bits=bits)
            contents, streams = streams_of(driver, *range(1, 12), incompressible=200)
            await driver.write_compressed(streams[:5])
            await driver.write_compressed(streams[5:])
            for number, expected in contents.items():
                assert await read_guest(driver.image, Span(number * SIZE, SIZE)) == expected

    in_loop(body)
