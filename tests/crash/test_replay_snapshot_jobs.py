"""snapshot-save, -load and -delete over two disks, under power cuts and failing requests: both, or none."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass

import pytest

from blockjobs.base.errors import IoFailure
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


async def opened(host: SimHost, media: dict[str, object]) -> list[Node]:
    nodes = []
    for name in NAMES:
        await host.graph.open_medium(media[name], f"{name}-file")
        options = {"driver": "qcow2", "node-name": name, "file": f"{name}-file", "backing": None}
        nodes.append(await host.blockdev_add(options))
    return nodes


@dataclass
class Found:
    """What the next open finds, of either disk: the names of the snapshots, and how the disk begins."""

    names: list[list[str]]
    content: list[bytes]


async def found_later(images: dict[str, Pages]) -> Found:
    found = Found([], [])
    async with SimHost() as host:
        nodes = await opened(host, {name: SimDisk(pages) for name, pages in images.items()})
        for node in nodes:
            entries = snapshots_of(node).entries
            found.names.append([each.name for each in entries if each.is_shown])
            async with host.access(node) as held:
                found.content.append(await held.node.read(0, 9000))
        if found.names == [["s"], ["s"]]:
            assert await ended(await host.snapshot_load("s", nodes)) is None
        assert await ended(await host.snapshot_delete("s", nodes)) is None
        # The one that decided keeps nothing back once all have followed.
        assert [list(snapshots_of(node).entries) for node in nodes] == [[], []]
    return found


def filled(word: str) -> list[bytes]:
    return [(name + word).encode() * (9000 // len(name + word)) for name in NAMES]


async def blank() -> dict[str, Pages]:
    async with SimHost() as host:
        nodes = [await host.image(name, IMAGE) for name in NAMES]
        await write(host, nodes, "1")
    return {name: host.disks[f"{name}-file"].pages for name in NAMES}


async def write(host: SimHost, nodes: list[Node], word: str) -> None:
    for node, content in zip(nodes, filled(word), strict=True):
        async with host.access(node, write=True) as held:
            await held.node.write(0, content)


async def with_snapshot() -> dict[str, Pages]:
    disks = {name: SimDisk(pages) for name, pages in (await blank()).items()}
    async with SimHost() as host:
        nodes = await opened(host, dict(disks))
        assert await ended(await host.snapshot_save("s", nodes)) is None
        await write(host, nodes, "2")
    return {name: disk.pages for name, disk in disks.items()}


@dataclass(frozen=True)
class Change:
    """One of the jobs: where it starts, and what is found before and after."""

    start: Callable[[], Awaitable[dict[str, Pages]]]
    job: Callable[[SimHost, list[Node]], Awaitable[JobHandle]]
    before: Found
    after: Found


CHANGES = {
    "save": Change(
        blank,
        lambda host, nodes: host.snapshot_save("s", nodes),
        Found([[], []], filled("1")),
        Found([["s"], ["s"]], filled("1")),
    ),
    "load": Change(
        with_snapshot,
        lambda host, nodes: host.snapshot_load("s", nodes),
        Found([["s"], ["s"]], filled("2")),
        Found([["s"], ["s"]], filled("1")),
    ),
    "delete": Change(
        with_snapshot,
        lambda host, nodes: host.snapshot_delete("s", nodes),
        Found([["s"], ["s"]], filled("2")),
        Found([[], []], filled("2")),
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_power_cuts(change: Change) -> None:
    async def scenario() -> None:
        start = await change.start()
        log = WriteLog()
        async with SimHost() as host:
            media = {name: RecordingMedium(SimDisk(pages), log, name) for name, pages in start.items()}
            nodes = await opened(host, dict(media))
            assert await ended(await change.job(host, nodes)) is None
            done = log.mark("done")
        outcomes = set()
        for state in crash_states(log, start, seed=0, exhaustive_up_to=3, samples=1):
            found = await found_later(dict(state.images))
            assert found in (change.before, change.after), (state.story, found.names)
            assert state.issued <= done or found == change.after, state.story
            outcomes.add(found == change.after)
        assert outcomes == {False, True}

    run(scenario())


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_power_cuts_while_a_crash_is_put_right(change: Change) -> None:
    """What the next open has begun to finish or to take back, the one after it ends in the same way."""

    async def scenario() -> None:
        start = await change.start()
        log = WriteLog()
        async with SimHost() as host:
            media = {name: RecordingMedium(SimDisk(pages), log, name) for name, pages in start.items()}
            nodes = await opened(host, dict(media))
            assert await ended(await change.job(host, nodes)) is None
        states = list(crash_states(log, start, seed=0, exhaustive_up_to=0, samples=0))
        for state in states[:: max(1, len(states) // 6)]:
            wanted = await found_later({name: pages.copy() for name, pages in state.images.items()})
            again = WriteLog()
            async with SimHost() as host:
                await opened(
                    host,
                    {name: RecordingMedium(SimDisk(pages.copy()), again, name) for name, pages in state.images.items()},
                )
            images = {name: pages.copy() for name, pages in state.images.items()}
            for second in crash_states(again, images, seed=0, exhaustive_up_to=2, samples=1):
                found = await found_later(dict(second.images))
                assert found == wanted, (state.story, second.story, found.names)

    run(scenario())


@pytest.mark.parametrize("operation", [Operation.WRITE, Operation.READ, Operation.SYNC])
@pytest.mark.parametrize("disk", NAMES)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_failing_request(change: Change, disk: str, operation: Operation) -> None:
    async def once(nth: int) -> bool:
        disks = {name: SimDisk(pages) for name, pages in (await change.start()).items()}
        plan = FaultPlan()
        error: str | None = None
        # A disk that failed to sync fails to close.
        with suppress(IoFailure):
            async with SimHost() as host:
                media: dict[str, object] = dict(disks)
                media[disk] = FaultyMedium(disks[disk], plan)
                nodes = await opened(host, media)
                plan.add(Fault(nth=nth, operation=operation))
                error = await ended(await change.job(host, nodes))
                plan.cure()
        found = await found_later({name: each.pages for name, each in disks.items()})
        # Deleting may end with an error although it is decided: what is left goes with the next try.
        assert found in ([change.before, change.after] if error else [change.after]), (nth, error, found.names)
        return plan.hits > 0

    async def at_every_place() -> None:
        nth = 1
        while await once(nth):
            nth += 1
        assert nth > 2

    run(at_every_place())
