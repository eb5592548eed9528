"""A failing request at every place of `blockdev-create`: the job says so, nothing half made opens, a retry succeeds."""

import errno
from dataclasses import replace

import pytest
from replay import own_errors

from blockjobs.base.errors import BlockjobsError
from blockjobs.jobs.create import CreateJob
from blockjobs.jobs.create_options import BlockdevCreateOptions
from blockjobs.lifecycle.history import Fate
from blockjobs.schema.command import convert
from blockjobs.testing.clock import run
from blockjobs.testing.faults import Fault, Operation
from blockjobs.testing.host import SimHost

FOR_EVER = 1 << 30
KINDS = {
    "a write": Fault(nth=0, operation=Operation.WRITE),
    "no space from here on": Fault(nth=0, operation=Operation.WRITE, errno=errno.ENOSPC, short=True, times=FOR_EVER),
    "everything from here on": Fault(nth=0, times=FOR_EVER),
    "a sync": Fault(nth=0, operation=Operation.SYNC),
}
LENGTH = 8 << 20
IMAGES = {
    "plain": {},
    "preallocated, with a name": {"preallocation": "metadata"},
    "overlay": {"backing-file": "base.qcow2", "backing-fmt": "qcow2", "refcount-bits": 1, "cluster-size": 4096},
}


async def make(host: SimHost, job: str, more: dict[str, object]) -> Fate:
    described = {"driver": "qcow2", "file": "disk", "size": LENGTH, **more}
    work = CreateJob(host.graph, convert(described, BlockdevCreateOptions))
    return (await (await host.jobs.submit("create", work, id=job)).outcome()).fate


async def opens(host: SimHost) -> bool:
    try:
        await host.blockdev_add({"driver": "qcow2", "node-name": "image", "file": "disk", "backing": None})
    except BlockjobsError:
        return False
    assert host.graph.node("image").length == LENGTH
    await host.graph.remove("image")
    return True


async def scenario(more: dict[str, object], fault: Fault) -> int:
    """Make an image with one fault, then without; returns how many requests of that kind there were."""
    async with SimHost() as host:
        await host.disk("disk")
        plan = host.faults["disk"]
        plan.add(fault)
        fate = await make(host, "first", more)
        counted, hits = plan.calls[fault.operation], plan.hits
        plan.cure()
        assert fate is (Fate.FAILED if hits else Fate.COMPLETED)
        if await opens(host):
            assert not (errors := await own_errors({"disk": host.disks["disk"].pages})), errors
        if not plan.failed_syncs:
            assert await make(host, "second", more) is Fate.COMPLETED
            assert await opens(host)
            assert not (errors := await own_errors({"disk": host.disks["disk"].pages})), errors
    return counted


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", IMAGES)
def test_a_fault_at_every_place(name: str, kind: str) -> None:
    more, fault = IMAGES[name], KINDS[kind]
    places = run(scenario(more, replace(fault, nth=FOR_EVER)))
    assert places > 1
    for nth in range(1, places + 1):
        try:
            run(scenario(more, replace(fault, nth=nth)))
        except Exception as error:
            raise AssertionError(f"{name}, {kind}, number {nth}") from error
