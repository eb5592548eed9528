"""A power cut during stream and commit: the chain that the headers name shows all that was promised to the guest.

Which chain that is may change at one instant only; before and after it the disk is the same. Once the job has
completed it is the new one.
"""

import asyncio
import random
from collections.abc import Mapping
from dataclasses import dataclass

import pytest
from replay import SEEDS, Guest, own_errors
from workload import states_of

from blockjobs.base.errors import BlockjobsError
from blockjobs.block.chain import named_backing
from blockjobs.block.claims import ALL, Perm
from blockjobs.block.drivers.qcow2.create import NewImage
from blockjobs.block.node import Node
from blockjobs.block.users import Root
from blockjobs.jobs.chain_options import BlockCommit, BlockStream
from blockjobs.jobs.commit_start import start_commit
from blockjobs.jobs.events import BlockJobCompleted
from blockjobs.jobs.stream_start import start_stream
from blockjobs.schema.command import convert
from blockjobs.testing.chains import change, shown_by_headers
from blockjobs.testing.clock import run
from blockjobs.testing.crash import CrashState, RecordingMedium, WriteLog
from blockjobs.testing.disk import Pages, SimDisk
from blockjobs.testing.host import SimHost
from blockjobs.testing.little_host import LittleHost

KIB, MIB = 1 << 10, 1 << 20
SIZE = MIB // 2
NAMES = ("l0", "l1", "l2", "l3")


@dataclass(frozen=True)
class Setup:
    """A job on the chain from `l0` (the base) to `l3` (the active image), and what `changed` names afterwards."""

    command: str
    job: dict[str, object]
    changed: str
    names: str | None
    cluster_size: int = 16 * KIB
    is_v2: bool = False
    base_writes: int = 8


SETUPS = {
    "stream all": Setup("stream", {"device": "l3"}, "l3", None),
    "stream down to the base": Setup("stream", {"device": "l3", "base-node": "l0"}, "l3", "l0-file"),
    "stream, old format": Setup("stream", {"device": "l3", "base-node": "l0"}, "l3", "l0-file", 64 * KIB, is_v2=True),
    "stream in the middle, slow": Setup("stream", {"device": "l2", "speed": 4 * MIB}, "l2", None),
    "commit": Setup("commit", {"device": "l3", "top-node": "l2", "base-node": "l0"}, "l3", "l0-file"),
    "commit one, small clusters": Setup(
        "commit", {"device": "l3", "top-node": "l1", "base-node": "l0"}, "l2", "l0-file", 4 * KIB
    ),
    "commit in columns": Setup(
        "commit", {"device": "l3", "top-node": "l1", "base-node": "l0"}, "l2", "l0-file", 64 * KIB, base_writes=0
    ),
}


@dataclass
class Recorded:
    """What happened, and what was promised."""

    log: WriteLog
    start: dict[str, Pages]
    guest: Guest
    completed: int


async def filled(setup: Setup, seed: int) -> dict[str, Pages]:
    """The disks of a chain; the images differ in length."""
    chance = random.Random(seed)
    async with SimHost(seed) as host:
        below: Node | None = None
        for index, name in enumerate(NAMES):
            image = NewImage(
                size=SIZE - (SIZE // 8 if index in (0, 1) else 0),
                cluster_size=setup.cluster_size,
                is_v2=setup.is_v2,
                backing_file=f"{below.name}-file" if below else None,
                backing_format="qcow2" if below else None,
            )
            below = await host.image(name, image, backing=below.name if below else None)
            async with host.access(below, write=True) as user:
                for _ in range(8 if index else setup.base_writes):
                    await change(user.node, chance)
                await user.node.flush()
        disks = host.disks
    return {name: disk.pages for name, disk in disks.items()}


async def write_on(guest: Guest, user: Root, chance: random.Random, *, writes: int) -> None:
    """A guest that writes and flushes now and then."""
    for _ in range(writes):
        await asyncio.sleep(chance.random() * 0.02)
        at, content = chance.randrange(SIZE // 512 - 64) * 512, chance.randbytes(chance.randrange(1, 64) * 512)
        await guest.change(at, content, lambda at=at, content=content: user.node.write(at, content))
        if chance.random() < 0.4:
            await guest.flush(user.node.flush)


def record(setup: Setup, seed: int) -> Recorded:
    """Run the job under a writing guest."""

    async def scenario() -> Recorded:
        chance = random.Random(seed)
        log, completed = WriteLog(), [0]
        start = await filled(setup, seed)
        async with LittleHost(seed=seed) as host:

            def note(event: object) -> None:
                if isinstance(event, BlockJobCompleted):
                    assert event.error is None
                    completed[0] = log.mark("completed")

            below: str | None = None
            for name in NAMES:
                medium = RecordingMedium(SimDisk(start[f"{name}-file"]), log, f"{name}-file")
                await host.graph.open_medium(medium, f"{name}-file")
                await host.add(node_name=name, driver="qcow2", file=f"{name}-file", backing=below, discard="unmap")
                below = name
            active = host.graph.node("l3")
            guest = Guest(log, await active.read(0, SIZE), SIZE)
            user = await host.graph.claim("a guest", active, needs=Perm.CONSISTENT_READ | Perm.WRITE, shares=ALL)
            with host.bus.listening(note):
                described = {"job-id": "job0", "speed": 8 * MIB, **setup.job}
                if setup.command == "stream":
                    job = await start_stream(host, convert(described, BlockStream))
                else:
                    job = await start_commit(host, convert(described, BlockCommit))
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(write_on(guest, user, chance, writes=12))
                    await job.outcome()
                await write_on(guest, user, chance, writes=2)
            assert await user.node.read(0, SIZE) == guest.now()
            await host.graph.release(user)
        return Recorded(log, start, guest, completed[0])

    return run(scenario())


async def complaint(state: CrashState, recorded: Recorded, setup: Setup) -> str:
    """What is wrong with a crash state; empty if nothing."""
    try:
        for name in NAMES:
            if errors := await own_errors({"disk": state.images[f"{name}-file"]}):
                return f"{state.story}: {name}: {errors}"
        named = await backing_name(state.images, setup.changed)
        if state.issued > recorded.completed and named != setup.names:
            return f"{state.story}: completed, but '{setup.changed}' names '{named}'"
        seen = await shown_by_headers(state.images, "l3-file")
    except BlockjobsError as error:
        return f"{state.story}: cannot be read: {error!r}"
    lies = recorded.guest.lies(seen, state.issued)
    return f"{state.story}, '{setup.changed}' names '{named}': wrong sectors {lies[:10]}" if lies else ""


async def backing_name(disks: Mapping[str, Pages], name: str) -> str | None:
    """What the header of an image calls its backing file."""
    async with SimHost() as host:
        await host.disk("file", disks[f"{name}-file"])
        options = {"driver": "qcow2", "node-name": "image", "file": "file", "backing": None, "read-only": True}
        return named_backing(await host.blockdev_add(options))[0]


@pytest.mark.parametrize("name", SETUPS)
def test_chains(name: str) -> None:
    setup = SETUPS[name]
    for seed in range(SEEDS):
        recorded = record(setup, seed)
        assert recorded.completed
        states = states_of(recorded.log, recorded.start, seed)

        async def judge(seed: int = seed, states: list[CrashState] = states, recorded: Recorded = recorded) -> None:
            for state in states:
                assert not (wrong := await complaint(state, recorded, setup)), f"seed {seed}, {wrong}"

        asyncio.run(judge())
