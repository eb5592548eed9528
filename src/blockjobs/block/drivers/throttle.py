"""The throttle filter: requests wait until the group of their node may send them."""

from dataclasses import dataclass

from blockjobs.base.buffers import Buffer
from blockjobs.base.errors import UsageError
from blockjobs.base.span import Span
from blockjobs.block.driver import Child, FilterDriver, Forward, OpenContext
from blockjobs.block.drivers.throttle_group import Direction, Member, ThrottleGroup
from blockjobs.block.options import BlockRef, NodeOptions, driver
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

    @classmethod
    async def open(cls, options: ThrottleOptions, children: dict[str, Child], context: OpenContext) -> "Throttle":
        """Join the group.

        Raises:
            UsageError: there is no such group.
        """
        group = context.objects.get(options.throttle_group)
        if not isinstance(group, ThrottleGroup):
            raise UsageError(f"Throttle group '{options.throttle_group}' does not exist")
        return cls(children, group, group.join())

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
