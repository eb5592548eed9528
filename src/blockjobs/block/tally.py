"""Counts of a node's requests: cheap enough for every request to pass through."""

from typing import ClassVar

from msgspec import Struct, field

from blockjobs.base.clock import Clock


class Tally(Struct):
    """Requests of one kind that have ended. Those that failed count in `failed` only."""

    operations: int = 0
    size_bytes: int = 0
    time_ns: int = 0
    failed: int = 0


class NodeTally(Struct):
    """All that a node counts.

    Attributes:
        clock: of the graph.
        write_end: where the highest write so far ended, in bytes from the start of the node.
        watches: all writes must be counted, also on a filter that they could pass by.
    """

    watches: ClassVar[bool] = False
    clock: Clock
    write_end: int = 0
    kinds: dict[str, Tally] = field(default_factory=dict)

    def of(self, kind: str) -> Tally:
        """The counts of one kind: read, write, zero, discard, flush, ..."""
        tally = self.kinds.get(kind)
        if tally is None:
            tally = self.kinds[kind] = Tally()
        return tally

    def ended(self, kind: str, end: int, length: int, *, began_ns: int, failed: bool, count: int = 1) -> None:
        """A request up to the offset `end` is over, or `count` in a row that have `length` bytes together."""
        tally = self.kinds.get(kind) or self.of(kind)
        if failed:
            tally.failed += count
            return
        tally.operations += count
        tally.size_bytes += length
        tally.time_ns += self.clock.now_ns() - began_ns
        if end > self.write_end and kind in ("write", "zero"):
            self.write_end = end

    def reached(self, end: int) -> None:
        """A write up to `end` has passed, or is about to pass, beside the doors."""
        if end > self.write_end:
            self.write_end = end
