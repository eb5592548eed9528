"""Guests write, zero and discard through the source while it is backed up; users pause and cancel; disks fail.

Whatever happens: a backup that completes is the source at the instant of the command; a guest's write that was
acknowledged is there afterwards; one that was refused changed nothing; and the nodes are free again.
"""

import asyncio
import os
import random
from collections.abc import Callable
from typing import TypeVar, TypeVarTuple

import pytest

from blockjobs.base.errors import IoFailure, UsageError
from blockjobs.base.offload import InlineOffload
from blockjobs.base.span import Span
from blockjobs.base.units import KiB
from blockjobs.block.bitmap import DirtyBitmap
from blockjobs.block.claims import ALL, Perm
from blockjobs.block.drivers.qcow2.create import NewImage
from blockjobs.block.node import Node
from blockjobs.block.node_bitmap import NodeBitmap
from blockjobs.block.users import Root
from blockjobs.jobs.transaction import TransactionAction, run_transaction
from blockjobs.lifecycle.handle import JobHandle
from blockjobs.schema.command import convert
from blockjobs.testing.clock import run
from blockjobs.testing.faults import Fault, FaultPlan, FaultyMedium, Operation
from blockjobs.testing.little_host import LittleHost, make_disk

T = TypeVar("T")
Args = TypeVarTuple("Args")

SIZE = 40 * 64 * KiB + 12 * KiB
CLUSTER = 64 * KiB
SECTOR = 4 * KiB
LANES = 3
SEEDS = range(int(os.environ.get("BLOCKJOBS_SEEDS", "30")))


class JitteryOffload(InlineOffload):
    """Workers that take a random time before and after they work: requests overlap in ever new ways."""

    cores = 2

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance

    async def run(self, work: Callable[[*Args], T], *args: *Args) -> T:
        await asyncio.sleep(self._chance.random() * 0.01)
        try:
            return work(*args)
        finally:
            await asyncio.sleep(self._chance.random() * 0.01)


class Gate:
    """All guests as one user of the source that a drain can hold, as an export would be."""

    def __init__(self) -> None:
        self._held = self._active = 0
        self._changed = asyncio.Event()

    def quiesce_begin(self) -> None:
        self._held += 1

    def is_quiet(self) -> bool:
        return not self._active

    async def quiet(self) -> None:
        await self._until(self.is_quiet)

    def quiesce_end(self) -> None:
        self._held -= 1
        self._notify()

    async def __aenter__(self) -> None:
        await self._until(lambda: not self._held)
        self._active += 1

    async def __aexit__(self, *_: object) -> None:
        self._active -= 1
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._changed.wait()


class Guest:
    """A writer with sectors of its own, so that what it wrote last is what must be there."""

    def __init__(self, root: Root, gate: Gate, model: bytearray, chance: random.Random, lane: int) -> None:
        self._root, self._gate, self._model, self._chance, self._lane = root, gate, model, chance, lane

    async def work(self, requests: int) -> None:
        for _ in range(requests):
            async with self._gate:
                await self._request(self._pick())
            await asyncio.sleep(self._chance.random() * 0.02)

    async def _request(self, span: Span) -> None:
        kind = self._chance.choice(("write", "write", "write", "zero", "discard"))
        content = self._chance.randbytes(span.length) if kind == "write" else bytes(span.length)
        node: Node = self._root.node
        try:
            if kind == "write":
                await node.write(span.at, content)
            elif kind == "zero":
                await node.zero(span)
            else:
                await node.discard(span)
                content = await node.read(span.at, span.length)
        except IoFailure:
            content = bytes(self._model[span.at : span.end])
        self._model[span.at : span.end] = content
        assert await node.read(span.at, span.length) == content

    def _pick(self) -> Span:
        """Half of the disk is long runs, one for each guest; in the other half the guests' sectors alternate."""
        half = SIZE // LANES // 2 // SECTOR * SECTOR
        if self._chance.random() < 0.3:
            start = self._chance.randrange(half // SECTOR) * SECTOR
            length = self._chance.randrange(1, (half - start) // SECTOR + 1) * SECTOR
            return Span(2 * half * self._lane + half + start, length)
        sector = self._chance.randrange(half // SECTOR) * LANES + self._lane
        area, within = divmod(sector, half // SECTOR)
        return Span(2 * half * area + within * SECTOR + self._chance.randrange(SECTOR // 2), SECTOR // 2)


async def make_nodes(host: LittleHost, chance: random.Random, plan: FaultPlan, content: bytes) -> dict[str, object]:
    """A source that reads as `content`, and a target that holds rubbish and may fail; returns what suits them."""
    layered = chance.random() < 0.5
    if layered:
        await host.disk("base", content)
        cluster_size = chance.choice((512, 16 * KiB, 64 * KiB, 256 * KiB))
        await host.qcow2("source", NewImage(size=SIZE, cluster_size=cluster_size), backing="base")
    else:
        await host.disk("source", content)
    if chance.random() < 0.4:
        host.disks["target"] = make_disk(chance.randbytes(SIZE))
        await host.disk("target", b"", medium=FaultyMedium(host.disks["target"], plan))
        return by_bitmap(host.graph.node("source"), chance) if chance.random() < 0.5 else {"sync": "full"}
    image = NewImage(size=SIZE, cluster_size=chance.choice((512, 64 * KiB, 128 * KiB)), zstd=chance.random() < 0.5)
    await host.qcow2("made", image)
    await host.graph.remove("made")
    await host.graph.remove("made-file")
    host.disks["target-file"] = host.disks["made-file"]
    on_top = layered and chance.random() < 0.5
    medium = FaultyMedium(host.disks["target-file"], plan)
    await host.qcow2("target", image, medium=medium, backing="base" if on_top else None)
    return {"sync": "top" if on_top else "full", "compress": chance.random() < 0.4}


def by_bitmap(source: Node, chance: random.Random) -> dict[str, object]:
    """Only some clusters are to be copied, and those that guests change before the command."""
    bitmap = NodeBitmap(name="b", map=DirtyBitmap(SIZE, CLUSTER))
    source.attach_bitmap(bitmap)
    for _ in range(chance.randrange(20)):
        bitmap.record(Span(chance.randrange(SIZE), 1))
    return {"sync": "bitmap", "bitmap": "b", "bitmap-mode": chance.choice(("on-success", "never", "always"))}


async def meddle(host: LittleHost, job: JobHandle, chance: random.Random, plan: FaultPlan) -> None:
    """A user who pauses, resumes, changes speeds, drains, perhaps cancels, and at last cures the disks."""
    for _ in range(chance.randrange(8)):
        await asyncio.sleep(chance.random() * 0.05)
        try:
            match chance.randrange(6):
                case 0:
                    job.pause()
                case 1:
                    job.resume()
                case 2:
                    job.set_speed(chance.choice((0, 10**6, 10**8)))
                case 3 if chance.random() < 0.3:
                    await job.cancel()
                case _:
                    async with host.graph.drained(None):
                        await asyncio.sleep(0.01)
        except UsageError:
            pass
    plan.cure()
    while host.jobs.jobs():
        await asyncio.sleep(0.05)
        try:
            job.set_speed(0)
            job.resume()
        except UsageError:
            pass


async def play(seed: int) -> str:
    chance = random.Random(seed)
    content = b"".join(
        bytes(SECTOR) if chance.random() < 0.4 else chance.randbytes(SECTOR) for _ in range(SIZE // SECTOR)
    )
    plan = FaultPlan()
    async with LittleHost(seed=seed, offload=JitteryOffload(chance)) as host:
        suiting = await make_nodes(host, chance, plan, content)
        source = host.graph.node("source")
        gate, model = Gate(), bytearray(content)
        needs = Perm.CONSISTENT_READ | Perm.WRITE
        root = await host.graph.claim("a guest", source, needs=needs, shares=ALL, user=gate)
        guests = [Guest(root, gate, model, random.Random(seed * LANES + lane), lane) for lane in range(LANES)]
        for guest in guests:
            await guest.work(3)
        if chance.random() < 0.6:
            kind = chance.choice((Operation.READ, Operation.WRITE, Operation.WRITE, Operation.ZERO))
            nth, times = chance.randrange(1, 25) + plan.calls[kind], chance.choice((1, 3, 1000))
            plan.faults.append(Fault(nth=nth, operation=kind, errno=chance.choice((5, 28)), times=times))
        arguments = {
            "job-id": "j",
            "device": "source",
            "target": "target",
            **suiting,
            "speed": chance.choice((0, 0, 2 * 10**6)),
            "on-source-error": chance.choice(("report", "stop")),
            "on-target-error": chance.choice(("report", "ignore", "stop", "enospc")),
        }
        async with asyncio.TaskGroup() as group:
            for guest in guests:
                group.create_task(guest.work(12))
            await asyncio.sleep(chance.random() * 0.1)
            async with host.graph.drained(None):
                at_start = bytes(model)  # nothing is in flight: what was acknowledged is what there is
                if suiting["sync"] == "bitmap":
                    copied = list(source.bitmaps[0].map.runs())
                    before = await host.graph.node("target").read(0, SIZE)
                    at_start = b"".join(
                        (at_start if any(span.overlaps(part) for part in copied) else before)[span.at : span.end]
                        for span in Span(0, SIZE).split(CLUSTER)
                    )
                await run_transaction(
                    host, [convert({"type": "blockdev-backup", "data": arguments}, TransactionAction)]
                )
            job = host.jobs.get("j")
            group.create_task(meddle(host, job, chance, plan))
        outcome = await job.outcome()
        plan.cure()
        if outcome.error is None:
            assert await host.graph.node("target").read(0, SIZE) == at_start, seed
        assert root.node is source
        assert await source.read(0, SIZE) == model, seed
        await host.graph.release(root)
        await host.graph.remove("target")
        await host.graph.remove("source")
        return outcome.error or "completed"


@pytest.mark.parametrize("seed", SEEDS)
def test_a_completed_backup_is_the_source_at_the_command(seed: int) -> None:
    run(play(seed))
