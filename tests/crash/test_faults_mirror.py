"""A failing request at every place of a mirror: the policy is followed, and COMPLETED never stands for a wrong byte."""

import asyncio
import errno
import random
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, replace

import pytest
from replay import SEEDS, blank, own_errors, shown

from blockjobs.base.errors import IoFailure
from blockjobs.block.drivers.qcow2.create import NewImage
from blockjobs.jobs.mirror_options import BlockdevMirror
from blockjobs.jobs.mirror_start import start_blockdev_mirror
from blockjobs.lifecycle.history import Outcome
from blockjobs.lifecycle.status import JobStatus
from blockjobs.schema.command import convert
from blockjobs.testing.clock import run
from blockjobs.testing.disk import Pages, SimDisk
from blockjobs.testing.faults import Fault, FaultPlan, FaultyMedium, Operation
from blockjobs.testing.little_host import LittleHost

KIB, MIB = 1 << 10, 1 << 20
SIZE = MIB
PLACES_MAX = 4
"""Places that are tried per kind of fault in the suite; with BLOCKJOBS_CRASH_SEEDS all."""
FOR_EVER = 1 << 30
TARGETS = {
    "plain": NewImage(size=SIZE),
    "small clusters": NewImage(size=SIZE, cluster_size=512, refcount_bits=64),
}
KINDS = {
    "reading the source": ("source", Fault(nth=0, operation=Operation.READ)),
    "looking at the source": ("source", Fault(nth=0, operation=Operation.STATUS)),
    "reading the target": ("target", Fault(nth=0, operation=Operation.READ)),
    "writing the target": ("target", Fault(nth=0, operation=Operation.WRITE)),
    "the target is full": ("target", Fault(nth=0, operation=Operation.WRITE, errno=errno.ENOSPC, short=True)),
}
TIMES = {"report": FOR_EVER, "stop": FOR_EVER, "ignore": 3}
"""How long a fault lasts: for the other policies a fault that one retry gets over would go unseen."""


@dataclass
class Ended:
    """How a run ended."""

    outcome: Outcome
    calls: int
    hits: int
    target: dict[str, Pages]
    source: Pages
    stops: int
    wanted: bytes


async def mirror(content: Pages, target: Pages, *, mode: str, side: str, fault: Fault, policy: str) -> Ended:
    """Mirror under a guest that writes now and then; a job that stops is resumed after the fault is cured."""
    disks = {"source": SimDisk(content), "target-disk": SimDisk(target)}
    wanted = bytearray(content.read(0, SIZE))
    plan, good = FaultPlan(), FaultPlan()
    chance = random.Random(5)
    stops = 0
    async with AsyncExitStack() as stack:
        # A poisoned target cannot be closed cleanly.
        stack.enter_context(suppress(IoFailure))
        host = await stack.enter_async_context(LittleHost())
        for name, disk in disks.items():
            medium = FaultyMedium(disk, plan if name.startswith(side) else good)
            await host.graph.open_medium(medium, name)
        await host.add(node_name="target", driver="qcow2", file="target-disk")
        guest = await host.guest(host.graph.node("source"))
        plan.calls.clear()
        plan.faults.append(fault)
        described = {
            "job-id": "job0",
            "device": "source",
            "target": "target",
            "sync": "full",
            "copy-mode": mode,
            "on-source-error": policy,
            "on-target-error": policy,
        }
        async with host.jobs.control:
            job = await start_blockdev_mirror(host, convert(described, BlockdevMirror))
        asked = False
        while job.status is not JobStatus.NULL:
            await asyncio.sleep(0.01)
            if job.status in (JobStatus.PAUSED, JobStatus.STANDBY):
                stops += 1
                plan.cure()
                job.resume()
            if job.status is JobStatus.READY and not asked:
                for _ in range(3):
                    at, new = chance.randrange(SIZE // 512 - 8) * 512, chance.randbytes(4 * KIB)
                    await guest.node.write(at, new)
                    wanted[at : at + len(new)] = new
                    await asyncio.sleep(0.03)
                if job.status is JobStatus.READY:
                    job.complete()
                    asked = True
        outcome = await job.outcome()
        calls = plan.calls[fault.operation]
        plan.cure()
        assert guest.node.name == ("source" if outcome.error else "target")
        await host.graph.release(guest)
    pages = {"disk": disks["target-disk"].pages}
    return Ended(outcome, calls, plan.hits, pages, disks["source"].pages, stops, bytes(wanted))


async def check_whole(ended: Ended) -> None:
    """The source shows what the guest wrote; the target is whole, and the same if the job says so."""
    assert ended.source.read(0, SIZE) == ended.wanted
    assert not (errors := await own_errors(ended.target)), errors
    copied = await shown(ended.target, {"file": "disk"})
    if ended.outcome.error is None:
        assert copied == ended.wanted


def content_of(seed: int) -> Pages:
    """A source of random bytes, zeroes and text."""
    return Pages(random.Random(seed).randbytes(SIZE // 2) + bytes(SIZE // 4) + b"text" * (SIZE // 16))


@pytest.mark.parametrize("policy", TIMES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "mode"), [("plain", "background"), ("small clusters", "write-blocking")])
def test_a_fault_at_every_place(name: str, mode: str, kind: str, policy: str) -> None:
    image, (side, fault) = TARGETS[name], KINDS[kind]

    async def check(seed: int, nth: int) -> Ended:
        content, target = content_of(seed), (await blank(image))["disk"]
        chosen = replace(fault, nth=nth, times=TIMES[policy])
        ended = await mirror(content, target, mode=mode, side=side, fault=chosen, policy=policy)
        await check_whole(ended)
        return ended

    for seed in range(SEEDS):
        places = range(1, run(check(seed, FOR_EVER)).calls + 1)
        if SEEDS == 1 and len(places) > PLACES_MAX:
            places = sorted(random.Random(seed).sample(places, PLACES_MAX))
        for nth in places:
            ended = run(check(seed, nth))
            assert ended.hits, nth
            assert (ended.outcome.error is None) == (policy != "report"), nth
            assert ended.outcome.errno == (fault.errno if policy == "report" else None), nth
            assert (ended.stops > 0) == (policy == "stop"), nth


@pytest.mark.parametrize("name", TARGETS)
def test_a_failed_sync_is_never_reported_as_success(name: str) -> None:
    async def check(nth: int) -> int:
        content, target = content_of(0), (await blank(TARGETS[name]))["disk"]
        fault = Fault(nth=nth, operation=Operation.SYNC)
        ended = await mirror(content, target, mode="background", side="target", fault=fault, policy="report")
        await check_whole(ended)
        assert bool(ended.hits) == (ended.outcome.error is not None)
        return ended.calls

    calls = run(check(FOR_EVER))
    assert calls >= 2  # before READY and before the pivot
    for nth in range(1, calls + 1):
        run(check(nth))
