"""A fault at every place of stream and commit: the disk never changes, and the headers name a chain that shows it."""

import errno
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass, replace

import pytest
from replay import SEEDS, own_errors

from blockjobs.base.errors import IoFailure
from blockjobs.block.drivers.qcow2.create import NewImage
from blockjobs.block.node import Node
from blockjobs.lifecycle.history import Outcome
from blockjobs.lifecycle.status import JobStatus
from blockjobs.testing.chains import change, read_all, shown_by_headers
from blockjobs.testing.clock import run
from blockjobs.testing.disk import Pages
from blockjobs.testing.faults import Fault, Operation
from blockjobs.testing.host import SimHost

KIB = 1 << 10
SIZE = 256 * KIB
NAMES = ("l0", "l1", "l2", "l3")
FOR_EVER = 1 << 60
PLACES_MAX = 6
"""Of each kind in the suite; with BLOCKJOBS_CRASH_SEEDS all of them."""

JOBS: dict[str, dict[str, object]] = {
    "stream": {"base_node": "l0"},
    "stream all": {},
    "commit": {"top_node": "l2", "base_node": "l0"},
}
KINDS = {
    "read": Fault(nth=1, operation=Operation.READ, errno=errno.EIO),
    "write": Fault(nth=1, operation=Operation.WRITE, errno=errno.ENOSPC),
    "sync": Fault(nth=1, operation=Operation.SYNC, errno=errno.EIO),
}


@dataclass
class Ended:
    """How a job with a fault ended."""

    outcome: Outcome
    calls: int
    hits: int
    before: bytes
    after: bytes
    disks: dict[str, Pages]
    chain: list[str]


@asynccontextmanager
async def chain(seed: int) -> AsyncIterator[tuple[SimHost, Node]]:
    """Four images with random content, the lowest one shorter. A disk whose sync failed cannot be closed well."""
    chance = random.Random(seed)
    async with AsyncExitStack() as stack:
        host = SimHost(seed)
        stack.push_async_exit(_closing(host))
        await host.__aenter__()
        below: Node | None = None
        for name in NAMES:
            image = NewImage(
                size=SIZE - (64 * KIB if name == "l0" else 0),
                cluster_size=16 * KIB,
                backing_file=f"{below.name}-file" if below else None,
                backing_format="qcow2" if below else None,
            )
            below = await host.image(name, image, backing=below.name if below else None)
            async with host.access(below, write=True) as user:
                for _ in range(8):
                    await change(user.node, chance)
                await user.node.flush()
        assert below is not None
        yield host, below


def _closing(host: SimHost) -> Callable[..., Awaitable[None]]:
    async def close(*error: object) -> None:
        with suppress(IoFailure) if any(plan.failed_syncs for plan in host.faults.values()) else nullcontext():
            await host.__aexit__(*error)

    return close


async def work(name: str, seed: int, fault: Fault, policy: str) -> Ended:
    """Run a job with a fault that may hit any disk; what `stop` stops goes on without it."""
    async with chain(seed) as (host, top):
        before = await read_all(host, top)
        plan = host.faults["l0-file"]
        for each in host.disks:
            host.faults[each] = plan
        for node in host.graph.nodes():
            if node.driver_name == "file":
                node.driver.medium.plan = plan
        plan.calls.clear()
        plan.faults.append(fault)
        start = host.commit if name == "commit" else host.stream
        job = await start(top, on_error=policy, **JOBS[name])
        while (status := job.status) not in (JobStatus.CONCLUDED, JobStatus.NULL):
            await host.clock.sleep_until(host.clock.now_ns() + 10**7)
            if status is JobStatus.PAUSED:
                plan.cure()
                job.resume()
        outcome = await job.outcome()
        calls, hits = plan.calls[fault.operation], plan.hits
        plan.cure()
        after = await read_all(host, top)
        names, node = [], top
        while node is not None:
            names.append(node.name)
            node = node.backing
        disks = {each: disk.pages.copy() for each, disk in host.disks.items()}
    return Ended(outcome, calls, hits, before, after, disks, names)


async def check(name: str, seed: int, fault: Fault, policy: str) -> Ended:
    """The disk is as it was, in memory and by the headers, and every image of its chain is in order."""
    ended = await work(name, seed, fault, policy)
    assert ended.after == ended.before
    assert await shown_by_headers(ended.disks, "l3-file") == ended.before
    for each in ended.chain:
        assert not (errors := await own_errors({"disk": ended.disks[f"{each}-file"]})), (each, errors)
    succeeded = ended.outcome.error is None
    gone = {"stream": ["l3", "l0"], "stream all": ["l3"], "commit": ["l3", "l0"]}[name]
    assert ended.chain == (gone if succeeded else ["l3", "l2", "l1", "l0"])
    return ended


@pytest.mark.parametrize(
    ("kind", "policy"),
    # A file whose sync failed stays poisoned, so that no other policy can help.
    [
        (kind, policy)
        for kind in KINDS
        for policy in ("report", "ignore", "stop")
        if kind != "sync" or policy == "report"
    ],
)
@pytest.mark.parametrize("name", JOBS)
def test_a_fault_at_every_place(name: str, kind: str, policy: str) -> None:
    for seed in range(SEEDS):
        places = range(1, run(check(name, seed, replace(KINDS[kind], nth=FOR_EVER), policy)).calls + 1)
        assert places
        if SEEDS == 1 and len(places) > PLACES_MAX:
            places = sorted(random.Random(seed).sample(places, PLACES_MAX))
        for nth in places:
            # Twice: the batch, and the chunk that is tried after it.
            ended = run(check(name, seed, replace(KINDS[kind], nth=nth, times=1 if kind == "sync" else 2), policy))
            assert ended.hits, nth
            if kind == "sync":
                assert ended.outcome.error is not None, nth
