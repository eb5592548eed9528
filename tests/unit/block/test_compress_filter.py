"""The compress filter: everything written through it is stored compressed, and reads as written."""

import random
from collections.abc import Awaitable, Callable

import pytest

from blockjobs.base.errors import IoFailure, UsageError
from blockjobs.base.span import Span
from blockjobs.base.units import KiB, MiB
from blockjobs.block.drivers.copy_before_write import CopyBeforeWriteOptions
from blockjobs.block.drivers.qcow2.create import NewImage
from blockjobs.block.node import Node
from blockjobs.block.objects import AnyObjectOptions, add_object
from blockjobs.block.vocabulary import Kind
from blockjobs.schema.command import convert
from blockjobs.testing.clock import run
from blockjobs.testing.faults import Fault, FaultPlan, FaultyMedium, Operation
from blockjobs.testing.little_host import LittleHost

CLUSTER = 64 * KiB
SIZE = 1 * MiB + 10 * KiB
TEXT = b"the same words over and over again " * (SIZE // 35 + 1)
NOISE = random.Random(3).randbytes(SIZE)


def through_compress(scenario: Callable[[LittleHost, Node], Awaitable[None]], **image: object) -> None:
    async def main() -> None:
        async with LittleHost() as host:
            await host.qcow2("disk", NewImage(size=SIZE, **image))
            node = await host.add(driver="compress", node_name="c", file="disk", discard="unmap")
            guest = await host.guest(node)
            await scenario(host, node)
            await host.graph.release(guest)

    run(main())


async def kinds(host: LittleHost) -> list[tuple[int, int, Kind]]:
    disk = host.graph.node("disk")
    return [(part.at, part.length, part.kind) for part in await disk.status(Span(0, disk.length))]


@pytest.mark.parametrize("image", [{}, {"zstd": True}, {"extended_l2": True}, {"cluster_size": 4 * KiB}])
def test_a_whole_disk_is_stored_compressed(image: dict[str, object]) -> None:
    async def scenario(host: LittleHost, node: Node) -> None:
        await node.write(0, TEXT[:SIZE])
        assert await node.read(0, SIZE) == TEXT[:SIZE]
        assert {kind for _, _, kind in await kinds(host)} == {Kind.SPECIAL}
        await node.flush()
        assert host.disks["disk-file"].allocated_size() < 512 * KiB

    through_compress(scenario, **image)


def test_what_is_written_in_part_is_compressed_anew_with_what_was_there() -> None:
    async def scenario(host: LittleHost, node: Node) -> None:
        model = bytearray(SIZE)
        chance = random.Random(1)
        for _ in range(60):
            length = chance.choice((1, 700, 4096, CLUSTER, 3 * CLUSTER + 5))
            at = chance.randrange(SIZE - length)
            content = chance.choice((TEXT, NOISE, bytes(SIZE)))[at : at + length]
            model[at : at + length] = content
            await node.write(at, content)
        end = SIZE - 2000
        model[end:] = TEXT[end:SIZE]
        await node.write(end, TEXT[end:SIZE])  # the last cluster is short
        assert await node.read(0, SIZE) == model
        assert (await kinds(host))[-1][2] is Kind.SPECIAL

    through_compress(scenario)


def test_what_does_not_shrink_is_stored_as_it_is_and_zeroes_not_at_all() -> None:
    async def scenario(host: LittleHost, node: Node) -> None:
        await node.write(0, TEXT[:CLUSTER] + NOISE[:CLUSTER] + bytes(CLUSTER))
        found = await kinds(host)
        assert [kind for _, _, kind in found[:2]] == [Kind.SPECIAL, Kind.DATA]
        assert {kind for _, _, kind in found[2:]} <= {Kind.ZERO, Kind.BACKING}

    through_compress(scenario)


def test_zero_and_discard_pass() -> None:
    async def scenario(host: LittleHost, node: Node) -> None:
        await node.write(0, TEXT[: 4 * CLUSTER])
        await node.zero(Span(0, CLUSTER))
        await node.discard(Span(2 * CLUSTER, CLUSTER))
        expected = bytes(CLUSTER) + TEXT[CLUSTER : 2 * CLUSTER] + bytes(CLUSTER) + TEXT[3 * CLUSTER : 4 * CLUSTER]
        assert await node.read(0, 4 * CLUSTER) == expected
        assert await node.read(0, 10) == bytes(10)

    through_compress(scenario)


def test_writes_are_compressed_below_a_filter_that_a_job_put_between() -> None:
    async def scenario(host: LittleHost, node: Node) -> None:
        disk = host.graph.node("disk")
        await host.disk("saved", bytes(SIZE // 512 * 512 + 512))
        await node.write(0, TEXT[:CLUSTER])
        async with host.graph.edit() as edit:
            described = CopyBeforeWriteOptions(node_name="cbw", file="disk", target="saved")
            await edit.insert(above=disk, filter=described)
        assert node.children["file"].name == "cbw"
        await node.write(0, TEXT[7 : 7 + 2 * CLUSTER], fua=True)
        assert await node.read(0, 2 * CLUSTER) == TEXT[7 : 7 + 2 * CLUSTER]
        assert await host.graph.node("saved").read(0, 2 * CLUSTER) == TEXT[:CLUSTER] + bytes(CLUSTER)
        assert (await kinds(host))[0] == (0, 2 * CLUSTER, Kind.SPECIAL)
        async with host.graph.edit() as edit:
            await edit.drop(host.graph.node("cbw"))

    through_compress(scenario)


@pytest.mark.parametrize("below", ["raw", "file", "throttle", "compress"])
def test_only_formats_that_can_compress(below: str) -> None:
    async def main() -> None:
        async with LittleHost() as host:
            if below == "compress":
                await host.qcow2("disk", NewImage(size=SIZE))
            else:
                await host.disk("disk", SIZE // 512 * 512)
            child: object = "disk"
            if below == "throttle":
                group = {"qom-type": "throttle-group", "id": "g"}
                add_object(host.graph.objects, convert(group, AnyObjectOptions), host.clock)
                child = {"driver": "throttle", "throttle-group": "g", "file": "disk"}
            elif below != "file":
                child = {"driver": below, "file": "disk"}
            before = len(host.graph.nodes())
            with pytest.raises(UsageError, match=f"Compression is not supported for underlying format: {below}$"):
                await host.add(driver="compress", node_name="c", file=child)
            assert len(host.graph.nodes()) == before

    run(main())


def test_the_nth_request_that_fails_leaves_each_cluster_old_or_new() -> None:
    async def attempt(nth: int) -> bool:
        async with LittleHost() as host:
            plan = FaultPlan()
            await host.qcow2("plain", NewImage(size=SIZE))
            await host.graph.remove("plain")
            medium = FaultyMedium(host.disks["plain-file"], plan)
            await host.graph.remove("plain-file")
            await host.qcow2("disk", NewImage(size=SIZE), medium=medium)
            node = await host.add(driver="compress", node_name="c", file="disk")
            guest = await host.guest(node)
            await node.write(0, TEXT[: 4 * CLUSTER])
            await node.flush()
            plan.add(Fault(nth=nth, operation=Operation.WRITE))
            new = NOISE[:100] + TEXT[: 3 * CLUSTER]
            try:
                await node.write(500, new)
            except IoFailure:
                failed = True
            else:
                failed = False
            plan.cure()
            shown = await node.read(0, 4 * CLUSTER)
            expected = TEXT[:500] + new + TEXT[500 + len(new) : 4 * CLUSTER]
            for at in range(0, 4 * CLUSTER, CLUSTER):
                here = shown[at : at + CLUSTER]
                assert here == expected[at : at + CLUSTER] or (failed and here == TEXT[at : at + CLUSTER])
            await host.graph.release(guest)
            return failed

    assert run(attempt(1))
    assert not run(attempt(20))
    for nth in range(2, 6):
        run(attempt(nth))
