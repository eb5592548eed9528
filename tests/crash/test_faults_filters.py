"""The n-th request to a disk fails, for every n: what drivers that write on their own make of it."""

import random

import pytest

from blockjobs.base.errors import IoFailure
from blockjobs.base.span import Span
from blockjobs.block.claims import ALL, Perm
from blockjobs.block.drivers.file import File
from blockjobs.testing.clock import run
from blockjobs.testing.faults import Fault, FaultPlan, FaultyMedium, Operation
from blockjobs.testing.host import SimHost

KIB = 1 << 10
SIZE = 256 * KIB
SECTOR = 512


async def quorum_with_one_bad_disk(nth: int, times: int, bad: int) -> int:
    """Guests never notice. Returns how many requests failed."""
    plan = FaultPlan()
    try:
        await guest_of_a_quorum(plan, nth, times, bad)
    except IoFailure:  # from closing the bad disk, which a failed sync has spoiled for good
        assert plan.failed_syncs
    return plan.hits


async def guest_of_a_quorum(plan: FaultPlan, nth: int, times: int, bad: int) -> None:
    async with SimHost(nth) as host:
        for index in range(3):
            await host.disk(f"c{index}", bytes(SIZE))
        children = ["c0", "c1", "c2"]
        options = {"driver": "quorum", "node-name": "q", "vote-threshold": 2, "rewrite-corrupted": True}
        node = await host.blockdev_add({**options, "children": children})
        user = await host.graph.claim("a guest", node, needs=Perm.CONSISTENT_READ | Perm.WRITE, shares=ALL)
        file = host.graph.node(f"c{bad}")
        assert isinstance(file.driver, File)
        assert isinstance(file.driver.medium, FaultyMedium)
        file.driver.medium.plan = plan
        plan.add(Fault(nth=nth, times=times))
        chance, model = random.Random(1), bytearray(SIZE)
        for step in range(12):
            length = chance.choice((SECTOR, 5000, 40_000))
            at = chance.randrange(SIZE - length)
            content = bytes(length) if step % 4 == 3 else chance.randbytes(length)
            await (node.zero(Span(at, length)) if step % 4 == 3 else node.write(at, content))
            model[at : at + length] = content
            if step % 3 == 2:
                await node.flush()
            assert await node.read(0, SIZE) == model
        plan.cure()
        assert await node.read(0, SIZE) == model  # which puts right what is wrong
        assert [await host.graph.node(child).read(0, SIZE) for child in children] == [bytes(model)] * 3
        await host.graph.release(user)


@pytest.mark.parametrize("bad", range(3))
@pytest.mark.parametrize("times", [1, 5])
def test_a_quorum_outvotes_any_disk_that_fails(bad: int, times: int) -> None:
    for nth in range(1, 60):
        if not run(quorum_with_one_bad_disk(nth, times, bad)):
            assert nth > 20
            return


async def file_that_grows(nth: int, operation: Operation, *, short: bool) -> int:
    """Each sector is the old one or the new one, and the file has the length that was shown in the end."""
    async with SimHost(nth) as host:
        await host.disk("disk", b"s" * SECTOR)
        options = {"driver": "preallocate", "node-name": "p", "prealloc-size": 32 * KIB, "prealloc-align": 4 * KIB}
        node = await host.blockdev_add({**options, "file": "disk"})
        needs = Perm.CONSISTENT_READ | Perm.WRITE | Perm.RESIZE
        user = await host.graph.claim("a format", node, needs=needs, shares=Perm.CONSISTENT_READ)
        plan = host.faults["disk"]
        plan.add(Fault(nth=nth, operation=operation, short=short))
        chance, model = random.Random(2), bytearray(b"s" * SECTOR)
        for step in range(16):
            length = chance.choice((SECTOR, 8 * SECTOR, 40 * SECTOR))
            at = max(0, node.length - chance.choice((0, 0, 2, -3)) * SECTOR)
            new = bytes(length) if step % 5 == 4 else bytes([step + 1]) * length
            model.extend(bytes(max(0, at + length - len(model))))
            failed = False
            try:
                await (node.zero(Span(at, length)) if step % 5 == 4 else node.write(at, new))
            except IoFailure:
                failed = True
            shown = await node.read(at, length)
            for start in range(0, length, SECTOR):
                sector = shown[start : start + SECTOR]
                assert sector == new[:SECTOR] or (failed and sector == model[at + start : at + start + SECTOR])
            model[at : at + length] = shown
            assert await node.read(0, len(model)) == model
        hits = plan.hits
        plan.cure()
        length = node.length
        await host.graph.release(user)
        assert host.disks["disk"].size() == node.length == length
        assert host.disks["disk"].pages.read(0, length) == model[:length].ljust(length, b"\0")
        return hits


@pytest.mark.parametrize(
    ("operation", "short"), [(Operation.WRITE, False), (Operation.WRITE, True), (Operation.ZERO, False)]
)
def test_a_file_that_grows_ahead_with_a_disk_that_fails(operation: Operation, short: bool) -> None:
    for nth in range(1, 80):
        if not run(file_that_grows(nth, operation, short=short)):
            assert nth > 5
            return
    raise AssertionError("the last request was never reached")
