"""Disks that fail on purpose: the n-th request, no more space, a sync that fails for good (spec/durability.md §4)."""

import errno as codes
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from blockjobs.base.buffers import Buffer
from blockjobs.base.errors import error_text
from blockjobs.block.medium import Allocation, Medium
from blockjobs.testing.disk import SECTOR, copy_through_memory


class Operation(StrEnum):
    """Kinds of call that a fault can hit. A copy between media counts as reads and writes.

    GROW is any call that would make the disk longer, whatever else it counts as.
    """

    READ = "read"
    WRITE = "write"
    ZERO = "zero"
    DISCARD = "discard"
    SYNC = "sync"
    TRUNCATE = "truncate"
    GROW = "grow"
    STATUS = "status"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Fails calls number `nth` … `nth + times - 1` (from 1) of an operation, or of all operations if that is None.

    Attributes:
        short: a failing write first writes half of its sectors, as a full disk does.
    """

    nth: int
    operation: Operation | None = None
    errno: int = codes.EIO
    times: int = 1
    short: bool = False

    def hits(self, number: int) -> bool:
        """Whether call `number` of the fault's operation fails."""
        return self.nth <= number < self.nth + self.times


@dataclass(slots=True, eq=False)
class FaultPlan:
    """What fails, and a count of what was called; may be shared by several media.

    Attributes:
        space_bytes: how many bytes may still be written (counting overwrites too); None: no end.
        calls: per operation, and under None in all.
        hits: calls that failed; failed_syncs: those of them that poisoned a medium.
    """

    faults: list[Fault] = field(default_factory=list)
    space_bytes: int | None = None
    calls: Counter[Operation | None] = field(default_factory=Counter)
    hits: int = 0
    failed_syncs: int = 0

    def add(self, fault: Fault) -> None:
        """Let a fault hit, with its `nth` counted from now on."""
        self.faults.append(replace(fault, nth=fault.nth + self.calls[fault.operation]))

    def cure(self) -> None:
        """Nothing fails any more, except what a failed sync has poisoned."""
        self.faults.clear()
        self.space_bytes = None

    def judge(self, operation: Operation, length: int = 0, *, grows: bool = False) -> tuple[int, int]:
        """Count a call; returns (errno, bytes to write nevertheless), with errno 0 for success."""
        kinds = (None, operation, Operation.GROW) if grows else (None, operation)
        self.calls.update(kinds)
        for fault in self.faults:
            if fault.operation in kinds and fault.hits(self.calls[fault.operation]):
                self.hits += 1
                self.failed_syncs += operation is Operation.SYNC
                return fault.errno, length // 2 // SECTOR * SECTOR if fault.short else 0
        if self.space_bytes is not None and operation in (Operation.WRITE, Operation.ZERO):
            if length > self.space_bytes:
                self.hits += 1
                fits, self.space_bytes = self.space_bytes // SECTOR * SECTOR, 0
                return codes.ENOSPC, fits
            self.space_bytes -= length
        return 0, length


class FaultyMedium(Medium):
    """Another medium, with faults. A failed sync poisons it: every later sync fails, until it is opened anew (I8).

    Args:
        inner: the other one.
        plan: of faults.
        is_cached: says of each short request whether it is done at once (`Medium.write_cached`); by default none is.
    """

    def __init__(
        self,
        inner: Medium,
        plan: FaultPlan | Iterable[Fault] = (),
        *,
        is_cached: Callable[[], bool] = lambda: False,
    ) -> None:
        self.inner, self._is_cached = inner, is_cached
        self.plan = plan if isinstance(plan, FaultPlan) else FaultPlan(list(plan))
        self._poison = 0

    def _check(self, operation: Operation, length: int = 0, end: int = 0) -> None:
        code, _ = self.plan.judge(operation, length, grows=end > self.inner.size())
        if code:
            raise OSError(code, error_text(code))

    def read_into(self, at: int, buffer: memoryview) -> None:
        """See `Medium`."""
        self._check(Operation.READ)
        self.inner.read_into(at, buffer)

    def read_cached(self, at: int, buffer: memoryview) -> bool:
        """See `Medium`."""
        if not self._is_cached():
            return False
        try:
            self.read_into(at, buffer)
        except OSError:
            return False
        return True

    def write_cached(self, at: int, contents: Sequence[Buffer]) -> bool:
        """See `Medium`."""
        if not self._is_cached() or at + sum(map(len, contents)) > self.size():
            return False
        self.writev(at, list(contents))
        return True

    def write(self, at: int, content: Buffer) -> None:
        """See `Medium`."""
        code, fits = self.plan.judge(Operation.WRITE, len(content), grows=at + len(content) > self.inner.size())
        if fits:
            self.inner.write(at, bytes(content)[:fits])
        if code:
            raise OSError(code, error_text(code))

    def writev(self, at: int, contents: list[Buffer]) -> None:
        """See `Medium`."""
        self.write(at, b"".join(bytes(piece) for piece in contents))

    def zero(self, at: int, length: int, *, unmap: bool) -> None:
        """See `Medium`."""
        self._check(Operation.ZERO, length, at + length)
        self.inner.zero(at, length, unmap=unmap)

    def discard(self, at: int, length: int) -> None:
        """See `Medium`."""
        self._check(Operation.DISCARD)
        self.inner.discard(at, length)

    def copy_from(self, source: Medium, source_at: int, at: int, length: int) -> None:
        """See `Medium`; the faults of both sides take part."""
        copy_through_memory(self, source, source_at, at, length)

    def allocations(self, at: int, length: int) -> list[Allocation]:
        """See `Medium`."""
        self._check(Operation.STATUS)
        return self.inner.allocations(at, length)

    def sync(self) -> None:
        """See `Medium`."""
        code, _ = self.plan.judge(Operation.SYNC)
        self._poison = self._poison or code
        if self._poison:
            raise OSError(self._poison, error_text(self._poison))
        self.inner.sync()

    def truncate(self, length: int) -> None:
        """See `Medium`."""
        self._check(Operation.TRUNCATE, end=length)
        self.inner.truncate(length)

    def size(self) -> int:
        """See `Medium`."""
        return self.inner.size()

    def unwritten_at(self) -> int:
        """See `Medium`."""
        return self.inner.unwritten_at()

    def allocated_size(self) -> int:
        """See `Medium`."""
        return self.inner.allocated_size()

    def close(self) -> None:
        """See `Medium`."""
        self.inner.close()
