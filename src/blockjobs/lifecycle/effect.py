"""What the machine wants done. The engine executes effects in order; a journal or a test may just look at them."""

from enum import StrEnum

import msgspec

from blockjobs.lifecycle.status import JobStatus


class Hook(StrEnum):
    """The steps of a job's end, named after the methods of `Job`."""

    PREPARE = "prepare"
    COMMIT = "commit"
    ABORT = "abort"
    CLEAN = "clean"


class Milestone(StrEnum):
    """The moments a job type may announce with an event of its own (spec/lifecycle.md §7)."""

    READY = "ready"
    PENDING = "pending"
    COMPLETED = "completed"
    CANCELLED = "cancelled"


class StatusChanged(msgspec.Struct, frozen=True):
    """The job's status is now `status`; JOB_STATUS_CHANGE for jobs that have an id."""

    job: str
    status: JobStatus


class Announce(msgspec.Struct, frozen=True):
    """This is where the job type's own event belongs."""

    job: str
    milestone: Milestone


class Launch(msgspec.Struct, frozen=True):
    """Begin the body; if the job is parked already, its first pause point holds it before any work."""

    job: str


class Wake(msgspec.Struct, frozen=True):
    """Something the body waits for, or should look at, has changed."""

    job: str


class Interrupt(msgspec.Struct, frozen=True):
    """The body is to stop: release whatever it waits for where the type can."""

    job: str


class CallHook(msgspec.Struct, frozen=True):
    """The group's settler calls this hook next and reports with `HookDone`."""

    job: str
    hook: Hook


class AwaitBody(msgspec.Struct, frozen=True):
    """The group's settler waits for this body to return before it goes on."""

    job: str


class Forget(msgspec.Struct, frozen=True):
    """The job is gone; its id may be used again."""

    job: str


Effect = StatusChanged | Announce | Launch | Wake | Interrupt | CallHook | AwaitBody | Forget
