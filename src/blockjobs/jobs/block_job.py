"""What all block jobs have: nodes that they hold, a rate limit, error policies and events of their own."""

import logging
from collections.abc import Coroutine, Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Final, Protocol

from blockjobs.base.bus import Bus
from blockjobs.base.errors import BlockjobsError, UsageError
from blockjobs.block.claims import ALL, NONE, Perm
from blockjobs.block.users import Edge
from blockjobs.jobs.events import (
    BlockJobCancelled,
    BlockJobCompleted,
    BlockJobError,
    BlockJobPending,
    BlockJobReady,
    IoOperation,
)
from blockjobs.lifecycle.effect import Milestone
from blockjobs.lifecycle.error_policy import Action, IoStatus, OnError, Side
from blockjobs.lifecycle.handle import JobHandle
from blockjobs.lifecycle.job import Job
from blockjobs.lifecycle.status import JobStatus
from blockjobs.schema.types import Record

if TYPE_CHECKING:
    from blockjobs.block.graph import Graph
    from blockjobs.block.node import Node
    from blockjobs.block.users import Root
    from blockjobs.jobs.machine_state import Machine
    from blockjobs.lifecycle.engine import Engine


_LOG: Final = logging.getLogger(__name__)


class JobHost(Protocol):
    """What starting a job needs of the program around it; `Host` is one."""

    @property
    def graph(self) -> "Graph":
        """The nodes."""
        ...

    @property
    def jobs(self) -> "Engine":
        """The jobs."""
        ...

    @property
    def bus(self) -> Bus:
        """Where events go."""
        ...

    @property
    def machine(self) -> "Machine":
        """The machine that the disks belong to."""
        ...


class BlockJobInfo(Record, frozen=True, kw_only=True):
    """A block job as `query-block-jobs` shows it (spec/lifecycle.md §8).

    Attributes:
        device: the job's id.
        busy: the body is at work and not waiting.
        paused: something holds the job, whether it stands still already or not.
        error: why it failed.
        actively_synced: of a mirror: both sides are the same, and every write goes to both (QEMU 8.2).
    """

    type: str
    device: str
    len: int
    offset: int
    busy: bool
    paused: bool
    speed: int
    io_status: IoStatus
    ready: bool
    status: JobStatus
    auto_finalize: bool
    auto_dismiss: bool
    error: str | None = None
    actively_synced: bool | None = None


def block_job_info(handle: JobHandle) -> BlockJobInfo:
    """The present view of a block job."""
    life, job = handle.life, handle.job
    return BlockJobInfo(
        type=handle.type,
        device=life.key,
        len=handle.progress.total,
        offset=handle.progress.current,
        busy=handle.is_busy,
        paused=life.pause_count > 0,
        speed=life.speed_bytes_per_s,
        io_status=life.io_status,
        ready=life.is_ready,
        status=life.status,
        auto_finalize=life.auto_finalize,
        auto_dismiss=life.auto_dismiss,
        error=handle.error,
        actively_synced=job.is_actively_synced if isinstance(job, BlockJob) else None,
    )


def check_root(node: "Node") -> None:
    """Refuse a node that another node uses, or that a job holds: QEMU counts a job's hold as a node above.

    Raises:
        UsageError: it is so.
    """
    for parent in node.parents:
        if isinstance(parent, Edge) or (parent.user is not None and not parent.is_backend):
            raise UsageError("Need a root block node")


async def back_to_read_only(node: "Node") -> None:
    """Let an image that was writable for a job be read-only again.

    A failure is logged: nothing else depends on it, and a job that is over must let go of its nodes.
    """
    try:
        await node.graph.set_read_only(node, read_only=True)
    except BlockjobsError as error:
        _LOG.warning("node '%s' stays writable: %s", node.name, error)


class BlockJob(Job):
    """A job on nodes. Subclasses call `hold` for each node when they are created, and `let_go` in `clean`.

    Attributes:
        type_name: as in QAPI's `JobType`.
    """

    is_block_job: ClassVar[bool] = True
    type_name: ClassVar[str]

    @property
    def is_actively_synced(self) -> bool | None:
        """What `query-block-jobs` shows of a mirror; None for other types."""
        return None

    def __init__(self, host: JobHost, *, on_source_error: OnError, on_target_error: OnError) -> None:
        self.graph, self._bus = host.graph, host.bus
        self._policies = {Side.SOURCE: on_source_error, Side.TARGET: on_target_error}
        self._held: list[Root] = []
        self._forbidden: list[Node] = []
        self._key = ""

    async def hold(self, node: "Node", handle: JobHandle, *, name: str, needs: Perm = NONE, shares: Perm = ALL) -> None:
        """Attach the job to a node: it is paused when the node is drained, keeps it alive, and forbids operations.

        Args:
            name: the job's word for the node, as in QEMU's graph listings.
            needs, shares: what the job itself does there, and lets others do.

        Raises:
            PermissionConflict, UsageError: the rights are not to be had; the node is not held.
        """
        self._key = handle.spec.key
        root = await self.graph.claim(
            f"{self.type_name} job '{self._key}'",
            node,
            needs=needs,
            shares=shares,
            user=handle,
            name=name,
            follows=False,
        )
        self._held.append(root)
        self.forbid(node)

    def forbid(self, node: "Node") -> None:
        """Refuse operations on a node until `let_go`, without holding it."""
        node.block(f"block device is in use by block job: {self.type_name}", self)
        self._forbidden.append(node)

    async def let_go(self) -> None:
        """Detach from all nodes and allow everything again. Harmless when repeated."""
        while self._forbidden:
            self._forbidden.pop().unblock(self)
        while self._held:
            await self.graph.release(self._held.pop())

    async def share_all(self) -> None:
        """Let others do with the held nodes what they like; the job still holds them."""
        for root in self._held:
            await self.graph.change_claim(root, needs=root.rights.needs, shares=ALL)

    async def let_go_of(self, node: "Node") -> None:
        """Detach from one node early; it is closed if nothing else uses it."""
        while node in self._forbidden:
            self._forbidden.remove(node)
            node.unblock(self)
        for root in [root for root in self._held if root.node is node]:
            self._held.remove(root)
            await self.graph.release(root)

    def forgotten(self) -> Coroutine[Any, Any, None] | None:
        """See `Job`: a type that keeps its nodes until it is dismissed (spec/jobs.md §0) lets go of them here."""
        while self._forbidden:
            self._forbidden.pop().unblock(self)
        nodes = [self.graph.unclaim(root) for root in self._held]
        self._held.clear()
        return self._close_unused(nodes) if nodes else None

    async def _close_unused(self, nodes: "list[Node]") -> None:
        for node in nodes:
            try:
                await self.graph.tidy()
                await self.graph.close_unused(node)
            except BlockjobsError as error:
                _LOG.error("a node of the dismissed job '%s' could not be closed well: %s", self._key, error)

    def cancel(self, *, force: bool) -> bool:
        """See `Job`. A job that writes to a target that does not answer any more ends nevertheless."""
        if force:
            for node in self.written():
                node.cancel_in_flight()
        return True

    def written(self) -> "Iterable[Node]":
        """The nodes whose stuck requests a forced cancel lets fail."""
        return ()

    def policy(self, side: Side) -> OnError:
        """See `Job`."""
        return self._policies[side]

    def announce(self, milestone: Milestone, handle: JobHandle) -> None:
        """See `Job`."""
        key, meter = handle.spec.key, handle.progress
        speed = handle.life.speed_bytes_per_s
        match milestone:
            case Milestone.PENDING:
                self._bus.publish(BlockJobPending(type=handle.type, id=key))
            case Milestone.COMPLETED:
                self._bus.publish(
                    BlockJobCompleted(
                        type=handle.type,
                        device=key,
                        len=meter.total,
                        offset=meter.current,
                        speed=speed,
                        error=handle.error,
                    )
                )
            case Milestone.READY | Milestone.CANCELLED:
                kind = BlockJobReady if milestone is Milestone.READY else BlockJobCancelled
                self._bus.publish(
                    kind(type=handle.type, device=key, len=meter.total, offset=meter.current, speed=speed)
                )

    def announce_error(self, side: Side, action: Action) -> None:
        """See `Job`."""
        operation = IoOperation.READ if side is Side.SOURCE else IoOperation.WRITE
        self._bus.publish(BlockJobError(device=self._key, operation=operation, action=action))
