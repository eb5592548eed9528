"""The short way for small requests: what can be done at once, without a task and without waiting for anything.

Everything here either does all that the long way (`requests`) would do, or nothing. It begins and ends within one turn
of the loop, so nobody can see such a request under way: it takes no ticket and no place among those in flight. Whoever
holds requests back while a node is drained must not come here meanwhile.
"""

from blockjobs.base.buffers import zeroes
from blockjobs.base.errors import IoFailure
from blockjobs.base.span import Span
from blockjobs.block.claims import CHANGES
from blockjobs.block.driver import FormatDriver, OwnPlaces, ProtocolDriver
from blockjobs.block.node import Node, Shortcut
from blockjobs.block.requests import plain_medium
from blockjobs.block.vocabulary import Watch


class ReadRun:
    """Reads of one node within one step of the loop: what they share is looked up once, and `end` counts them."""

    __slots__ = ("_began_ns", "_count", "_end", "_node", "_size_bytes", "_target")

    def __init__(self, node: Node) -> None:
        self._node = node
        self._target = _read_shortcut(node).target
        self._end = self._target.driver.length
        self._count = self._size_bytes = 0
        self._began_ns = node.graph.clock.now_ns()

    def read(self, at: int, view: memoryview) -> bool:
        """Fill `view` if the bytes lie in one run of a file whose pages the kernel has in memory, or are zeroes.

        Returns:
            False if it is not so, if a filter wants to see the read, or if an overlapping write is under way: what
            `view` holds is unspecified then, and the long way must be gone.
        """
        length = len(view)
        if at + length > self._end or not _fill(self._node, at, view):
            return False
        self._count += 1
        self._size_bytes += length
        return True

    def end(self) -> None:
        """Count what was read, on the nodes whose doors the long way passes."""
        if not self._count:
            return
        for each in (self._node,) if self._target is self._node else (self._target, self._node):
            each.tally.ended("read", 0, self._size_bytes, began_ns=self._began_ns, failed=False, count=self._count)


def read_now(node: Node, at: int, view: memoryview) -> bool:
    """One read; see `ReadRun.read`."""
    run = ReadRun(node)
    done = run.read(at, view)
    run.end()
    return done


def _fill(node: Node, at: int, view: memoryview) -> bool:
    """See `ReadRun.read`; the caller has checked the range."""
    _, target, format, below, protocol = _read_shortcut(node)
    length = len(view)
    if target.tracker.live and not _is_free(target, at, length):
        return False
    encipherment = None
    if format is not None:
        encipherment = format.encipherment
        place = format.place_now(at, length)
        # Filters over the file may listen for the debug events that the long way raises.
        if place is None or (protocol is None and below.route(Watch.READ) is not below):
            return False
        name, child_at = place
        if not name:
            view[:] = zeroes(length)
            return True
        if name != "file" or protocol is None:
            if name != "backing" and encipherment is not None:
                return False
            below = target.children[name]
            inside = child_at + length <= below.route(Watch.READ).length
            return inside and not _has_own_door(below) and _fill(below, child_at, view)
        if encipherment is not None:
            encipherment = encipherment.placed(at, child_at)
        at = child_at
        if below.tracker.live and not _is_free(below, at, length):
            return False
    medium = plain_medium(protocol, at, length, encipherment) if protocol is not None else None
    return medium is not None and medium.read_cached(at, view)


def _read_shortcut(node: Node) -> Shortcut:
    shortcut = node.read_shortcut
    if shortcut is None or shortcut.generation != node.graph.generation:
        shortcut = node.read_shortcut = _shortcut(node, Watch.READ)
    return shortcut


def _has_own_door(node: Node) -> bool:
    """Whether the long way asks the node itself: its clusters may move meanwhile."""
    storage = node.route(Watch.READ)
    return isinstance(storage.driver, FormatDriver) and storage.driver.write_align > 1 and not storage.read_only


def _is_free(node: Node, at: int, length: int) -> bool:
    return node.tracker.is_free(Span(at, length), exclusive=False)


class WriteRun:
    """Writes to one node within one step of the loop: what they share is looked up once, and `end` counts them."""

    __slots__ = ("_began_ns", "_count", "_doors", "_end", "_node", "_own_place", "_reached", "_shortcut", "_size_bytes")

    def __init__(self, node: Node) -> None:
        shortcut = node.write_shortcut
        if shortcut is None or shortcut.generation != node.graph.generation:
            shortcut = node.write_shortcut = _shortcut(node, Watch.WRITE)
        self._node, self._shortcut = node, shortcut
        _, target, format, below, protocol = shortcut
        self._own_place: OwnPlaces | None = None
        if protocol is not None and node.gate is None and target.gate is None and below.gate is None:
            self._own_place = _same_place if format is None else format.own_places_now()
        self._doors = (node,) if node is target else (target, node)
        self._end = target.driver.length
        self._count = self._size_bytes = self._reached = 0
        self._began_ns = node.graph.clock.now_ns()

    def write(self, at: int, content: memoryview) -> bool:
        """Write, if nobody must be asked and the bytes need only be copied over others in the kernel's memory.

        Returns:
            False if it is not so: nothing was done, and the long way must be gone.

        Raises:
            IoFailure: as `Node.write`.
        """
        generation, target, format, below, protocol = self._shortcut
        length = len(content)
        # Who heard of the write before may have changed the graph.
        if self._own_place is None or protocol is None or generation != self._node.graph.generation:
            return False
        if at + length > self._end or (target.tracker.live and not _is_free_to_write(target, at, length)):
            return False
        if (place := self._own_place(at, length)) is None:
            return False
        encipherment = None if format is None else format.encipherment
        if encipherment is not None:
            encipherment = encipherment.placed(at, place)
        medium = plain_medium(protocol, place, length, encipherment)
        if medium is None:
            return False
        try:
            if not medium.write_cached(place, (content,)):
                return False
        except OSError as error:
            for each in self._doors:
                each.record(Span(at, length))
                each.tally.ended("write", at + length, length, began_ns=self._began_ns, failed=True)
            raise IoFailure.wrap(error, f"node '{self._node.name}' at {at}+{length}") from error
        for each in self._doors:
            if each.bitmaps:
                each.record(Span(at, length))
        self._count += 1
        self._size_bytes += length
        if at + length > self._reached:
            self._reached = at + length
        if below is not target:
            below.tally.reached(place + length)
        if self._node.tally.watches or target.tally.watches:
            self.end()
        return True

    def end(self) -> None:
        """Count what was written, on the nodes whose doors the long way passes."""
        if not self._count:
            return
        for each in self._doors:
            each.tally.ended(
                "write", self._reached, self._size_bytes, began_ns=self._began_ns, failed=False, count=self._count
            )
        self._count = self._size_bytes = self._reached = 0
        self._began_ns = self._node.graph.clock.now_ns()


def _same_place(at: int, _length: int) -> int:
    return at


def write_now(node: Node, at: int, content: memoryview) -> bool:
    """One write; see `WriteRun.write`."""
    run = WriteRun(node)
    done = run.write(at, content)
    run.end()
    return done


def _is_free_to_write(target: Node, at: int, length: int) -> bool:
    span, driver = Span(at, length), target.driver
    align = driver.write_align if isinstance(driver, FormatDriver) else 1
    return target.tracker.is_free(span.widen(align), exclusive=True)


def _shortcut(node: Node, kind: Watch) -> Shortcut:
    """Where requests to `node` go, and whether nobody on the way has a say in them."""
    target = below = node.route(kind)
    format = target.driver if isinstance(target.driver, FormatDriver) else None
    if format is not None:
        below = target.children["file"]
    is_clear = below.route(kind) is below
    if kind is Watch.WRITE:
        is_clear = is_clear and not (format is not None and below.bitmaps)
        for each in (node, target, below):
            is_clear = is_clear and not (each.read_only or each.detects_zeroes) and bool(each.rights.needs & CHANGES)
    protocol = below.driver if is_clear and isinstance(below.driver, ProtocolDriver) else None
    return Shortcut(node.graph.generation, target, format, below, protocol)


def zeroes_fast(node: Node, span: Span) -> bool:
    """Whether making a run of `node` read as zeroes costs less than writing so many bytes.

    A format must copy or write what is left of a unit, so there must be a whole one.
    """
    storage = node.storage
    while isinstance(storage.driver, FormatDriver) and storage.driver.write_align == 1:
        storage = storage.children["file"].storage
    driver = storage.driver
    if isinstance(driver, FormatDriver):
        end = storage.length if span.end == storage.length else span.end // driver.write_align * driver.write_align
        return not span or (driver.zeroes_fast and span.narrow(driver.write_align).at < end)
    return not isinstance(driver, ProtocolDriver) or driver.zeroes_fast
