"""Mirrors under guests that write all the time, in virtual time: both sides are the same when the job says so."""

import asyncio
import random
from dataclasses import dataclass

import pytest

from blockjobs.base.span import Span
from blockjobs.base.units import KiB, MiB
from blockjobs.block.drivers.qcow2.create import NewImage
from blockjobs.block.users import Root
from blockjobs.jobs import mirror_begin
from blockjobs.jobs.mirror_options import MirrorCopyMode
from blockjobs.lifecycle.handle import JobHandle
from blockjobs.lifecycle.registry import JobType
from blockjobs.lifecycle.status import JobStatus
from blockjobs.monitor.commands.block_jobs import BlockJobChange
from blockjobs.testing.clock import run
from blockjobs.testing.host import SimHost

SIZE = 2 * MiB
GUESTS = 3


@dataclass
class Model:
    """What the disk shows; each guest has stretches of its own, so that the order of two writes is never open."""

    content: bytearray
    stop: bool = False
    writes: int = 0

    async def guest(self, number: int, user: Root, chance: random.Random, *, discards: bool) -> None:
        stretch = 32 * KiB
        while not self.stop:
            await asyncio.sleep(chance.random() ** 2 * 0.02)
            slot = chance.randrange(SIZE // stretch // GUESTS) * GUESTS + number
            at = slot * stretch + chance.randrange(stretch // 512) * 512
            length = min(stretch * (slot + 1) - at, chance.randrange(1, 40) * 512)
            kind = chance.random()
            if 0.3 <= kind < 0.4:
                await user.node.flush()
                continue
            self.writes += 1
            if kind < 0.2:
                await user.node.zero(Span(at, length))
                self.content[at : at + length] = bytes(length)
            elif discards and kind < 0.3:
                await user.node.discard(Span(at, length))
                # What a discarded run shows is the disk's choice, and it must stay so.
                self.content[at : at + length] = await user.node.read(at, length)
            else:
                content = chance.randbytes(length)
                await user.node.write(at, content)
                self.content[at : at + length] = content


SETUPS = {
    "raw to raw": (None, None),
    "qcow2 to qcow2": (NewImage(size=SIZE), NewImage(size=SIZE)),
    "qcow2 to small clusters": (NewImage(size=SIZE), NewImage(size=SIZE, cluster_size=4 * KiB)),
    "small clusters to large": (NewImage(size=SIZE, cluster_size=4 * KiB), NewImage(size=SIZE, cluster_size=256 * KiB)),
}
JOBS: dict[str, dict[str, object]] = {
    "background": {},
    "write-blocking": {"copy-mode": "write-blocking"},
    "switched": {},
    "fine map": {"granularity": 512, "copy-mode": "write-blocking"},
    "top": {"sync": "top"},
    "slow": {"speed": 4 * MiB},
}


async def set_up(host: SimHost, seed: int, images: tuple[NewImage | None, NewImage | None]) -> Model:
    chance = random.Random(seed)
    content = chance.randbytes(SIZE // 2) + bytes(SIZE // 4) + chance.randbytes(SIZE // 4)
    source, target = images
    if source is None:
        await host.disk("source", content)
    else:
        node = await host.image("source", source)
        async with host.access(node, write=True):
            await node.write(0, content[: SIZE // 2])
            await node.write(SIZE // 4 * 3, content[SIZE // 4 * 3 :])
    if target is None:
        # What it held is made zero first, while guests write.
        await host.disk("target-file", chance.randbytes(SIZE))
        await host.blockdev_add({"driver": "raw", "node-name": "target", "file": "target-file", "discard": "unmap"})
    else:
        await host.image("target", target)
    return Model(bytearray(content))


async def mirror(host: SimHost, members: dict[str, object]) -> JobHandle:
    plain = {name.replace("-", "_"): value for name, value in members.items()}
    return await host.mirror(host.graph.node("source"), host.graph.node("target"), id="job0", **plain)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("setup", SETUPS)
def test_the_target_is_the_source_at_the_end(setup: str, job: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror_begin, "LOOK_BYTES", 64 * KiB)  # so that guests come between

    async def main() -> None:
        async with SimHost(seed, latency_s_max=0.01) as host:
            chance = random.Random(seed)
            model = await set_up(host, seed, SETUPS[setup])
            source, target = host.graph.node("source"), host.graph.node("target")
            async with host.access(source, write=True) as user, asyncio.TaskGroup() as tasks:
                for number in range(GUESTS):
                    each = random.Random(f"{seed} {number}")
                    tasks.create_task(model.guest(number, user, each, discards=True))
                await asyncio.sleep(0.1)
                handle = await mirror(host, JOBS[job])
                await asyncio.sleep(chance.random() * 0.2)
                if chance.random() < 0.5:
                    handle.pause()
                    await asyncio.sleep(chance.random())
                    handle.resume()
                if job == "switched":
                    handle.change(
                        BlockJobChange(id="job0", type=JobType.MIRROR, copy_mode=MirrorCopyMode.WRITE_BLOCKING)
                    )
                await handle.reached(JobStatus.READY)
                await asyncio.sleep(chance.random())
                before = model.writes
                handle.complete()
                assert (await handle.outcome()).error is None
                assert user.node is target
                # Nobody writes to the source any more, and guests went on.
                old = host.disks["source" if SETUPS[setup][0] is None else "source-file"].pages.copy()
                await asyncio.sleep(0.5)
                assert model.writes > before
                model.stop = True
            assert host.disks["source" if SETUPS[setup][0] is None else "source-file"].pages == old
            async with host.access(target):
                assert await target.read(0, SIZE) == model.content

    run(main())


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("job", ["background", "write-blocking"])
def test_while_pending_both_sides_are_the_same_and_guests_wait(job: str, seed: int) -> None:
    async def main() -> None:
        async with SimHost(seed, latency_s_max=0.01) as host:
            model = await set_up(host, seed, SETUPS["qcow2 to qcow2"])
            source, target = host.graph.node("source"), host.graph.node("target")
            async with host.access(source, write=True) as user, asyncio.TaskGroup() as tasks:
                for number in range(GUESTS):
                    tasks.create_task(model.guest(number, user, random.Random(f"{seed} {number}"), discards=False))
                handle = await mirror(host, {**JOBS[job], "auto-finalize": False})
                await handle.reached(JobStatus.READY)
                if seed % 2:
                    handle.complete()
                else:
                    await handle.block_cancel()
                await handle.reached(JobStatus.PENDING)
                begun = model.writes
                await asyncio.sleep(10)
                assert model.writes <= begun + GUESTS
                async with host.access(source):
                    assert await source.read(0, SIZE) == await target.read(0, SIZE)
                if seed % 3 == 2:
                    await handle.cancel()
                else:
                    await handle.finalize()
                await handle.reached(JobStatus.CONCLUDED)
                await asyncio.sleep(0.2)
                assert model.writes > begun + GUESTS
                pivoted = seed % 2 == 1 and seed % 3 != 2
                assert user.node is (target if pivoted else source)
                model.stop = True
            async with host.access(user.node):
                assert await user.node.read(0, SIZE) == model.content

    run(main())
