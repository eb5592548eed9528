"""The one event that the life cycle itself sends."""

from blockjobs.lifecycle.status import JobStatus
from blockjobs.schema.command import Event, event


@event("JOB_STATUS_CHANGE", since="3.0")
class JobStatusChange(Event, kw_only=True, frozen=True, rename="kebab", omit_defaults=True):
    """The status of a job has changed (spec/lifecycle.md §2).

    Attributes:
        id: the job's id.
        status: what it is now.
    """

    id: str
    status: JobStatus
