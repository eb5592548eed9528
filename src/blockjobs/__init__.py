"""QEMU's background jobs for disk images, as a daemon, a command and an asyncio library."""

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from blockjobs.base.errors import BlockjobsError, IoFailure, JobCancelled, UsageError
    from blockjobs.host import Host
    from blockjobs.lifecycle.context import JobContext
    from blockjobs.lifecycle.handle import JobHandle
    from blockjobs.lifecycle.history import Fate, Outcome
    from blockjobs.lifecycle.job import Job
    from blockjobs.lifecycle.registry import job_type
    from blockjobs.lifecycle.status import JobStatus, JobVerb

__version__ = "0.1.0"

_HOMES: Final = {
    "BlockjobsError": "base.errors",
    "Fate": "lifecycle.history",
    "Host": "host",
    "IoFailure": "base.errors",
    "Job": "lifecycle.job",
    "JobCancelled": "base.errors",
    "JobContext": "lifecycle.context",
    "JobHandle": "lifecycle.handle",
    "JobStatus": "lifecycle.status",
    "JobVerb": "lifecycle.status",
    "Outcome": "lifecycle.history",
    "UsageError": "base.errors",
    "job_type": "lifecycle.registry",
}

__all__ = [
    "BlockjobsError",
    "Fate",
    "Host",
    "IoFailure",
    "Job",
    "JobCancelled",
    "JobContext",
    "JobHandle",
    "JobStatus",
    "JobVerb",
    "Outcome",
    "UsageError",
    "job_type",
]


def __getattr__(name: str) -> Any:
    # Loaded on first use: `blockjobs --help` should not pay for the whole library.
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'blockjobs' has no attribute '{name}'")
    return getattr(importlib.import_module(f"blockjobs.{home}"), name)
