"""The events of block jobs (spec/lifecycle.md §7); the status changes are `lifecycle.events`."""

from enum import StrEnum

from blockjobs.lifecycle.error_policy import Action
from blockjobs.schema.command import Event, event


class IoOperation(StrEnum):
    """What failed: sources are read, targets are written."""

    READ = "read"
    WRITE = "write"


@event("BLOCK_JOB_COMPLETED", since="1.1")
class BlockJobCompleted(Event, frozen=True, kw_only=True):
    """A block job has ended by itself, well or with `error`.

    Attributes:
        type: the job's type.
        device: the job's id.
        len: total progress in bytes.
        offset: current progress in bytes.
        speed: the rate limit in bytes per second, 0 for none.
        error: why it failed.
    """

    type: str
    device: str
    len: int
    offset: int
    speed: int
    error: str | None = None


@event("BLOCK_JOB_CANCELLED", since="1.1")
class BlockJobCancelled(Event, frozen=True, kw_only=True):
    """A block job was cancelled. Members as BLOCK_JOB_COMPLETED."""

    type: str
    device: str
    len: int
    offset: int
    speed: int


@event("BLOCK_JOB_READY", since="1.3")
class BlockJobReady(Event, frozen=True, kw_only=True):
    """A block job can be completed now. Members as BLOCK_JOB_COMPLETED."""

    type: str
    device: str
    len: int
    offset: int
    speed: int


@event("BLOCK_JOB_PENDING", since="2.12")
class BlockJobPending(Event, frozen=True, kw_only=True):
    """A block job waits to be finalized by a command.

    Attributes:
        type: the job's type.
        id: the job's id.
    """

    type: str
    id: str


@event("BLOCK_JOB_ERROR", since="1.3")
class BlockJobError(Event, frozen=True, kw_only=True):
    """A block job met an I/O error; sent before anything is done about it.

    Attributes:
        device: the job's id.
        operation: which side failed.
        action: what the job's policy makes of it.
    """

    device: str
    operation: IoOperation
    action: Action
