"""What `query-jobs` shows of a job: built on demand, never stored."""

import msgspec

from blockjobs.lifecycle.status import JobStatus


class JobInfo(msgspec.Struct, frozen=True, kw_only=True, rename="kebab", omit_defaults=True):
    """A job as others see it (QAPI `JobInfo`, spec/lifecycle.md §8)."""

    id: str
    type: str
    status: JobStatus
    current_progress: int
    total_progress: int
    error: str | None = None
    """Present as soon as an error text exists, from aborting on."""
