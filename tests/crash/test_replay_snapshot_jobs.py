"""snapshot-save over two disks, under power cuts and failing requests: both have it, or none, at the next look."""

import asyncio

import pytest

from blockjobs.block.drivers.qcow2.create import NewImage
from blockjobs.block.node import Node
from blockjobs.jobs.snapshot_group import snapshots_of
from blockjobs.lifecycle.handle import JobHandle
from blockjobs.testing.clock import run
from blockjobs.testing.crash import RecordingMedium, WriteLog, crash_states
from blockjobs.testing.disk import Pages, SimDisk
from blockjobs.testing.faults import Fault, FaultPlan, FaultyMedium, Operation
from blockjobs.testing.host import SimHost

SIZE = 64 << 10
IMAGE = NewImage(size=SIZE, cluster_size=4096)
NAMES = ("a", "b")


async def ended(job: JobHandle) -> str | None:
    while job.status != "concluded":
        await asyncio.sleep(0.01)
    error = job.error
    job.dismiss()
    return error


async def blank() -> dict[str, Pages]:
    async with SimHost() as host:
        for name in NAMES:
            node = await host.image(name, IMAGE)
            async with host.access(node, write=True) as held:
                await held.node.write(0, name.encode() * 9000)
    return {name: host.disks[f"{name}-file"].pages for name in NAMES}


async def opened(host: SimHost, media: dict[str, object]) -> list[Node]:
    nodes = []
    for name in NAMES:
        await host.graph.open_medium(media[name], f"{name}-file")  # type: ignore[arg-type]
        options = {"driver": "qcow2", "node-name": name, "file": f"{name}-file", "backing": None}
        nodes.append(await host.blockdev_add(options))
    return nodes


async def found_later(images: dict[str, Pages]) -> list[list[str]]:
    """Names of the snapshots that are shown after the next job has looked at both disks; contents are as they were."""
    async with SimHost() as host:
        nodes = await opened(host, {name: SimDisk(pages) for name, pages in images.items()})
        assert await ended(await host.snapshot_delete("no such", nodes)) is None
        for node in nodes:
            async with host.access(node) as held:
                assert await held.node.read(0, 9000) == node.name.encode() * 9000
        shown = [[each.name for each in snapshots_of(node).entries if each.is_settled] for node in nodes]
        hidden = [[each.name for each in snapshots_of(node).entries if not each.is_settled] for node in nodes]
        assert hidden == [[], []]
        if shown == [["s"], ["s"]]:
            assert await ended(await host.snapshot_load("s", nodes)) is None
        return shown


def test_power_cuts() -> None:
    async def scenario() -> None:
        start = await blank()
        log = WriteLog()
        async with SimHost() as host:
            media = {name: RecordingMedium(SimDisk(pages), log, name) for name, pages in start.items()}
            nodes = await opened(host, dict(media))
            assert await ended(await host.snapshot_save("s", nodes)) is None
            done = log.mark("saved")
        outcomes = set()
        for state in crash_states(log, start, seed=0, exhaustive_up_to=3, samples=1):
            shown = await found_later(dict(state.images))
            assert shown in ([[], []], [["s"], ["s"]]), (state.story, shown)
            assert state.issued <= done or shown == [["s"], ["s"]], state.story
            outcomes.add(str(shown))
        assert len(outcomes) == 2

    run(scenario())


@pytest.mark.parametrize("operation", [Operation.WRITE, Operation.READ])
@pytest.mark.parametrize("disk", NAMES)
def test_a_failing_request(disk: str, operation: Operation) -> None:
    async def once(nth: int) -> bool:
        disks = {name: SimDisk(pages) for name, pages in (await blank()).items()}
        plan = FaultPlan()
        async with SimHost() as host:
            media: dict[str, object] = dict(disks)
            media[disk] = FaultyMedium(disks[disk], plan)
            nodes = await opened(host, media)
            plan.add(Fault(nth=nth, operation=operation))
            error = await ended(await host.snapshot_save("s", nodes))
            plan.cure()
        shown = await found_later({name: each.pages for name, each in disks.items()})
        assert shown == ([[], []] if error else [["s"], ["s"]]), (nth, error, shown)
        return plan.hits > 0

    async def at_every_place() -> None:
        nth = 1
        while await once(nth):
            nth += 1
        assert nth > 2

    run(at_every_place())
