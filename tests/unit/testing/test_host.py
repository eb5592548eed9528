"""SimHost: a real host in simulated time."""

import pytest

from blockjobs.base.errors import IoFailure
from blockjobs.block.drivers.qcow2.create import NewImage
from blockjobs.block.node import Node
from blockjobs.jobs.events import BlockJobCompleted
from blockjobs.testing.clock import run
from blockjobs.testing.faults import Fault, Operation
from blockjobs.testing.host import SimHost

MIB = 1 << 20
CONTENT = bytes(range(256)) * 4096 + bytes(MIB)


async def backup(host: SimHost, *, speed_bytes_per_s: int = 0) -> Node:
    source = await host.disk("source", CONTENT)
    target = await host.image("target", NewImage(size=source.length))
    job = await host.backup(source, target, speed_bytes_per_s=speed_bytes_per_s)
    outcome = await job.outcome()
    assert outcome.error is None
    return target


def test_hours_take_no_time_and_the_disks_outlive_the_host() -> None:
    async def scenario() -> None:
        async with SimHost() as host:
            started_ns = host.clock.now_ns()
            await backup(host, speed_bytes_per_s=100)
            assert host.clock.now_ns() - started_ns > 3600 * 10**9
            assert any(isinstance(event, BlockJobCompleted) for event in host.events)
        async with SimHost() as later:
            target = await later.image("target", host.disks["target-file"].pages)
            async with later.access(target):
                assert await target.read(0, 2 * MIB) == CONTENT

    run(scenario())


def test_the_same_seed_gives_the_same_run() -> None:
    async def trace(seed: int) -> tuple[int, list[str]]:
        async with SimHost(seed, latency_s_max=0.01) as host:
            await backup(host)
            return host.clock.now_ns(), [repr(event) for event in host.events]

    assert run(trace(1)) == run(trace(1))
    assert run(trace(1))[0] != run(trace(2))[0]


def test_faults_are_planned_by_disk() -> None:
    async def scenario() -> None:
        async with SimHost() as host:
            target = await host.image("target", NewImage(size=MIB))
            host.faults["target-file"].add(Fault(nth=1, operation=Operation.SYNC))
            async with host.access(target, write=True) as user:
                await user.node.write(0, b"x" * 512)
                with pytest.raises(IoFailure):
                    await user.node.flush()

    with pytest.raises(IoFailure):
        run(scenario())
