"""The throttle filter and its buckets, in virtual time: exact, and the same as timed QSD runs where noted."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from blockjobs.base.bus import Bus
from blockjobs.base.entropy import SeededEntropy
from blockjobs.base.errors import UsageError
from blockjobs.base.offload import InlineOffload
from blockjobs.base.span import Span
from blockjobs.block.claims import ALL, Perm
from blockjobs.block.driver import OpenContext
from blockjobs.block.drivers.raw import RawOptions
from blockjobs.block.drivers.throttle import Throttle, ThrottleOptions
from blockjobs.block.drivers.throttle_group import Bucket, Direction, Member, ThrottleGroup, ThrottleLimits
from blockjobs.block.graph import Graph
from blockjobs.block.vocabulary import ZeroMode
from blockjobs.testing.child import MemoryChild
from blockjobs.testing.clock import VirtualClock, run
from blockjobs.testing.disk import SimDisk

MIB = 1 << 20
NS = 10**9


def now() -> float:
    return asyncio.get_running_loop().time()


def group_of(**limits: int) -> ThrottleGroup:
    group = ThrottleGroup(VirtualClock())
    group.set_limits(ThrottleLimits(**limits))
    return group


def seconds_for(count: int, length: int, direction: Direction = Direction.WRITE, **limits: int) -> float:
    """When the last of `count` equal requests, one after the other, may go."""

    async def send() -> float:
        group = group_of(**limits)
        member = group.join()
        started = now()
        for _ in range(count):
            await group.admit(member, direction, length)
        return now() - started

    return run(send())


@pytest.mark.parametrize(
    ("count", "length", "limits", "expected_s"),
    [
        (1, MIB, {"bps_total": MIB}, 0.0),
        (2, MIB, {"bps_total": MIB}, 0.9),  # QSD: 0.91
        (9, MIB // 16, {"bps_total": MIB}, 0.4),  # QSD: 0.41
        (101, MIB, {"bps_total": MIB}, 99.9),
        (4, MIB, {"bps_total": MIB, "bps_total_max": 2 * MIB}, 1.0),  # QSD: 1.01
        (4, MIB, {"bps_total": MIB, "bps_total_max": 2 * MIB, "bps_total_max_length": 2}, 1.4),  # QSD: 1.41
        (8, 4096, {"iops_total": 8}, 0.775),  # QSD: 0.78
        (3, 16384, {"iops_total": 8, "iops_size": 4096}, 0.9),  # QSD: 0.91
        (3, 4095, {"iops_total": 8, "iops_size": 4096}, 0.15),
        (9, MIB, {"iops_read": 1, "bps_read": 1}, 0.0),
        (2, MIB, {"bps_write": MIB, "iops_write": 1000}, 0.9),
        (9, MIB, {}, 0.0),
    ],
)
def test_rates(count: int, length: int, limits: dict[str, int], expected_s: float) -> None:
    assert seconds_for(count, length, **limits) == pytest.approx(expected_s, abs=1e-6)


def test_an_idle_bucket_runs_empty_but_saves_nothing_up() -> None:
    bucket = Bucket(rate=100, burst=0, burst_s=1)
    bucket.fill(1000 * NS)
    assert bucket.wait_ns(0) == 9_900_000_000
    assert bucket.wait_ns(9_899_999_999) == 1
    assert bucket.wait_ns(3600 * NS) == 0
    bucket.fill(11 * NS)
    assert bucket.wait_ns(3600 * NS) == 10_000_000  # 11 units are 0.01 s above the rim of 10


async def in_parallel(*work: Callable[[], Awaitable[None]]) -> None:
    async def one(item: Callable[[], Awaitable[None]]) -> None:
        await item()

    async with asyncio.TaskGroup() as tasks:
        for item in work:
            tasks.create_task(one(item))


def test_members_take_turns_whatever_the_length_of_their_queues() -> None:
    async def check() -> None:
        group = group_of(iops_total=10)
        greedy, modest = group.join(), group.join()
        passed: list[Member] = []

        async def send(member: Member) -> None:
            await group.admit(member, Direction.READ, 512)
            passed.append(member)

        jobs = [lambda: send(greedy)] * 20 + [lambda: send(modest)] * 3
        await in_parallel(*jobs)
        last_modest = max(index for index, member in enumerate(passed) if member is modest)
        assert passed.count(greedy) == 20
        assert last_modest <= 8
        assert now() == pytest.approx(2.1, abs=1e-6)

    run(check())


def test_reads_and_writes_share_a_total_without_starving() -> None:
    async def check() -> None:
        group = group_of(iops_total=10)
        member = group.join()
        finished: dict[Direction, float] = {}

        async def send(direction: Direction) -> None:
            for _ in range(10):
                await group.admit(member, direction, 512)
            finished[direction] = now()

        await in_parallel(*(lambda direction=direction: send(direction) for direction in Direction))
        assert max(finished.values()) == pytest.approx(1.8, abs=1e-6)
        assert min(finished.values()) > 1.4

    run(check())


def test_writes_do_not_wait_behind_reads_that_alone_are_limited() -> None:
    async def check() -> None:
        group = group_of(bps_read=1)
        member = group.join()
        await group.admit(member, Direction.READ, 1000)
        async with asyncio.TaskGroup() as tasks:
            waiting = tasks.create_task(group.admit(member, Direction.READ, 1))
            await asyncio.sleep(1)
            await group.admit(member, Direction.WRITE, MIB)
            assert now() == 1.0
            waiting.cancel()

    run(check())


def test_changed_limits_act_at_once() -> None:
    async def check() -> None:
        group = group_of(bps_total=1)
        member = group.join()
        await group.admit(member, Direction.WRITE, 1000)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(group.admit(member, Direction.WRITE, 1000))
            tasks.create_task(group.admit(member, Direction.WRITE, 1000))
            await asyncio.sleep(10)
            group.set_limits(ThrottleLimits(bps_total=100))
        # 990 left after 10 s; 9.8 s more to the rim of 10 at 100/s, then 1000 more.
        assert now() == pytest.approx(10 + 9.8 + 10, abs=1e-6)
        group.set_limits(ThrottleLimits(bps_total=0))
        await group.admit(member, Direction.WRITE, 1000)
        assert now() == pytest.approx(29.8, abs=1e-6)

    run(check())


def test_a_drain_lets_queued_requests_through() -> None:
    async def check() -> None:
        group = group_of(bps_total=1)
        drained, other = group.join(), group.join()
        await group.admit(other, Direction.WRITE, 100)
        async with asyncio.TaskGroup() as tasks:
            bystander = tasks.create_task(group.admit(other, Direction.WRITE, 1))
            queued = [tasks.create_task(group.admit(drained, Direction.WRITE, 1)) for _ in range(3)]
            await asyncio.sleep(1)
            group.drain_begin(drained)
            await group.admit(drained, Direction.WRITE, 1)
            await asyncio.wait(queued)
            assert now() == 1.0
            assert not bystander.done()
            group.drain_end(drained)
        assert now() == pytest.approx(104 - 0.1, abs=1e-6)  # what went during the drain was charged

    run(check())


def test_a_cancelled_request_leaves_the_queue() -> None:
    async def check() -> None:
        group = group_of(bps_total=10)
        member = group.join()
        await group.admit(member, Direction.WRITE, 11)
        async with asyncio.TaskGroup() as tasks:
            tasks_in_queue = [tasks.create_task(group.admit(member, Direction.WRITE, 10)) for _ in range(4)]
            await asyncio.sleep(0)
            tasks_in_queue[0].cancel()
            tasks_in_queue[2].cancel()
        assert now() == pytest.approx(2.0, abs=1e-6)

    run(check())


class Below:
    """The route under the filter: remembers what passed when."""

    def __init__(self) -> None:
        self.passed: list[tuple[str, float]] = []

    async def read_into(self, at: int, buffer: memoryview) -> None:
        self.passed.append(("read", now()))

    async def write(self, at: int, content: object, *, fua: bool = False) -> None:
        self.passed.append((f"write fua={fua}", now()))

    async def zero(self, span: Span, *, mode: ZeroMode = ZeroMode.UNMAP) -> None:
        self.passed.append((f"zero {mode.name}", now()))

    async def discard(self, span: Span) -> None:
        self.passed.append(("discard", now()))

    async def flush(self) -> None:
        self.passed.append(("flush", now()))


def context(objects: dict[str, object]) -> OpenContext:
    return OpenContext(
        node_name="t",
        read_only=False,
        offload=InlineOffload(),
        clock=VirtualClock(),
        entropy=SeededEntropy(1),
        objects=objects,
    )


def test_the_filter_charges_every_kind_of_request() -> None:
    async def check() -> None:
        group = group_of(bps_total=1000)
        child = MemoryChild(bytes(4096), "disk")
        options = ThrottleOptions(throttle_group="g", file="disk")
        with pytest.raises(UsageError, match="Throttle group 'g' does not exist"):
            await Throttle.open(options, {"file": child}, context({}))
        filter_driver = await Throttle.open(options, {"file": child}, context({"g": group}))
        assert group.in_use
        assert filter_driver.length == 4096
        below = Below()
        await filter_driver.write(0, bytes(1100), below, fua=True)
        await filter_driver.read_into(0, memoryview(bytearray(1000)), below)
        await filter_driver.zero(Span(0, 1000), ZeroMode.KEEP, below)
        await filter_driver.discard(Span(0, 1000), below)
        await filter_driver.flush(below)
        kinds, times = zip(*below.passed, strict=True)
        assert kinds == ("write fua=True", "read", "zero KEEP", "discard", "flush")
        assert times == pytest.approx((0, 1, 2, 3, 3), abs=1e-6)
        filter_driver.drain_begin()
        await filter_driver.discard(Span(0, 1000), below)
        filter_driver.drain_end()
        assert now() == pytest.approx(3, abs=1e-6)
        await filter_driver.close()
        assert not group.in_use

    run(check())


def test_a_drain_anywhere_does_not_wait_for_a_throttle_below() -> None:
    async def check() -> None:
        graph = Graph(
            clock=VirtualClock(),
            offload=InlineOffload(),
            entropy=SeededEntropy(1),
            bus=Bus(),
            objects={"g": group_of(bps_total=1)},
        )
        await graph.open_medium(SimDisk(bytes(4096)), "disk")
        throttled = ThrottleOptions(throttle_group="g", file="disk")
        top = await graph.open(RawOptions(node_name="top", file=throttled))
        user = await graph.claim("a test", top, needs=Perm.WRITE, shares=ALL)
        await top.write(0, bytes(512))
        async with asyncio.TaskGroup() as tasks:
            for _ in range(3):
                tasks.create_task(top.write(0, bytes(512)))
            await asyncio.sleep(1)
            async with graph.drained(top):
                assert now() == 1.0
        await graph.release(user)
        await graph.close()

    run(check())
