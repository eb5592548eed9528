"""The whole state of one job, and of one group of jobs. Only `Machine` writes these records."""

from enum import StrEnum

from msgspec import Struct, field

from blockjobs.lifecycle.effect import AwaitBody, CallHook
from blockjobs.lifecycle.error_policy import IoStatus
from blockjobs.lifecycle.failure import Failure
from blockjobs.lifecycle.status import PARKED, JobStatus


class CancelMode(StrEnum):
    """How much of a cancellation was asked for; it only ever grows."""

    NONE = "none"
    SOFT = "soft"
    """A ready job ends well, without its last step (a mirror without its pivot)."""
    FORCED = "forced"
    """The body stops at its next checkpoint and the group aborts."""


class Life(Struct):
    """What the machine knows of one job.

    Attributes:
        key: the job's id, or a `#` name for an internal job.
        group: number of the group it settles with.
        started: the body was launched.
        returned: the body has come back.
        user_paused: the user, or an error policy, holds one pause.
        drains: drained sections that hold a pause each.
        completion_requested: `job-complete` was accepted.
        failure: why it failed; set no earlier than its status can show it.
    """

    key: str
    group: int
    auto_finalize: bool
    auto_dismiss: bool
    speed_bytes_per_s: int
    status: JobStatus = JobStatus.UNDEFINED
    started: bool = False
    returned: bool = False
    user_paused: bool = False
    drains: int = 0
    cancel: CancelMode = CancelMode.NONE
    completion_requested: bool = False
    io_status: IoStatus = IoStatus.OK
    failure: Failure | None = None

    @property
    def pause_count(self) -> int:
        """Independent holders of a pause; not having been started is one."""
        return self.user_paused + self.drains + (not self.started)

    @property
    def is_stopping(self) -> bool:
        """Whether a forced cancel was asked for: pause points no longer hold the body."""
        return self.cancel is CancelMode.FORCED

    @property
    def should_park(self) -> bool:
        """Whether the body must stand still at its next pause point."""
        return self.pause_count > 0 and self.cancel is not CancelMode.FORCED

    @property
    def is_parked(self) -> bool:
        """Whether the body stands at a pause point."""
        return self.status in PARKED

    @property
    def is_ready(self) -> bool:
        """Whether the job has reached READY and its body still runs."""
        return self.status is JobStatus.READY or self.status is JobStatus.STANDBY


class Phase(StrEnum):
    """How far a group is on its way to one common end."""

    WORKING = "working"
    """Bodies run, or all are done and someone must finalize."""
    PREPARING = "preparing"
    """Prepare hooks run; one failure still aborts all."""
    COMMITTING = "committing"
    ABORTING = "aborting"
    SETTLED = "settled"


class GroupLife(Struct):
    """What the machine knows of one group (a QMP transaction; a lone job is a group of one).

    Attributes:
        members: newest first, which is the order of every walk (spec/lifecycle.md §6, Transaction order).
        cursor: index of the member whose turn it is, outside WORKING.
        due: what the settler was asked to do and has not reported yet.
    """

    number: int
    members: list[Life] = field(default_factory=list)
    phase: Phase = Phase.WORKING
    cursor: int = 0
    due: CallHook | AwaitBody | None = None
