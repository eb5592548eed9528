"""Media that read and write through a cipher, and the short way to them."""

import random
from itertools import pairwise

import pytest

from blockjobs.block.drivers.qcow2.create import NewImage
from blockjobs.block.encipherment import IN_LOOP_BYTES_MAX, MEDIA_MAX, PIECE_BYTES, Encipherment
from blockjobs.block.execute import Copy, Zero, execute
from blockjobs.block.quick import read_now, write_now
from blockjobs.testing.clock import run
from blockjobs.testing.disk import SimDisk
from blockjobs.testing.host import SimHost
from blockjobs.testing.toy_cipher import ToyCipher

NOISE = random.Random(3).randbytes(2 * PIECE_BYTES + 1024)


def read(medium: object, at: int, length: int) -> bytes:
    content = bytearray(length)
    medium.read_into(at, memoryview(content))
    return bytes(content)


def test_bytes_lie_enciphered_at_their_place_less_the_origin() -> None:
    disk, cipher = SimDisk(), ToyCipher(1)
    medium = Encipherment(cipher, 4096).over(disk)
    medium.write(8192, NOISE[:1024])
    assert disk.pages.read(8192, 1024) == cipher.encipher(4096, NOISE[:1024])
    medium.writev(16384, [NOISE[:512], NOISE[512:2048]])
    assert read(medium, 16384, 2048) == NOISE[:2048]
    assert disk.pages.read(16384, 2048) == cipher.encipher(12288, NOISE[:2048])


def test_plain_steps_decipher_and_encipher_pieces_of_any_length() -> None:
    one, other, plain = SimDisk(), SimDisk(), SimDisk()
    source, target = Encipherment(ToyCipher(1), 0).over(one), Encipherment(ToyCipher(2), 512).over(other)
    source.write(0, NOISE)
    cuts = [0, 512, PIECE_BYTES - 512, PIECE_BYTES, len(NOISE)]
    pieces = [(start, end - start) for start, end in pairwise(cuts)]
    pieces.reverse()
    steps: list[Copy | Zero] = []
    at = 1024
    for start, length in pieces:
        steps.append(Copy(source, start, target, at, length))
        at += length
    execute([*steps, Zero(target, at, PIECE_BYTES + 512), Copy(source, 512, plain, 0, 4096)])
    shown = b"".join(NOISE[start : start + length] for start, length in pieces)
    assert read(target, 1024, len(NOISE)) == shown
    assert read(target, at, PIECE_BYTES + 512) == bytes(PIECE_BYTES + 512)
    assert other.pages.read(at, 512) != bytes(512)
    assert plain.pages.read(0, 4096) == NOISE[512 : 512 + 4096]


def test_one_medium_is_one_object_and_old_ones_are_forgotten() -> None:
    encipherment = Encipherment(ToyCipher(1), 0)
    disks = [SimDisk() for _ in range(MEDIA_MAX + 1)]
    media = [encipherment.over(disk) for disk in disks[:MEDIA_MAX]]
    assert all(encipherment.over(disk) is medium for disk, medium in zip(disks, media))
    assert encipherment.over(disks[MEDIA_MAX]) is not media[-1]
    assert encipherment.over(disks[0]) is not media[0]


def test_tweaks_may_count_from_the_beginning_of_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blockjobs.block.encipherment.PLACES_MAX", 2)
    disk, cipher = SimDisk(), ToyCipher(1)
    encipherment = Encipherment(cipher, None)
    assert encipherment.fits(512, 1024) and not encipherment.fits(512, 1000)
    there = encipherment.placed(1024, 8192)
    there.over(disk).write(8192, NOISE[:1024])
    assert disk.pages.read(8192, 1024) == cipher.encipher(1024, NOISE[:1024])
    assert read(encipherment.placed(1536, 8704).over(disk), 8704, 512) == NOISE[512:1024]
    # Runs of one distance are joined, so they need one medium; an end of the disk lies before a beginning of the file.
    assert encipherment.placed(2048, 9216).over(disk) is there.over(disk)
    assert encipherment.placed(8192, 512).over(disk) is not there.over(disk)
    encipherment.placed(0, 512)
    assert encipherment.placed(2048, 9216) is not there
    assert Encipherment(cipher, 512).placed(0, 4096).origin == 512


def test_a_medium_knows_no_holes() -> None:
    disk = SimDisk()
    disk.truncate(1 << 20)
    medium = Encipherment(ToyCipher(1), 0).over(disk)
    assert [each.is_data for each in medium.allocations(0, 1 << 20)] == [True]
    assert medium.allocated_size() == medium.size() == 1 << 20
    before = read(medium, 0, 512)
    medium.discard(0, 1 << 20)
    assert read(medium, 0, 512) == before != bytes(512)


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("unaligned", [False, True])
def test_the_short_way_enciphers_too_or_leaves_it_to_the_long_way(unaligned: bool, on_disk: bool) -> None:
    async def main() -> None:
        async with SimHost(1, cached_share=1.0) as host:
            image = NewImage(size=4 << 20)
            node = await host.image("disk", image, cipher=ToyCipher(1), tweaks_on_disk=on_disk)
            async with host.access(node, write=True) as user:
                await user.node.write(0, NOISE[: 1 << 20])
                at = 5 if unaligned else 4096
                room = memoryview(bytearray(4096))
                assert read_now(node, at, room) == (not unaligned)
                assert write_now(node, at + 8192, room) == (not unaligned)
                if not unaligned:
                    assert room == NOISE[at : at + 4096]
                    assert await user.node.read(at + 8192, 4096) == room
                long = memoryview(bytearray(IN_LOOP_BYTES_MAX + 512))
                assert not read_now(node, 0, long) and not write_now(node, 0, long)
                assert await user.node.read(0, 4096) == NOISE[:4096]

    run(main())


@pytest.mark.parametrize("on_disk", [False, True])
def test_zeroes_at_the_end_of_a_disk_that_grows_are_enciphered(on_disk: bool) -> None:
    async def main() -> None:
        async with SimHost(1) as host:
            image = NewImage(size=(64 << 10) + 512)
            node = await host.image("disk", image, cipher=ToyCipher(1), tweaks_on_disk=on_disk)
            async with host.access(node, write=True, resize=True) as user:
                await user.node.write(64 << 10, b"x" * 512)
                await user.node.resize(256 << 10)
                assert await user.node.read(0, 256 << 10) == bytes(64 << 10) + b"x" * 512 + bytes((192 << 10) - 512)

    run(main())


def test_nothing_is_compressed_into_an_enciphered_image() -> None:
    async def main() -> None:
        async with SimHost(1) as host:
            node = await host.image("disk", NewImage(size=1 << 20), cipher=ToyCipher(1))
            async with host.access(node, write=True) as user:
                await user.node.write(0, b"secret" * 4096, compressed=True)
                assert await user.node.read(0, 6) == b"secret"
            pages = host.disks["disk-file"].pages
            assert b"secret" not in pages.read(0, pages.size)
            assert not [run async for run in host.map(node) if run.compressed]

    run(main())
