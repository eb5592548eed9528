"""The life cycle as data: eleven statuses, eight verbs and the two tables that relate them (spec/lifecycle.md §2)."""

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Final


class JobStatus(StrEnum):
    """Where a job is in its life; values are the wire names."""

    UNDEFINED = "undefined"
    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    READY = "ready"
    STANDBY = "standby"
    WAITING = "waiting"
    PENDING = "pending"
    ABORTING = "aborting"
    CONCLUDED = "concluded"
    NULL = "null"


class JobVerb(StrEnum):
    """What a user may ask of a job; values are the wire names."""

    CANCEL = "cancel"
    PAUSE = "pause"
    RESUME = "resume"
    SET_SPEED = "set-speed"
    COMPLETE = "complete"
    DISMISS = "dismiss"
    FINALIZE = "finalize"
    CHANGE = "change"


_S = JobStatus

NEXT: Final[Mapping[JobStatus, frozenset[JobStatus]]] = MappingProxyType(
    {
        _S.UNDEFINED: frozenset({_S.CREATED}),
        _S.CREATED: frozenset({_S.RUNNING, _S.ABORTING, _S.NULL}),
        _S.RUNNING: frozenset({_S.PAUSED, _S.READY, _S.WAITING, _S.ABORTING}),
        _S.PAUSED: frozenset({_S.RUNNING}),
        _S.READY: frozenset({_S.STANDBY, _S.WAITING, _S.ABORTING}),
        _S.STANDBY: frozenset({_S.READY}),
        _S.WAITING: frozenset({_S.PENDING, _S.ABORTING}),
        _S.PENDING: frozenset({_S.ABORTING, _S.CONCLUDED}),
        # Several causes may abort one job; only the first is an event.
        _S.ABORTING: frozenset({_S.ABORTING, _S.CONCLUDED}),
        _S.CONCLUDED: frozenset({_S.NULL}),
        _S.NULL: frozenset(),
    }
)
"""Status to the statuses that may follow; anything else is a bug of ours."""

PARKED: Final = frozenset({_S.PAUSED, _S.STANDBY})
"""The body stands at a pause point."""

BODY_LIVES: Final = frozenset({_S.CREATED, _S.RUNNING, _S.PAUSED, _S.READY, _S.STANDBY})
"""The body has not returned yet, or has not been reported to have."""

ALLOWED: Final[Mapping[JobVerb, frozenset[JobStatus]]] = MappingProxyType(
    {
        JobVerb.CANCEL: BODY_LIVES | {_S.WAITING, _S.PENDING},
        JobVerb.PAUSE: BODY_LIVES,
        JobVerb.RESUME: BODY_LIVES,
        JobVerb.SET_SPEED: BODY_LIVES,
        JobVerb.CHANGE: BODY_LIVES,
        JobVerb.COMPLETE: frozenset({_S.READY, _S.STANDBY}),
        JobVerb.FINALIZE: frozenset({_S.PENDING}),
        JobVerb.DISMISS: frozenset({_S.CONCLUDED}),
    }
)
"""Verb to the statuses in which it is accepted."""

assert set(NEXT) == set(JobStatus)
assert set(ALLOWED) == set(JobVerb)
assert [status for status in JobStatus if not NEXT[status]] == [_S.NULL]
assert all(NEXT[parked] == {running} for parked, running in ((_S.PAUSED, _S.RUNNING), (_S.STANDBY, _S.READY)))
assert not any(_S.UNDEFINED in statuses or _S.NULL in statuses for statuses in ALLOWED.values())


def _closure(start: JobStatus) -> frozenset[JobStatus]:
    found: set[JobStatus] = set()
    frontier = [start]
    while frontier:
        for status in NEXT[frontier.pop()] - found:
            found.add(status)
            frontier.append(status)
    return frozenset(found)


REACHABLE: Final[Mapping[JobStatus, frozenset[JobStatus]]] = MappingProxyType(
    {status: _closure(status) for status in JobStatus}
)
"""Status to every status that may still come, however many steps away; waits use it to fail instead of hanging."""
