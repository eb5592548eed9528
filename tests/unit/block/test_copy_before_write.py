import asyncio
import errno
import random
from collections.abc import Awaitable, Callable

import pytest

from blockjobs.base.errors import IoFailure, PermissionConflict, UsageError
from blockjobs.base.span import Span
from blockjobs.base.units import KiB, MiB
from blockjobs.block.claims import ALL, Perm
from blockjobs.block.drivers.copy_before_write import CopyBeforeWrite
from blockjobs.block.drivers.qcow2.create import NewImage
from blockjobs.block.node import Node
from blockjobs.block.objects import AnyObjectOptions, add_object
from blockjobs.schema.command import convert
from blockjobs.testing.clock import run
from blockjobs.testing.faults import Fault, FaultPlan, FaultyMedium, Operation
from blockjobs.testing.little_host import LittleHost, make_disk

SIZE = 1 * MiB
CLUSTER = 64 * KiB
CONTENT = random.Random(3).randbytes(SIZE)


def with_filter(scenario: Callable[[LittleHost, Node], Awaitable[None]], *faults: Fault, **members: object) -> None:
    async def main() -> None:
        async with LittleHost() as host:
            await host.disk("source", CONTENT)
            host.disks["target"] = make_disk(SIZE)
            medium = FaultyMedium(host.disks["target"], FaultPlan(list(faults)))
            await host.disk("target", b"", medium=medium)
            plain = {"driver": "copy-before-write", "node_name": "cbw", "file": "source", "target": "target"}
            node = await host.add(**plain, **members)
            guest = await host.guest(node)
            await scenario(host, node)
            await host.graph.release(guest)

    run(main())


def saved(host: LittleHost, *clusters: int) -> bytes:
    """What the target holds when just these clusters were saved."""
    expected = bytearray(SIZE)
    for index in clusters:
        expected[index * CLUSTER : (index + 1) * CLUSTER] = CONTENT[index * CLUSTER : (index + 1) * CLUSTER]
    return bytes(expected)


def on_target(host: LittleHost) -> bytes:
    return host.disks["target"].pages.read(0, SIZE)


@pytest.mark.parametrize("change", ["write", "zero", "discard"])
def test_the_first_change_of_a_cluster_saves_all_of_it_and_the_second_nothing(change: str) -> None:
    async def scenario(host: LittleHost, node: Node) -> None:
        if change == "write":
            await node.write(CLUSTER + 100, b"new")
        elif change == "zero":
            await node.zero(Span(CLUSTER + 100, 3))
        else:
            await node.discard(Span(CLUSTER, CLUSTER))
        assert on_target(host) == saved(host, 1)
        host.disks["target"].write(0, b"untouched")
        await node.write(CLUSTER, b"again")
        await node.read(0, SIZE)
        assert on_target(host)[:9] == b"untouched"
        assert on_target(host)[9:] == saved(host, 1)[9:]

    with_filter(scenario, discard="unmap")


def test_a_write_over_several_clusters_saves_them_all_before_it_goes_on() -> None:
    async def scenario(host: LittleHost, node: Node) -> None:
        await node.write(3 * CLUSTER - 1, bytes(2 * CLUSTER))
        assert on_target(host) == saved(host, 2, 3, 4)
        assert await node.read(3 * CLUSTER - 1, 2 * CLUSTER) == bytes(2 * CLUSTER)

    with_filter(scenario)


def test_concurrent_writers_of_one_cluster_save_it_once() -> None:
    async def scenario(host: LittleHost, node: Node) -> None:
        async with asyncio.TaskGroup() as group:
            for index in range(8):
                group.create_task(node.write(index * 512, bytes([index]) * 512))
        assert on_target(host) == saved(host, 0)
        assert await node.read(0, 8 * 512) == b"".join(bytes([index]) * 512 for index in range(8))

    with_filter(scenario)


def test_a_failure_refuses_the_guest_and_the_next_try_saves() -> None:
    async def scenario(host: LittleHost, node: Node) -> None:
        with pytest.raises(IoFailure) as failed:
            await node.write(0, b"new")
        assert failed.value.errno == errno.ENOSPC
        assert await node.read(0, 3) == CONTENT[:3]
        await node.write(0, b"new")
        assert on_target(host) == saved(host, 0)

    # The plain step fails, then the request through the doors, which the guest hears of.
    with_filter(scenario, Fault(nth=1, operation=Operation.WRITE, errno=errno.ENOSPC, times=2))


def test_a_transient_failure_is_not_the_guests_business() -> None:
    async def scenario(host: LittleHost, node: Node) -> None:
        await node.write(0, b"new")
        assert on_target(host) == saved(host, 0)

    with_filter(scenario, Fault(nth=1, operation=Operation.WRITE))


def test_break_snapshot_gives_the_view_up_and_never_tries_again() -> None:
    async def scenario(host: LittleHost, node: Node) -> None:
        driver = node.driver
        assert isinstance(driver, CopyBeforeWrite)
        told: list[bool] = []
        driver.on_broken = lambda: told.append(True)
        await node.write(0, b"new")
        await node.write(CLUSTER, b"new")
        assert driver.broken is not None and driver.broken.errno == errno.EIO
        assert told == [True]
        assert on_target(host) == bytes(SIZE)

    with_filter(scenario, Fault(nth=1, operation=Operation.WRITE, times=2), **{"on-cbw-error": "break-snapshot"})


def test_nobody_else_may_write_to_the_source_of_a_filter_in_use() -> None:
    async def scenario(host: LittleHost, node: Node) -> None:
        with pytest.raises(PermissionConflict, match="Permission conflict on node 'source'"):
            await host.graph.claim("other", host.graph.node("source"), needs=Perm.WRITE, shares=ALL)
        other = await host.graph.claim("other", host.graph.node("target"), needs=Perm.WRITE, shares=ALL)
        await host.graph.release(other)

    with_filter(scenario)


def test_an_unused_filter_is_in_nobodys_way() -> None:
    async def main() -> None:
        async with LittleHost() as host:
            source = await host.disk("source", CONTENT)
            await host.disk("target", SIZE)
            guest = await host.guest(source)
            await host.add(driver="copy-before-write", node_name="cbw", file="source", target="target")
            await host.graph.release(guest)

    run(main())


def test_larger_clusters_on_request_and_only_powers_of_two() -> None:
    async def scenario(host: LittleHost, node: Node) -> None:
        await node.write(0, b"x")
        assert on_target(host) == saved(host, 0, 1, 2, 3)

    with_filter(scenario, **{"min-cluster-size": 4 * CLUSTER})
    with pytest.raises(UsageError, match="power of 2"):
        with_filter(scenario, **{"min-cluster-size": 3 * CLUSTER})


def test_a_node_with_too_many_clusters_is_refused_at_once() -> None:
    async def main() -> None:
        async with LittleHost() as host:
            disk = make_disk((1 << 48) + 65536)
            await host.disk("source", b"", medium=disk)
            await host.disk("target", 1 << 20)
            with pytest.raises(UsageError, match="set min-cluster-size to at least 131072"):
                await host.add(driver="copy-before-write", node_name="cbw", file="source", target="target")

    run(main())


def test_fleecing_the_target_shows_the_old_content_of_its_backing_source() -> None:
    async def main() -> None:
        async with LittleHost() as host:
            await host.disk("source", CONTENT)
            target = await host.qcow2("target", NewImage(size=SIZE), backing="source")
            node = await host.add(driver="copy-before-write", node_name="cbw", file="source", target="target")
            guest = await host.guest(node)
            reader = await host.graph.claim("reader", target, needs=Perm.CONSISTENT_READ, shares=ALL)
            chance = random.Random(5)
            for _ in range(30):
                at = chance.randrange(SIZE - 1000)
                await node.write(at, chance.randbytes(1000))
                assert await target.read(at // 512 * 512, 512) == CONTENT[at // 512 * 512 :][:512]
            assert await target.read(0, SIZE) == CONTENT
            await host.graph.release(reader)
            await host.graph.release(guest)

    run(main())


@pytest.mark.parametrize("policy", ["break-guest-write", "break-snapshot"])
def test_saving_that_takes_too_long_counts_as_failed(policy: str) -> None:
    async def main() -> None:
        async with LittleHost() as host:
            await host.disk("source", CONTENT)
            await host.disk("target", bytes(SIZE))
            limits = {"qom-type": "throttle-group", "id": "slow", "limits": {"bps-write": 1024}}
            add_object(host.graph.objects, convert(limits, AnyObjectOptions), host.clock)
            await host.add(driver="throttle", node_name="slow", throttle_group="slow", file="target")
            plain = {"driver": "copy-before-write", "node_name": "cbw", "file": "source", "target": "slow"}
            node = await host.add(**plain, on_cbw_error=policy, cbw_timeout=3)
            guest = await host.guest(node)
            assert isinstance(node.driver, CopyBeforeWrite)
            await node.write(0, b"new")  # a burst is free, and the next cluster pays for it: 64 seconds
            begun_ns = host.clock.now_ns()
            if policy == "break-snapshot":
                await node.write(CLUSTER, b"new")
                assert node.driver.broken is not None
                assert node.driver.broken.errno == errno.ETIMEDOUT
            else:
                with pytest.raises(IoFailure) as caught:
                    await node.write(CLUSTER, b"new")
                assert caught.value.errno == errno.ETIMEDOUT
                assert await node.read(CLUSTER, 3) == CONTENT[CLUSTER : CLUSTER + 3]
            assert host.clock.now_ns() - begun_ns == 3 * 10**9
            await host.clock.sleep_until(begun_ns + 100 * 10**9)
            if policy == "break-guest-write":
                await node.write(CLUSTER, b"new")  # the copy that was begun has ended: nothing to wait for
                assert on_target(host) == saved(host, 0, 1)
            assert await node.read(CLUSTER, 3) == b"new"
            await host.graph.release(guest)

    run(main())
