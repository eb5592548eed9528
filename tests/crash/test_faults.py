"""A failing request at every place of a run: a clean error, a whole image, and all is well once the cause is gone.

(spec/durability.md §1, last paragraph, and I8.)
"""

import asyncio
import errno
import random
from contextlib import nullcontext, suppress
from dataclasses import replace

import pytest
from replay import SECTOR, SEEDS, Guest, blank, graph_over, own_errors, shown
from workload import SETUPS, Setup, Workload

from blockjobs.base.errors import IoFailure
from blockjobs.block.claims import ALL, Perm
from blockjobs.block.node import Node
from blockjobs.block.options import BlockdevOptions
from blockjobs.schema.command import convert
from blockjobs.testing.crash import WriteLog
from blockjobs.testing.disk import Pages, SimDisk
from blockjobs.testing.faults import Fault, FaultPlan, FaultyMedium, Operation

STEPS = 16
PLACES_MAX = 3
"""Places that are tried per run and kind of fault in the suite; with BLOCKJOBS_CRASH_SEEDS all."""
FOR_EVER = 1 << 30
KINDS = {
    "a write": Fault(nth=0, operation=Operation.WRITE),
    "no space from here on": Fault(nth=0, operation=Operation.WRITE, errno=errno.ENOSPC, short=True, times=FOR_EVER),
    "a read": Fault(nth=0, operation=Operation.READ),
    "everything from here on": Fault(nth=0, times=FOR_EVER),
    "a sync": Fault(nth=0, operation=Operation.SYNC),
}
NAMES = ("tiny caches", "extended L2", "backing")


def wrong_sectors(content: bytes, guest: Guest) -> list[int]:
    """Sectors that show neither the last change that succeeded nor one that failed."""
    expected = guest.now()
    failed = [op for op in guest.ops if op.issued > op.ended or op.ended > len(guest.log.changes)]
    wrong = []
    for at in range(0, len(expected), SECTOR):
        possible = {expected[at : at + SECTOR]}
        if content[at : at + SECTOR] in possible:
            continue
        for op in failed:
            possible |= {op.apply(at, sector) for sector in possible}
        if content[at : at + SECTOR] not in possible:
            wrong.append(at // SECTOR)
    return wrong


async def work(setup: Setup, node: Node, guest: Guest, seed: int) -> None:
    """A guest that takes errors as they come and goes on. Anything but an IoFailure is ours to explain."""
    workload = Workload(guest, node, setup, random.Random(seed))
    for _ in range(STEPS):
        with suppress(IoFailure):
            await workload.step()


async def run_with(setup: Setup, start: dict[str, Pages], seed: int, fault: Fault) -> FaultPlan:
    """Run the workload with one fault, then see that everything can be healed; returns what was counted and hit."""
    disks = {name: SimDisk(pages) for name, pages in start.items()}
    plan = FaultPlan()
    guest = Guest(WriteLog(), await shown(start, setup.options), setup.image.size)
    with suppress(IoFailure) if fault.operation in (None, Operation.SYNC) else nullcontext():
        async with graph_over({name: FaultyMedium(disk, plan) for name, disk in disks.items()}) as graph:
            described = {"driver": "qcow2", "node-name": "image", "discard": "unmap", **setup.options}
            node = await graph.open(convert(described, BlockdevOptions))
            user = await graph.claim("a guest", node, needs=Perm.CONSISTENT_READ | Perm.WRITE, shares=ALL)
            plan.calls.clear()
            plan.faults.append(fault)
            await work(setup, node, guest, seed)
            counted = replace(plan, calls=plan.calls.copy())
            plan.cure()
            assert not (wrong := wrong_sectors(await node.read(0, node.length), guest)), f"live: {wrong[:9]}"
            if plan.failed_syncs:
                for _ in range(2):
                    with pytest.raises(IoFailure):
                        await node.flush()
            else:
                await guest.flush(node.flush)
            await graph.release(user)
    images = {name: disk.pages for name, disk in disks.items()}
    assert not (errors := await own_errors(images)), errors
    content = await shown(images, setup.options)
    if plan.failed_syncs:
        assert not (lies := guest.lies(content, len(guest.log.changes))), f"lost: {lies[:9]}"
    else:
        assert not (wrong := wrong_sectors(content, guest)), f"reopened: {wrong[:9]}"
    return counted


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_a_fault_at_every_place(name: str, kind: str) -> None:
    setup, fault = SETUPS[name], KINDS[kind]

    async def check(seed: int) -> None:
        start = await blank(setup.image, backing=setup.backing, seed=seed)
        counted = await run_with(setup, start, seed, replace(fault, nth=FOR_EVER))
        places = range(1, counted.calls[fault.operation] + 1)
        if SEEDS == 1 and len(places) > PLACES_MAX:
            places = sorted(random.Random(seed).sample(places, PLACES_MAX))
        for nth in places:
            try:
                plan = await run_with(setup, start, seed, replace(fault, nth=nth))
            except Exception as error:
                raise AssertionError(f"seed {seed}, {kind}, number {nth}") from error
            assert plan.hits

    for seed in range(SEEDS):
        asyncio.run(check(seed))
