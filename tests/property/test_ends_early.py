"""Batches that end early: wherever a copy is stopped, what it says has arrived has, and nothing else is shown.

Whether to go on is answered at random, between strides that are shorter than usual, with two batches under way. In the
end the target is the source and its image has no leaks; and at any time a power cut leaves it sound.
"""

import asyncio
import random
from collections.abc import Callable

import pytest

from blockjobs.base.offload import InlineOffload
from blockjobs.base.span import Span, subtract
from blockjobs.base.units import KiB
from blockjobs.block import execute
from blockjobs.block.claims import ALL, Perm
from blockjobs.block.copier import BlockCopy, copy_cluster_size
from blockjobs.block.drivers.copy_on_read import CopyOnRead
from blockjobs.block.drivers.qcow2.check import check_image
from blockjobs.block.drivers.qcow2.create import NewImage
from blockjobs.block.drivers.qcow2.driver import Qcow2
from blockjobs.block.node import Node
from blockjobs.block.vocabulary import Kind
from blockjobs.testing.clock import run
from blockjobs.testing.disk import Pages, SimDisk
from blockjobs.testing.little_host import LittleHost

SIZE = 60 * 64 * KiB + 12 * KiB
CLUSTER = 64 * KiB


@pytest.fixture(autouse=True)
def short_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "STRIDE_BYTES", 80 * KiB)
    monkeypatch.setattr(execute, "TOGETHER_BYTES", 80 * KiB)


def some_content(chance: random.Random) -> bytes:
    """Runs of data and of zeroes."""
    content = bytearray()
    while len(content) < SIZE:
        length = chance.randrange(1, 9) * CLUSTER // chance.choice((1, 1, 16))
        content += chance.randbytes(length) if chance.random() < 0.7 else bytes(length)
    return bytes(content[:SIZE])


def mostly(chance: random.Random) -> Callable[[], bool]:
    return lambda: chance.random() < 0.8


async def make_source(host: LittleHost, content: bytes, chance: random.Random) -> Node:
    if chance.random() < 0.3:
        return await host.disk("source", content)
    below = await make_base(host, content, chance) if chance.random() < 0.4 else None
    extended, data_file = chance.random() < 0.3, "data.raw" if chance.random() < 0.3 else None
    source = await host.qcow2(
        "source", NewImage(size=SIZE, extended_l2=extended, data_file_name=data_file), backing=below
    )
    unit = chance.choice((CLUSTER, CLUSTER, 4 * KiB))
    async with Writer(host, source):
        for at in chance.sample(range(0, SIZE, unit), len(range(0, SIZE, unit))):
            wanted = content[at : at + unit]
            if below is not None and await source.read(at, len(wanted)) == wanted and chance.random() < 0.9:
                continue
            if any(wanted):
                await source.write(at, wanted)
            elif below is not None or chance.random() < 0.3:
                await source.zero(Span(at, len(wanted)))
    return source


async def make_base(host: LittleHost, content: bytes, chance: random.Random) -> str:
    """What is below shows some of the content, and something else."""
    lower = bytearray(content[: chance.choice((SIZE, SIZE, SIZE // 2))])
    for _ in range(chance.randrange(12)):
        at = chance.randrange(len(lower) // CLUSTER) * CLUSTER
        lower[at : at + CLUSTER] = chance.choice((bytes(CLUSTER), chance.randbytes(CLUSTER)))
    if chance.random() < 0.5:
        return (await host.disk("base", bytes(lower))).name
    base = await host.qcow2("base", NewImage(size=len(lower)))
    async with Writer(host, base):
        for at in chance.sample(range(0, len(lower), CLUSTER), len(range(0, len(lower), CLUSTER))):
            if any(lower[at : at + CLUSTER]):
                await base.write(at, bytes(lower[at : at + CLUSTER]))
    return base.name


async def make_target(host: LittleHost, chance: random.Random) -> Node:
    """Raw or qcow2, new or full of rubbish, with clusters that are new, in place, or not divisible at all."""
    if chance.random() < 0.25:
        return await host.disk("target", chance.randbytes(SIZE) if chance.random() < 0.5 else SIZE)
    cluster_size = chance.choice((512, 4096, CLUSTER, 2 * CLUSTER))
    extended, data_file = cluster_size >= CLUSTER and chance.random() < 0.3, chance.random() < 0.3
    image = NewImage(
        size=SIZE,
        cluster_size=cluster_size,
        extended_l2=extended,
        data_file_name="data.raw" if data_file else None,
        data_file_raw=data_file and chance.random() < 0.5,
    )
    target = await host.qcow2("target", image)
    if chance.random() < 0.4:
        async with Writer(host, target):
            await target.write(0, chance.randbytes(SIZE))
    return target


class Writer:
    """The right to write to a node for a while."""

    def __init__(self, host: LittleHost, node: Node) -> None:
        self._host, self._node = host, node

    async def __aenter__(self) -> None:
        needs = Perm.CONSISTENT_READ | Perm.WRITE
        self._root = await self._host.graph.claim("a writer", self._node, needs=needs, shares=ALL)

    async def __aexit__(self, *_: object) -> None:
        await self._host.graph.release(self._root)


async def expect_sound(node: Node, *, leaks: bool = False) -> None:
    if isinstance(node.driver, Qcow2):
        image = node.driver.image
        if image.geometry.is_data_file_raw:
            assert await image.child("data-file").read(0, SIZE) == await node.read(0, SIZE)
        found = await check_image(image.child("file"), offload=InlineOffload())
        assert found.is_clean or (leaks and not found.corruptions), found


async def copy_with_stops(host: LittleHost, copier: BlockCopy, chance: random.Random) -> None:
    """Two batches at a time; each ends where it is stopped."""
    lane = asyncio.Lock()
    wanted_bytes = copier.dirty.dirty_bytes()
    arrived: list[int] = []
    copier.on_arrived = arrived.append

    async def carry() -> None:
        flight = copier.take(chance.randrange(SIZE)) or copier.take()
        if flight is None:
            return
        batch = await copier.prepare(flight, moved_max=chance.randrange(1, 20) * CLUSTER)
        for span in await copier.move(batch, lane=lane, goes_on=mostly(chance)):
            assert copier.dirty.any(span)

    while copier.dirty.any():
        async with asyncio.TaskGroup() as group:
            group.create_task(carry())
            group.create_task(carry())
    assert sum(arrived) == wanted_bytes


def mark(copier: BlockCopy, chance: random.Random) -> list[Span]:
    """All of it is to be copied, or some runs; returns which."""
    if chance.random() < 0.4:
        copier.dirty.set_all()
    while not copier.dirty.any() or chance.random() < 0.9:
        copier.dirty.set(Span(chance.randrange(SIZE), chance.randrange(1, 3 * CLUSTER)))
    return list(copier.dirty.runs())


@pytest.mark.parametrize("seed", range(120))
def test_a_copy_that_is_stopped_again_and_again_is_whole_in_the_end(seed: int) -> None:
    async def main() -> None:
        chance = random.Random(seed)
        content = some_content(chance)
        async with LittleHost(seed=seed) as host:
            source, target = await make_source(host, content, chance), await make_target(host, chance)
            copier = BlockCopy(
                source=lambda: source,
                target=lambda: target,
                offload=host.graph.offload,
                clock=host.clock,
                cluster_size=copy_cluster_size(target.cluster_size),
            )
            wanted = bytearray(await target.read(0, SIZE))
            for span in mark(copier, chance):
                wanted[span.at : span.end] = content[span.at : span.end]
            async with Writer(host, target):
                await copy_with_stops(host, copier, chance)
                assert await target.read(0, SIZE) == wanted
                for _ in range(2):  # what the first one made free is counted as such by the second
                    await target.flush()
                await expect_sound(target)

    run(main())


@pytest.mark.parametrize("seed", range(30))
def test_power_cuts_between_stops_leave_sound_images(seed: int) -> None:
    async def main() -> None:
        chance = random.Random(1000 + seed)
        content = some_content(chance)
        async with LittleHost(seed=seed) as host:
            source = await host.disk("source", content)
            image = NewImage(size=SIZE, cluster_size=chance.choice((4096, CLUSTER)))
            target = await host.qcow2("target", image)
            copier = BlockCopy(
                source=lambda: source,
                target=lambda: target,
                offload=host.graph.offload,
                clock=host.clock,
                cluster_size=CLUSTER,
            )
            copier.dirty.set_all()
            durable: list[Span] = []
            async with Writer(host, target):
                while (flight := copier.take()) is not None:
                    batch = await copier.prepare(flight, moved_max=chance.randrange(1, 20) * CLUSTER)
                    await copier.move(batch, goes_on=mostly(chance))
                    if chance.random() < 0.3:
                        await target.flush()
                        durable = subtract(Span(0, SIZE), copier.dirty.runs())
                    after = host.disks["target-file"].after_power_cut(seed)
                    await expect_after_power_cut(after, image, content, durable)

    async def expect_after_power_cut(pages: Pages, image: NewImage, content: bytes, durable: list[Span]) -> None:
        async with LittleHost() as host:
            again = await host.qcow2("target", image, medium=SimDisk(pages))
            await expect_sound(again, leaks=True)
            for span in durable:
                assert await again.read(span.at, span.length) == content[span.at : span.end]

    run(main())


@pytest.mark.parametrize("keeps_zeroes", [True, False])
@pytest.mark.parametrize("seed", range(40))
def test_a_population_that_is_stopped_again_and_again_is_whole_in_the_end(seed: int, keeps_zeroes: bool) -> None:
    async def main() -> None:
        chance = random.Random(seed)
        async with LittleHost(seed=seed) as host:
            base = host.graph.find(await make_base(host, some_content(chance), chance))
            cluster_size = chance.choice((4096, CLUSTER, 2 * CLUSTER))
            extended = cluster_size >= CLUSTER and chance.random() < 0.3
            image = NewImage(size=SIZE, cluster_size=cluster_size, extended_l2=extended)
            top = await host.qcow2("top", image, backing=base.name)
            filtering = await host.add(driver="copy-on-read", node_name="cor", file="top")
            assert isinstance(filtering.driver, CopyOnRead)
            populator = filtering.driver.populator
            populator.keeps_zeroes = keeps_zeroes
            async with Writer(host, filtering):
                whole = bytearray((await base.read(0, base.length)).ljust(SIZE, b"\0"))
                for _ in range(chance.choice((1, 9, 40))):
                    at, own = chance.randrange(SIZE - 3 * KiB), chance.randbytes(3 * KiB)
                    await filtering.write(at, own)
                    whole[at : at + len(own)] = own
                left = [Span(0, SIZE)]
                while left:
                    first = left.pop(0)
                    part = Span(first.at, min(first.length, chance.randrange(1, 30) * CLUSTER))
                    plan = await populator.plan(part, moved_max=chance.randrange(1, 80) * CLUSTER // 4)
                    assert plan.span, "it gets on"
                    dealt_with = Span(0, plan.span.end).widen(cluster_size).end
                    for ticket in plan.tickets:  # writers may go behind it
                        assert extended or min(ticket.end, SIZE) == min(dealt_with, SIZE)
                    assert await populator.move(plan, goes_on=mostly(chance)) == []
                    left += [part for each in plan.left if (part := each.intersect(plan.span))]
                    left += [rest for rest in [Span.between(min(plan.span.end, first.end), first.end)] if rest]
                assert await filtering.read(0, SIZE) == whole
                await filtering.flush()
                await expect_sound(top)
                stored = await top.driver.resolve(Span(0, SIZE // image.cluster_size * image.cluster_size))
                absent = [segment for segment in stored if segment.length and segment.kind is Kind.BACKING]
                if keeps_zeroes:
                    assert not absent
                assert not any(any(whole[segment.at : segment.at + segment.length]) for segment in absent)

    run(main())
