"""Power cuts after a request has failed: what a failed commit left in memory is written by the next, in the same order.

A write that failed may have reached the disk all the same, so each state is looked at with and without it
(spec/durability.md §1, I1, I2 and the last paragraph).
"""

import asyncio
from contextlib import suppress

import pytest
from sectors import Stretch, stretches
from short_runs import KIB, SETUPS, Allowed, Content, Run, Setup, change, disks_of, flush, pattern, running, used

from blockjobs.base.errors import IoFailure
from blockjobs.block.medium import Medium
from blockjobs.testing.crash import RecordingMedium, WriteLog
from blockjobs.testing.disk import Pages, SimDisk
from blockjobs.testing.faults import Fault, FaultPlan, FaultyMedium, Operation

PLACES_MAX = 100
NAMES = ("plain", "extended L2", "refcounts of 64 bits", "data file")
"""With refcounts of 64 bits a few writes need another refcount block, and an L2 table maps 32 KiB only."""


async def put(run: Run, step: int, at: int, length: int) -> None:
    at, length = at * run.setup.scale, length * run.setup.scale
    content = pattern(step, at, length)
    await change(run, "write", at, content, lambda: run.node.write(at, content))


def faulty(disk: SimDisk, plan: FaultPlan, log: WriteLog, name: str, *, lands: bool) -> Medium:
    """A disk with faults and a log.

    Args:
        lands: what fails may reach the disk nevertheless, now or later; else it never does.
    """
    if lands:
        return RecordingMedium(FaultyMedium(disk, plan), log, name)
    return FaultyMedium(RecordingMedium(disk, log, name), plan)


class Trial:
    """Two writes with a flush each; one of the writes to the disk that the first flush takes fails."""

    def __init__(self, setup: Setup, start: tuple[dict[str, Pages], Allowed, Content]) -> None:
        self.setup, self.start = setup, start
        self.seen: set[int] = set()

    async def run(self, nth: int, then: str, *, lands: bool) -> bool:
        """Returns whether the fault was met.

        Args:
            then: what follows: the flush is tried again at once, or another write comes before, which uses the tables
                that the first one made, or others.
            lands: see `faulty`.
        """
        pages, now, content = self.start
        log, plan = WriteLog(), FaultPlan()
        media = {name: faulty(SimDisk(each), plan, log, name, lands=lands) for name, each in pages.items()}
        async with running(self.setup, media, log, now, content) as run:
            await run.do("grow")
            since = len(log.changes)
            await put(run, 20, 6 * KIB, 34 * KIB)
            plan.add(Fault(nth=nth, operation=Operation.WRITE))
            with suppress(IoFailure):
                await flush(run, 0)
            plan.cure()
            if then != "again":
                await put(run, 21, 2 * KIB if then == "other tables" else 36 * KIB, 3 * KIB)
            await flush(run, 0)
            await put(run, 22, 37 * KIB, KIB)
        for stretch in stretches(log, disks_of(pages)):
            if stretch.end >= since:
                self.look(f"write {nth} failed", stretch, run)
        return plan.hits > 0

    def look(self, story: str, stretch: Stretch, run: Run) -> None:
        allowed = run.allowed(stretch.end)
        means = hash(tuple(each.sectors for each in allowed))
        for what, state in stretch.states():
            key = hash((means, state.key(stretch.key), *state.lengths))
            if key in self.seen:
                continue
            self.seen.add(key)
            wrong = self.setup.complaint(self.setup.verdict(stretch.disks(state)), allowed)
            assert not wrong, f"{story}, log {stretch.begin} to {stretch.end}, {what}: {wrong}"


@pytest.mark.parametrize("lands", [False, True], ids=["", "it is done"])
@pytest.mark.parametrize("then", ["again", "same tables", "other tables"])
@pytest.mark.parametrize("name", NAMES)
def test_every_write_of_a_flush(name: str, then: str, *, lands: bool) -> None:
    async def all_places() -> int:
        trial = Trial(SETUPS[name], await used(SETUPS[name]))
        for nth in range(1, PLACES_MAX):
            if not await trial.run(nth, then, lands=lands):
                return nth - 1
        raise AssertionError("never ends")

    assert asyncio.run(all_places()) >= (1 if SETUPS[name].image.data_file_name else 2)
