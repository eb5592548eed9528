"""Why a job failed, reduced from an exception to what the wire and the journal can carry."""

import errno as errno_codes
from typing import Final

import msgspec

from blockjobs.base.errors import BlockjobsError, error_text


class Failure(msgspec.Struct, frozen=True):
    """The `error` member of a job: `text` for people, `errno` (positive) where the cause was an errno."""

    text: str
    errno: int | None = None

    @classmethod
    def of_errno(cls, errno: int) -> "Failure":
        """The failure whose text is the errno's own."""
        return cls(error_text(errno), errno)


CANCELED: Final = Failure.of_errno(errno_codes.ECANCELED)
"""How a cancelled job ends when it has no error of its own: `Operation canceled`."""


def failure_of(error: Exception) -> Failure:
    """Reduce `error`: an `OSError` to its errno's text, anything else to its message or, failing that, its class."""
    if isinstance(error, OSError):
        return Failure.of_errno(error.errno or errno_codes.EIO)
    return Failure(str(error) or type(error).__name__)


def is_expected(error: Exception) -> bool:
    """Whether the text alone tells the user what happened; anything else is logged with its traceback."""
    return isinstance(error, (BlockjobsError, OSError))
