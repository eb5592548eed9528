"""Fleecing, discard-source, tuning and sources inside a chain."""

import asyncio
import random
from collections.abc import Awaitable, Callable

import pytest

from blockjobs.base.errors import UsageError
from blockjobs.base.units import KiB, MiB
from blockjobs.block.claims import ALL, Perm
from blockjobs.block.drivers.qcow2.create import NewImage
from blockjobs.jobs.transaction import TransactionAction, run_transaction
from blockjobs.lifecycle.handle import JobHandle
from blockjobs.schema.command import convert
from blockjobs.testing.clock import run
from blockjobs.testing.faults import Fault, FaultPlan, FaultyMedium, Operation
from blockjobs.testing.host import SlowOffload
from blockjobs.testing.little_host import LittleHost, make_disk

SIZE = 4 * MiB
CONTENT = random.Random(1).randbytes(2 * MiB) + bytes(1 * MiB) + random.Random(2).randbytes(1 * MiB)


async def backup(host: LittleHost, **members: object) -> JobHandle:
    plain = {"job-id": "job0", "device": "source", "target": "target", "sync": "full"}
    plain |= {name.replace("_", "-"): value for name, value in members.items()}
    await run_transaction(host, [convert({"type": "blockdev-backup", "data": plain}, TransactionAction)])
    return host.jobs.get(str(plain["job-id"]))


def on_disks(scenario: Callable[[LittleHost], Awaitable[None]]) -> None:
    async def main() -> None:
        async with LittleHost() as host:
            await host.disk("source", CONTENT)
            await host.disk("target", SIZE)
            await scenario(host)

    run(main())


def target_content(host: LittleHost) -> bytes:
    return host.disks["target"].pages.read(0, SIZE)


def test_discard_source_gives_back_what_has_arrived_and_only_then() -> None:
    async def main() -> None:
        async with LittleHost() as host:
            await host.disk("source", CONTENT)
            host.disks["target"] = make_disk(SIZE)
            plan = FaultPlan([Fault(nth=3, operation=Operation.WRITE, times=10**6)])
            await host.disk("target", b"", medium=FaultyMedium(host.disks["target"], plan))
            job = await backup(host, discard_source=True, speed=1 * MiB)
            assert (await job.outcome()).error == "Input/output error"
            on_source, on_target = host.disks["source"].pages.read(0, SIZE), target_content(host)
            host.disks["target"].cut_power(seed=1)
            assert on_target == target_content(host), "flushed before anything was discarded"
            for at in range(0, SIZE, 64 * KiB):
                piece = slice(at, at + 64 * KiB)
                assert CONTENT[piece] in (on_source[piece], on_target[piece])
            assert on_source != CONTENT
            plan.cure()

    run(main())


def test_discard_source_leaves_what_guests_write_meanwhile() -> None:
    async def scenario(host: LittleHost) -> None:
        guest = await host.guest(host.graph.node("source"))
        job = await backup(host, discard_source=True, speed=64 * KiB)
        await guest.node.write(3 * MiB, b"mine")
        job.set_speed(0)
        assert (await job.outcome()).error is None
        assert target_content(host) == CONTENT
        assert await guest.node.read(3 * MiB, 4) == b"mine"
        assert host.disks["source"].pages.read(0, 3 * MiB) == bytes(3 * MiB)
        await host.graph.release(guest)

    on_disks(scenario)


def test_discard_source_of_a_read_only_node_is_refused() -> None:
    async def scenario(host: LittleHost) -> None:
        await host.add(driver="raw", node_name="ro", read_only=True, file="source")
        with pytest.raises(UsageError, match=r"discard-source\): node 'ro' is read-only"):
            await backup(host, device="ro", discard_source=True)
        assert not host.jobs.jobs()

    on_disks(scenario)


def test_discard_source_takes_the_right_to_write() -> None:
    async def scenario(host: LittleHost) -> None:
        source = host.graph.node("source")
        for discards in (False, True):
            job = await backup(host, discard_source=discards, speed=1)
            assert source.permits(Perm.WRITE) == discards
            await job.cancel()
            await job.outcome()
            assert not source.permits(Perm.WRITE)

    on_disks(scenario)


@pytest.mark.parametrize(("wanted", "unit"), [(0, 64 * KiB), (4 * KiB, 64 * KiB), (1 * MiB, 1 * MiB)])
def test_min_cluster_size_raises_the_unit_of_copying(wanted: int, unit: int) -> None:
    async def scenario(host: LittleHost) -> None:
        guest = await host.guest(host.graph.node("source"))
        job = await backup(host, sync="none", x_perf={"min-cluster-size": wanted})
        await guest.node.write(3 * MiB + 5, b"x")
        assert job.progress.current == unit
        await job.cancel()
        await job.outcome()
        await host.graph.release(guest)

    on_disks(scenario)


def test_max_chunk_bounds_requests_through_the_doors() -> None:
    class Counted(FaultyMedium):
        longest = 0

        def read_into(self, at: int, buffer: memoryview) -> None:
            type(self).longest = max(self.longest, len(buffer))
            super().read_into(at, buffer)

    async def main() -> None:
        async with LittleHost() as host:
            disk = make_disk(CONTENT)
            await host.disk("source-file", b"", medium=Counted(disk))
            rules = [{"event": "read_aio", "iotype": "read"}]
            await host.add(driver="blkdebug", node_name="source", image="source-file", inject_error=rules)
            await host.disk("target", SIZE)
            perf = {"max-chunk": 192 * KiB, "max-workers": 1, "use-copy-range": True}
            assert (await (await backup(host, x_perf=perf)).outcome()).error is None
            assert Counted.longest == 192 * KiB
            assert target_content(host) == CONTENT

    run(main())


def test_a_reader_of_the_fleecing_target_sees_the_first_moment_while_a_guest_writes() -> None:
    chance = random.Random(5)

    async def main() -> None:
        async with LittleHost(offload=SlowOffload(1, latency_s_max=0.01)) as host:
            await host.disk("base", CONTENT)
            source = await host.qcow2("source", NewImage(size=SIZE, cluster_size=4 * KiB), backing="base")
            target = await host.qcow2("target", NewImage(size=SIZE, cluster_size=4 * KiB), backing="source")
            guest = await host.guest(source)
            await guest.node.write(1 * MiB, b"before" * 1000)
            before = await guest.node.read(0, SIZE)
            job = await backup(host, sync="none")
            reader = await host.graph.claim("a reader", target, needs=Perm.CONSISTENT_READ, shares=ALL)

            async def write() -> None:
                for _ in range(60):
                    at, length = chance.randrange(SIZE - 70000), chance.randrange(1, 70000)
                    await guest.node.write(at, chance.randbytes(length))

            async def read() -> None:
                for _ in range(120):
                    at, length = chance.randrange(SIZE - 200000), chance.randrange(1, 200000)
                    assert await reader.node.read(at, length) == before[at : at + length]

            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(write())
                tasks.create_task(read())
                tasks.create_task(read())
            assert await reader.node.read(0, SIZE) == before
            assert await guest.node.read(0, SIZE) != before
            await job.cancel()
            await job.outcome()
            await host.graph.release(reader)
            await host.graph.release(guest)

    run(main())


def test_a_backing_image_is_backed_up_below_its_overlay() -> None:
    async def main() -> None:
        async with LittleHost() as host:
            await host.disk("base", CONTENT)
            top = await host.qcow2("top", NewImage(size=SIZE), backing="base")
            await host.disk("target", SIZE)
            guest = await host.guest(top)
            job = await backup(host, device="base", speed=64 * KiB)
            await guest.node.write(3 * MiB, b"only in the overlay")
            job.set_speed(0)
            assert (await job.outcome()).error is None
            assert target_content(host) == CONTENT
            assert top.backing is host.graph.node("base")
            await host.graph.release(guest)

    run(main())
