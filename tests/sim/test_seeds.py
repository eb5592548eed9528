"""Whole hosts in simulated time: guests write, jobs copy, an operator interferes, disks fail, all from one seed.

Whatever happens: a backup that completes is the source of its first moment, and durable; guests find what they wrote;
images have no errors; nobody waits for ever. `BLOCKJOBS_SIM_SEEDS=1000 pytest tests/sim` goes on for longer; a failure
names its seed, and `BLOCKJOBS_SIM_FIRST=<seed> BLOCKJOBS_SIM_SEEDS=1` plays it again.
"""

import asyncio
import errno
import os
import random
from contextlib import suppress
from dataclasses import dataclass, field

import pytest

from blockjobs.base.errors import IoFailure, UsageError
from blockjobs.base.offload import InlineOffload
from blockjobs.base.span import Span
from blockjobs.block.drivers.qcow2.check import check_image
from blockjobs.block.drivers.qcow2.create import NewImage
from blockjobs.block.node import Node
from blockjobs.block.users import Root
from blockjobs.jobs.transaction import (
    ActionCompletionMode,
    TransactionAction,
    TransactionProperties,
    run_transaction,
)
from blockjobs.lifecycle.handle import JobHandle
from blockjobs.lifecycle.status import JobStatus
from blockjobs.schema.command import convert
from blockjobs.testing.child import MemoryChild
from blockjobs.testing.clock import run
from blockjobs.testing.disk import Pages
from blockjobs.testing.faults import Fault, Operation
from blockjobs.testing.host import SimHost

FIRST, SEEDS = int(os.environ.get("BLOCKJOBS_SIM_FIRST", "0")), int(os.environ.get("BLOCKJOBS_SIM_SEEDS", "40"))
KIB, MIB = 1 << 10, 1 << 20
SECTOR = 512


@dataclass
class Guest:
    """Writes to its part of a disk, one request at a time, and knows what must be there.

    Attributes:
        content: of the whole disk, shared by all guests.
        writing: what a request under way is about to put, where.
    """

    user: Root
    span: Span
    content: bytearray
    chance: random.Random
    writing: tuple[int, bytes] | None = None

    async def live(self, until_s: float) -> None:
        """Write, zero, flush and read until that time."""
        clock = asyncio.get_running_loop()
        while clock.time() < until_s:
            await asyncio.sleep(self.chance.random() * 0.05)
            await self.request()

    async def request(self) -> None:
        length = self.chance.choice((1, 3, 8, 64, 200)) * SECTOR
        at = self.span.at + self.chance.randrange((self.span.length - length) // SECTOR) * SECTOR
        kind = self.chance.choice(("write", "write", "write", "zero", "flush", "read"))
        new = self.chance.randbytes(length) if kind == "write" else bytes(length)
        if kind == "read":
            assert await self.user.node.read(at, length) == self.content[at : at + length]
        elif kind == "flush":
            await self.user.node.flush()
        else:
            self.writing = at, new
            try:
                if kind == "write":
                    await self.user.node.write(at, new)
                else:
                    await self.user.node.zero(Span(at, length))
            except IoFailure:
                # The old content could not be saved, so the guest's request fails (on-cbw-error=break-guest-write).
                await self.look_back(at, new)
            else:
                self.content[at : at + length] = new
            self.writing = None

    async def look_back(self, at: int, new: bytes) -> None:
        """A request failed: each sector is as it was, or new."""
        shown = await self.user.node.read(at, len(new))
        for start in range(0, len(new), SECTOR):
            sector = shown[start : start + SECTOR]
            assert sector in (self.content[at + start : at + start + SECTOR], new[start : start + SECTOR])
        self.content[at : at + len(new)] = shown


@dataclass
class Copy:
    """A backup under way: what it may show at its end, besides `content`."""

    job: JobHandle
    target: Node
    content: bytes
    in_flight: list[tuple[int, bytes]] = field(default_factory=list)

    def check(self, shown: bytes) -> None:
        """A request that was under way when the backup began may be in the copy or not, sector by sector."""
        for at in range(0, len(shown), SECTOR):
            sector = shown[at : at + SECTOR]
            if sector == self.content[at : at + SECTOR]:
                continue
            possible = [
                new[at - start : at - start + SECTOR] for start, new in self.in_flight if start <= at < start + len(new)
            ]
            assert sector in possible, f"sector {at // SECTOR} of the copy is not of the first moment"


class World:
    """One seed's world."""

    def __init__(self, host: SimHost, chance: random.Random) -> None:
        self.host, self.chance = host, chance
        self.size = chance.choice((256, 512, 1000)) * KIB
        self.all_started = False
        self.copies: list[Copy] = []
        self.groups: list[list[Copy]] = []
        self.guests: list[Guest] = []

    def image(self) -> NewImage:
        return NewImage(
            size=self.size,
            cluster_size=self.chance.choice((512, 4 * KIB, 64 * KIB)),
            refcount_bits=self.chance.choice((16, 16, 1, 64)),
            zstd=self.chance.random() < 0.3,
        )

    async def start_backups(self, numbers: tuple[int, ...]) -> None:
        """New targets, and their jobs in one transaction, which settle together; the guests go on."""
        host = self.host
        targets = [await self.target(number) for number in numbers]
        actions = [
            convert({"type": "blockdev-backup", "data": self.arguments(number)}, TransactionAction)
            for number in numbers
        ]
        content = bytes(self.guests[0].content)
        in_flight = [guest.writing for guest in self.guests if guest.writing]
        grouped = TransactionProperties(completion_mode=ActionCompletionMode.GROUPED)
        async with host.jobs.control:
            jobs = await run_transaction(host, actions, grouped)
        # The drain at the start let requests end that were under way, and perhaps some that came meanwhile.
        in_flight += [(0, bytes(self.guests[0].content))]
        in_flight += [guest.writing for guest in self.guests if guest.writing]
        copies = [Copy(job, target, content, in_flight) for job, target in zip(jobs, targets, strict=True)]
        self.copies += copies
        self.groups.append(copies)

    async def target(self, number: int) -> Node:
        """An image on a disk that perhaps fails."""
        chance = self.chance
        target = await self.host.image(f"target{number}", self.image())
        if chance.random() < 0.5:
            fault = Fault(
                nth=chance.randrange(1, 30),
                operation=chance.choice((Operation.WRITE, Operation.READ)),
                errno=chance.choice((errno.EIO, errno.ENOSPC)),
                times=chance.randrange(1, 5),
                short=chance.random() < 0.5,
            )
            self.host.faults[f"target{number}-file"].add(fault)
        return target

    def arguments(self, number: int) -> dict[str, object]:
        chance = self.chance
        return {
            "job-id": f"job{number}",
            "device": "source",
            "target": f"target{number}",
            "sync": "full",
            "compress": chance.random() < 0.4,
            "speed": chance.choice((0, 500 * KIB, 2 * MIB)),
            "on-source-error": "stop",
            "on-target-error": chance.choice(("stop", "stop", "report", "ignore")),
        }

    async def operate(self, until_s: float) -> None:
        """An operator who tries things; what is refused is refused."""
        chance, clock = self.chance, asyncio.get_running_loop()
        while not self.all_started or clock.time() < until_s or self.are_running():
            await asyncio.sleep(chance.random() * 0.1)
            if clock.time() > until_s:
                self.finish_all()
                continue
            if not self.copies:
                continue
            await self.interfere(chance.choice(self.copies).job)

    def are_running(self) -> bool:
        return any(copy.job.status is not JobStatus.NULL for copy in self.copies)

    async def interfere(self, job: JobHandle) -> None:
        chance = self.chance
        with suppress(UsageError):
            match chance.choice(("pause", "resume", "resume", "speed", "drain", "cancel", "nothing")):
                case "pause":
                    job.pause()
                case "resume":
                    job.resume()
                case "speed":
                    job.set_speed(chance.choice((0, 100 * KIB, 10 * MIB)))
                case "drain":
                    async with self.host.graph.drained(
                        self.host.graph.node("source") if chance.random() < 0.5 else None
                    ):
                        await asyncio.sleep(chance.random() * 0.02)
                case "cancel" if chance.random() < 0.2:
                    async with self.host.jobs.control:
                        await job.cancel(force=True)

    def finish_all(self) -> None:
        """The time of trouble is over: whatever stands is set going."""
        for plan in self.host.faults.values():
            plan.cure()
        for copy in self.copies:
            if copy.job.status is JobStatus.PAUSED:
                with suppress(UsageError):
                    copy.job.resume()

    async def live(self) -> None:
        """The whole story of this world."""
        host, chance = self.host, self.chance
        source = await host.image("source", self.image())
        content = bytearray(self.size)
        async with host.access(source, write=True) as user:
            half = self.size // 2 // SECTOR * SECTOR
            for span in (Span(0, half), Span.between(half, self.size)):
                self.guests.append(Guest(user, span, content, chance))
            for guest in self.guests:
                for _ in range(5):
                    await guest.request()
            until_s = asyncio.get_running_loop().time() + 2.0
            async with asyncio.TaskGroup() as tasks:
                for guest in self.guests:
                    tasks.create_task(guest.live(until_s))
                tasks.create_task(self.operate(until_s))
                for numbers in chance.choice((((0,),), ((0,), (1,)), ((0, 1),), ((0, 1), (2,)))):
                    await asyncio.sleep(chance.random() * 0.5)
                    await self.start_backups(numbers)
                self.all_started = True
            assert await user.node.read(0, self.size) == content
            assert user.node is source, "a filter was left behind"
        for copy in self.copies:
            await self.check_copy(copy)
        for group in self.groups:
            fates = [(await copy.job.outcome()).error is None for copy in group]
            assert all(fates) or not any(fates), "a group has one fate"

    async def check_copy(self, copy: Copy) -> None:
        outcome = await copy.job.outcome()
        if outcome.error is not None:
            assert outcome.errno in (errno.EIO, errno.ENOSPC, errno.ECANCELED, None), outcome
            return
        async with self.host.access(copy.target):
            copy.check(await copy.target.read(0, self.size))
        # Completed is durable: a power cut now loses nothing.
        disk = self.host.disks[f"{copy.target.name}-file"]
        disk.cut_power(seed=1)
        async with SimHost() as later:
            target = await later.image("target", disk.pages)
            async with later.access(target):
                copy.check(await target.read(0, self.size))


async def errors_of(pages: Pages) -> list[str]:
    """What our check finds in an image, leaks aside."""
    result = await check_image(MemoryChild(pages.read(0, pages.size)), offload=InlineOffload())
    return result.problems if result.corruptions or result.check_errors else []


@pytest.mark.parametrize("seed", range(FIRST, FIRST + SEEDS))
def test_seed(seed: int) -> None:
    async def scenario() -> None:
        chance = random.Random(seed)
        host = SimHost(seed, latency_s_max=chance.choice((0.0, 0.002, 0.05)))
        with suppress(IoFailure):  # an image on a disk that failed may not close cleanly
            async with host:
                await World(host, chance).live()
        for name, disk in host.disks.items():
            assert not (errors := await errors_of(disk.pages)), (name, errors)

    run(scenario())
