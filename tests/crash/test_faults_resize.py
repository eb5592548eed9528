"""A resize that fails is taken back: the length is what it was, after the next flush in the file too; a retry succeeds.

(spec/durability.md §1, last paragraph.) Tables move here, because a longer disk needs a longer L1 table.
"""

import asyncio
import errno
import random
from dataclasses import replace

import pytest
from replay import blank, graph_over, opened, shown

from blockjobs.base.buffers import Buffer
from blockjobs.base.errors import BlockjobsError
from blockjobs.block.drivers.qcow2.check import check_image
from blockjobs.block.drivers.qcow2.create import NewImage
from blockjobs.testing.disk import Pages, SimDisk
from blockjobs.testing.faults import Fault, FaultPlan, FaultyMedium, Operation

KIB, MIB = 1 << 10, 1 << 20
SIZE, LONGER, SHORTER = MIB + 512, 3 * MIB, MIB // 2 + 512
AT, PIECE = SIZE - 8 * KIB - 512, 8 * KIB
PLACES_MAX = 200
IMAGES = {
    "512": NewImage(size=SIZE, cluster_size=512),
    "refcounts of 64 bits": NewImage(size=SIZE, cluster_size=512, refcount_bits=64),
    "extended L2": NewImage(size=SIZE, cluster_size=16 * KIB, extended_l2=True),
}


class LateFaults(FaultyMedium):
    """Writes are done and then fail: the caller cannot know."""

    def write(self, at: int, content: Buffer) -> None:
        """See `Medium`."""
        self.inner.write(at, bytes(content))
        super().write(at, content)


KINDS: dict[str, tuple[type[FaultyMedium], Fault]] = {
    "a write": (FaultyMedium, Fault(nth=0, operation=Operation.WRITE)),
    "a write that was done": (LateFaults, Fault(nth=0, operation=Operation.WRITE)),
    "no space": (FaultyMedium, Fault(nth=0, operation=Operation.GROW, errno=errno.ENOSPC, short=True)),
    "a read": (FaultyMedium, Fault(nth=0, operation=Operation.READ)),
}


async def errors(pages: Pages) -> list[str]:
    """What a check finds but leaks."""
    async with graph_over({"disk": SimDisk(pages)}, read_only=True) as graph:
        found = await check_image(graph.node("disk"), offload=graph.offload)
    return [line for line in found.problems if line.startswith("ERROR")]


class Trial:
    """One resize with one fault, and what comes after it."""

    def __init__(self, start: Pages, before: bytes, to: int) -> None:
        self.start, self.before, self.to = start, before, to

    async def run(self, kind: str, nth: int) -> bool:
        """Returns whether the fault was met."""
        medium, fault = KINDS[kind]
        disk, plan = SimDisk(self.start), FaultPlan()
        async with opened({"disk": medium(disk, plan)}, {"file": "disk"}) as node:
            assert await node.read(0, node.length) == self.before  # all tables that are needed are in memory
            plan.add(replace(fault, nth=nth))
            try:
                await node.resize(self.to)
            except BlockjobsError:
                plan.cure()
                assert node.length == SIZE
                late = random.Random(nth).randbytes(PIECE)
                await node.write(AT, late)
                await node.flush()
                await self.is_as_before(disk.pages, late)
                await node.resize(self.to)
            plan.cure()
        assert len(await shown({"disk": disk.pages}, {"file": "disk"})) == self.to
        assert not (found := await errors(disk.pages)), found
        return plan.hits > 0

    async def is_as_before(self, pages: Pages, late: bytes) -> None:
        """What was flushed after the error is there, and nothing but what a shorter disk loses is not."""
        found = await shown({"disk": pages}, {"file": "disk"})
        assert len(found) == SIZE
        assert found[AT : AT + PIECE] == late
        kept = min(self.to, AT)
        assert found[:kept] == self.before[:kept]
        assert all(found[at : at + 512] in (self.before[at : at + 512], bytes(512)) for at in range(kept, AT, 512))
        assert not (wrong := await errors(pages)), wrong


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("to", [LONGER, SHORTER], ids=["longer", "shorter"])
@pytest.mark.parametrize("name", IMAGES)
def test_every_place(name: str, to: int, kind: str) -> None:
    async def all_places() -> int:
        disk = SimDisk((await blank(IMAGES[name]))["disk"])
        content = random.Random(1).randbytes(SIZE - AT)
        async with opened({"disk": disk}, {"file": "disk"}) as node:
            for at in (0, SHORTER - KIB, AT):
                await node.write(at, content[: SIZE - AT])
        trial = Trial(disk.pages, await shown({"disk": disk.pages}, {"file": "disk"}), to)
        for nth in range(1, PLACES_MAX):
            if not await trial.run(kind, nth):
                return nth - 1
        raise AssertionError("never ends")

    met = asyncio.run(all_places())
    assert met or kind in ("a read", "no space")
