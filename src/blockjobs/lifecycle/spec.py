"""What a job is asked to be, fixed for its whole life."""

from msgspec import Struct


class Group(Struct, frozen=True):
    """A ticket for jobs that settle together; ask the engine for one and create the jobs with it."""

    number: int


class JobSpec(Struct, frozen=True, kw_only=True):
    """The identity and creation flags of a job (spec/lifecycle.md §1).

    Attributes:
        key: the id, or a `#` name for an internal job; unique among live jobs.
        id: what users call it; none for an internal job, which is never listed and sends no events.
        type: a QAPI `JobType` or a name that starts with `x-`.
        is_block_job: has speed, io-status and BLOCK_JOB_* events, and is addressable by `block-job-*`.
        created_ns: wall clock.
    """

    key: str
    id: str | None
    type: str
    is_block_job: bool
    group: Group
    auto_finalize: bool
    auto_dismiss: bool
    created_ns: int
