"""A node of the graph: the only doors through which bytes are read and written (design §1.5)."""

import errno
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, NamedTuple

from blockjobs.base.buffers import Buffer, is_zero
from blockjobs.base.errors import UsageError
from blockjobs.base.span import Span
from blockjobs.block import requests
from blockjobs.block.block_status import block_status
from blockjobs.block.claims import ALL, CHANGES, NONE, Claim, Perm, Rights, Vertex
from blockjobs.block.driver import Driver, FilterDriver, FormatDriver, ProtocolDriver
from blockjobs.block.extents import Extent
from blockjobs.block.gate import Gate
from blockjobs.block.inflight import InFlight
from blockjobs.block.node_bitmap import NodeBitmap
from blockjobs.block.options import DetectZeroes, NodeOptions, tag_of
from blockjobs.block.settings import Settings
from blockjobs.block.tally import NodeTally
from blockjobs.block.tracker import RangeTracker
from blockjobs.block.users import Blocker, Edge, Root
from blockjobs.block.vocabulary import NO_LIMITS, NO_PERMS, Segment, Watch, ZeroMode

if TYPE_CHECKING:
    from blockjobs.block.graph import Graph
    from blockjobs.block.kept_info import Described

ALLOWED_ON_BACKING: Final = frozenset({"commit-source", "commit-target", "stream", "backup-source", "backup-target"})
"""Operations that being somebody's backing image does not forbid (spec/block-layer.md §3)."""


class Shortcut(NamedTuple):
    """What `quick` has found out about requests of one kind to a node.

    Attributes:
        generation: of the graph, in which this is true.
        target: the node that they are first of interest to.
        format: its driver, if that is a format: the bytes are in its child.
        below: the node with the bytes, `target` itself or its child.
        protocol: the driver of `below`; None if somebody must be asked on the way.
    """

    generation: int
    target: "Node"
    format: FormatDriver | None
    below: "Node"
    protocol: ProtocolDriver | None


class Node:
    """A named vertex with a driver. Made by the graph only; `driver` is set once it is open.

    Attributes:
        options: as given.
        edges: nodes below by edge name; `children` is the same without the edges' rights, shared with the driver.
        parents: who uses this node, newest first.
        rights: the sum over `parents`.
        monitor_owned: made by blockdev-add and not yet deleted.
        bitmaps: dirty bitmaps of this node, oldest first; those of jobs have no name.
        gate: changes wait there before they begin; None while nobody holds them back.
        tally: counts of its requests.
        populating: runs that are being copied up from the backing node; see `populate`.
        implicit: a filter that a job put there without a name given; skipped where users see "the backing image".
        heir_of: the node inside whose description this one was described: what that one is told holds here too.
        turns_read_only: it was writable until the change of the graph that is under way.
        serial: grows from node to node.
        read_shortcut, write_shortcut: kept for `quick`.
        described: kept for `kept_info`; by whether images below are left out.
    """

    driver: Driver

    def __init__(self, graph: "Graph", name: str, options: NodeOptions, settings: Settings, *, serial: int) -> None:
        self.graph, self.name, self.options, self.settings, self.serial = graph, name, options, settings, serial
        self.driver_name = tag_of(options)
        self.edges: dict[str, Edge] = {}
        self.children: dict[str, Node] = {}
        self.parents: list[Edge | Root] = []
        self.rights = Rights(NONE, ALL)
        self.monitor_owned = False
        self.implicit = False
        self.heir_of: Node | None = None
        self.turns_read_only = False
        self.is_open = False
        self.tracker = RangeTracker()
        self.populating = RangeTracker()
        self.tally = NodeTally(graph.clock)
        self.in_flight = InFlight(self.tally, name)
        self.bitmaps: list[NodeBitmap] = []
        self.gate: Gate | None = None
        self.read_shortcut: Shortcut | None = None
        self.write_shortcut: Shortcut | None = None
        self.described: dict[bool, Described] = {}
        self._blockers: list[Blocker] = []
        self._routes: dict[Watch, Node] = {}
        self._routes_generation = -1

    def __repr__(self) -> str:
        return f"<Node {self.name} ({self.driver_name})>"

    # --- what it is

    @property
    def read_only(self) -> bool:
        """Whether nobody may write."""
        return self.settings.read_only

    @property
    def refusal_to_write(self) -> str:
        """See `Vertex`."""
        if self.turns_read_only:
            return f"Read-only block node '{self.name}' cannot support read-write users"
        return "Block node is read-only"

    @property
    def length(self) -> int:
        """Bytes that the node shows."""
        return self.driver.length

    @property
    def open_ended(self) -> bool:
        """See `Driver.open_ended`."""
        return self.driver.open_ended

    @property
    def detects_zeroes(self) -> bool:
        """Whether writes are looked at for zeroes."""
        return self.settings.detect_zeroes is not DetectZeroes.OFF

    @property
    def filename(self) -> str:
        """The image's name as users gave it, or `json:{...}`."""
        return self.graph.filename_of(self)

    @property
    def storage(self) -> "Node":
        """The first node at or below this one that is no filter: where allocation happens and tickets are taken."""
        node = self
        while isinstance(driver := node.driver, FilterDriver):
            node = node.children[driver.filtered]
        return node

    @property
    def backing(self) -> "Node | None":
        """The backing node of the first format at or below this node."""
        return self.storage.children.get("backing")

    @property
    def cluster_size(self) -> int | None:
        """Allocation unit of the first format at or below this node, in bytes; None if it has none."""
        size = self.storage.driver.info().get("cluster-size")
        return size if isinstance(size, int) else None

    # --- as a vertex of the permission solver

    @property
    def claims(self) -> Sequence[Claim]:
        """See `Vertex`."""
        return self.parents

    @property
    def below(self) -> Mapping[str, tuple[Vertex, Claim]]:
        """See `Vertex`."""
        return {name: (edge.node, edge) for name, edge in self.edges.items()}

    def child_rights(self, edge: str, needs: Perm, shares: Perm) -> Rights:
        """See `Vertex`."""
        if not self.is_open:
            return self.edges[edge].rights
        if not self.settings.is_active and not needs:
            return Rights(*NO_PERMS)
        return Rights(*self.driver.child_perms(edge, needs, shares))

    def permits(self, needs: Perm) -> bool:
        """Whether the users of this node together hold these rights."""
        return needs & ~self.rights.needs == NONE

    # --- op blockers

    def block(self, reason: str, owner: object) -> None:
        """Refuse all operations on this node until `unblock(owner)`."""
        self._blockers.insert(0, Blocker(reason, owner))

    def unblock(self, owner: object) -> None:
        """Remove all blockers of `owner`."""
        self._blockers = [blocker for blocker in self._blockers if blocker.owner is not owner]

    def check_op(self, operation: str) -> None:
        """Refuse an operation that somebody blocks (spec/block-layer.md §3).

        Raises:
            UsageError: `Node 'x' is busy: ...`.
        """
        if self._blockers:
            raise UsageError(f"Node '{self.name}' is busy: {self._blockers[0].reason}")
        if operation in ALLOWED_ON_BACKING:
            return
        for parent in self.parents:
            if isinstance(parent, Edge) and parent.name == "backing":
                user = parent.parent
                if not user.is_open or isinstance(user.driver, FormatDriver):  # it may be about to be opened
                    raise UsageError(f"Node '{self.name}' is busy: node is used as backing hd of '{user.name}'")

    # --- dirty bitmaps

    def attach_bitmap(self, bitmap: NodeBitmap) -> None:
        """Let `bitmap`, of this node's length, record what changes from now on."""
        assert bitmap.map.length == self.length, (bitmap, self.length)
        self.bitmaps.append(bitmap)
        self.graph.routes_changed()

    def detach_bitmap(self, bitmap: NodeBitmap) -> None:
        """End what `attach_bitmap` began."""
        self.bitmaps.remove(bitmap)
        self.graph.routes_changed()

    def record(self, span: Span) -> None:
        """`span` has changed, or may have: tell the bitmaps. For whoever passes by the doors."""
        for bitmap in self.bitmaps:
            if bitmap.map.length != self.length:  # a file grows with writes past its end
                bitmap.resize(self.length)
            bitmap.record(span)

    @contextmanager
    def recorded(self, span: Span) -> Iterator[None]:
        """A change of `span` is under way; it counts once it has ended, however it did."""
        try:
            yield
        finally:
            if self.bitmaps:
                self.record(span)

    # --- routes

    def route(self, kind: Watch) -> "Node":
        """The node that a request of this kind is first of interest to: filters that do not watch it are skipped."""
        if self._routes_generation != self.graph.generation:
            self._routes.clear()
            self._routes_generation = self.graph.generation
        target = self._routes.get(kind)
        if target is None:
            target = self
            while isinstance(driver := target.driver, FilterDriver) and not target._cares(driver, kind):
                target = target.children[driver.filtered]
            self._routes[kind] = target
        return target

    def _cares(self, driver: FilterDriver, kind: Watch) -> bool:
        if driver.watches & kind or driver.limits != NO_LIMITS:
            return True
        if (self.bitmaps or self.tally.watches) and kind & Watch.CHANGES:
            return True
        if kind is Watch.WRITE:
            return self.detects_zeroes
        if kind is Watch.FLUSH:
            return self.settings.no_flush
        return kind in Watch.ZERO | Watch.DISCARD and not self.settings.unmap

    # --- the doors

    async def read(self, at: int, length: int) -> bytes:
        """Bytes of the run.

        Raises:
            IoFailure: EIO past the end (zeroes if `open_ended`), else what the medium said.
        Waits: earlier overlapping writes, then I/O. Checkpoint: no.
        """
        content = bytearray(length)
        await self.read_into(at, memoryview(content))
        return bytes(content)

    async def read_into(self, at: int, buffer: memoryview) -> None:
        """As `read`, without a copy."""
        length = len(buffer)
        if not length:
            return
        target = self.route(Watch.READ)
        with self.in_flight.request("read", at, length):
            if target is not self:
                await target.read_into(at, buffer)
                return
            if at + length > self.length:
                buffer = self._cut_short(at, buffer)
            if buffer:
                await requests.read(self, at, buffer)

    def _cut_short(self, at: int, buffer: memoryview) -> memoryview:
        if not self.open_ended:
            raise requests.io_error(self, at, len(buffer))
        inside = max(0, self.length - at)
        buffer[inside:] = bytes(len(buffer) - inside)
        return buffer[:inside]

    async def write(self, at: int, content: Buffer, *, fua: bool = False, compressed: bool = False) -> None:
        """Write; with `fua` durable on return. Grows the node if `open_ended` and one of its users may resize.

        Args:
            compressed: a format that can compress stores it so.

        Raises:
            IoFailure: EPERM on a read-only node, EIO past the end, else what the medium said. A format shows the old
                content then; of a protocol's run any part may be new.
        Waits: earlier overlapping requests, then I/O. Checkpoint: no.
        """
        if self.gate is not None:
            await (await self.gate.passed(self)).write(at, content, fua=fua)
            return
        length = len(content)
        self.check_write(at, length)
        if not length:
            return
        if self.detects_zeroes and is_zero(content if isinstance(content, bytes | bytearray) else bytes(content)):
            mode = ZeroMode.UNMAP if self.settings.detect_zeroes is DetectZeroes.UNMAP else ZeroMode.KEEP
            await self.zero(Span(at, length), mode=mode)
            if fua:
                await self.flush()
            return
        target = self.route(Watch.WRITE)
        with self.in_flight.request("write", at, length):
            try:
                if target is self:
                    await requests.write(self, at, content, fua=fua, compressed=compressed)
                else:
                    await target.write(at, content, fua=fua, compressed=compressed)
            finally:  # as `recorded`, at less cost
                if self.bitmaps:
                    self.record(Span(at, length))

    async def zero(self, span: Span, *, mode: ZeroMode = ZeroMode.UNMAP) -> None:
        """Make the run read as zeroes. Raises, Waits: as `write`, but any part may be zeroed after an error."""
        if self.gate is not None:
            await (await self.gate.passed(self)).zero(span, mode=mode)
            return
        self.check_write(span.at, span.length)
        if not span:
            return
        if not self.settings.unmap:
            mode = ZeroMode.KEEP
        target = self.route(Watch.ZERO)
        with self.in_flight.request("zero", span.at, span.length), self.recorded(span):
            if target is self:
                await requests.zero(self, span, mode)
            else:
                await target.zero(span, mode=mode)

    async def discard(self, span: Span) -> None:
        """Give space back, if the node was opened with discard=unmap. Raises, Waits: as `zero`."""
        if self.gate is not None:
            await (await self.gate.passed(self)).discard(span)
            return
        self.check_write(span.at, span.length)
        if not span or not self.settings.unmap:
            return
        target = self.route(Watch.DISCARD)
        with self.in_flight.request("discard", span.at, span.length), self.recorded(span):
            if target is self:
                await requests.discard(self, span)
            else:
                await target.discard(span)

    async def flush(self) -> None:
        """Everything completed before is durable on return, on every file involved (durability I7).

        Raises:
            IoFailure: some of it may be lost.
        Waits: data syncs. Checkpoint: no.
        """
        if self.settings.no_flush:
            return
        driver = self.driver
        with self.in_flight.request("flush", 0, 0):
            if isinstance(driver, FilterDriver):
                child = self.children[driver.filtered]
                await (driver.flush(child) if driver.watches & Watch.FLUSH else child.flush())
            else:
                assert isinstance(driver, FormatDriver | ProtocolDriver)
                if not self.read_only:
                    await driver.flush()

    async def resize(self, length: int) -> None:
        """Set the length; the user holds RESIZE.

        Raises:
            UsageError: the node is read-only, or its driver cannot do it or not to this length.
            IoFailure: the length is as before.
        Waits: I/O. Checkpoint: no.
        """
        if self.read_only:
            raise UsageError("Image is read-only")
        assert Perm.RESIZE in self.rights.needs, f"{self} has no user that may resize"
        driver = self.driver
        with self.in_flight.request("resize", length, 0):
            if isinstance(driver, FilterDriver):
                await driver.resize(length, self.children[driver.filtered])
            else:
                assert isinstance(driver, FormatDriver | ProtocolDriver)
                await driver.resize(length)
        for bitmap in self.bitmaps:
            bitmap.resize(self.length)

    def cancel_in_flight(self) -> None:
        """Let requests fail that are stuck below (an NBD server gone), but for those to backing images."""
        self.driver.cancel_in_flight()
        for edge, child in self.children.items():
            if edge == self.driver.filtered if isinstance(self.driver, FilterDriver) else edge != "backing":
                child.cancel_in_flight()

    def debug_event(self, event: str) -> None:
        """See `Child`: reaches this node only, as in QEMU."""
        self.driver.debug_event(event)

    def check_write(self, at: int, length: int) -> None:
        """The conditions of every change.

        Raises:
            IoFailure: EPERM on a read-only node, EIO past the end.
        """
        if self.read_only:
            raise requests.io_error(self, at, length, errno.EPERM)
        assert self.rights.needs & CHANGES, f"{self} has no user that may write"
        if at + length > self.length and not (self.open_ended and Perm.RESIZE in self.rights.needs):
            raise requests.io_error(self, at, length)

    # --- status

    async def status(self, span: Span) -> list[Segment]:
        """What this layer says about the run, filters skipped; `span` must be inside the node.

        Raises:
            IoFailure, ImageCorrupt: tables could not be read.
        Waits: metadata reads. Checkpoint: no.
        """
        driver = self.driver
        with self.in_flight.request("status", span.at, span.length):
            if isinstance(driver, FilterDriver):
                if driver.watches & Watch.STATUS:
                    await driver.status(span)
                return await self.children[driver.filtered].status(span)
            if isinstance(driver, FormatDriver):
                async with self.tracker.shared(span):
                    return await driver.resolve(span)
            assert isinstance(driver, ProtocolDriver)
            return await driver.status(span)

    async def block_status(self, span: Span, *, base: "Node | None" = None) -> list[Extent]:
        """What the run reads as, and which node of the chain provides it; see `block_status.block_status`."""
        return await block_status(self, span, base=base)
