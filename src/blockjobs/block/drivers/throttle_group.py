"""Throttle groups: leaky buckets shared fairly by all nodes of a group (spec/block-layer.md §2; rates probed on QSD).

A bucket leaks at the allowed rate and is filled by requests. A request may go while the bucket is not above its rim,
and then fills it, possibly far above: so no request is ever split, and the average is exact. Without a burst rate the
rim is at 100 ms worth of the rate. All arithmetic is in whole unit-nanoseconds: nothing drifts, virtual time is exact.
"""

import asyncio
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

import msgspec

from blockjobs.base.clock import Clock
from blockjobs.base.errors import UsageError
from blockjobs.block.object_properties import LiveProperties
from blockjobs.block.objects import ObjectOptions, object_options
from blockjobs.schema.command import convert
from blockjobs.schema.types import Options

RATE_MAX: Final = 10**15
LENGTH_MAX: Final = 2**32 - 1
_NS: Final = 10**9


class ThrottleLimits(Options, frozen=True, kw_only=True):
    """Rates in bytes/s (bps) and requests/s (iops); 0 or absent is no limit.

    `…_max` is the rate in bursts, `…_max_length` the seconds that a burst may last. Requests of more than `iops_size`
    bytes count as several.
    """

    iops_total: int | None = None
    iops_total_max: int | None = None
    iops_total_max_length: int | None = None
    iops_read: int | None = None
    iops_read_max: int | None = None
    iops_read_max_length: int | None = None
    iops_write: int | None = None
    iops_write_max: int | None = None
    iops_write_max_length: int | None = None
    bps_total: int | None = None
    bps_total_max: int | None = None
    bps_total_max_length: int | None = None
    bps_read: int | None = None
    bps_read_max: int | None = None
    bps_read_max_length: int | None = None
    bps_write: int | None = None
    bps_write_max: int | None = None
    bps_write_max_length: int | None = None
    iops_size: int | None = None


class _LimitsProperty(Options, frozen=True, kw_only=True):
    """What may be set while a group lives; a struct of its own so that messages name the property."""

    limits: ThrottleLimits


@object_options.add
class ThrottleGroupOptions(ObjectOptions, frozen=True, kw_only=True, tag="throttle-group"):
    """A set of nodes with common limits. The `x-` members are the older spelling and win over `limits`."""

    limits: ThrottleLimits | None = None
    x_iops_total: int | None = None
    x_iops_total_max: int | None = None
    x_iops_total_max_length: int | None = None
    x_iops_read: int | None = None
    x_iops_read_max: int | None = None
    x_iops_read_max_length: int | None = None
    x_iops_write: int | None = None
    x_iops_write_max: int | None = None
    x_iops_write_max_length: int | None = None
    x_bps_total: int | None = None
    x_bps_total_max: int | None = None
    x_bps_total_max_length: int | None = None
    x_bps_read: int | None = None
    x_bps_read_max: int | None = None
    x_bps_read_max_length: int | None = None
    x_bps_write: int | None = None
    x_bps_write_max: int | None = None
    x_bps_write_max_length: int | None = None
    x_iops_size: int | None = None

    def build(self, clock: Clock, objects: Mapping[str, object]) -> "ThrottleGroup":
        """See `ObjectOptions.build`."""
        del objects
        older = {
            name: value
            for name in ThrottleLimits.__struct_fields__
            if (value := getattr(self, f"x_{name}")) is not None
        }
        if any(value < 0 for value in older.values()):
            raise UsageError("Property values cannot be negative")
        group = ThrottleGroup(clock)
        group.set_limits(msgspec.structs.replace(self.limits or ThrottleLimits(), **older))
        return group


class Direction(Enum):
    """Reads and writes are limited apart or in total; the names are those in the limits."""

    READ = "read"
    WRITE = "write"


KINDS: Final = ("total", *(direction.value for direction in Direction))
UNITS: Final = ("bps", "iops")
NAMES: Final = tuple(f"{unit}_{kind}" for unit in UNITS for kind in KINDS)


def check_limits(settings: Mapping[str, int]) -> None:
    """Refuse limits that make no sense together, in QEMU's order and words.

    Raises:
        UsageError: with the first thing that is wrong.
    """
    for name in NAMES:
        if settings.get(f"{name}_max_length", 0) > LENGTH_MAX:
            option = f"{name}_max_length".replace("_", "-")
            raise UsageError(f"{option} value must be in the range [0, {LENGTH_MAX}]")
    for unit in UNITS:
        for suffix in ("", "_max"):
            total, read, write = (settings.get(f"{unit}_{kind}{suffix}", 0) for kind in KINDS)
            if total and (read or write):
                raise UsageError("bps/iops/max total values and read/write values cannot be used at the same time")
    if settings.get("iops_size") and not any(settings.get(f"iops_{kind}") for kind in KINDS):
        raise UsageError("iops size requires an iops value to be set")
    for name in NAMES:
        _check_bucket(settings.get(name, 0), settings.get(f"{name}_max", 0), settings.get(f"{name}_max_length", 1))


def _check_bucket(rate: int, burst: int, burst_s: int) -> None:
    if not (0 <= rate <= RATE_MAX and 0 <= burst <= RATE_MAX):
        raise UsageError(f"bps/iops/max values must be within [0, {RATE_MAX}]")
    if burst_s == 0:
        raise UsageError("the burst length cannot be 0")
    if burst and not rate:
        raise UsageError("bps_max/iops_max require corresponding bps/iops values")
    if burst and burst < rate:
        raise UsageError("bps_max/iops_max cannot be lower than bps/iops")
    if not burst and burst_s != 1:
        raise UsageError("burst length set without burst rate")
    # QEMU reads a negative length as a huge one.
    if burst and not 0 < burst_s <= RATE_MAX // burst:
        raise UsageError("burst length too high for this burst rate")


@dataclass(slots=True)
class Bucket:
    """One limit. `rate` and `burst` in units/s, fill levels in unit-nanoseconds."""

    rate: int
    burst: int
    burst_s: int
    now_ns: int = 0
    level: int = 0
    burst_level: int = 0

    def wait_ns(self, now_ns: int) -> int:
        """How long from `now_ns` on until the next request may go; 0 is now."""
        passed_ns, self.now_ns = now_ns - self.now_ns, now_ns
        self.level = max(0, self.level - self.rate * passed_ns)
        self.burst_level = max(0, self.burst_level - self.burst * passed_ns)
        rim = self.burst * self.burst_s * _NS if self.burst else self.rate * _NS // 10
        if self.level > rim:
            return -(-(self.level - rim) // self.rate)
        burst_rim = self.burst * _NS // 10
        if self.burst_s > 1 and self.burst_level > burst_rim:
            return -(-(self.burst_level - burst_rim) // self.burst)
        return 0

    def fill(self, units_ns: int) -> None:
        """A request goes."""
        self.level += units_ns
        self.burst_level += units_ns


@dataclass(slots=True, eq=False)
class Member:
    """One node of a group; `drains` counts the drains that are under way there."""

    drains: int = 0


@dataclass(slots=True, eq=False)
class _Turn:
    """A waiting request; `changed` is set whenever it must look again."""

    member: Member
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class _Lane:
    """Waiting requests under the same limits: one at the head, the others in a queue per member, taken round robin."""

    def __init__(self) -> None:
        self.head: _Turn | None = None
        self._queues: dict[Member, deque[_Turn]] = {}

    def __iter__(self) -> Iterator[_Turn]:
        if self.head is not None:
            yield self.head
        for queue in self._queues.values():
            yield from queue

    def enter(self, member: Member) -> _Turn:
        turn = _Turn(member)
        if self.head is None:
            self.head = turn
        else:
            self._queues.setdefault(member, deque()).append(turn)
        return turn

    def leave(self, turn: _Turn) -> None:
        if turn is not self.head:
            queue = self._queues[turn.member]
            queue.remove(turn)
            if not queue:
                del self._queues[turn.member]
            return
        self.head = None
        if self._queues:
            member, queue = next(iter(self._queues.items()))
            del self._queues[member]
            self.head = queue.popleft()
            if queue:
                self._queues[member] = queue  # at the end: the other members come first
            self.head.changed.set()


class ThrottleGroup(LiveProperties):
    """Limits that several nodes share. Only the loop thread may call it."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._settings: dict[str, int] = {}
        self._buckets: dict[str, Bucket] = {}
        self._members: set[Member] = set()
        self._lanes = {kind: _Lane() for kind in KINDS}

    @property
    def in_use(self) -> bool:
        """Whether a node belongs to the group."""
        return bool(self._members)

    @property
    def limits(self) -> ThrottleLimits:
        """What is in force now."""
        return ThrottleLimits(**self._settings)

    def set_limits(self, limits: ThrottleLimits) -> None:
        """Change the limits that are given, keep the others; waiting requests are judged anew at once.

        Raises:
            UsageError: the outcome would make no sense; nothing changed.
        """
        settings = dict(self._settings)
        settings.update((name, value) for name, value in msgspec.structs.asdict(limits).items() if value is not None)
        check_limits(settings)
        self._settings = settings
        fresh: dict[str, Bucket] = {}
        for name in NAMES:
            if rate := settings.get(name, 0):
                bucket = Bucket(rate, settings.get(f"{name}_max", 0), settings.get(f"{name}_max_length", 1))
                if (old := self._buckets.get(name)) is not None:
                    bucket.now_ns = self._clock.now_ns()
                    old.wait_ns(bucket.now_ns)  # leaks what is due at the old rate
                    bucket.level, bucket.burst_level = old.level, old.burst_level
                fresh[name] = bucket
        self._buckets = fresh
        self._wake(turn for lane in self._lanes.values() for turn in lane)

    def current(self, name: str) -> object:
        """See `LiveProperties`: all limits, those not set as well."""
        settings = {
            field.name: self._settings.get(field.name, 1 if field.name.endswith("_max_length") else 0)
            for field in msgspec.structs.fields(ThrottleLimits)
        }
        if name == "limits":
            return {member.replace("_", "-"): value for member, value in settings.items()}
        return settings[name.removeprefix("x-").replace("-", "_")]

    def change(self, name: str, value: object) -> None:
        """See `LiveProperties`: requests that wait already follow the new limits."""
        if name != "limits":
            raise UsageError("Property cannot be set after initialization")
        self.set_limits(convert({"limits": value}, _LimitsProperty).limits)

    def join(self) -> Member:
        """Make a node a member."""
        member = Member()
        self._members.add(member)
        return member

    def leave(self, member: Member) -> None:
        """A node goes; it has no requests any more."""
        self._members.discard(member)

    def drain_begin(self, member: Member) -> None:
        """Let the member's queued and coming requests go without waiting, until the matching `drain_end`."""
        member.drains += 1
        self._wake(turn for lane in self._lanes.values() for turn in lane if turn.member is member)

    def drain_end(self, member: Member) -> None:
        """One drain is over."""
        assert member.drains
        member.drains -= 1

    async def admit(self, member: Member, direction: Direction, length: int) -> None:
        """Return when a request of `length` bytes may go; it is charged then.

        Requests of one member go in their order, members take turns. A request that is cancelled while it waits is not
        charged. Waits: for the rate, and for earlier requests under the same limits.
        """
        # Under a total limit reads and writes share a queue, or the faster of them would starve the other.
        has_total = any(name.endswith("_total") for name in self._buckets)
        lane = self._lanes["total" if has_total else direction.value]
        if not member.drains and (lane.head is not None or self._wait_ns(direction)):
            turn = lane.enter(member)
            try:
                await self._wait_for(turn, lane, direction)
            finally:
                lane.leave(turn)
        self._charge(direction, length)

    async def _wait_for(self, turn: _Turn, lane: _Lane, direction: Direction) -> None:
        while not turn.member.drains:
            turn.changed.clear()
            if lane.head is not turn:
                await turn.changed.wait()
            elif wait_ns := self._wait_ns(direction):
                await self._sleep(self._clock.now_ns() + wait_ns, turn.changed)
            else:
                return

    async def _sleep(self, deadline_ns: int, changed: asyncio.Event) -> None:
        """Until the deadline or the change, whichever is first."""
        async with asyncio.TaskGroup() as both:
            sleeper = both.create_task(self._clock.sleep_until(deadline_ns))
            waker = both.create_task(changed.wait())
            await asyncio.wait((sleeper, waker), return_when=asyncio.FIRST_COMPLETED)
            sleeper.cancel()
            waker.cancel()

    def _wait_ns(self, direction: Direction) -> int:
        if not self._buckets:
            return 0
        now_ns = self._clock.now_ns()
        return max((bucket.wait_ns(now_ns) for _, bucket in self._limiting(direction)), default=0)

    def _charge(self, direction: Direction, length: int) -> None:
        operation = _NS
        if 0 < (size := self._settings.get("iops_size", 0)) < length:
            operation = length * _NS // size
        for name, bucket in self._limiting(direction):
            bucket.fill(length * _NS if name.startswith("bps") else operation)

    def _limiting(self, direction: Direction) -> Iterator[tuple[str, Bucket]]:
        for name, bucket in self._buckets.items():
            if name.endswith(("_total", f"_{direction.value}")):
                yield name, bucket

    @staticmethod
    def _wake(turns: Iterator[_Turn]) -> None:
        for turn in turns:
            turn.changed.set()
