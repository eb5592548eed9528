"""The dirty mark around a snapshot that is being made: whenever copied flags and refcounts disagree, the image says so.

QEMU's check calls such flags corruption, though nobody is harmed by them; whoever opens a marked image for writing
makes them agree (spec/durability.md §1, Snapshot create).
"""

import asyncio
from contextlib import suppress
from dataclasses import replace

import pytest
from replay import graph_over, opened
from sectors import pages_of, stretches
from short_runs import disks_of
from test_replay_after_faults import faulty
from test_replay_snapshots import IMAGES, MORE, STEPS, start_of, wrong_with

from blockjobs.base.errors import BlockjobsError
from blockjobs.block.drivers.qcow2.check import check_image
from blockjobs.block.drivers.qcow2.create import NewImage
from blockjobs.testing.crash import RecordingMedium, WriteLog
from blockjobs.testing.disk import Pages, SimDisk
from blockjobs.testing.faults import Fault, FaultPlan, FaultyMedium, Operation

PLACES_MAX = 100
FEATURES_AT, DIRTY = 79, 1
TINY_CACHES = {"l2-cache-size": 1024, "refcount-cache-size": 1024}
"""So commits are made on the way."""
CASES: dict[str, tuple[NewImage, dict[str, object]]] = {
    "4k": (MORE["4k"], {}),
    "lazy refcounts": (MORE["lazy refcounts"], {}),
    "refcounts of 64 bits": (IMAGES["refcounts of 64 bits"], {}),
    "many commits": (MORE["512"], dict(TINY_CACHES)),
}


class Judge:
    """Looks at each different state once."""

    def __init__(self) -> None:
        self.seen: set[int] = set()
        self.marked = 0

    async def look(self, log: WriteLog, start: dict[str, Pages], since: int = 0) -> None:
        for stretch in stretches(log, disks_of(start)):
            for story, state in stretch.states() if stretch.end >= since else ():
                if (key := hash((state.key(stretch.key), *state.lengths))) in self.seen:
                    continue
                self.seen.add(key)
                pages = pages_of(stretch.disks(state)["disk"])
                is_marked = bool(pages.read(FEATURES_AT, 1)[0] & DIRTY)
                self.marked += is_marked
                wrong = "" if is_marked else await wrong_with({"disk": pages}, strict=True)
                assert not wrong, f"log {stretch.begin} to {stretch.end}, {story}: {wrong}"


@pytest.mark.parametrize("name", CASES)
def test_power_cuts(name: str) -> None:
    async def run() -> None:
        image, tuning = CASES[name]
        start, world = await start_of(image)
        log, judge = WriteLog(), Judge()
        async with opened({"disk": RecordingMedium(SimDisk(start["disk"]), log, "disk")},
                          {"file": "disk", **tuning}) as node:  # fmt: skip
            await STEPS["create"](node, world)
        await judge.look(log, start)
        assert judge.marked > 3

    asyncio.run(run())


@pytest.mark.parametrize("lands", [False, True], ids=["", "and are done"])
@pytest.mark.parametrize("times", [1, 2, 3])
@pytest.mark.parametrize("name", ["4k", "many commits"])
def test_power_cuts_after_failed_writes(name: str, times: int, *, lands: bool) -> None:
    """So many writes in a row fail: that of the snapshot, and those that would take it back."""

    async def run() -> None:
        image, tuning = CASES[name]
        start, world = await start_of(image)
        judge = Judge()
        for nth in range(1, PLACES_MAX):
            log, plan = WriteLog(), FaultPlan()
            medium = faulty(SimDisk(start["disk"]), plan, log, "disk", lands=lands)
            with suppress(BlockjobsError):
                async with opened({"disk": medium}, {"file": "disk", **tuning}) as node:
                    plan.add(Fault(nth=nth, operation=Operation.WRITE, times=times))
                    with suppress(BlockjobsError):
                        await STEPS["create"](node, world)
                    since = log.mark("created or not")
                    plan.cure()
                    await node.write(0, b"x" * 512)
            await judge.look(log, start, since)
            if not plan.hits:
                return
        raise AssertionError("never ends")

    asyncio.run(run())


FAULTS = {
    "a write": Fault(nth=0, operation=Operation.WRITE),
    "a write that reaches the disk in part": Fault(nth=0, operation=Operation.WRITE, short=True),
    "a read": Fault(nth=0, operation=Operation.READ),
}


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("step", ["create", "apply", "delete"])
@pytest.mark.parametrize("name", ["4k", "refcounts of 64 bits"])
def test_a_failed_step_leaves_nothing(name: str, step: str, kind: str) -> None:
    """Everything is as before, in memory and in the file: no leak, no flag less. A second try succeeds."""

    async def once(nth: int) -> bool:
        start, before = await start_of(CASES[name][0])
        disk, plan = SimDisk(start["disk"]), FaultPlan()
        async with opened({"disk": FaultyMedium(disk, plan)}, {"file": "disk"}) as node:
            plan.add(replace(FAULTS[kind], nth=nth))
            try:
                await STEPS[step](node, before)
            except BlockjobsError:
                await node.flush()
                assert (found := await everything_wrong(disk.pages)) == "", f"{kind}, number {nth}: {found}"
                plan.cure()
                after = await STEPS[step](node, before)
                assert await node.read(0, node.length) == after.content
            await node.flush()
        found = await everything_wrong(disk.pages)
        # What is durable has not failed; only space that could not be given back leaks.
        assert found == "" or (plan.hits and step != "create"), f"{kind}, number {nth}: {found}"
        assert not await wrong_with({"disk": disk.pages}, strict=False), f"{kind}, number {nth}: {found}"
        return plan.hits > 0

    async def at_every_place() -> None:
        for nth in range(1, PLACES_MAX):
            if not await once(nth):
                assert nth > 1
                return
        raise AssertionError("never ends")

    asyncio.run(at_every_place())


async def everything_wrong(pages: Pages) -> str:
    """All lines of a check, leaks too."""
    async with graph_over({"disk": SimDisk(pages)}, read_only=True) as graph:
        found = await check_image(graph.node("disk"), offload=graph.offload)
    return "; ".join(found.problems)
