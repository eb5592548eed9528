"""The job types `snapshot-save`, `snapshot-load` and `snapshot-delete` (spec/jobs.md §7).

Everything is checked inside the job, as in QEMU. They do their work in one go: pause and cancel take effect after it.
"""

from abc import abstractmethod
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

from blockjobs.base.buffers import Buffer
from blockjobs.base.errors import BlockjobsError, UsageError
from blockjobs.block import group_doubt
from blockjobs.block.internal_snapshots import InternalSnapshot
from blockjobs.block.peer_images import peer_snapshots
from blockjobs.jobs import snapshot_group
from blockjobs.jobs.machine_state import PIECE_BYTES, Machine
from blockjobs.jobs.snapshot_group import find, snapshots_of
from blockjobs.jobs.undoable_load import UndoableLoad
from blockjobs.lifecycle.context import JobContext
from blockjobs.lifecycle.job import Job
from blockjobs.lifecycle.registry import job_type

if TYPE_CHECKING:
    from blockjobs.block.graph import Graph
    from blockjobs.block.node import Node
    from blockjobs.jobs.block_job import JobHost

GROUP_BYTES: Final = 16


class _SnapshotJob(Job):
    """What the three have in common.

    Args:
        host: graph, machine and the rest.
        tag: name of the snapshot.
        devices: names of nodes.
    """

    def __init__(self, host: "JobHost", tag: str, devices: Sequence[str]) -> None:
        self._graph: Graph = host.graph
        self._machine: Machine = host.machine
        self._tag, self._devices = tag, devices

    async def run(self, ctx: JobContext) -> None:
        """See `Job`. Progress is 1 of 1 when the attempt is over, also if it failed. Checkpoint: no. Waits: I/O."""
        ctx.progress.set_remaining(1)
        try:
            async with self._machine.snapshots:
                nodes = self._nodes()
                self._check(nodes)
                async with self._graph.drained(None):
                    for node in nodes:
                        await group_doubt.finish_decided(snapshots_of(node), peer_snapshots(node))
                await self._work(ctx, nodes)
        finally:
            ctx.progress.advance(1)

    def _check(self, nodes: "list[Node]") -> None:
        """Refuse what cannot be done, before anything is.

        Raises:
            UsageError: see the types.
        """

    @abstractmethod
    async def _work(self, ctx: JobContext, nodes: "list[Node]") -> None:
        """Do it."""

    def _nodes(self) -> "list[Node]":
        """The nodes, after QEMU's checks.

        Raises:
            UsageError: one is not there, or cannot have snapshots.
        """
        if not self._devices:
            raise UsageError("At least one device is required for snapshot")
        named = {node.name: node for node in self._graph.nodes()}
        nodes: list[Node] = []
        for name in self._devices:
            node = named.get(name)
            if node is None:
                raise UsageError(f"No block device node '{name}'")
            if node.driver.internal_snapshots is None or node.read_only:
                raise UsageError(f"Device '{name}' is writable but does not support snapshots")
            if node not in nodes:
                nodes.append(node)
        return nodes

    def _new_group(self) -> str:
        return self._graph.entropy.below(1 << 8 * GROUP_BYTES).to_bytes(GROUP_BYTES, "big").hex()

    def _all_have(self, nodes: "list[Node]") -> bool:
        return all(find(node, self._tag) is not None for node in nodes)


class _WithState(_SnapshotJob):
    """Saving and loading: one of the devices has the machine's state."""

    def __init__(self, host: "JobHost", tag: str, vmstate: str, devices: Sequence[str]) -> None:
        super().__init__(host, tag, devices)
        self._vmstate = vmstate

    def _check(self, nodes: "list[Node]") -> None:
        self._state_node(nodes)

    def _state_node(self, nodes: "list[Node]") -> "Node":
        for node in nodes:
            if node.name == self._vmstate:
                return node
        raise UsageError(f"vmstate block device '{self._vmstate}' does not exist")

    @asynccontextmanager
    async def _standing_still(self, ctx: JobContext) -> AsyncIterator[None]:
        """Stop a machine that runs, and let it go on afterwards; what went wrong first is what the job tells."""
        was_running = await self._machine.stop()
        try:
            yield
        except BaseException:
            if was_running:
                try:
                    await self._machine.cont()
                except BlockjobsError as error:
                    ctx.log.error("the machine does not go on: %s", error)
            raise
        if was_running:
            await self._machine.cont()


class _Sink:
    """The vm state area of a node, which nobody uses while a piece is written there."""

    def __init__(self, graph: "Graph", node: "Node") -> None:
        self._graph, self._node = graph, node
        self.length = 0

    async def write(self, content: Buffer) -> None:
        """See `ByteSink`."""
        view = memoryview(content)
        for start in range(0, len(view), PIECE_BYTES):
            piece = view[start : start + PIECE_BYTES]
            async with self._graph.drained(self._node):
                await snapshots_of(self._node).write_vm_state(self.length, bytes(piece))
            self.length += len(piece)


class _Source:
    """The machine state of a snapshot."""

    def __init__(self, node: "Node", entry: InternalSnapshot) -> None:
        self._node, self._id, self.length = node, entry.id, entry.vm_state_bytes
        self._at = 0

    async def read(self, length_max: int = PIECE_BYTES) -> bytes:
        """See `ByteSource`."""
        length = min(length_max, PIECE_BYTES, self.length - self._at)
        content = await snapshots_of(self._node).read_vm_state(self._id, self._at, length) if length else b""
        self._at += length
        return content


@job_type("snapshot-save")
class SnapshotSaveJob(_WithState):
    """Saves the machine's state, and all devices with it."""

    async def _work(self, ctx: JobContext, nodes: "list[Node]") -> None:
        state_node = self._state_node(nodes)
        if self._all_have(nodes):
            raise UsageError(f"Snapshot '{self._tag}' already exists in one or more devices")
        async with self._standing_still(ctx):
            await self._save(ctx, state_node, [state_node, *(node for node in nodes if node is not state_node)])

    async def _save(self, ctx: JobContext, state_node: "Node", nodes: "list[Node]") -> None:
        sink = _Sink(self._graph, state_node)
        try:
            await self._machine.provider.save(sink)
            if not sink.length:
                raise UsageError("The machine has no state")
            async with self._graph.drained(None):
                for node in nodes:
                    await node.flush()
                await snapshot_group.take(
                    nodes,
                    self._tag,
                    group=self._new_group(),
                    date_ns=ctx.clock.wall_ns(),
                    vm_clock_ns=ctx.clock.now_ns(),
                    vm_state_bytes=sink.length,
                )
        except BaseException:
            async with self._graph.drained(state_node):
                await snapshots_of(state_node).drop_vm_state()
            raise


@job_type("snapshot-load")
class SnapshotLoadJob(_WithState):
    """Makes all devices, and the machine, what they were."""

    async def _work(self, ctx: JobContext, nodes: "list[Node]") -> None:
        state_node = self._state_node(nodes)
        if not self._all_have(nodes):
            raise UsageError(f"Snapshot '{self._tag}' does not exist in one or more devices")
        entry = find(state_node, self._tag)
        assert entry is not None
        if not entry.vm_state_bytes:
            raise UsageError("This is a disk-only snapshot. Revert to it  offline using qemu-img")
        for node in nodes:
            try:
                snapshot_group.check_may_apply(node)
            except UsageError as error:
                raise UsageError(f"Could not load snapshot '{self._tag}' on '{node.name}': {error}") from error
        async with self._standing_still(ctx):
            await self._load(ctx, state_node, nodes, _Source(state_node, entry))

    async def _load(self, ctx: JobContext, state_node: "Node", nodes: "list[Node]", source: _Source) -> None:
        """Apply everywhere, then let the machine take its state; undo all of it if something fails."""
        ordered = [state_node, *(node for node in nodes if node is not state_node)]
        undo = UndoableLoad(ordered, self._new_group())
        state_bytes = await self._keep_state(state_node)
        changes = False
        try:
            async with self._graph.drained(None):
                await undo.prepare(date_ns=ctx.clock.wall_ns(), vm_state_bytes=state_bytes)
            await self._machine.provider.disks_change()
            changes = True
            async with self._graph.drained(None):
                for node in nodes:
                    entry = find(node, self._tag)
                    assert entry is not None
                    await self._apply(node, entry.id)
            await self._machine.provider.load(source)
            async with self._graph.drained(None):
                await undo.decide()
        except BaseException:
            await self._undo(ctx, undo, machine_too=changes and state_bytes > 0)
            raise
        async with self._graph.drained(None):
            await undo.forget()

    async def _keep_state(self, state_node: "Node") -> int:
        """Put the machine's present state where the snapshot that undoes everything will have it; its length."""
        if not await self._machine.provider.has_state():
            return 0
        sink = _Sink(self._graph, state_node)
        try:
            await self._machine.provider.save(sink)
        except BaseException:
            async with self._graph.drained(state_node):
                await snapshots_of(state_node).drop_vm_state()
            raise
        return sink.length

    async def _apply(self, node: "Node", id: str) -> None:
        try:
            await snapshots_of(node).apply(id)
        except BlockjobsError as error:
            raise UsageError(f"Could not load snapshot '{self._tag}' on '{node.name}': {error}") from error

    async def _undo(self, ctx: JobContext, undo: UndoableLoad, *, machine_too: bool) -> None:
        """Make devices and machine what they were before the load, as far as that is possible."""
        async with self._graph.drained(None):
            await undo.apply()
        if machine_too and (kept := undo.machine_state) is not None:
            try:
                await self._machine.provider.load(_Source(*kept))
            except BlockjobsError as error:
                ctx.log.error("the machine could not be made what it was before the load: %s", error)
        async with self._graph.drained(None):
            await undo.take_back()


@job_type("snapshot-delete")
class SnapshotDeleteJob(_SnapshotJob):
    """Deletes the first snapshot of that name on each device that has one, on all or on none."""

    async def _work(self, ctx: JobContext, nodes: "list[Node]") -> None:
        async with self._graph.drained(None):
            await snapshot_group.delete(nodes, self._tag, group=self._new_group())
