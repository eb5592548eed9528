"""A cluster gets no new use, and is not punched, while a durable table still refers to it (spec/durability.md §1, I3).

Seen from the log of what was written: between the last durable state in which one thing refers to a cluster and the
first in which another does, there is one in which nothing does.
"""

import asyncio
import random
from itertools import pairwise, product

import pytest
from judge import COMPRESSED_DATA, Owner, judge
from replay import SEEDS
from sectors import Disks, Stretch, stretches
from short_runs import SETUPS, Allowed, Content, Setup, disks_of, running, used

from blockjobs.testing.crash import RecordingMedium, WriteLog
from blockjobs.testing.disk import Act, Pages, SimDisk

LONG_RUNS = 6


Start = tuple[dict[str, Pages], Allowed, Content]


async def record(setup: Setup, start: Start, names: tuple[str, ...]) -> tuple[WriteLog, Disks]:
    pages, now, content = start
    log = WriteLog()
    media = {name: RecordingMedium(SimDisk(each), log, name) for name, each in pages.items()}
    async with running(setup, media, log, now, content) as run:
        for name in names:
            await run.do(name)
    return log, disks_of(pages)


def early_uses(log: WriteLog, start: Disks) -> list[str]:
    """Clusters that were put to another use, or punched, too early."""
    found = []
    steps = [
        (stretch, judge(stretch.durable["disk"], stretch.durable.get("data"))) for stretch in stretches(log, start)
    ]
    for (stretch, before), (_, after) in pairwise(steps):
        for cluster, owners in before.owners.items():
            if is_taken_over(owners, after.owners.get(cluster, owners)):
                found.append(f"log {stretch.end}: cluster {cluster} of {owners} now of {after.owners[cluster]}")
        found += [f"log {stretch.end}: cluster {each} of {before.owners[each]} is punched"
                  for each in punched(log, stretch, before.cluster_size) if each in before.owners]  # fmt: skip
    return found


def is_taken_over(before: list[Owner], after: list[Owner]) -> bool:
    """Streams share clusters: one may go while another comes, which is seen by what the disk shows then."""
    return not set(before) & set(after) and COMPRESSED_DATA not in (*before, *after)


def punched(log: WriteLog, stretch: Stretch, cluster_size: int) -> set[int]:
    """Clusters of which anything was discarded."""
    return {
        cluster
        for change in log.changes[stretch.begin + 1 : stretch.end]
        if change.act is Act.DISCARD and change.disk == "disk"
        for cluster in range(change.at // cluster_size, -(-(change.at + change.length) // cluster_size))
    }


@pytest.mark.parametrize("name", [name for name, setup in SETUPS.items() if "discard-no-unref" not in setup.tuning])
def test_short_and_longer_runs(name: str) -> None:
    setup = SETUPS[name]
    chance = random.Random(3)
    runs = list(product(setup.requests, repeat=2 if name == "plain" or SEEDS > 1 else 1))
    runs += [tuple(chance.choices(setup.requests, k=12)) for _ in range(LONG_RUNS * SEEDS)]

    async def all_of_them() -> int:
        start, punches = await used(setup), 0
        for names in runs:
            log, disks = await record(setup, start, names)
            assert not (found := early_uses(log, disks)), f"{names}: {found[:5]}"
            punches += any(change.act is Act.DISCARD for change in log.changes)
        return punches

    assert asyncio.run(all_of_them()) or setup.image.data_file_name


def test_early_uses_are_found() -> None:
    """The tool itself: had nothing been synced in between, clusters would have been used too early."""
    names = ("write", "flush", "discard", "flush", "write", "create", "delete", "zero", "flush", "write", "compress")
    setup = SETUPS["plain"]
    log, start = asyncio.run(record(setup, asyncio.run(used(setup)), names))
    syncs = [index for index, change in enumerate(log.changes) if change.act is Act.SYNC]
    for index in syncs[:-1]:
        log.changes[index] = log.changes[index]._replace(act=Act.MARK)
    found = early_uses(log, start)
    assert any("now of" in each for each in found)
    assert any("punched" in each for each in found)
