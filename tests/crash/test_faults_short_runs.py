"""A failing request at every place of every kind of request: an error, nothing acknowledged lost, and a retry succeeds.

(spec/durability.md §1, last paragraph, and I8.)
"""

import asyncio
import errno
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import replace
from itertools import product

import pytest
from replay import SEEDS
from short_runs import SETUPS, Allowed, Content, Run, Setup, disks_of, flush, split, used

from blockjobs.base.errors import BlockjobsError, IoFailure
from blockjobs.block.bitmaps import remove_bitmap
from blockjobs.testing.crash import WriteLog
from blockjobs.testing.disk import Pages, SimDisk
from blockjobs.testing.faults import Fault, FaultPlan, FaultyMedium, Operation

FOR_EVER = 1 << 30
PLACES_MAX = 500
KINDS = {
    "one request": Fault(nth=0),
    "no space from here on": Fault(nth=0, operation=Operation.WRITE, errno=errno.ENOSPC, short=True, times=FOR_EVER),
    "no space for more from here on": Fault(
        nth=0, operation=Operation.GROW, errno=errno.ENOSPC, short=True, times=FOR_EVER
    ),
    "one short write": Fault(nth=0, operation=Operation.WRITE, short=True),
    "everything from here on": Fault(nth=0, times=FOR_EVER),
}


class Trial:
    """One request that fails at one place, after another one that succeeded and was not flushed."""

    def __init__(self, setup: Setup, pages: dict[str, Pages], now: Allowed, content: Content) -> None:
        self.setup, self.now, self.content = setup, now, content
        self.disks = {name: SimDisk(each) for name, each in pages.items()}
        self.plan = FaultPlan()

    async def run(self, before: str, name: str, fault: Fault) -> bool:
        """Returns whether the fault was met."""
        media = {each: FaultyMedium(disk, self.plan) for each, disk in self.disks.items()}
        during: list[Allowed] = []
        with suppress(IoFailure):  # closing tells of a sync that failed before
            async with self.setup.opened(media) as node:
                run = Run(node, self.setup, WriteLog(), self.now, self.content)
                await run.do(before)
                self.plan.add(fault)
                during = await self.fails(run, name)
                self.plan.cure()
                if self.plan.failed_syncs:
                    await self.is_poisoned(run)
                else:
                    during = await self.is_retried(run, name, during)
        assert during, "it could not be opened"
        assert not (wrong := self.wrong(during)), wrong
        if self.plan.failed_syncs:
            await self.is_retried_anew(name, during)
        return self.plan.hits > 0

    def wrong(self, allowed: list[Allowed]) -> str:
        verdict = self.setup.verdict(disks_of({name: disk.pages for name, disk in self.disks.items()}))
        return self.setup.complaint(verdict, allowed)

    async def fails(self, run: Run, name: str) -> list[Allowed]:
        """Do the request; returns what may be afterwards."""
        count = len(run.eras)
        try:
            await run.do(name)
        except BlockjobsError:
            assert self.plan.hits
            era = run.eras[-1]
            return era.during
        era = run.eras[-1]
        # It succeeded, so all faults were of the kind that do no harm; before a flush nothing is promised.
        return [run.now] if len(run.eras) > count else [run.now, *era.during]

    async def is_poisoned(self, run: Run) -> None:
        """No flush succeeds until the file is opened anew."""
        for _ in range(2):
            with pytest.raises(IoFailure):
                await run.node.flush()

    async def is_retried(self, run: Run, name: str, during: list[Allowed]) -> list[Allowed]:
        """What was there is there, and now the request succeeds."""
        live = split(await run.node.read(0, run.node.length))
        fitting = [each for each in during if len(each.sectors) == len(live)]
        assert any(all(map(frozenset.__contains__, each.sectors, live)) for each in fitting), "lost while it is open"
        if "create" not in self.setup.without:
            ids = [each.id.encode() for each in run.snapshots.entries]
            assert ids == list(run.now.snapshots), f"{ids} after the error"
        run.now, run.content = run.now.exactly(live), live
        await flush(run, 0)
        assert not (wrong := self.wrong([run.now])), f"after the next flush: {wrong}"
        await run.do(name)
        await flush(run, 0)
        assert split(await run.node.read(0, run.node.length)) == run.content
        return [run.now]

    async def is_retried_anew(self, name: str, during: list[Allowed]) -> None:
        """The image is as good as any other; it may be that of before or that of after the request."""
        async with self.setup.opened(self.disks) as node:
            live = split(await node.read(0, node.length))
            fitting = [each for each in during if len(each.sectors) == len(live)]
            run = Run(node, self.setup, WriteLog(), self.now, live)
            ids = [] if "create" in self.setup.without else [each.id.encode() for each in run.snapshots.entries]
            now = next(each for each in fitting if list(each.snapshots) == ids)
            run.now = now.exactly(live)
            if node.bitmaps and node.bitmaps[0].inconsistent and name in ("apply", "store"):
                await remove_bitmap(node, node.bitmaps[0])
            if not node.bitmaps:
                run.now = replace(run.now, reference=None)
            await run.do(name)
            await flush(run, 0)
            assert split(await node.read(0, node.length)) == run.content
        assert not (wrong := self.wrong([run.now])), wrong


def pairs(setup: Setup) -> list[tuple[str, str]]:
    """(what succeeded before, what fails): in the suite every request after a write, and after one other request."""
    requests = setup.requests
    if SEEDS > 1:
        return list(product(requests, requests))
    return [("write", request) for request in requests] + list(zip(requests[1:], requests, strict=False))


def every_place(name: str, kind: str) -> None:
    """Let each request of each run fail, one after the other."""
    setup, fault = SETUPS[name], KINDS[kind]

    async def check() -> None:
        start = await used(setup)
        for before, request in pairs(setup):
            for nth in range(1, PLACES_MAX):
                try:
                    if not await Trial(setup, *start).run(before, request, replace(fault, nth=nth)):
                        break
                except Exception as error:
                    raise AssertionError(f"{before}, {request}, {kind}, number {nth}") from error
            else:
                raise AssertionError("never ends")

    asyncio.run(check())


@pytest.mark.serial
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", SETUPS)
def test_a_fault_at_every_place(name: str, workers: ProcessPoolExecutor) -> None:
    for each in [workers.submit(every_place, name, kind) for kind in KINDS]:
        each.result()
