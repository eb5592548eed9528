"""The quorum driver: votes, reports, corrections, children that come and go. Events and errors as QEMU's daemon has."""

import asyncio
import errno
import random
from collections.abc import Awaitable, Callable

import pytest

from blockjobs.base.errors import IoFailure, PermissionConflict, UsageError
from blockjobs.base.span import Span
from blockjobs.base.units import KiB
from blockjobs.block.claims import ALL, Perm
from blockjobs.block.driver import Driver
from blockjobs.block.drivers.quorum import Quorum
from blockjobs.block.drivers.quorum_votes import QuorumFailure, QuorumReportBad, commonest, judge, sectors_of
from blockjobs.block.node import Node
from blockjobs.block.objects import AnyObjectOptions, add_object
from blockjobs.block.vocabulary import Kind
from blockjobs.schema.command import convert
from blockjobs.testing.clock import run
from blockjobs.testing.faults import Fault, FaultPlan, FaultyMedium, Operation
from blockjobs.testing.little_host import LittleHost, make_disk

SIZE = 256 * KiB
CONTENT = random.Random(3).randbytes(SIZE)

Scenario = Callable[[LittleHost, Node, list[FaultPlan]], Awaitable[None]]


def with_quorum(scenario: Scenario, *contents: bytes, guest: bool = True, **options: object) -> None:
    async def main() -> None:
        async with LittleHost() as host:
            plans = [FaultPlan() for _ in contents]
            for index, (content, plan) in enumerate(zip(contents, plans, strict=True)):
                host.disks[f"c{index}"] = make_disk(content)
                await host.disk(f"c{index}", b"", medium=FaultyMedium(host.disks[f"c{index}"], plan))
            children = [f"c{index}" for index in range(len(contents))]
            node = await host.add(
                driver="quorum", node_name="q", **{"vote_threshold": 2, "children": children, **options}
            )
            user = await host.guest(node) if guest else None
            await scenario(host, node, plans)
            if user is not None:
                await host.graph.release(user)

    run(main())


def told(host: LittleHost) -> list[tuple[object, ...]]:
    """The events so far, shortened, and forget them."""
    found: list[tuple[object, ...]] = []
    for event in host.events:
        match event:
            case QuorumReportBad():
                found.append((event.node_name, event.type.value, event.error, event.sector_num, event.sectors_count))
            case QuorumFailure():
                found.append((event.reference, event.sector_num, event.sectors_count))
    host.events.clear()
    return found


def shown(host: LittleHost, index: int) -> bytes:
    return host.disks[f"c{index}"].pages.read(0, SIZE)


def spoiled(at: int, length: int, mark: bytes = b"\xee") -> bytes:
    return CONTENT[:at] + mark * length + CONTENT[at + length :]


def test_changes_go_to_all_and_reads_are_what_they_agree_on() -> None:
    async def scenario(host: LittleHost, node: Node, plans: list[FaultPlan]) -> None:
        model = bytearray(CONTENT)
        chance = random.Random(1)
        for _ in range(50):
            length = chance.choice((1, 512, 5000))
            at = chance.randrange(SIZE - length)
            content = chance.randbytes(length)
            if chance.random() < 0.2:
                content = bytes(length)
                await node.zero(Span(at, length))
            else:
                await node.write(at, content, fua=chance.random() < 0.2)
            model[at : at + length] = content
        await node.flush()
        assert await node.read(0, SIZE) == model
        assert [shown(host, index) for index in range(3)] == [bytes(model)] * 3
        assert told(host) == []

    with_quorum(scenario, CONTENT, CONTENT, CONTENT)


def test_the_minority_is_reported_and_stays_as_it_is() -> None:
    async def scenario(host: LittleHost, node: Node, plans: list[FaultPlan]) -> None:
        assert await node.read(0, SIZE) == CONTENT
        assert told(host) == [("c2", "read", None, 0, SIZE // 512)]
        assert await node.read(1000, 100) == CONTENT[1000:1100]
        assert told(host) == [("c2", "read", None, 1, 2)]
        assert await node.read(5000, 100) == CONTENT[5000:5100]
        assert told(host) == []
        assert shown(host, 2) == spoiled(1000, 30)

    with_quorum(scenario, CONTENT, CONTENT, spoiled(1000, 30))


def test_rewrite_corrupted_puts_the_minority_right() -> None:
    async def scenario(host: LittleHost, node: Node, plans: list[FaultPlan]) -> None:
        assert await node.read(0, SIZE) == CONTENT
        assert told(host)[0] == ("c1", "read", None, 0, SIZE // 512)
        assert shown(host, 1) == CONTENT
        assert await node.read(0, SIZE) == CONTENT
        assert told(host) == []

    with_quorum(scenario, CONTENT, spoiled(0, 600), CONTENT, rewrite_corrupted=True)


def test_a_child_that_cannot_be_put_right_does_not_fail_the_read() -> None:
    async def scenario(host: LittleHost, node: Node, plans: list[FaultPlan]) -> None:
        plans[1].add(Fault(nth=1, operation=Operation.WRITE))
        assert await node.read(0, SIZE) == CONTENT
        assert plans[1].hits == 1
        assert await node.read(0, SIZE) == CONTENT
        assert shown(host, 1) == CONTENT

    with_quorum(scenario, CONTENT, spoiled(0, 600), CONTENT, rewrite_corrupted=True)


def test_too_little_agreement() -> None:
    async def scenario(host: LittleHost, node: Node, plans: list[FaultPlan]) -> None:
        with pytest.raises(IoFailure) as caught:
            await node.read(0, 4096)
        assert caught.value.errno == errno.EIO
        assert told(host) == [("q", 0, 8)]

    with_quorum(scenario, CONTENT, spoiled(0, 9, b"b"), spoiled(0, 9, b"c"))


def test_a_child_that_cannot_be_read() -> None:
    async def scenario(host: LittleHost, node: Node, plans: list[FaultPlan]) -> None:
        plans[0].add(Fault(nth=1, operation=Operation.READ, errno=errno.ENOSPC))
        assert await node.read(131072, 4096) == CONTENT[131072:][:4096]
        assert told(host) == [("c0", "read", "No space left on device", 256, 8)]
        for plan in plans[:2]:
            plan.add(Fault(nth=1, operation=Operation.READ, errno=errno.ENOSPC))
        with pytest.raises(IoFailure) as caught:
            await node.read(0, 512)
        assert caught.value.errno == errno.ENOSPC
        assert [line[0] for line in told(host)] == ["c0", "c1", "q"]

    with_quorum(scenario, CONTENT, CONTENT, CONTENT)


@pytest.mark.parametrize("threshold", [1, 2, 3])
def test_children_that_cannot_be_written(threshold: int) -> None:
    async def scenario(host: LittleHost, node: Node, plans: list[FaultPlan]) -> None:
        plans[0].add(Fault(nth=1, operation=Operation.WRITE, errno=errno.ENOSPC))
        plans[2].add(Fault(nth=1, operation=Operation.WRITE, errno=errno.ENOSPC))
        reports = [(name, "write", "No space left on device", 0, 1) for name in ("c0", "c2")]
        if threshold == 1:
            await node.write(0, b"n" * 512)
            assert told(host) == reports
            assert shown(host, 1)[:512] == b"n" * 512
            return
        with pytest.raises(IoFailure) as caught:
            await node.write(0, b"n" * 512)
        assert caught.value.errno == errno.ENOSPC
        assert told(host) == [*reports, ("q", 0, 1)]

    with_quorum(scenario, CONTENT, CONTENT, CONTENT, vote_threshold=threshold)


def test_flushes_that_fail() -> None:
    async def scenario(host: LittleHost, node: Node, plans: list[FaultPlan]) -> None:
        plans[0].add(Fault(nth=1, operation=Operation.SYNC, errno=errno.ENOSPC))
        await node.flush()
        assert told(host) == [("c0", "flush", "No space left on device", 0, 0)]
        plans[1].add(Fault(nth=1, operation=Operation.SYNC, errno=errno.EIO))
        with pytest.raises(IoFailure) as caught:
            await node.flush()
        assert caught.value.errno == errno.EIO  # a tie goes to the later child
        assert [line[0] for line in told(host)] == ["c0", "c1"]

    with_quorum(scenario, CONTENT, CONTENT, CONTENT)


def test_fifo_asks_one_after_the_other() -> None:
    async def scenario(host: LittleHost, node: Node, plans: list[FaultPlan]) -> None:
        assert await node.read(0, 4096) == CONTENT[:4096]
        assert [plan.calls[Operation.READ] for plan in plans] == [1, 0, 0]
        plans[0].add(Fault(nth=1, operation=Operation.READ))
        assert (await node.read(0, 4096))[:9] == b"b" * 9
        assert told(host) == [("c0", "read", "Input/output error", 0, 8)]
        for plan in plans:
            plan.add(Fault(nth=1, operation=Operation.READ, errno=errno.ENOSPC))
        with pytest.raises(IoFailure) as caught:
            await node.read(0, 4096)
        assert caught.value.errno == errno.ENOSPC
        assert [line[0] for line in told(host)] == ["c0", "c1", "c2"]

    contents = CONTENT, spoiled(0, 9, b"b"), CONTENT
    with_quorum(scenario, *contents, vote_threshold=1, read_pattern="fifo")


def test_readers_never_meet_half_of_a_write() -> None:
    async def scenario(host: LittleHost, node: Node, plans: list[FaultPlan]) -> None:
        async def write(mark: int) -> None:
            await node.write(4096, bytes([mark]) * 8192)

        async def read() -> None:
            assert len(set(await node.read(4096, 8192))) == 1

        await write(0)
        for round_ in range(20):
            async with asyncio.TaskGroup() as group:
                for mark in range(1, 5):
                    group.create_task(write(mark + round_))
                    group.create_task(read())
            assert len({shown(host, index) for index in range(3)}) == 1
        assert told(host) == []

    async def with_latency() -> None:
        async with LittleHost() as host:
            for index in range(3):
                await host.disk(f"c{index}", CONTENT)
                limits = {"qom-type": "throttle-group", "id": f"g{index}", "limits": {"iops-total": 100 * (index + 1)}}
                add_object(host.graph.objects, convert(limits, AnyObjectOptions), host.clock)
                await host.add(driver="throttle", node_name=f"t{index}", throttle_group=f"g{index}", file=f"c{index}")
            children = ["t0", "t1", "t2"]
            node = await host.add(driver="quorum", node_name="q", vote_threshold=3, children=children)
            guest = await host.guest(node)
            await scenario(host, node, [])
            await host.graph.release(guest)

    run(with_latency())


def test_block_status_is_zero_where_all_say_so() -> None:
    async def scenario(host: LittleHost, node: Node, plans: list[FaultPlan]) -> None:
        await node.zero(Span(0, 64 * KiB))
        parts = [(part.at, part.length, part.kind) for part in await node.status(Span(0, 128 * KiB))]
        assert parts == [(0, 64 * KiB, Kind.ZERO), (64 * KiB, 64 * KiB, Kind.DATA)]
        other = host.graph.node("c1")
        user = await host.graph.claim("a vandal", other, needs=Perm(0), shares=ALL)
        host.disks["c1"].write(4096, b"x")
        parts = [(part.at, part.length, part.kind) for part in await node.status(Span(0, 64 * KiB))]
        assert [kind for _, _, kind in parts] == [Kind.ZERO, Kind.DATA, Kind.ZERO]
        plans[0].add(Fault(nth=1, operation=Operation.STATUS))
        assert await node.status(Span(0, 512)) == [(0, 512, Kind.DATA, "", 0, None)]
        await host.graph.release(user)

    with_quorum(scenario, CONTENT, CONTENT)


def test_discards_do_not_reach_the_children() -> None:
    async def scenario(host: LittleHost, node: Node, plans: list[FaultPlan]) -> None:
        await node.discard(Span(0, 64 * KiB))
        assert await node.read(0, SIZE) == CONTENT
        assert not any(plan.calls[Operation.DISCARD] for plan in plans)

    with_quorum(scenario, CONTENT, CONTENT, discard="unmap")


def test_nobody_else_changes_a_child_and_nobody_resizes() -> None:
    async def scenario(host: LittleHost, node: Node, plans: list[FaultPlan]) -> None:
        with pytest.raises(PermissionConflict):
            await host.graph.claim("an outsider", host.graph.node("c1"), needs=Perm.WRITE, shares=ALL)
        with pytest.raises(UsageError, match="Image format driver does not support resize"):
            await node.driver.resize(1)

    with_quorum(scenario, CONTENT, CONTENT)


def test_children_come_and_go() -> None:
    async def scenario(host: LittleHost, node: Node, plans: list[FaultPlan]) -> None:
        driver = node.driver
        assert isinstance(driver, Quorum)
        assert driver.takes_children
        assert not Driver.takes_children
        for name, content in (("late", CONTENT), ("later", spoiled(0, 5)), ("short", CONTENT[:512])):
            await host.disk(name, content)
        late, later = host.graph.node("late"), host.graph.node("later")
        for child in (late, later):
            async with host.graph.edit() as edit:
                await edit.set_child(node, driver.edge_for(child), child)
        assert list(node.children) == ["children.0", "children.1", "children.2", "children.3"]
        assert await node.read(0, 4096) == CONTENT[:4096]
        assert [line[0] for line in told(host)] == ["later"]
        with pytest.raises(UsageError, match="Cannot add node 'short' of 512 bytes to a quorum of 262144 bytes"):
            driver.edge_for(host.graph.node("short"))
        for edge in ("children.0", "children.3"):
            driver.check_may_lose(edge)
            async with host.graph.edit() as edit:
                await edit.set_child(node, edge, None)
        assert driver.edge_for(late) == "children.3"
        with pytest.raises(UsageError, match="The number of children cannot be lower than the vote threshold 2"):
            driver.check_may_lose("children.1")
        await node.write(0, b"n" * 512)
        assert host.disks["late"].pages.read(0, 512) == b"n" * 512
        assert host.disks["c0"].pages.read(0, 512) == CONTENT[:512]

    with_quorum(scenario, CONTENT, CONTENT)


def test_a_pair_that_must_agree_takes_nobody_else() -> None:
    async def scenario(host: LittleHost, node: Node, plans: list[FaultPlan]) -> None:
        assert await node.read(0, 512) == CONTENT[:512]
        with pytest.raises(IoFailure):
            await node.read(1000, 512)
        with pytest.raises(UsageError, match="blkverify"):
            node.driver.edge_for(host.graph.node("c0"))

    with_quorum(scenario, CONTENT, spoiled(1000, 3), blkverify=True)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"children": []}, "Number of provided children must be 1 or more"),
        ({"vote_threshold": 0}, "Parameter 'vote-threshold' expects a value >= 1"),
        ({"vote_threshold": 4}, "threshold may not exceed children count"),
        ({"blkverify": True}, "blkverify=on can only be set if there are exactly two files and vote-threshold is 2"),
        (
            {"blkverify": True, "rewrite_corrupted": True, "children": ["c0", "c1"]},
            "rewrite-corrupted=on cannot be used with blkverify=on",
        ),
        ({"children": ["c0", "short"]}, "Could not refresh total sector count: Input/output error"),
    ],
)
def test_refused_options(options: dict[str, object], text: str) -> None:
    async def main() -> None:
        async with LittleHost() as host:
            for name in ("c0", "c1", "c2"):
                await host.disk(name, CONTENT)
            await host.disk("short", 512)
            given = {"children": ["c0", "c1", "c2"], "vote_threshold": 2, **options}
            with pytest.raises(UsageError) as caught:
                await host.add(driver="quorum", node_name="q", **given)
            assert str(caught.value) == text

    run(main())


def test_counting() -> None:
    a, b = bytearray(b"a"), bytearray(b"b")
    assert judge({"0": a, "1": b, "2": a}, 2) is not None
    verdict = judge({"0": a, "1": b}, 1)
    assert verdict is not None
    assert (verdict.content, list(verdict.losers)) == (b, ["0"])
    assert judge({"0": a, "1": b}, 2) is None
    assert judge({"0": a, "1": a, "2": b}, 3) is None
    assert sectors_of(Span(131000, 600)) == (255, 3)
    assert sectors_of(Span(0, 0)) == (0, 0)
    failures = [IoFailure(code) for code in (errno.ENOSPC, errno.EIO, errno.EIO)]
    assert commonest(failures).errno == errno.EIO
    assert commonest(failures[:2]).errno == errno.EIO
