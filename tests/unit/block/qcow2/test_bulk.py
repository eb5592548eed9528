"""Many runs reserved at once: the same image as run by run, in one piece on the host."""

import errno
from array import array
from itertools import pairwise

import pytest
from tiny_images import in_loop, new_disk, reopen, write

from blockjobs.base.errors import ImageCorrupt, IoFailure
from blockjobs.base.offload import InlineOffload
from blockjobs.base.span import Span
from blockjobs.block.drivers.qcow2.check import check_image
from blockjobs.block.drivers.qcow2.create import NewImage, create_image
from blockjobs.block.drivers.qcow2.entries import ALL_BITS, ALL_ZERO
from blockjobs.block.drivers.qcow2.reads import read_guest
from blockjobs.block.vocabulary import Kind, ZeroMode
from blockjobs.testing.child import MemoryChild
from blockjobs.wire.qcow2_tables import COPIED

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


def in_place(reservations):
    """The placements of reservations that change nothing but bytes."""
    assert not any(reservation.fills for reservation in reservations)
    return [(place.at, place.length, place.child_at) for each in reservations for place in each.placements]


def test_a_full_image_is_written_where_it_is():
    async def body():
        file, driver = await new_disk(size=LENGTH)
        for span in reversed(SPANS):
            await write(driver, span, b"old" * span.length)
        await driver.flush()
        before = bytes(file.content)
        [reservation] = await driver.reserve_many(SPANS)
        assert driver.is_divisible(reservation)
        assert await write_all(driver, [reservation]) == [
            SPANS[0],
            SPANS[1],
            Span((2 << 20) - SIZE, SIZE),
            Span(2 << 20, 2 * SIZE),
            SPANS[3],
        ]
        assert driver.image.transaction.is_clean
        assert len(file.content) == len(before)
        await expect(file, driver, SPANS)

    in_loop(body)


def test_parts_of_clusters_are_written_where_they_are():
    async def body():
        _file, driver = await new_disk(size=LENGTH)
        [place] = (await driver.reserve(Span(SIZE, 2 * SIZE))).placements
        await write(driver, Span(0, 4 * SIZE), b"x" * 4 * SIZE)
        [whole] = (await driver.reserve_many([Span(0, 4 * SIZE)]))[0].placements
        found = in_place(await driver.reserve_many([Span(512, 512), Span(SIZE + 1024, SIZE)]))
        assert found == [(512, 512, whole.child_at + 512), (SIZE + 1024, SIZE, whole.child_at + SIZE + 1024)]
        assert place.child_at != whole.child_at

    in_loop(body)


@pytest.mark.parametrize("how", ["zero", "shared", "doubtful"])
def test_what_is_not_its_own_is_not_written_in_place(how):
    async def body():
        _file, driver = await new_disk(size=LENGTH)
        await write(driver, Span(0, 4 * SIZE), b"x" * 4 * SIZE)
        if how == "zero":
            await driver.zero(Span(SIZE, SIZE), ZeroMode.KEEP)
        elif how == "shared":
            (await driver.image.mapping.writable_table(0)).items[1] &= ~COPIED
        else:
            driver.image.mapping.flags_may_be_false()
        reservations = await driver.reserve_many([Span(0, SIZE), Span(SIZE, SIZE)])
        assert len(reservations) == 2
        for reservation in reservations:
            await driver.release(reservation)

    in_loop(body)


def test_metadata_is_not_written_in_place():
    async def body():
        _file, driver = await new_disk(size=LENGTH)
        await write(driver, Span(0, 2 * SIZE), b"x" * 2 * SIZE)
        table = await driver.image.mapping.writable_table(0)
        table.items[1] = table.at | COPIED
        with pytest.raises(ImageCorrupt, match="L2 table"):
            await driver.reserve_many([Span(0, SIZE), Span(SIZE, SIZE)])

    in_loop(body)


async def with_data_file(*, raw):
    file, data = MemoryChild(), MemoryChild()
    await create_image(file, data, NewImage(size=LENGTH, cluster_size=SIZE, data_file_name="data", data_file_raw=raw))
    return file, data, await reopen(file, children={"data-file": data})


@pytest.mark.parametrize("raw", [True, False])
def test_what_is_given_back_of_a_data_file_is_not_counted(raw):
    """A raw data file shows by itself what has reached it: the disk shows the same."""

    async def body():
        file, data, driver = await with_data_file(raw=raw)
        (await driver.image.mapping.writable_table(0)).items[:16] = array("Q", bytes(128))  # as after a discard
        reservation = await driver.reserve_in_one([0, 4 * SIZE, 6 * SIZE], [SIZE, SIZE, 3 * SIZE])
        [place] = reservation.placements
        assert (place.at, place.length, place.child, place.child_at) == (0, 9 * SIZE, "data-file", 0)
        await driver.shorten(reservation, 3 * SIZE)
        assert reservation.token.runs == [(0, 1), (4, 1), (6, 1)]
        await data.write(4 * SIZE, b"y" * SIZE)
        await driver.release(reservation)
        assert await read_guest(driver.image, Span(4 * SIZE, SIZE)) == (b"y" if raw else b"\0") * SIZE
        await driver.flush()
        assert (await check_image(file, offload=InlineOffload())).is_clean

    in_loop(body)


def test_subclusters_are_all_written():
    async def body():
        file, driver = await new_disk(size=LENGTH, cluster_size=16384, extended_l2=True)
        spans = [Span(0, 16384), Span(5 * 16384, 2 * 16384)]
        await driver.zero(Span(16384 * 6, 512), ZeroMode.UNMAP)
        [reservation] = await driver.reserve_many(spans)
        assert await write_all(driver, [reservation]) == spans
        assert driver.image.mapping.l2.dirty
        await expect(file, driver, spans)
        assert (await driver.pieces(Span(0, LENGTH)))[:2] == ([0, 5 * 16384], [16384, 2 * 16384])
        assert not [each for each in await driver.resolve(spans[1]) if each.kind is not Kind.DATA]

    in_loop(body)


def test_columns_of_subclusters():
    """Whole clusters of one kind; anything else is for `resolve`."""

    async def body():
        _file, driver = await new_disk(size=LENGTH, cluster_size=16384, extended_l2=True)
        size = 16384
        await write(driver, Span(0, 2 * size), b"x" * 2 * size)
        [(host_at, _)] = [(each.child_at, each.length) for each in await driver.resolve(Span(0, 2 * size))]
        everything = Span(0, 4 * size)
        table = await driver.image.mapping.writable_table(0)
        words = table.items[:8]
        assert await driver.pieces(everything) == ([0], [2 * size], [host_at])
        table.items[4:8] = array("Q", [0, ALL_ZERO, host_at + 2 * size | COPIED, ALL_ZERO])
        assert await driver.pieces(everything) == ([0], [2 * size], [host_at])
        assert await driver.pieces(everything, has_zeroes=False) is None
        for odd in ((host_at | COPIED, 1), (0, ALL_BITS), (1 << 62 | 5, 0), (host_at | COPIED | 1, ALL_BITS)):
            table.items[4:6] = array("Q", odd)
            assert await driver.pieces(everything) is None, odd
        table.items[:8] = words

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
        at, length, host_at = await driver.pieces(Span(512, SIZE))
        assert (at, length) == ([512], [SIZE - 512]) and host_at[0] % SIZE == 512
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
