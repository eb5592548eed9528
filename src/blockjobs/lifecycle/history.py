"""What became of jobs, answerable after they were dismissed."""

from collections import deque
from collections.abc import Iterator
from enum import StrEnum
from typing import Final

from msgspec import Struct

from blockjobs.lifecycle.status import JobStatus

HISTORY_MAX: Final = 1000
"""Outcomes kept by default: a few hundred bytes each, weeks of nightly backups."""


class Fate(StrEnum):
    """The three ways a job can end."""

    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Outcome(Struct, frozen=True, kw_only=True):
    """How a job ended, as of the moment it concluded.

    Attributes:
        id: none for an internal job.
        error: text, for failed and cancelled jobs.
        errno: positive code where the cause was one.
        current, total: progress, in bytes for block jobs.
        created_ns, started_ns, ended_ns: wall clock; `started_ns` is none if the job never started.
    """

    id: str | None
    type: str
    status: JobStatus
    fate: Fate
    error: str | None
    errno: int | None
    current: int
    total: int
    created_ns: int
    started_ns: int | None
    ended_ns: int


class History:
    """The latest outcomes, oldest first; the oldest make room for new ones."""

    def __init__(self, limit: int = HISTORY_MAX) -> None:
        self._outcomes: deque[Outcome] = deque(maxlen=limit)

    def __len__(self) -> int:
        return len(self._outcomes)

    def __iter__(self) -> Iterator[Outcome]:
        return iter(tuple(self._outcomes))

    def latest(self, job_id: str) -> Outcome | None:
        """How the most recent job of that id ended; ids may be used again, so there can be older ones."""
        return next((outcome for outcome in reversed(self._outcomes) if outcome.id == job_id), None)

    def record(self, outcome: Outcome) -> None:
        """Remember one more."""
        self._outcomes.append(outcome)
