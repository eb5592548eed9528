"""Many runs reserved at once: the same image as run by run, in one piece on the host."""

import errno
from itertools import pairwise

import pytest
from tiny_images import in_loop, new_disk, write

from blockjobs.base.errors import IoFailure
from blockjobs.base.offload import InlineOffload
from blockjobs.base.span import Span
from blockjobs.block.drivers.qcow2.check import check_image
from blockjobs.block.drivers.qcow2.reads import read_guest

SIZE = 4096
LENGTH = 8 << 20
"""Four L2 tables."""
SPANS = [Span(0, SIZE), Span(3 * SIZE, 2 * SIZE), Span((2 << 20) - SIZE, 3 * SIZE), Span(LENGTH - SIZE, SIZE)]


def byte_of(at):
    return bytes([1 + at // SIZE % 251])


async def write_all(driver, reservations):
    """Payload of every placement, then publish; returns the placed spans in order."""
    placed = []
    for reservation in reservations:
        assert not reservation.fills
        for place in reservation.placements:
            assert place.child == "file"
            content = b"".join(byte_of(at) * SIZE for at in range(place.at, place.at + place.length, SIZE))
            await driver.children["file"].write(place.child_at, content)
            placed.append(Span(place.at, place.length))
        await driver.publish(reservation)
    return placed


async def expect(file, driver, spans):
    """What is in `spans` is there, all else is zero, and the image is sound."""
    for at in range(0, LENGTH, SIZE):
        inside = any(span.at <= at < span.end for span in spans)
        assert await read_guest(driver.image, Span(at, SIZE)) == (byte_of(at) * SIZE if inside else bytes(SIZE)), at
    await driver.flush()
    assert (await check_image(file, offload=InlineOffload())).is_clean


def test_scattered_runs_get_one_run_of_the_host_file():
    async def body():
        file, driver = await new_disk(size=LENGTH)
        reservations = await driver.reserve_many(SPANS)
        assert len(reservations) == 1
        placements = reservations[0].placements
        for place, later in pairwise(placements):
            assert place.child_at + place.length == later.child_at
        assert await write_all(driver, reservations) == SPANS
        assert not any(table.pins for table in driver.image.mapping.l2.dirty.values())
        await expect(file, driver, SPANS)

    in_loop(body)


def test_what_exists_already_is_written_run_by_run():
    async def body():
        file, driver = await new_disk(size=LENGTH)
        await write(driver, Span(3 * SIZE, SIZE), b"old" * SIZE)
        reservations = await driver.reserve_many(SPANS)
        assert len(reservations) == len(SPANS)
        await write_all(driver, reservations)
        assert not any(table.pins for table in driver.image.mapping.l2.dirty.values())
        await expect(file, driver, SPANS)

    in_loop(body)


def test_released_runs_leave_nothing():
    async def body():
        file, driver = await new_disk(size=LENGTH)
        [reservation] = await driver.reserve_many(SPANS)
        await driver.release(reservation)
        await expect(file, driver, [])

    in_loop(body)


def test_all_or_nothing_run_by_run(monkeypatch):
    async def body():
        file, driver = await new_disk(size=LENGTH)
        await write(driver, Span(0, SIZE), byte_of(0) * SIZE)
        reserve, asked = driver.reserve, []

        async def failing(span):
            asked.append(span)
            if len(asked) == 3:
                raise IoFailure(errno.ENOSPC, "disk")
            return await reserve(span)

        monkeypatch.setattr(driver, "reserve", failing)
        with pytest.raises(IoFailure, match="No space"):
            await driver.reserve_many(SPANS)
        assert asked == SPANS[:3]
        await expect(file, driver, SPANS[:1])

    in_loop(body)


def test_parts_of_clusters_are_left_to_the_ordinary_way():
    async def body():
        file, driver = await new_disk(size=LENGTH)
        whole, part = await driver.reserve_many([Span(0, SIZE), Span(2 * SIZE, 512)])
        assert part.fills
        for reservation in (whole, part):
            await driver.release(reservation)
        await expect(file, driver, [])

    in_loop(body)


def test_columns_get_one_run_and_show_as_columns():
    async def body():
        file, driver = await new_disk(size=LENGTH)
        at, length = [span.at for span in SPANS], [span.length for span in SPANS]
        reservation = await driver.reserve_in_one(at, length)
        [place] = reservation.placements
        assert place.length == sum(length)
        content = b"".join(byte_of(at) * SIZE for span in SPANS for at in range(span.at, span.end, SIZE))
        await driver.children["file"].write(place.child_at, content)
        await driver.publish(reservation)
        assert await driver.reserve_in_one([0], [SIZE]) is None
        found = await driver.pieces(Span(0, LENGTH))
        assert [Span(*run) for run in zip(found[0], found[1], strict=True)] == SPANS
        assert found[2] == [place.child_at + sum(length[:index]) for index in range(len(SPANS))]
        await expect(file, driver, SPANS)

    in_loop(body)


def test_columns_of_what_is_not_plain_are_left_to_resolve():
    async def body():
        _file, driver = await new_disk(size=LENGTH)
        await write(driver, Span(0, SIZE), b"x" * SIZE)
        assert [column[0] for column in await driver.pieces(Span(0, 2 * SIZE))][:2] == [0, SIZE]
        assert await driver.pieces(Span(0, SIZE // 2)) is None
        assert await driver.reserve_in_one([SIZE], [SIZE // 2]) is None
        table = await driver.image.mapping.writable_table(0)
        word = table.items[0]
        table.items[0] = word | 1  # reads as zeroes
        assert await driver.pieces(Span(0, 2 * SIZE)) == ([], [], [])
        for odd in (word | 1 << 62, word + 512):  # compressed; not at a cluster
            table.items[0] = odd
            assert await driver.pieces(Span(0, 2 * SIZE)) is None
        table.items[0] = word

    in_loop(body)


def test_columns_are_given_back():
    async def body():
        file, driver = await new_disk(size=LENGTH)
        await driver.release(await driver.reserve_in_one([0, 5 * SIZE], [SIZE, SIZE]))
        await driver.flush()
        assert (await check_image(file, offload=InlineOffload())).is_clean

    in_loop(body)
