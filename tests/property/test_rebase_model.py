"""Overlays that are to lie on another image: they keep what they would lose, and show the same, whatever happens."""

import random

import pytest

from blockjobs.base.errors import IoFailure
from blockjobs.base.span import Span
from blockjobs.block import compare, rebase
from blockjobs.block.drivers.qcow2.create import NewImage
from blockjobs.block.node import Node
from blockjobs.block.plan import RunKind, trace
from blockjobs.testing.chains import Layer, make_chain, random_layers, read_all
from blockjobs.testing.clock import run
from blockjobs.testing.disk import Pages, SimDisk
from blockjobs.testing.faults import Fault, FaultyMedium, Operation
from blockjobs.testing.host import SimHost

KIB = 1 << 10
UNIT = 64 * KIB


def layers_of(chance: random.Random, count: int) -> list[Layer]:
    """Of some dozens of units, not all of them whole."""
    layers = random_layers(chance, count)
    for layer in layers:
        layer.size = chance.choice([10, 24, 40]) * UNIT + chance.choice([0, 0, 0, 512, 20 * KIB])
        layer.cluster_size = max(layer.cluster_size, chance.choice([512, UNIT, 2 * UNIT]))
    return layers


async def other_image(host: SimHost, like: bytes, chance: random.Random) -> Node:
    """An image that has much in common with those bytes; raw or qcow2, longer or shorter."""
    content = bytearray(like[: chance.choice([len(like), len(like), len(like) // 2, 5 * UNIT + 512])])
    content += bytes(chance.choice([0, 0, 3 * UNIT]))
    for _ in range(chance.randrange(6)):
        length = chance.choice([1, UNIT, 3 * UNIT])
        at = chance.randrange(max(1, len(content) - length))
        content[at : at + length] = chance.choice([bytes(length), chance.randbytes(length)])
    if chance.random() < 0.5:
        await host.disk("other-file", Pages(bytes(content)))
        return await host.blockdev_add({"driver": "raw", "node-name": "other", "file": "other-file"})
    node = await host.image("other", NewImage(size=len(content) // 512 * 512, cluster_size=chance.choice([512, UNIT])))
    async with host.access(node, write=True) as user:
        for at in range(0, node.length, UNIT):
            if any(piece := bytes(content[at : min(at + UNIT, node.length)])):
                await user.node.write(at, piece)
    return node


async def expect_independent(host: SimHost, top: Node, new: Node | None, shown: bytes) -> None:
    """On the new image it shows the same as on the old one."""
    below = await read_all(host, new) if new is not None else b""
    for each in await trace(top, Span(0, top.length), through_backing=False):
        if each.kind is RunKind.ABSENT:
            assert below[each.at : each.end].ljust(each.length, b"\0") == shown[each.at : each.end], each
    assert await read_all(host, top) == shown


@pytest.mark.parametrize("seed", range(150))
def test_what_would_be_lost_is_kept(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(seed)
    monkeypatch.setattr(rebase, "LOOK_BYTES_MIN", chance.choice([7 * UNIT, compare.LOOK_BYTES_MIN]))
    monkeypatch.setattr(rebase, "GROUP_BYTES", chance.choice([UNIT, rebase.GROUP_BYTES]))
    monkeypatch.setattr(rebase, "PIECE_BYTES", chance.choice([2 * UNIT, rebase.PIECE_BYTES]))

    async def scenario() -> None:
        async with SimHost(seed) as host:
            has_old = chance.random() < 0.85
            layers = layers_of(chance, chance.randrange(2, 5) if has_old else 1)
            layers[0].is_raw = layers[0].is_raw and has_old
            nodes = await make_chain(host, layers, chance, writes=20)
            top, old = nodes[-1], nodes[-2] if has_old else None
            shown = await read_all(host, top)
            new = chance.choice([None, *nodes[:-1]])
            if chance.random() < 0.5:
                new = await other_image(host, await read_all(host, old or top), chance)
            dealt: list[int] = []
            async with host.access(top, write=True):
                await rebase.keep_differences(top, old, new, advance=dealt.append)
            assert sum(dealt) == top.length
            await expect_independent(host, top, new, shown)

    run(scenario())


@pytest.mark.parametrize("seed", range(60))
def test_a_failure_leaves_it_as_it_was(seed: int) -> None:
    chance = random.Random(seed)

    async def scenario() -> None:
        async with SimHost(seed) as host:
            nodes = await make_chain(host, [Layer(40 * UNIT, UNIT), Layer(40 * UNIT, UNIT)], chance, writes=30)
            top = nodes[-1]
            shown = await read_all(host, top)
            new = await other_image(host, await read_all(host, nodes[0]), chance)
            kind = chance.choice((Operation.READ, Operation.WRITE))
            plan = host.faults[chance.choice(("l0-file", "l1-file", "other-file"))]
            plan.add(Fault(nth=chance.randrange(1, 20), operation=kind, times=1000))
            async with host.access(top, write=True):
                failed = False
                try:
                    await rebase.keep_differences(top, nodes[0], new)
                except IoFailure:
                    failed = True
                assert plan.hits or not failed
                plan.cure()
                if not failed:
                    await expect_independent(host, top, new, shown)
                assert await top.read(0, top.length) == shown
                await rebase.keep_differences(top, nodes[0], new)
            await expect_independent(host, top, new, shown)

    run(scenario())


def test_another_place_of_the_same_file_is_compared() -> None:
    async def scenario() -> None:
        async with SimHost(1) as host:
            size = 64 * UNIT
            content = random.Random(1).randbytes(UNIT) * 32 + random.Random(2).randbytes(UNIT) * 33
            await host.disk("file", Pages(content))
            at, further = [
                await host.blockdev_add(
                    {"driver": "raw", "node-name": name, "file": "file", "offset": offset, "size": size}
                )
                for name, offset in (("at", 0), ("further", UNIT))
            ]
            top = await host.image("top", NewImage(size=size, backing_file="x", backing_format="raw"), backing="at")
            shown = await read_all(host, top)
            async with host.access(top, write=True):
                await rebase.keep_differences(top, at, further)
            await expect_independent(host, top, further, shown)
            own = [run for run in await trace(top, Span(0, size), through_backing=False) if run.kind is RunKind.DATA]
            assert [(run.at, run.length) for run in own] == [(31 * UNIT, UNIT)]

    run(scenario())


class Noting(FaultyMedium):
    """Notes what is read."""

    def __init__(self, inner: SimDisk) -> None:
        super().__init__(inner)
        self.read_bytes = 0

    def read_into(self, at: int, buffer: memoryview) -> None:
        self.read_bytes += len(buffer)
        super().read_into(at, buffer)


def test_what_both_have_from_one_image_is_not_read() -> None:
    async def scenario() -> None:
        async with SimHost(1) as host:
            size = 64 * UNIT
            await host.disk("base-file", Pages(random.Random(1).randbytes(size)))
            base = await host.blockdev_add({"driver": "raw", "node-name": "base", "file": "base-file"})
            image = NewImage(size=size, backing_file="base-file", backing_format="raw")
            below = await host.image("below", image, backing="base")
            async with host.access(below, write=True) as user:
                await user.node.write(3 * UNIT, b"x" * UNIT)
            top = await host.image("top", image, backing="below")
            noting = Noting(base.children["file"].driver.medium)
            base.children["file"].driver.medium = noting
            async with host.access(top, write=True):
                await rebase.keep_differences(top, below, base)
            assert noting.read_bytes <= UNIT
            assert [(run.at, run.length) for run in await trace(top, Span(0, size), through_backing=False)][1] == (
                3 * UNIT,
                UNIT,
            )

    run(scenario())
