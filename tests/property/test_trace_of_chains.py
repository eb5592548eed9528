"""Where the bytes of a chain are, asked for at once and sector by sector; and how often its images are asked."""

import random
from collections import Counter

import pytest

from blockjobs.base.span import Span
from blockjobs.block import plan
from blockjobs.block.drivers.qcow2.create import NewImage
from blockjobs.block.drivers.qcow2.driver import Qcow2
from blockjobs.block.drivers.qcow2.streams import InflatedMedium
from blockjobs.block.layers import trace_pieces
from blockjobs.block.node import Node
from blockjobs.block.plan import Run, RunKind, trace
from blockjobs.testing.chains import make_chain, random_layers
from blockjobs.testing.clock import run
from blockjobs.testing.host import SimHost
from blockjobs.testing.little_host import LittleHost

SECTOR = 512
KiB, MiB = 1 << 10, 1 << 20


def sectors(runs: list[Run]) -> list[object]:
    """Each sector of the runs; what is compressed as its bytes, since each run of that has a medium of its own."""
    return [
        each._replace(
            at=at,
            length=SECTOR,
            medium_at=each.medium_at + at - each.at if each.medium else 0,
        )
        if not isinstance(each.medium, InflatedMedium)
        else (at, inflated(each.medium, each.medium_at + at - each.at))
        for each in runs
        for at in range(each.at, each.end, SECTOR)
    ]


def inflated(medium: InflatedMedium, at: int) -> bytes:
    content = memoryview(bytearray(SECTOR))
    medium.read_into(at, content)
    return bytes(content)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("apart_bytes", [0, 4 * KiB, plan.GAPS_APART_BYTES_MIN])
def test_a_whole_chain_is_what_its_sectors_are(seed: int, apart_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "GAPS_APART_BYTES_MIN", apart_bytes)

    async def scenario() -> None:
        chance = random.Random(seed)
        async with SimHost(seed) as host:
            nodes = await make_chain(host, random_layers(chance, chance.randrange(2, 7)), chance, writes=12)
            top = nodes[-1]
            for base in (None, *nodes[:-1]):
                whole = await trace(top, Span(0, top.length), through_backing=True, base=base)
                single: list[Run] = []
                for at in range(0, top.length, SECTOR):
                    single += await trace(top, Span(at, SECTOR), through_backing=True, base=base)
                assert sectors(whole) == sectors(single)
                assert [run.at for run in whole] == [0, *(run.end for run in whole[:-1])]

    run(scenario())


def test_each_image_of_a_chain_is_asked_a_few_times_not_for_each_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    layers, length = 12, 32 * MiB
    asked = 0
    resolve = Qcow2.resolve

    async def counted(self: Qcow2, span: Span) -> object:
        nonlocal asked
        asked += 1
        return await resolve(self, span)

    async def scenario() -> None:
        chance = random.Random(1)
        clusters = chance.sample(range(length // (64 * KiB)), length // (64 * KiB) // 2)
        async with LittleHost() as host:
            node: Node | None = None
            for layer in range(layers):
                node = await host.qcow2(f"l{layer}", NewImage(size=length), backing=node and node.name)
                guest = await host.guest(node)
                for cluster in clusters[layer::layers]:
                    await node.write(cluster * 64 * KiB, b"x" * 512)
                await host.graph.release(guest)
            assert node is not None
            monkeypatch.setattr(Qcow2, "resolve", counted)
            runs = await trace(node, Span(0, length), through_backing=True)
            assert len(runs) > 100
            assert asked <= 3 * layers

    run(scenario())


@pytest.mark.parametrize("seed", range(12))
def test_columns_of_a_chain_are_what_its_runs_are(seed: int) -> None:
    found: Counter[str] = Counter()

    async def scenario(chance: random.Random) -> None:
        async with SimHost(seed) as host:
            layers = random_layers(chance, chance.randrange(1, 6))
            nodes = await make_chain(host, layers, chance, writes=12)
            top = nodes[-1]
            for base in (None, *nodes[:-1]):
                for _ in range(12):
                    at = chance.randrange(top.length // SECTOR) * SECTOR
                    span = Span(at, chance.randrange(1, (top.length - at) // SECTOR + 1) * SECTOR)
                    enough = chance.choice((1 << 40, 8 * KiB))
                    pieces = await trace_pieces(top, span, SECTOR, enough, base)
                    if pieces is None:
                        found["not simple"] += 1
                        continue
                    found["simple"] += 1
                    found["several media"] += pieces.media is not None
                    assert pieces.rest is (RunKind.ZERO if base is None else RunKind.ABSENT)
                    assert pieces.at == sorted(pieces.at)
                    # Nobody asked for what is behind enough.
                    span = Span.between(span.at, pieces.end_of(enough) or span.end)
                    runs = await trace(top, span, through_backing=True, base=base)
                    assert sectors(pieces.before(span.end).runs(span)) == sectors(runs), (span, base)

    for number in range(15):
        run(scenario(random.Random(seed * 15 + number)))
    assert found["simple"] > 100 and found["several media"] > 5, found
