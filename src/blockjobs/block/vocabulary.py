"""The words that nodes, drivers and planners share: limits, what runs are made of, where writes go.

Plain values; whoever promises something about them is in `driver.py`.
"""

from enum import Enum, IntFlag, auto
from typing import Any, Final, NamedTuple

from msgspec import Struct, field

from blockjobs.base.span import Span
from blockjobs.block.claims import ALL, Perm


class Limits(Struct, frozen=True, kw_only=True):
    """What requests a driver takes as they are; the node above splits and pads the others. All in bytes."""

    request_align: int = 1
    zero_align: int = 1
    discard_align: int = 1
    transfer_bytes_max: int = 1 << 31
    zero_bytes_max: int = 1 << 62
    discard_bytes_max: int = 1 << 62


NO_LIMITS: Final = Limits()

LENGTH_MAX: Final = (1 << 63) - (1 << 30)
"""The longest a node can be, as in QEMU 7.2. In bytes."""

NO_PERMS: Final[tuple[Perm, Perm]] = (Perm(0), ALL)
"""Takes nothing and shares everything: an edge without users."""


class ZeroMode(Enum):
    """How a run may be made to read as zeroes."""

    UNMAP = auto()
    """Deallocate where possible."""
    KEEP = auto()
    """Keep the space allocated."""


class Kind(Enum):
    """What a run of a node is made of."""

    DATA = auto()
    """Stored as it is in a child, at `child_at`; enciphered if the driver has an encipherment."""
    ZERO = auto()
    """This layer says: zeroes. Hides the backing."""
    BACKING = auto()
    """This layer says nothing: the backing node answers, or zeroes if there is none or it is shorter."""
    SPECIAL = auto()
    """Stored, but only `read_special` can make sense of it: compressed."""


PLACED: Final = "placed"
"""The token of zeroes for which a child keeps space, at `child_at`."""


class Segment(NamedTuple):
    """A run of a format node's bytes and where they are."""

    at: int
    length: int
    kind: Kind
    child: str = "file"
    child_at: int = 0
    token: object = None


class Placement(NamedTuple):
    """Where `length` guest bytes from `at` on are to be written: at `child_at` of the child named `child`."""

    at: int
    length: int
    child: str
    child_at: int


class Reservation(Struct, kw_only=True):
    """Host space for one write; nothing of it is visible until `publish`.

    Attributes:
        span: the guest bytes that the caller asked to write.
        placements: where they go; together exactly `span`, in order.
        fills: guest bytes beside `span` in the same new clusters. The caller writes there what the guest reads now,
            before `publish` (copy on write).
        token: the driver's own.
    """

    span: Span
    placements: list[Placement]
    fills: list[Placement] = field(default_factory=list)
    token: Any = None


class ImpliedChild(NamedTuple):
    """A child that an image's header names (`backing`, `data-file`): opened by the graph under its open policy."""

    name: str
    filename: str
    format: str | None


class Watch(IntFlag):
    """The kinds of request a filter wants to see; the others pass it without a call."""

    NONE = 0
    READ = 1
    WRITE = 2
    ZERO = 4
    DISCARD = 8
    FLUSH = 16
    STATUS = 32
    CHANGES = WRITE | ZERO | DISCARD
    ALL = 63
