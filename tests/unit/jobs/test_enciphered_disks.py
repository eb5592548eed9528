"""Jobs from, to and between disks that are enciphered, each with its own key, while guests go on writing."""

import asyncio
import random
from collections.abc import Awaitable, Callable

import pytest

from blockjobs.base.span import Span
from blockjobs.base.units import KiB, MiB
from blockjobs.block.drivers.qcow2.create import NewImage
from blockjobs.block.drivers.qcow2.driver import Qcow2
from blockjobs.block.encipherment import Encipherment
from blockjobs.block.node import Node
from blockjobs.block.placing import Placing
from blockjobs.block.quick import read_now, write_now
from blockjobs.block.vocabulary import Kind
from blockjobs.lifecycle.status import JobStatus
from blockjobs.testing.chains import guest_of, read_all, run_guest
from blockjobs.testing.clock import run
from blockjobs.testing.host import SimHost
from blockjobs.testing.toy_cipher import ToyCipher

SIZE = 2 * MiB + 2560
MARK = b"nobody may find this"
KEYS = [(None, 2), (1, None), (1, 2), (1, 1), (None, -2), (-1, None), (-1, 2), (-1, -1)]
"""Of two disks; a negative one's tweaks count from the beginning of the disk, as in the old encryption of qcow2."""


def on_host(scenario: Callable[[SimHost], Awaitable[None]], *, seed: int = 1) -> None:
    async def main() -> None:
        async with SimHost(seed, latency_s_max=0.001, cached_share=0.5) as host:
            await scenario(host)

    run(main())


async def disk(host: SimHost, name: str, key: int | None, *, backing: Node | None = None, **more: int) -> Node:
    image = NewImage(
        size=SIZE,
        cluster_size=more.get("cluster_size", 16 * KiB),
        backing_file=None if backing is None else f"{backing.name}-file",
        backing_format=None if backing is None else "qcow2",
        extended_l2=bool(more.get("extended_l2", 0)),
    )
    cipher = None if key is None else ToyCipher(key)
    below = None if backing is None else backing.name
    return await host.image(name, image, backing=below, cipher=cipher, tweaks_on_disk=key is not None and key < 0)


async def fill(host: SimHost, node: Node, seed: int) -> None:
    chance = random.Random(seed)
    async with host.access(node, write=True) as user:
        for _ in range(8):
            at = chance.randrange(SIZE - 200 * KiB)
            await user.node.write(at, MARK + chance.randbytes(chance.randrange(1, 200 * KiB - len(MARK))))
        await user.node.write(SIZE - 1000, MARK.ljust(1000, b"."))
        await user.node.flush()


def shows_mark(host: SimHost, name: str) -> bool:
    pages = host.disks[f"{name}-file"].pages
    return MARK in pages.read(0, pages.size)


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("shape", [{}, {"extended_l2": 1}, {"cluster_size": 512}])
def test_a_backup_is_right_under_another_key(keys: tuple[int | None, int | None], shape: dict[str, int]) -> None:
    async def scenario(host: SimHost) -> None:
        source = await disk(host, "source", keys[0])
        target = await disk(host, "target", keys[1], **shape)
        await fill(host, source, 1)
        before = await read_all(host, source)
        guest = await guest_of(host, source)
        job = await host.backup(source, target)
        await run_guest(guest, bytearray(before), random.Random(5), writes=30, pause_s=0.001)
        assert (await job.outcome()).error is None
        assert await read_all(host, target) == before
        assert shows_mark(host, "source") == (keys[0] is None) and shows_mark(host, "target") == (keys[1] is None)
        await host.graph.release(guest)

    on_host(scenario)


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("copy_mode", ["background", "write-blocking"])
def test_a_mirror_follows_its_guest_under_another_key(keys: tuple[int | None, int | None], copy_mode: str) -> None:
    async def scenario(host: SimHost) -> None:
        source, target = await disk(host, "source", keys[0]), await disk(host, "target", keys[1])
        await fill(host, source, 2)
        model = bytearray(await read_all(host, source))
        guest = await guest_of(host, source)
        job = await host.mirror(source, target, copy_mode=copy_mode)
        await run_guest(guest, model, random.Random(6), writes=40, pause_s=0.001)
        await job.reached(JobStatus.READY)
        await run_guest(guest, model, random.Random(7), writes=20, pause_s=0.001)
        job.complete()
        assert (await job.outcome()).error is None
        assert guest.node is target and await read_all(host, target) == model
        await host.graph.release(guest)

    on_host(scenario)


@pytest.mark.parametrize("keys", KEYS)
def test_a_chain_is_shortened_from_either_end(keys: tuple[int | None, int | None]) -> None:
    async def scenario(host: SimHost) -> None:
        base = await disk(host, "base", keys[0])
        middle = await disk(host, "middle", 7, backing=base)
        top = await disk(host, "top", keys[1], backing=middle)
        for seed, node in enumerate((base, middle, top)):
            await fill(host, node, seed)
        model = bytearray(await read_all(host, top))
        guest = await guest_of(host, top)
        commit = await host.commit(top, top_node="middle", base_node="base")
        await run_guest(guest, model, random.Random(8), writes=20, pause_s=0.001)
        assert (await commit.outcome()).error is None
        assert top.backing is base and await read_all(host, top) == model
        stream = await host.stream(top)
        await run_guest(guest, model, random.Random(9), writes=20, pause_s=0.001)
        assert (await stream.outcome()).error is None
        assert top.backing is None and await read_all(host, top) == model
        await host.graph.release(guest)

    on_host(scenario)


@pytest.mark.parametrize("keys", [(1, 2), (-1, -2)])
def test_bytes_that_are_no_sectors_are_read_through_a_chain(keys: tuple[int, int]) -> None:
    async def scenario(host: SimHost) -> None:
        base = await disk(host, "base", keys[0])
        await fill(host, base, 1)
        top = await disk(host, "top", keys[1], backing=base)
        shown = await read_all(host, base)
        async with host.access(top, write=True) as user:
            assert await user.node.read(1001, 70_001) == shown[1001:71_002]
            await user.node.write(20_001, b"!" * 3001)
            shown = shown[:20_001] + b"!" * 3001 + shown[23_002:]
            reads = [user.node.read(at, 333) for at in range(19_000, 25_000, 111)]
            parts = await asyncio.gather(*reads)
        assert parts == [shown[at : at + 333] for at in range(19_000, 25_000, 111)]
        assert await read_all(host, top) == shown

    on_host(scenario)


def test_a_read_only_backing_image_pads_too() -> None:
    async def scenario(host: SimHost) -> None:
        made = await disk(host, "made", 1)
        await fill(host, made, 1)
        shown = await read_all(host, made)
        await host.close_nodes(made)
        await host.disk("base-file", host.disks["made-file"].pages, read_only=True)
        base = await host.blockdev_add(
            {"driver": "qcow2", "node-name": "base", "file": "base-file", "read-only": True, "backing": None}
        )
        assert isinstance(base.driver, Qcow2)
        base.driver.image.encipherment = Encipherment(ToyCipher(1), 0)
        top = await disk(host, "top", None, backing=base)
        async with host.access(top, write=True) as user:
            for at in range(0, SIZE - 700, 40_009):
                assert await user.node.read(at, 700) == shown[at : at + 700]
                room = memoryview(bytearray(700))
                assert not read_now(top, at, room) or room == shown[at : at + 700]

    on_host(scenario)


@pytest.mark.parametrize("origin", [0, None])
def test_a_node_between_image_and_file_carries_ciphertext(origin: int | None) -> None:
    async def scenario(host: SimHost) -> None:
        nodes = []
        for name, key in (("one", 1), ("two", 2)):
            await host.close_nodes(await disk(host, name, None))
            await host.blockdev_add({"driver": "raw", "node-name": f"{name}-raw", "file": f"{name}-file"})
            options = {"driver": "qcow2", "node-name": name, "file": f"{name}-raw", "discard": "unmap"}
            node = await host.blockdev_add(options)
            assert isinstance(node.driver, Qcow2)
            node.driver.image.encipherment = Encipherment(ToyCipher(key), origin)
            nodes.append(node)
        await fill(host, nodes[0], 1)
        shown = await read_all(host, nodes[0])
        async with host.access(nodes[0], write=True) as user:
            room = memoryview(bytearray(512))
            at = shown.index(MARK) // 512 * 512 + 512
            assert not read_now(nodes[0], at, room) or room == shown[at : at + 512]
            assert not write_now(nodes[0], at, memoryview(shown)[at : at + 512])
            assert await user.node.read(0, SIZE) == shown
        assert (await (await host.backup(*nodes)).outcome()).error is None
        assert await read_all(host, nodes[1]) == shown
        plain = await disk(host, "plain", None)
        await fill(host, plain, 2)
        assert (await (await host.backup(plain, nodes[1])).outcome()).error is None
        assert await read_all(host, nodes[1]) == await read_all(host, plain)
        assert not shows_mark(host, "one") and not shows_mark(host, "two")

    on_host(scenario)


def test_holes_of_the_file_and_zeroes_in_it_mean_nothing() -> None:
    async def scenario(host: SimHost) -> None:
        node = await host.image("disk", NewImage(size=64 * MiB, cluster_size=2 * MiB), cipher=ToyCipher(1))
        async with host.access(node, write=True) as user:
            await user.node.write(0, b"x" * (8 * MiB))
            before = await user.node.read(0, 8 * MiB)
        file = host.disks["disk-file"]
        [run] = [each for each in [each async for each in host.map(node)] if each.is_data]
        assert run.offset is None and run.length == 8 * MiB and not run.zero
        assert before == b"x" * (8 * MiB)
        # A cluster that somebody has punched out of the file is not zero: it is garbage.
        file.discard(file.size() - 8 * MiB, 8 * MiB)
        [first, *_] = [each async for each in host.map(node)]
        assert not first.zero
        assert (await node.block_status(Span(0, 8 * MiB)))[0].kind is Kind.DATA
        other = await host.image("other", NewImage(size=64 * MiB))
        async with host.access(node), host.access(other):
            assert await host.first_difference(node, other) == 0

    on_host(scenario)


def test_pieces_for_an_enciphered_disk_are_refused_before_anybody_waits_for_its_clusters() -> None:
    async def scenario(host: SimHost) -> None:
        target = await disk(host, "target", 1)
        async with target.storage.tracker.exclusive(Span(0, 64 * KiB)), asyncio.timeout(1):
            assert await Placing().reserve_pieces(target, [0], [16 * KiB]) is None
        assert target.storage.tally.write_end == 0

    on_host(scenario)
