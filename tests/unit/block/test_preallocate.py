"""The preallocate filter: the file grows ahead, nobody sees it, and it has its true length in the end."""

import asyncio
import errno
import random
from collections.abc import Awaitable, Callable

import pytest

from blockjobs.base.errors import IoFailure, ParameterError, PermissionConflict, UsageError
from blockjobs.base.span import Span
from blockjobs.base.units import KiB, MiB
from blockjobs.block.claims import ALL, Perm
from blockjobs.block.drivers.qcow2.create import NewImage
from blockjobs.block.node import Node
from blockjobs.block.options import BlockdevOptions
from blockjobs.block.reopen_plan import reopen
from blockjobs.block.users import Root
from blockjobs.block.vocabulary import ZeroMode
from blockjobs.schema.command import convert
from blockjobs.testing.clock import run
from blockjobs.testing.faults import Fault, FaultPlan, FaultyMedium, Operation
from blockjobs.testing.little_host import LittleHost, make_disk

GROWS = Perm.CONSISTENT_READ | Perm.WRITE | Perm.RESIZE
AHEAD = 256 * KiB
ALIGN = 64 * KiB
START = random.Random(3).randbytes(100 * KiB)

Scenario = Callable[[LittleHost, Node, FaultPlan], Awaitable[None]]


def with_filter(scenario: Scenario, **options: object) -> None:
    async def main() -> None:
        async with LittleHost() as host:
            plan = FaultPlan()
            host.disks["disk"] = make_disk(START)
            await host.disk("disk", b"", medium=FaultyMedium(host.disks["disk"], plan))
            given = {"prealloc_size": AHEAD, "prealloc_align": ALIGN, **options}
            await scenario(host, await host.add(driver="preallocate", node_name="p", file="disk", **given), plan)

    run(main())


async def writer(host: LittleHost, node: Node) -> Root:
    return await host.graph.claim("a format", node, needs=GROWS, shares=Perm.CONSISTENT_READ)


def test_the_file_grows_ahead_and_gets_its_length_when_access_ends() -> None:
    async def scenario(host: LittleHost, node: Node, plan: FaultPlan) -> None:
        disk = host.disks["disk"]
        user = await writer(host, node)
        assert disk.size() == len(START)
        await node.write(len(START), b"x" * 512)
        grown = disk.size()
        assert grown % ALIGN == 0
        assert grown >= len(START) + 512 + AHEAD
        assert node.length == len(START) + 512
        zeroes = plan.calls[Operation.ZERO]
        for _ in range(20):
            await node.write(node.length, b"y" * 512)
        assert plan.calls[Operation.ZERO] == zeroes
        assert disk.size() == grown
        assert await node.read(len(START), 512 * 21) == b"x" * 512 + b"y" * 512 * 20
        await node.write(node.length + 2 * MiB, b"far")
        assert await node.read(len(START) + 21 * 512, 2 * MiB + 3) == bytes(2 * MiB) + b"far"
        length = node.length
        await host.graph.release(user)
        assert disk.size() == length
        assert host.graph.node("disk").length >= length
        assert node.length == host.graph.node("disk").length

    with_filter(scenario)


def test_nobody_else_touches_a_file_that_grows() -> None:
    async def scenario(host: LittleHost, node: Node, plan: FaultPlan) -> None:
        reader = await host.graph.claim("a reader", node, needs=Perm.CONSISTENT_READ, shares=ALL)
        outsider = await host.graph.claim("an outsider", host.graph.node("disk"), needs=Perm.RESIZE, shares=ALL)
        with pytest.raises(PermissionConflict):
            await writer(host, node)
        await host.graph.release(outsider)
        user = await writer(host, node)
        with pytest.raises(PermissionConflict):
            await host.graph.claim("an outsider", host.graph.node("disk"), needs=Perm.WRITE, shares=ALL)
        await node.write(len(START), b"x")
        await host.graph.release(user)
        await host.graph.release(
            await host.graph.claim("an outsider", host.graph.node("disk"), needs=Perm.WRITE, shares=ALL)
        )
        await host.graph.release(reader)

    with_filter(scenario)


def test_without_the_right_to_resize_nothing_is_watched() -> None:
    async def scenario(host: LittleHost, node: Node, plan: FaultPlan) -> None:
        guest = await host.guest(node)
        await node.write(0, b"inside")
        assert node.driver.watches == 0
        with pytest.raises(IoFailure):
            await node.write(len(START) + 512, b"outside")
        assert host.disks["disk"].size() == len(START)
        await host.graph.release(guest)

    with_filter(scenario)


def test_routes_that_were_taken_before_are_void_once_somebody_may_resize() -> None:
    async def scenario(host: LittleHost, node: Node, plan: FaultPlan) -> None:
        top = await host.add(driver="raw", node_name="top", file="p")
        guest = await host.guest(top)
        await top.write(0, b"inside")
        await node.write(0, b"inside")
        await host.graph.change_claim(guest, needs=GROWS, shares=Perm.CONSISTENT_READ)
        await top.write(len(START) // 512 * 512, b"x" * 4096)
        assert host.disks["disk"].size() >= len(START) + AHEAD
        await host.graph.release(guest)
        assert host.disks["disk"].size() == node.length

    with_filter(scenario)


def test_zeroing_past_the_end_grows_too() -> None:
    async def scenario(host: LittleHost, node: Node, plan: FaultPlan) -> None:
        user = await writer(host, node)
        for mode in ZeroMode:
            end = node.length
            await node.zero(Span(end + 512, 4096), mode=mode)
            assert node.length == end + 512 + 4096
            assert await node.read(end, 4608) == bytes(4608)
        assert host.disks["disk"].size() > node.length
        length = node.length
        await host.graph.release(user)
        assert host.disks["disk"].size() == length

    with_filter(scenario)


def test_resizing_within_what_was_added_is_free() -> None:
    async def scenario(host: LittleHost, node: Node, plan: FaultPlan) -> None:
        user = await writer(host, node)
        await node.resize(len(START) + 512)
        assert host.disks["disk"].size() == len(START) + 512
        await node.write(node.length, b"x" * 512)
        grown, truncates = host.disks["disk"].size(), plan.calls[Operation.TRUNCATE]
        await node.resize(node.length + 4096)
        assert plan.calls[Operation.TRUNCATE] == truncates
        await node.resize(grown + MiB)
        assert host.disks["disk"].size() == node.length == grown + MiB
        await node.resize(512)
        assert host.disks["disk"].size() == node.length == 512
        await node.resize(4096)
        assert await node.read(0, 4096) == START[:512] + bytes(4096 - 512)
        await host.graph.release(user)
        assert host.disks["disk"].size() == 4096

    with_filter(scenario)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EOPNOTSUPP])
def test_a_file_that_cannot_grow_ahead_is_written_as_it_is(code: int) -> None:
    async def scenario(host: LittleHost, node: Node, plan: FaultPlan) -> None:
        plan.add(Fault(nth=1, operation=Operation.ZERO, errno=code, times=100))
        user = await writer(host, node)
        for step in range(5):
            await node.write(node.length, bytes([step]) * 512)
        assert plan.calls[Operation.ZERO] == 1  # asked once, not for every write
        assert await node.read(len(START), 2560) == b"".join(bytes([step]) * 512 for step in range(5))
        await host.graph.release(user)
        assert host.disks["disk"].size() == len(START) + 2560

    with_filter(scenario)


def test_a_failed_write_leaves_no_bytes_to_be_shown_later_where_zeroes_should_be() -> None:
    async def scenario(host: LittleHost, node: Node, plan: FaultPlan) -> None:
        user = await writer(host, node)
        end = node.length
        plan.add(Fault(nth=1, operation=Operation.WRITE, errno=errno.ENOSPC, short=True))
        with pytest.raises(IoFailure):
            await node.write(end, b"z" * 4096)
        shown = await node.read(end, 4096)
        length = node.length
        await node.write(end + 8192, b"further")
        assert await node.read(end, 8192 + 7) == shown + bytes(4096) + b"further"
        assert length == end + 4096
        await host.graph.release(user)

    with_filter(scenario)


def test_a_file_that_cannot_be_cut_back_is_cut_back_at_the_next_chance() -> None:
    async def scenario(host: LittleHost, node: Node, plan: FaultPlan) -> None:
        user = await writer(host, node)
        await node.write(len(START), b"x" * 512)
        plan.add(Fault(nth=1, operation=Operation.TRUNCATE))
        await host.graph.release(user)
        assert plan.hits == 1
        assert node.length == len(START) + 512  # whatever the file's length is
        with pytest.raises(PermissionConflict):
            await host.graph.claim("an outsider", host.graph.node("disk"), needs=Perm.WRITE, shares=ALL)
        await host.graph.remove("p")
        assert host.disks["disk"].size() == len(START) + 512

    with_filter(scenario)


def test_many_writers_at_once() -> None:
    async def scenario(host: LittleHost, node: Node, plan: FaultPlan) -> None:
        user = await writer(host, node)
        model = bytearray(START)
        chance = random.Random(5)
        for _ in range(10):
            places = chance.sample(range(400), 12)
            contents = {place * 4096 + len(START): chance.randbytes(4096) for place in places}
            async with asyncio.TaskGroup() as group:
                for at, content in contents.items():
                    group.create_task(node.write(at, content))
            for at, content in contents.items():
                model.extend(bytes(max(0, at + 4096 - len(model))))
                model[at : at + 4096] = content
            assert node.length == len(model)
            assert await node.read(0, node.length) == model
        await host.graph.release(user)
        assert host.disks["disk"].size() == len(model)

    with_filter(scenario, prealloc_size=64 * KiB)


def test_under_a_format_that_is_closed_or_becomes_read_only() -> None:
    async def main() -> None:
        async with LittleHost() as host:
            await host.qcow2("plain", NewImage(size=8 * MiB))
            for name in ("plain", "plain-file"):
                await host.graph.remove(name)
            disk = host.disks["plain-file"]
            before = disk.size()
            await host.graph.open_medium(disk, "file", unmap=True)
            inner = {"driver": "preallocate", "node-name": "p", "prealloc-size": AHEAD, "file": "file"}
            node = await host.add(driver="qcow2", node_name="q", file=inner)
            guest = await host.guest(node)
            await node.write(0, b"x" * MiB)
            await host.graph.release(guest)
            grown = disk.size()
            assert grown >= before + MiB + AHEAD // 2
            await host.graph.set_read_only(node, read_only=True)
            shown = host.graph.node("p").length
            assert disk.size() == shown < grown
            await host.graph.set_read_only(node, read_only=False)
            guest = await host.guest(node)
            assert await node.read(0, MiB) == b"x" * MiB
            await node.write(MiB, b"y" * MiB)
            await host.graph.release(guest)
            assert disk.size() > shown + MiB
            await host.graph.remove("q")
            assert disk.size() <= shown + MiB + 128 * KiB
            node = await host.add(driver="qcow2", node_name="q", file="file")
            reader = await host.graph.claim("a reader", node, needs=Perm.CONSISTENT_READ, shares=ALL)
            assert await node.read(0, 2 * MiB) == b"x" * MiB + b"y" * MiB
            await host.graph.release(reader)

    run(main())


def test_a_reopen_cuts_the_file_back_before_another_takes_its_place() -> None:
    async def scenario(host: LittleHost, node: Node, plan: FaultPlan) -> None:
        await host.disk("other", 4096)
        user = await writer(host, node)
        await node.write(len(START), b"x" * 512)
        options = {"driver": "preallocate", "node-name": "p", "file": "other", "prealloc-size": 512}
        await reopen(host.graph, [convert(options, BlockdevOptions)])
        assert host.disks["disk"].size() == len(START) + 512
        assert node.length == 4096
        await node.write(4096, b"y" * 512)
        assert node.length == 4608
        assert host.disks["other"].size() == MiB  # the default of prealloc-align, as it was not given again
        await host.graph.release(user)
        assert host.disks["other"].size() == 4608

    with_filter(scenario)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"prealloc_align": 1000}, "prealloc-align parameter of preallocate filter is not aligned to 512"),
        ({"prealloc_align": -512}, "Parameter 'prealloc-align' expects a non-negative number below 2^64"),
        ({"prealloc_size": -1}, "Parameter 'prealloc-size' expects a non-negative number below 2^64"),
    ],
)
def test_refused_sizes(options: dict[str, object], text: str) -> None:
    async def main() -> None:
        async with LittleHost() as host:
            await host.disk("disk", START)
            with pytest.raises((UsageError, ParameterError)) as caught:
                await host.add(driver="preallocate", node_name="p", file="disk", **options)
            assert str(caught.value) == text

    run(main())
