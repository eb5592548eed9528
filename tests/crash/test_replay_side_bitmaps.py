"""Bitmaps of raw images in a side file, after every crash and every failed request: right, or inconsistent."""

import asyncio
import random
from contextlib import suppress

import pytest
from bitmap_sessions import Sessions
from replay import SEEDS, Guest
from side_disk import opened_raw
from workload import Setup, states_of

from blockjobs.base.errors import BlockjobsError
from blockjobs.block.drivers.qcow2.create import NewImage
from blockjobs.testing.crash import RecordingMedium, WriteLog
from blockjobs.testing.disk import Act, Change, Pages, SimDisk
from blockjobs.testing.faults import Fault, FaultPlan, FaultyMedium, Operation

SIZE = 1 << 20
# Of the image only its size counts; the data file says that nothing is to be compressed.
SETUP = Setup(NewImage(size=SIZE, data_file_name="data"))
FAULTS_SAMPLE = 4
FOR_EVER = 1 << 30


def start() -> dict[str, Pages]:
    disk = Pages()
    disk.truncate(SIZE)
    return {"disk": disk, "side": Pages()}


def record(seed: int) -> Sessions:
    async def run() -> Sessions:
        log = WriteLog()
        media = {name: RecordingMedium(SimDisk(pages), log, name) for name, pages in start().items()}
        sessions = Sessions(Guest(log, bytes(SIZE), SIZE), SETUP, seed, open=opened_raw)
        await sessions.run(media)
        return sessions

    return asyncio.run(run())


@pytest.mark.parametrize("seed", range(3 * SEEDS))
def test_random_sessions(seed: int) -> None:
    sessions = record(seed)

    async def judge() -> None:
        for state in states_of(sessions.guest.log, start(), seed):
            media = {name: SimDisk(pages) for name, pages in state.images.items()}
            wrong = await sessions.lies(media, state.issued)
            assert not wrong, f"{state.story}: {wrong}"

    asyncio.run(judge())
    assert sessions.found_valid and sessions.found_broken


def test_the_replay_finds_a_mark_that_comes_too_late() -> None:
    sessions = record(1)
    changes = sessions.guest.log.changes
    for index, change in enumerate(changes):
        if change.act is Act.SYNC and change.disk == "side":
            changes[index] = Change(Act.MARK, label="a sync that was skipped")

    async def count_bad() -> int:
        bad = 0
        for state in states_of(sessions.guest.log, start(), 1, least=1):
            media = {name: SimDisk(pages) for name, pages in state.images.items()}
            try:
                bad += bool(await sessions.lies(media, state.issued))
            except BlockjobsError:
                bad += 1
        return bad

    assert asyncio.run(count_bad())


@pytest.mark.parametrize("operation", [Operation.WRITE, Operation.SYNC, None])
@pytest.mark.parametrize("disk", ["disk", "side"])
def test_a_fault_at_every_place(disk: str, operation: Operation | None) -> None:
    async def run_with(plan: FaultPlan, seed: int) -> str:
        disks = {name: SimDisk(pages) for name, pages in start().items()}
        sessions = Sessions(Guest(WriteLog(), bytes(SIZE), SIZE), SETUP, seed, takes_errors=True, open=opened_raw)
        media = {name: FaultyMedium(each, plan) if name == disk else each for name, each in disks.items()}
        with suppress(BlockjobsError):
            await sessions.run(media)
        return await sessions.lies(disks, len(sessions.guest.log.changes))

    async def check(seed: int) -> None:
        counting = FaultPlan()
        assert not await run_with(counting, seed)
        places = range(1, counting.calls[operation] + 1)
        if SEEDS == 1:
            places = sorted(random.Random(seed).sample(places, min(len(places), FAULTS_SAMPLE)))
        for nth in places:
            plan = FaultPlan([Fault(nth=nth, operation=operation, times=FOR_EVER if operation is None else 1)])
            wrong = await run_with(plan, seed)
            assert plan.hits and not wrong, f"seed {seed}, {operation} number {nth} of {disk}: {wrong}"

    for seed in range(SEEDS):
        asyncio.run(check(seed))
