"""A power cut around a mirror and an active commit: whoever looks where the guest is finds all that was promised to it.

Before the users move that is the source. From COMPLETED on it is the target alone, with everything that the guest had
written until it was held, flushed or not. A write-blocking mirror in sync keeps a guest's flushes on both sides.
"""

import asyncio
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from replay import SEEDS, Guest, blank, opened, own_errors, qemu_errors, shown
from workload import states_of

from blockjobs.base.errors import BlockjobsError
from blockjobs.block.claims import ALL, Perm
from blockjobs.block.drivers.qcow2.create import NewImage
from blockjobs.block.users import Root
from blockjobs.jobs.active_commit import start_active_commit
from blockjobs.jobs.block_job import block_job_info
from blockjobs.jobs.events import BlockJobCompleted
from blockjobs.jobs.mirror_options import BlockdevMirror
from blockjobs.jobs.mirror_start import start_blockdev_mirror
from blockjobs.lifecycle.error_policy import OnError
from blockjobs.lifecycle.events import JobStatusChange
from blockjobs.lifecycle.handle import JobHandle
from blockjobs.lifecycle.status import JobStatus
from blockjobs.schema.command import convert
from blockjobs.testing.clock import run
from blockjobs.testing.crash import CrashState, RecordingMedium, WriteLog
from blockjobs.testing.disk import Pages, SimDisk
from blockjobs.testing.little_host import LittleHost

KIB, MIB = 1 << 10, 1 << 20
SIZE = MIB
QEMU_SAMPLE = 4
NEVER = 1 << 60
BIG, SMALL = NewImage(size=SIZE), NewImage(size=SIZE, cluster_size=4 * KIB)


@dataclass(frozen=True)
class Setup:
    """A mirror, or an active commit if there are no arguments: then the target is the source's backing image."""

    target: NewImage
    source: NewImage
    job: dict[str, object] | None


SETUPS = {
    "background": Setup(SMALL, BIG, {}),
    "write-blocking": Setup(BIG, SMALL, {"copy-mode": "write-blocking"}),
    "slow": Setup(SMALL, SMALL, {"speed": 2 * MIB}),
    "active commit": Setup(SMALL, SMALL, None),
    "active commit in columns": Setup(BIG, BIG, None),
}


@dataclass
class CommitOptions:
    """What `block-commit` was told."""

    job_id: str | None = "job0"
    speed: int = 0
    on_error: OnError = OnError.REPORT
    filter_node_name: str | None = None
    auto_finalize: bool = True
    auto_dismiss: bool = True


@dataclass
class Recorded:
    """What happened; places in the log: `completed`, `moved` (the guest's first request there), `synced`."""

    log: WriteLog
    start: dict[str, Pages]
    guest: Guest
    is_chain: bool
    completed: int = NEVER
    moved: int = NEVER
    synced: int = NEVER


async def filled(image: NewImage, chance: random.Random) -> Pages:
    disks = {name: SimDisk(pages) for name, pages in (await blank(image)).items()}
    async with opened(disks, {"file": "disk"}) as node:
        for _ in range(12):
            at = chance.randrange(SIZE // 512 - 128) * 512
            await node.write(at, chance.randbytes(chance.randrange(1, 128) * 512))
    return disks["disk"].pages


async def write_on(recorded: Recorded, user: Root, chance: random.Random, *, until: asyncio.Event) -> None:
    """A guest that writes and flushes now and then, until a while after the job."""
    guest, log, left = recorded.guest, recorded.log, 5
    while left:
        left -= until.is_set()
        await asyncio.sleep(chance.random() * 0.02)
        at, content = chance.randrange(SIZE // 512 - 32) * 512, chance.randbytes(chance.randrange(1, 32) * 512)
        if user.node.name == "target" and recorded.moved == NEVER:
            recorded.moved = log.mark("moved")
        await guest.change(at, content, lambda at=at, content=content: user.node.write(at, content))
        if chance.random() < 0.4:
            await guest.flush(user.node.flush)


async def start(host: LittleHost, setup: Setup) -> JobHandle:
    async with host.jobs.control:
        if setup.job is None:
            node = host.graph.node
            return await start_active_commit(host, CommitOptions(), node("source"), node("target"))
        described = {"job-id": "job0", "device": "source", "target": "target", "sync": "full", **setup.job}
        return await start_blockdev_mirror(host, convert(described, BlockdevMirror))


def record(setup: Setup, seed: int) -> Recorded:
    """Run the job under a writing guest, and complete it."""

    async def scenario() -> Recorded:
        chance, log, held = random.Random(seed), WriteLog(), [0]
        disks = {"source-disk": await filled(setup.source, chance), "target-disk": (await blank(setup.target))["disk"]}
        async with LittleHost(seed=seed) as host:
            for name, pages in disks.items():
                await host.graph.open_medium(RecordingMedium(SimDisk(pages), log, name), name)
            target = await host.add(node_name="target", driver="qcow2", file="target-disk")
            backing = "target" if setup.job is None else None
            source = await host.add(node_name="source", driver="qcow2", file="source-disk", backing=backing)
            recorded = Recorded(log, disks, Guest(log, await source.read(0, SIZE), SIZE), setup.job is None)

            def note(event: object) -> None:
                if isinstance(event, JobStatusChange) and event.status is JobStatus.PENDING:
                    held[0] = log.mark("held")
                if isinstance(event, BlockJobCompleted):
                    assert event.error is None
                    recorded.completed = log.mark("completed")
                    recorded.guest.promises.append((held[0], recorded.completed))

            user = await host.graph.claim("a guest", source, needs=Perm.CONSISTENT_READ | Perm.WRITE, shares=ALL)
            ended = asyncio.Event()
            with host.bus.listening(note):
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(write_on(recorded, user, chance, until=ended))
                    await asyncio.sleep(0.05)
                    job = await start(host, setup)
                    await job.reached(JobStatus.READY)
                    while setup.job == {"copy-mode": "write-blocking"} and recorded.synced == NEVER:
                        before = len(recorded.guest.promises)
                        synced = block_job_info(job).actively_synced
                        await asyncio.sleep(0.1)
                        if synced and len(recorded.guest.promises) > before + 1:
                            recorded.synced = log.mark("synced")
                    await asyncio.sleep(0.2)
                    job.complete()
                    await job.outcome()
                    ended.set()
            assert user.node is target and await target.read(0, SIZE) == recorded.guest.now()
            await host.graph.release(user)
        return recorded

    return run(scenario())


async def complaint(state: CrashState, recorded: Recorded) -> str:
    """What is wrong with a crash state; empty if nothing."""
    target, source = ({"disk": state.images[f"{name}-disk"]} for name in ("target", "source"))
    try:
        for name, images in (("target", target), ("source", source)):
            if errors := await own_errors(images):
                return f"{state.story}: {name}: {errors}"
        places: dict[str, bytes] = {}
        if state.issued > min(recorded.completed, recorded.synced):
            places["target"] = await shown(target, {"file": "disk"})
        if state.issued <= min(recorded.moved, recorded.completed):
            places["source"] = await source_content(state, recorded, source)
        for name, content in places.items():
            if lies := recorded.guest.lies(content, state.issued):
                return f"{state.story}: {name}: wrong sectors {lies[:10]}"
    except BlockjobsError as error:
        return f"{state.story}: cannot be read: {error!r}"
    return ""


async def source_content(state: CrashState, recorded: Recorded, source: Mapping[str, Pages]) -> bytes:
    if not recorded.is_chain:
        return await shown(source, {"file": "disk"})
    images = {**source, "base": state.images["target-disk"]}
    return await shown(images, {"file": "disk", "backing": {"driver": "qcow2", "file": "base"}})


@pytest.mark.parametrize("name", SETUPS)
def test_mirror(name: str, tmp_path: Path) -> None:
    for seed in range(SEEDS):
        recorded = record(SETUPS[name], seed)
        assert recorded.completed < NEVER and recorded.moved < NEVER
        states = states_of(recorded.log, recorded.start, seed)

        async def judge(seed: int = seed, states: list[CrashState] = states, recorded: Recorded = recorded) -> None:
            for state in states:
                assert not (wrong := await complaint(state, recorded)), f"seed {seed}, {wrong}"

        asyncio.run(judge())
        if shutil.which("qemu-img"):
            for state in random.Random(seed).sample(states, QEMU_SAMPLE):
                errors = qemu_errors({"disk": state.images["target-disk"]}, tmp_path)
                assert not errors, f"seed {seed}, {state.story}: {errors}"
