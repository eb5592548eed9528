"""The rules of blkdebug: a small machine of states and events that says which request fails (probed on QSD 7.2).

It starts in state 1. An event moves the state (`set-state`) and arms the errors listed for it (`inject-error`); what
other events armed is then disarmed. An armed rule fails each matching request, or only one with `once`. The event
`none` happens once, when the node is opened: its rules are armed from the start.
"""

from collections.abc import Iterable
from enum import StrEnum
from typing import Final

import msgspec

from blockjobs.base.span import Span
from blockjobs.schema.types import Options

SECTOR_BYTES: Final = 512
_ANY_STATE: Final = 0
_ANY_SECTOR: Final = -1


class DebugEvent(StrEnum):
    """What drivers above announce to a blkdebug child."""

    L1_UPDATE = "l1_update"
    L1_GROW_ALLOC_TABLE = "l1_grow_alloc_table"
    L1_GROW_WRITE_TABLE = "l1_grow_write_table"
    L1_GROW_ACTIVATE_TABLE = "l1_grow_activate_table"
    L2_LOAD = "l2_load"
    L2_UPDATE = "l2_update"
    L2_UPDATE_COMPRESSED = "l2_update_compressed"
    L2_ALLOC_COW_READ = "l2_alloc_cow_read"
    L2_ALLOC_WRITE = "l2_alloc_write"
    READ_AIO = "read_aio"
    READ_BACKING_AIO = "read_backing_aio"
    READ_COMPRESSED = "read_compressed"
    WRITE_AIO = "write_aio"
    WRITE_COMPRESSED = "write_compressed"
    VMSTATE_LOAD = "vmstate_load"
    VMSTATE_SAVE = "vmstate_save"
    COW_READ = "cow_read"
    COW_WRITE = "cow_write"
    REFTABLE_LOAD = "reftable_load"
    REFTABLE_GROW = "reftable_grow"
    REFTABLE_UPDATE = "reftable_update"
    REFBLOCK_LOAD = "refblock_load"
    REFBLOCK_UPDATE = "refblock_update"
    REFBLOCK_UPDATE_PART = "refblock_update_part"
    REFBLOCK_ALLOC = "refblock_alloc"
    REFBLOCK_ALLOC_HOOKUP = "refblock_alloc_hookup"
    REFBLOCK_ALLOC_WRITE = "refblock_alloc_write"
    REFBLOCK_ALLOC_WRITE_BLOCKS = "refblock_alloc_write_blocks"
    REFBLOCK_ALLOC_WRITE_TABLE = "refblock_alloc_write_table"
    REFBLOCK_ALLOC_SWITCH_TABLE = "refblock_alloc_switch_table"
    CLUSTER_ALLOC = "cluster_alloc"
    CLUSTER_ALLOC_BYTES = "cluster_alloc_bytes"
    CLUSTER_FREE = "cluster_free"
    FLUSH_TO_OS = "flush_to_os"
    FLUSH_TO_DISK = "flush_to_disk"
    PWRITEV_RMW_HEAD = "pwritev_rmw_head"
    PWRITEV_RMW_AFTER_HEAD = "pwritev_rmw_after_head"
    PWRITEV_RMW_TAIL = "pwritev_rmw_tail"
    PWRITEV_RMW_AFTER_TAIL = "pwritev_rmw_after_tail"
    PWRITEV = "pwritev"
    PWRITEV_ZERO = "pwritev_zero"
    PWRITEV_DONE = "pwritev_done"
    EMPTY_IMAGE_PREPARE = "empty_image_prepare"
    L1_SHRINK_WRITE_TABLE = "l1_shrink_write_table"
    L1_SHRINK_FREE_L2_CLUSTERS = "l1_shrink_free_l2_clusters"
    COR_WRITE = "cor_write"
    CLUSTER_ALLOC_SPACE = "cluster_alloc_space"
    NONE = "none"


class IoType(StrEnum):
    """Kinds of request that a rule may single out."""

    READ = "read"
    WRITE = "write"
    WRITE_ZEROES = "write-zeroes"
    DISCARD = "discard"
    FLUSH = "flush"
    BLOCK_STATUS = "block-status"


class InjectError(Options, frozen=True, kw_only=True):
    """Fails requests that follow `event`.

    `state` 0 is every state; `sector` (of 512 bytes) must begin inside the request; without `iotype` all kinds but
    block-status fail; an `errno` of 0 or less lets the request through. `immediately` makes no difference here.
    """

    event: DebugEvent
    state: int | None = None
    iotype: IoType | None = None
    errno: int | None = None
    sector: int | None = None
    once: bool | None = None
    immediately: bool | None = None

    def matches(self, kind: IoType, span: Span) -> bool:
        """Whether a request is one that the rule fails."""
        if kind is not (self.iotype or kind) or (self.iotype is None and kind is IoType.BLOCK_STATUS):
            return False
        sector = _ANY_SECTOR if self.sector is None else self.sector
        return sector == _ANY_SECTOR or span.at <= sector * SECTOR_BYTES < span.end


class SetState(Options, frozen=True, kw_only=True):
    """Moves the machine from `state` (0: from every state) to `new_state` when `event` happens."""

    event: DebugEvent
    state: int | None = None
    new_state: int = msgspec.field(name="new_state")


class Rules:
    """The machine; pure."""

    def __init__(self, errors: Iterable[InjectError], moves: Iterable[SetState], *, errno: int) -> None:
        """Args: errno: what a rule without one fails with."""
        self._errors = list(errors)
        self._moves = tuple(moves)
        self._errno = errno
        self._state = 1
        self._armed: list[InjectError] = []
        self.happens(DebugEvent.NONE)

    def happens(self, event: str) -> None:
        """An event: judged by the state before it."""
        current = (_ANY_STATE, self._state)
        armed = [rule for rule in self._errors if rule.event == event and (rule.state or _ANY_STATE) in current]
        if armed:
            self._armed = armed
        for move in self._moves:
            if move.event == event and (move.state or _ANY_STATE) in current:
                self._state = move.new_state

    def failure(self, kind: IoType, span: Span) -> int:
        """The errno that a request fails with; 0 or less: it does not."""
        for rule in self._armed:
            if rule.matches(kind, span):
                if rule.once:
                    self._armed.remove(rule)
                    self._errors.remove(rule)
                return self._errno if rule.errno is None else rule.errno
        return 0

    def kinds(self) -> set[IoType]:
        """The kinds of request that some rule may fail."""
        every = set(IoType) - {IoType.BLOCK_STATUS}
        return set().union(*({rule.iotype} if rule.iotype else every for rule in self._errors))

    def listens_to(self, *events: DebugEvent) -> bool:
        """Whether some rule waits for one of these events."""
        return any(rule.event in events for rule in self._errors) or any(move.event in events for move in self._moves)
