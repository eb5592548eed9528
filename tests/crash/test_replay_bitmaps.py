"""After every crash a stored bitmap covers all that changed, or is inconsistent: false dirty yes, false clean never."""

import asyncio
import random
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
from bitmap_sessions import Sessions
from replay import SEEDS, Guest, blank, own_errors, qemu_errors, shown
from test_replay import complaint
from workload import SETUPS, Setup, states_of

from blockjobs.base.errors import BlockjobsError
from blockjobs.testing.crash import CrashState, RecordingMedium, WriteLog
from blockjobs.testing.disk import Act, Change, Pages, SimDisk
from blockjobs.testing.faults import Fault, FaultPlan, FaultyMedium, Operation

NAMES = ("4k", "at once", "512, refcounts of 64 bits", "backing", "extended L2", "data file", "refcounts of 1 bit")
QEMU_SAMPLE = 3
FAULTS_SAMPLE = 4


def record(setup: Setup, seed: int) -> tuple[Sessions, dict[str, Pages]]:
    async def run() -> tuple[Sessions, dict[str, Pages]]:
        start = await blank(setup.image, backing=setup.backing, seed=seed)
        log = WriteLog()
        media = {name: RecordingMedium(SimDisk(pages), log, name) for name, pages in start.items()}
        content = await shown(start, setup.options)
        sessions = Sessions(Guest(log, content, len(content), behind=content if setup.backing else b""), setup, seed)
        await sessions.run(media)
        return sessions, start

    return asyncio.run(run())


async def bitmap_complaint(state: CrashState, sessions: Sessions) -> str:
    media = {name: SimDisk(pages) for name, pages in state.images.items()}
    lies = await sessions.lies(media, state.issued)
    return f"{state.story}: {lies}" if lies else ""


@pytest.mark.parametrize("name", NAMES)
def test_random_sessions(name: str, tmp_path: Path) -> None:
    setup = SETUPS[name]
    for seed in range(SEEDS):
        sessions, start = record(setup, seed)
        states = states_of(sessions.guest.log, start, seed, most=60)

        async def judge(seed: int = seed, states: list[CrashState] = states, sessions: Sessions = sessions) -> None:
            for state in states:
                wrong = await complaint(state, sessions.guest, setup) or await bitmap_complaint(state, sessions)
                assert not wrong, f"seed {seed}, {wrong}"

        asyncio.run(judge())
        assert sessions.found_valid and sessions.found_broken
        if shutil.which("qemu-img"):
            for state in random.Random(seed).sample(states, QEMU_SAMPLE):
                assert not (errors := qemu_errors(state.images, tmp_path)), f"seed {seed}, {state.story}: {errors}"


def test_the_replay_finds_a_mark_that_comes_too_late() -> None:
    """The tool itself: without the sync that makes IN_USE durable before a write, some bitmap conceals a change."""
    setup = SETUPS["4k"]
    sessions, start = record(setup, 1)
    changes = sessions.guest.log.changes
    for index, change in enumerate(changes):
        if change.act is Act.SYNC:
            changes[index] = Change(Act.MARK, label="a sync that was skipped")

    async def count_bad() -> int:
        bad = 0
        for state in states_of(sessions.guest.log, start, 1, least=1):
            with suppress(BlockjobsError):
                bad += bool(await bitmap_complaint(state, sessions))
        return bad

    assert asyncio.run(count_bad())


KINDS = {
    "a write": Fault(nth=0, operation=Operation.WRITE),
    "everything from here on": Fault(nth=0, times=1 << 30),
    "a sync": Fault(nth=0, operation=Operation.SYNC),
}


async def run_with(setup: Setup, start: dict[str, Pages], plan: FaultPlan, seed: int) -> tuple[Sessions, str]:
    """Sessions with faults; then says what the bitmaps conceal. A guest goes on after a failed write, or gives up."""
    disks = {name: SimDisk(pages) for name, pages in start.items()}
    content = await shown(start, setup.options)
    sessions = Sessions(Guest(WriteLog(), content, len(content)), setup, seed, takes_errors=True)
    with suppress(BlockjobsError):
        await sessions.run({name: FaultyMedium(disk, plan) for name, disk in disks.items()})
    images = {name: disk.pages for name, disk in disks.items()}
    assert not (errors := await own_errors(images)), errors
    media = {name: SimDisk(pages) for name, pages in images.items()}
    return sessions, await sessions.lies(media, len(sessions.guest.log.changes))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["4k", "512, refcounts of 64 bits"])
def test_a_fault_at_every_place(name: str, kind: str) -> None:
    setup, fault = SETUPS[name], KINDS[kind]

    async def check(seed: int) -> None:
        start = await blank(setup.image, seed=seed)
        counting = FaultPlan()
        _, wrong = await run_with(setup, start, counting, seed)
        assert not wrong
        places = range(1, counting.calls[fault.operation] + 1)
        if SEEDS == 1:
            places = sorted(random.Random(seed).sample(places, min(len(places), FAULTS_SAMPLE)))
        for nth in places:
            plan = FaultPlan([Fault(nth=nth, operation=fault.operation, times=fault.times)])
            _, wrong = await run_with(setup, start, plan, seed)
            assert plan.hits and not wrong, f"seed {seed}, {kind}, number {nth}: {wrong}"

    for seed in range(SEEDS):
        asyncio.run(check(seed))
