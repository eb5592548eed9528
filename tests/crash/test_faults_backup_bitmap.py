"""A failing request at every place of a backup by a bitmap, while a guest writes: no bit is lost.

What no bit marks is durable on the target and equal to the source, after success, failure and cancellation; and the
next backup by the same bitmap brings the rest.
"""

import asyncio
import errno
import random
from contextlib import AsyncExitStack, suppress
from dataclasses import replace

import pytest
from replay import SEEDS, shown

from blockjobs.base.errors import IoFailure
from blockjobs.base.span import Span
from blockjobs.block.bitmap import DirtyBitmap
from blockjobs.block.drivers.qcow2.create import NewImage
from blockjobs.block.node_bitmap import NodeBitmap
from blockjobs.jobs.transaction import TransactionAction, run_transaction
from blockjobs.lifecycle.handle import JobHandle
from blockjobs.lifecycle.status import JobStatus
from blockjobs.schema.command import convert
from blockjobs.testing.clock import run
from blockjobs.testing.disk import SimDisk
from blockjobs.testing.faults import Fault, FaultPlan, FaultyMedium, Operation
from blockjobs.testing.little_host import LittleHost, make_disk

KIB, MIB = 1 << 10, 1 << 20
SIZE, SECTOR = MIB, 512
PLACES_MAX = 4
"""Places that are tried per kind of fault in the suite; with BLOCKJOBS_CRASH_SEEDS all."""
FOR_EVER = 1 << 30
MODES = {
    "incremental": {"sync": "incremental"},
    "never": {"sync": "bitmap", "bitmap-mode": "never"},
    "always": {"sync": "bitmap", "bitmap-mode": "always"},
    "full always": {"sync": "full", "bitmap-mode": "always"},
    "full on-success": {"sync": "full", "bitmap-mode": "on-success"},
}
KINDS = {
    "reading the source": ("source", Fault(nth=0, operation=Operation.READ)),
    "reading the target": ("target", Fault(nth=0, operation=Operation.READ)),
    "writing the target": ("target", Fault(nth=0, operation=Operation.WRITE)),
    "the target is full": ("target", Fault(nth=0, operation=Operation.WRITE, errno=errno.ENOSPC, short=True)),
    "syncing the target": ("target", Fault(nth=0, operation=Operation.SYNC)),
}


class Story:
    """One source, one target that holds its content of a while ago, and a bitmap of what changed since."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.plans = {"source": FaultPlan(), "target": FaultPlan()}
        self.content = bytearray(self.chance.randbytes(SIZE))
        self.disks = {"source": make_disk(bytes(self.content)), "target": SimDisk()}
        self.granularity = self.chance.choice((512, 4 * KIB, 64 * KIB, 256 * KIB))

    async def begin(self, host: LittleHost) -> None:
        """Up to the first, full backup."""
        self.host = host
        source = await host.graph.open_medium(FaultyMedium(self.disks["source"], self.plans["source"]), "source")
        image = NewImage(size=SIZE, cluster_size=self.chance.choice((512, 4 * KIB, 64 * KIB)))
        await host.qcow2("made", image)
        self.disks["target"] = host.disks["made-file"]
        await host.graph.remove("made")
        await host.graph.remove("made-file")
        self.disks["target"] = SimDisk(self.disks["target"].pages)
        await host.graph.open_medium(FaultyMedium(self.disks["target"], self.plans["target"]), "target-file")
        await host.add(driver="qcow2", node_name="target", file="target-file", discard="unmap")
        self.bitmap = NodeBitmap(map=DirtyBitmap(SIZE, self.granularity), name="b")
        source.attach_bitmap(self.bitmap)
        self.guest = await host.guest(source)
        assert (await (await self.backup("report", sync="full", **{"bitmap-mode": "always"})).outcome()).error is None
        for _ in range(6):
            await self.write()

    async def backup(self, policy: str, **how: object) -> JobHandle:
        described = {
            "job-id": "job0",
            "device": "source",
            "target": "target",
            "bitmap": "b",
            "on-source-error": policy,
            "on-target-error": policy,
            **how,
        }
        action = convert({"type": "blockdev-backup", "data": described}, TransactionAction)
        (job,) = await run_transaction(self.host, [action])
        return job

    async def write(self) -> None:
        """A guest's write; one that fails has changed nothing."""
        length = self.chance.choice((1, 8, 100)) * SECTOR
        at = self.chance.randrange((SIZE - length) // SECTOR) * SECTOR
        new = self.chance.randbytes(length)
        with suppress(IoFailure):
            await self.guest.node.write(at, new)
            self.content[at : at + length] = new

    async def follow(self, job: JobHandle) -> None:
        """Write meanwhile; a job that stops is resumed when the fault is cured."""
        while job.status is not JobStatus.NULL:
            await self.write()
            await asyncio.sleep(0.01)
            if job.status is JobStatus.PAUSED:
                for plan in self.plans.values():
                    plan.cure()
                job.resume()

    async def check_bits(self) -> None:
        """False clean never, not even after a power cut."""
        assert self.bitmap.successor is None and not self.bitmap.busy
        copy = await shown({"disk": self.disks["target"].after_power_cut(1)}, {"file": "disk"})
        source = await self.guest.node.read(0, SIZE)
        assert source == self.content
        for at in range(0, SIZE, SECTOR):
            if copy[at : at + SECTOR] != source[at : at + SECTOR]:
                assert self.bitmap.map.any(Span(at, SECTOR)), f"sector {at // SECTOR} is clean but differs"


async def tell(seed: int, mode: str, side: str, fault: Fault, policy: str) -> tuple[int, int, bool]:
    """Returns how many calls there were that could have failed, how many did, and whether the job failed."""
    story = Story(seed)
    async with AsyncExitStack() as stack:
        # A poisoned target cannot be closed cleanly.
        stack.enter_context(suppress(IoFailure))
        host = await stack.enter_async_context(LittleHost(seed=seed))
        await story.begin(host)
        plan = story.plans[side]
        before, hits_before = plan.calls[fault.operation], plan.hits
        plan.add(fault)
        first = bytes(story.content)
        job = await story.backup(policy, **MODES[mode], speed=2 * MIB)
        await story.follow(job)
        calls, hits = plan.calls[fault.operation] - before, plan.hits - hits_before
        plan.cure()
        error = (await job.outcome()).error
        await story.check_bits()
        if error is None:
            assert await shown({"disk": story.disks["target"].after_power_cut(2)}, {"file": "disk"}) == first
        if not plan.failed_syncs:
            job = await story.backup("report", sync="incremental")
            assert (await job.outcome()).error is None
            assert not story.bitmap.map.any()
            await story.check_bits()
    return calls, hits, error is not None


@pytest.mark.parametrize("policy", ["report", "stop"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_a_fault_at_every_place(mode: str, kind: str, policy: str) -> None:
    side, fault = KINDS[kind]
    if fault.operation is Operation.SYNC and policy == "stop":
        return  # a poisoned target stops the job for ever
    for seed in range(SEEDS):
        calls, _, _ = run(tell(seed, mode, side, replace(fault, nth=FOR_EVER), policy))
        places = range(1, calls + 1)
        if SEEDS == 1 and len(places) > PLACES_MAX:
            places = sorted(random.Random(f"{mode} {kind}").sample(places, PLACES_MAX))
        seen = 0
        for nth in places:
            _, hits, failed = run(tell(seed, mode, side, replace(fault, nth=nth, times=FOR_EVER), policy))
            # Guests' requests meet the fault too, and then the job may end before or without it.
            assert not failed or hits
            seen += hits
        assert seen or not places


@pytest.mark.parametrize("mode", MODES)
def test_a_cancel_at_every_moment(mode: str) -> None:
    async def cancelled(seed: int, after_s: float) -> bool:
        story = Story(seed)
        async with LittleHost(seed=seed) as host:
            await story.begin(host)
            job = await story.backup("report", **MODES[mode], speed=2 * MIB)

            async def cancel() -> None:
                await asyncio.sleep(after_s)
                if job.status is not JobStatus.NULL:
                    await job.cancel()

            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(cancel())
                tasks.create_task(story.follow(job))
            await story.check_bits()
            return (await job.outcome()).error is not None

    for seed in range(SEEDS):
        assert run(cancelled(seed, 0.0))
        for after_s in (0.005, 0.05, 0.3):
            run(cancelled(seed, after_s))
