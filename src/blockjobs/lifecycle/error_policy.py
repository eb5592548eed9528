"""What a job does about an I/O error: the on-error policies of QAPI as a function (spec/jobs.md §0, Error policy)."""

import errno as errno_codes
from enum import StrEnum
from typing import assert_never


class OnError(StrEnum):
    """The user's policy (QAPI `BlockdevOnError`)."""

    REPORT = "report"
    IGNORE = "ignore"
    ENOSPC = "enospc"
    STOP = "stop"
    AUTO = "auto"


class Action(StrEnum):
    """What the policy means for one error (QAPI `BlockErrorAction`)."""

    IGNORE = "ignore"
    REPORT = "report"
    STOP = "stop"


class Side(StrEnum):
    """Which end of a copy failed; source errors are reads and target errors are writes."""

    SOURCE = "source"
    TARGET = "target"


class IoStatus(StrEnum):
    """How a job's I/O fares since it was last resumed (QAPI `BlockDeviceIoStatus`)."""

    OK = "ok"
    FAILED = "failed"
    NOSPACE = "nospace"


def action_for(policy: OnError, errno: int) -> Action:
    """The action that `policy` asks for on the positive `errno`; `auto` means `enospc` for jobs."""
    match policy:
        case OnError.REPORT:
            return Action.REPORT
        case OnError.IGNORE:
            return Action.IGNORE
        case OnError.STOP:
            return Action.STOP
        case OnError.ENOSPC | OnError.AUTO:
            return Action.STOP if errno == errno_codes.ENOSPC else Action.REPORT
        case _:
            assert_never(policy)


def io_status_for(errno: int) -> IoStatus:
    """What `query-block-jobs` shows while a job is stopped by `errno`."""
    return IoStatus.NOSPACE if errno == errno_codes.ENOSPC else IoStatus.FAILED
