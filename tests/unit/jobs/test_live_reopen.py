"""Nodes are reopened again and again while a guest writes: its bytes are what it wrote, whatever happens to options."""

import asyncio
import random

import pytest
from test_snapshot import SIZE, Guest, in_host, state_of

from blockjobs.base.errors import BlockjobsError
from blockjobs.block.drivers.qcow2.create import NewImage
from blockjobs.block.options import BlockdevOptions
from blockjobs.block.reopen_plan import reopen
from blockjobs.schema.command import convert
from blockjobs.testing.faults import Fault
from blockjobs.testing.host import SimHost


def described(chance: random.Random) -> dict[str, object]:
    options: dict[str, object] = {"driver": "qcow2", "node-name": "a", "file": "a-file", "backing": "base"}
    if chance.random() < 0.5:
        options["l2-cache-size"] = chance.choice([1 << 17, 1 << 20])
    if chance.random() < 0.5:
        options["discard"] = "unmap"
    if chance.random() < 0.5:
        options["detect-zeroes"] = "on"
    return options


async def begin(host: SimHost, seed: int) -> Guest:
    await host.image("base", NewImage(size=SIZE))
    await host.image("a", NewImage(size=SIZE), backing="base")
    guest = Guest(seed)
    await guest.begin(host, host.graph.node("a"))
    return guest


@pytest.mark.parametrize("seed", range(8))
def test_nothing_is_lost(seed: int) -> None:
    async def body(host: SimHost) -> None:
        chance = random.Random(seed)
        guest = await begin(host, seed)
        for _ in range(10):
            await asyncio.sleep(chance.random() * 0.1)
            await reopen(host.graph, [convert(described(chance), BlockdevOptions)])
            base = host.graph.node("base")
            await host.graph.set_read_only(base, read_only=not base.read_only)
        await guest.end()
        assert await guest.root.node.read(0, SIZE) == guest.model

    in_host(body, seed)


@pytest.mark.parametrize("nth", range(1, 9))
def test_a_failing_disk_leaves_the_old_options(nth: int) -> None:
    async def body(host: SimHost) -> None:
        guest = await begin(host, nth)
        await asyncio.sleep(0.3)
        async with host.graph.drained(None):
            before = state_of(host)
            host.faults["a-file"].add(Fault(nth=nth))
            wanted = {**described(random.Random(1)), "l2-cache-size": 1 << 16, "detect-zeroes": "on"}
            try:
                await reopen(host.graph, [convert(wanted, BlockdevOptions)])
            except BlockjobsError:
                assert state_of(host) == before
            host.faults["a-file"].cure()
        await guest.end()
        assert await guest.root.node.read(0, SIZE) == guest.model
        poisoned.append(bool(host.faults["a-file"].failed_syncs))

    poisoned: list[bool] = []
    try:
        in_host(body, nth)
    except BlockjobsError:  # a disk whose sync has failed once cannot be closed well
        assert poisoned == [True]
