"""The throttle filter: requests wait until the group of their node may send them."""

from dataclasses import dataclass
from typing import ClassVar

from blockjobs.base.buffers import Buffer
from blockjobs.base.errors import UsageError
from blockjobs.base.span import Span
from blockjobs.block.driver import Child, FilterDriver, Forward, OpenContext
from blockjobs.block.drivers.throttle_group import Direction, Member, ThrottleGroup
from blockjobs.block.options import BlockRef, NodeOptions, driver
from blockjobs.block.switch import Switch
from blockjobs.block.vocabulary import Watch, ZeroMode


class ThrottleOptions(NodeOptions, frozen=True, kw_only=True, tag="throttle"):
    """Limits the rate of requests to its child, together with all nodes of the same group."""

    throttle_group: str
    file: BlockRef


@driver(ThrottleOptions)
@dataclass(eq=False)
class Throttle(FilterDriver):
    """One member of a throttle group. Zero and discard requests count as writes of their length; flushes are free."""

    children: dict[str, Child]
    group: ThrottleGroup
    member: Member
    watches: Watch = Watch.READ | Watch.CHANGES

    reopenable: ClassVar[frozenset[str] | None] = frozenset({"throttle-group"})

    @classmethod
    async def open(cls, options: ThrottleOptions, children: dict[str, Child], context: OpenContext) -> "Throttle":
        """Join the group.

        Raises:
            UsageError: there is no such group.
        """
        group = _group(options, context)
        return cls(children, group, group.join())

    async def prepare_reopen(self, options: ThrottleOptions, context: OpenContext) -> Switch:
        """See `Driver`: the node may join another group."""
        return _NewGroup(self, _group(options, context))

    async def close(self) -> None:
        """Leave the group, which may then be deleted."""
        self.group.leave(self.member)

    def drain_begin(self) -> None:
        """See `Driver`: queued requests go at once, and are charged."""
        self.group.drain_begin(self.member)

    def drain_end(self) -> None:
        """See `Driver`."""
        self.group.drain_end(self.member)

    async def read_into(self, at: int, buffer: memoryview, forward: Forward) -> None:
        """See `FilterDriver`. Waits: for the group's rate."""
        await self.group.admit(self.member, Direction.READ, len(buffer))
        await forward.read_into(at, buffer)

    async def write(self, at: int, content: Buffer, forward: Forward, *, fua: bool) -> None:
        """See `FilterDriver`. Waits: for the group's rate."""
        await self.group.admit(self.member, Direction.WRITE, len(content))
        await forward.write(at, content, fua=fua)

    async def zero(self, span: Span, mode: ZeroMode, forward: Forward) -> None:
        """See `FilterDriver`. Waits: for the group's rate."""
        await self.group.admit(self.member, Direction.WRITE, span.length)
        await forward.zero(span, mode=mode)

    async def discard(self, span: Span, forward: Forward) -> None:
        """See `FilterDriver`. Waits: for the group's rate."""
        await self.group.admit(self.member, Direction.WRITE, span.length)
        await forward.discard(span)


class _NewGroup(Switch):
    """Joins the other group at once, which can then not be deleted, and leaves one of the two at the end."""

    def __init__(self, driver: Throttle, group: ThrottleGroup) -> None:
        self._driver = driver
        self._before = driver.group, driver.member
        self._after = self._before if group is driver.group else (group, group.join())

    def apply(self) -> None:
        """See `Switch`. The drains that are under way will be ended in the new group."""
        self._after[1].drains = self._before[1].drains
        self._driver.group, self._driver.member = self._after

    def revert(self) -> None:
        """See `Switch`."""
        self._before[1].drains = self._after[1].drains
        self._driver.group, self._driver.member = self._before

    async def close(self, *, applied: bool) -> None:
        """See `Switch`."""
        if self._after is not self._before:
            group, member = self._before if applied else self._after
            group.leave(member)


def _group(options: ThrottleOptions, context: OpenContext) -> ThrottleGroup:
    group = context.objects.get(options.throttle_group)
    if not isinstance(group, ThrottleGroup):
        raise UsageError(f"Throttle group '{options.throttle_group}' does not exist")
    return group
