"""Looks at every state that a power cut may leave of many runs, with what two of them share looked at once.

A worker takes all runs that begin with one request; several workers take all cores.
"""

import asyncio
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import product

from replay import own_errors
from sectors import Disks, Recall, State, Stretch, pages_of, stretches
from short_runs import SETUPS, Allowed, Content, Run, Setup, disks_of, running, split, used

from blockjobs.testing.crash import RecordingMedium, WriteLog
from blockjobs.testing.disk import Act, Change, Pages, SimDisk

COMPLAINTS_MAX = 5
REPAIRED_PER_RUN = 1
"""Dirty states per run that are repaired, which takes as long as twenty other states."""
SAMPLED = 97
"""Of so many distinct states one is a candidate for the sample."""

Requests = tuple[str, ...]


@dataclass
class Report:
    """What was looked at.

    Attributes:
        states: how many, how many `distinct` ones, and how many of those had to be `judged`: the others differ from
            one of those only where the judge does not look.
        complaints: what is wrong with the first bad states.
        sample: some states, with the content of the disk, for other programs to look at.
    """

    runs: int = 0
    states: int = 0
    distinct: int = 0
    judged: int = 0
    repaired: int = 0
    complaints: list[str] = field(default_factory=list)
    sample: list[tuple[str, Disks, Content]] = field(default_factory=list)

    def add(self, other: "Report") -> None:
        """Both together."""
        self.runs += other.runs
        self.states += other.states
        self.distinct += other.distinct
        self.judged += other.judged
        self.repaired += other.repaired
        self.complaints += other.complaints
        self.sample += other.sample


class Session:
    """All about the runs of one setup; nothing that was looked at once is looked at again."""

    def __init__(self, setup: Setup, *, skip_syncs: bool = False) -> None:
        self.setup, self.skip_syncs = setup, skip_syncs
        self.report = Report()
        self.pages: dict[str, Pages] = {}
        self._seen: set[int] = set()
        self._now: Allowed | None = None
        self._content: Content = ()

    async def all_of(self, runs: Iterable[Requests], *, share: bool) -> Report:
        """Look at many runs.

        Args:
            share: among the runs is what remains of each without its last request, so that is not looked at here.
        """
        self.pages, self._now, self._content = await used(self.setup)
        for names in runs:
            await self.one(names, share=share and len(names) > 1)
        self.report.distinct = len(self._seen)
        return self.report

    async def one(self, names: Requests, *, share: bool) -> None:
        """Run, and look at every state."""
        log, since = WriteLog(), 0
        media = {name: RecordingMedium(SimDisk(pages), log, name) for name, pages in self.pages.items()}
        assert self._now is not None
        async with running(self.setup, media, log, self._now, self._content) as run:
            for name in names:
                since = len(log.changes)
                await run.do(name)
            assert split(await run.node.read(0, run.node.length)) == run.content, names
        self.report.runs += 1
        if self.skip_syncs:
            log.changes = [change if change.act is not Act.SYNC else Change(Act.MARK) for change in log.changes]
        await self._look(names, run, log, since if share else 0)

    async def _look(self, names: Requests, run: Run, log: WriteLog, since: int) -> None:
        to_repair = REPAIRED_PER_RUN
        for stretch in stretches(log, disks_of(self.pages)):
            if stretch.end < since:
                continue
            allowed = run.allowed(stretch.end)
            means = hash(tuple((each.sectors, tuple(each.snapshots.items()), each.reference) for each in allowed))
            recall = Recall[tuple[str, bool]](stretch)
            for story, state in stretch.states():
                self.report.states += 1
                key = hash((means, state.key(stretch.key), *state.lengths))
                if key in self._seen:
                    continue
                self._seen.add(key)
                wrong, is_dirty = self._opinion(stretch, state, allowed, recall)
                if is_dirty and to_repair and not wrong:
                    to_repair -= 1
                    self.report.repaired += 1
                    wrong = await self.repaired(stretch.disks(state), allowed)
                if wrong and len(self.report.complaints) < COMPLAINTS_MAX:
                    self.report.complaints.append(f"{names}, log {stretch.begin} to {stretch.end}, {story}: {wrong}")
                elif not wrong and len(self._seen) % SAMPLED == 0:
                    self._remember(f"{names}, log {stretch.end}, {story}", stretch.disks(state))

    def _opinion(self, stretch: Stretch, state: State, allowed: Sequence[Allowed],
                 recall: Recall[tuple[str, bool]]) -> tuple[str, bool]:  # fmt: skip
        """See `Setup.complaint`; about states that are the same to the judge only once."""
        known = recall.find(state)
        if known is None:
            verdict = self.setup.verdict(stretch.disks(state))
            known = self.setup.complaint(verdict, allowed), verdict.is_dirty
            recall.keep(state, verdict.read, known)
            self.report.judged += 1
        return known

    async def repaired(self, disks: Disks, allowed: Sequence[Allowed]) -> str:
        """Open a dirty image for writing, which repairs it; says what is wrong then."""
        simulated = {name: SimDisk(pages_of(sectors)) for name, sectors in disks.items()}
        async with self.setup.opened(simulated):
            pass
        verdict = self.setup.verdict(disks_of({name: disk.pages for name, disk in simulated.items()}))
        wrong = self.setup.complaint(verdict, allowed)
        return f"repaired: {wrong}" if wrong else "dirty after the repair" if verdict.is_dirty else ""

    def _remember(self, story: str, disks: Disks) -> None:
        state = story, disks, self.setup.verdict(disks).content
        if len(self.report.sample) < 2:
            self.report.sample.append(state)
        else:
            self.report.sample[random.Random(story).randrange(2)] = state


def short_runs(name: str, first: str, depth: int) -> Report:
    """All runs of up to `depth` requests that begin with `first`."""
    setup = SETUPS[name]

    async def work() -> Report:
        rests = (rest for more in range(depth) for rest in product(setup.requests, repeat=more))
        return await Session(setup).all_of(((first, *rest) for rest in rests), share=True)

    return asyncio.run(work())


def long_runs(name: str, seed: int, runs: int, length: int) -> Report:
    """So many random runs."""
    setup, chance = SETUPS[name], random.Random(seed)
    chosen = [tuple(chance.choices(setup.requests, k=length)) for _ in range(runs)]
    return asyncio.run(Session(setup).all_of(chosen, share=False))


async def own_opinion(disks: Disks, setup: Setup, content: Content) -> str:
    """What the program's own check and its own reads say about a state that was judged to be good."""
    pages = {name: pages_of(sectors) for name, sectors in disks.items()}
    if errors := harm(await own_errors(pages), "; "):
        return errors
    media = {name: SimDisk(each) for name, each in pages.items()}
    async with setup.opened(media, read_only=True) as node:
        same = split(await node.read(0, node.length)) == content
    return "" if same else "the program reads something else"


def harm(errors: str, separator: str = "\n") -> str:
    """What a check says that is not about flags: whether those that are wrong do harm, `judge` has looked at."""
    lines = [line for line in errors.split(separator) if line.startswith("ERROR") and "OFLAG_COPIED" not in line]
    return "\n".join(lines)
