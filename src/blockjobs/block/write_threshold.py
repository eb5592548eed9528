"""`block-set-write-threshold`: an event when somebody writes past an offset of a node, so that its volume can grow.

A node whose threshold is set counts with another `NodeTally`, so that one without pays nothing. The event is sent once;
whoever wants the next one sets the next threshold. QEMU sends it before the write, we when it has ended, well or not:
one that the device had no room for is reported too. Discards that reach the node count, as in QEMU.
"""

from typing import TYPE_CHECKING, Annotated, ClassVar

from blockjobs.base.errors import UsageError
from blockjobs.block.tally import NodeTally
from blockjobs.schema.command import Event, event
from blockjobs.schema.types import UInt64, qapi

if TYPE_CHECKING:
    from blockjobs.block.graph import Graph
    from blockjobs.block.node import Node

_COUNTED = ("write", "zero", "discard")


@event("BLOCK_WRITE_THRESHOLD", since="2.3")
class BlockWriteThreshold(Event, frozen=True, kw_only=True):
    """A write went past a node's threshold, which is off again.

    Attributes:
        node_name: the node.
        amount_exceeded: bytes by which it went past.
        write_threshold: the offset that had been set.
    """

    node_name: str
    amount_exceeded: Annotated[int, qapi("uint64")]
    write_threshold: Annotated[int, qapi("uint64")]


class WatchedTally(NodeTally, kw_only=True):
    """The counts of a node that looks at where writes end.

    Attributes:
        node: whose counts these are.
        threshold: bytes from the start of the node; a write may end there, but not behind it.
    """

    watches: ClassVar[bool] = True
    node: "Node"
    threshold: int

    def ended(self, kind: str, end: int, length: int, *, began_ns: int, failed: bool, count: int = 1) -> None:
        """See `NodeTally`."""
        NodeTally.ended(self, kind, end, length, began_ns=began_ns, failed=failed, count=count)
        if end > self.threshold and kind in _COUNTED:
            self._exceeded(end)

    def reached(self, end: int) -> None:
        """See `NodeTally`."""
        NodeTally.reached(self, end)
        if end > self.threshold:
            self._exceeded(end)

    def _exceeded(self, end: int) -> None:
        node = self.node
        if node.tally is not self:
            return  # told already, or set anew, while this request was under way
        _count_plainly(node)
        node.graph.bus.publish(
            BlockWriteThreshold(
                node_name=node.name, amount_exceeded=end - self.threshold, write_threshold=self.threshold
            )
        )


def write_threshold(node: "Node") -> int:
    """The threshold of a node in bytes; 0 for none."""
    return node.tally.threshold if isinstance(node.tally, WatchedTally) else 0


def set_write_threshold(graph: "Graph", name: str, threshold: UInt64) -> None:
    """Say at which offset the next BLOCK_WRITE_THRESHOLD of a node is due; 0: none.

    Raises:
        UsageError: no such node.
    """
    node = next((each for each in graph.nodes() if each.name == name), None)
    if node is None:
        raise UsageError(f"Device '{name}' not found")
    _count_plainly(node)
    if threshold:
        tally = node.tally
        _count(node, WatchedTally(tally.clock, tally.write_end, tally.kinds, node=node, threshold=threshold))


def _count_plainly(node: "Node") -> None:
    if isinstance(node.tally, WatchedTally):
        _count(node, NodeTally(node.tally.clock, node.tally.write_end, node.tally.kinds))


def _count(node: "Node", tally: NodeTally) -> None:
    node.tally = node.in_flight.tally = tally
    node.graph.routes_changed()  # a filter that writes pass by is passed through from now on, or not any more
