"""Every error that leaves a function on purpose.

    BlockjobsError                         error_class = "GenericError"
    ├── UsageError                         the caller's mistake: one line of text, never a traceback
    │   ├── CommandNotFound                error_class = "CommandNotFound"
    │   ├── ParameterError                 texts as QEMU's, see the constructors
    │   ├── NodeNotFound  DeviceNotFound   the second has error_class = "DeviceNotFound"
    │   ├── JobNotFound  BlockJobNotFound  the second has error_class = "DeviceNotActive"
    │   ├── VerbRefused
    │   └── PermissionConflict
    ├── IoFailure (also an OSError)        what on-error policies act on
    ├── ImageCorrupt
    └── WireError                          the peer broke its protocol
    JobCancelled (a BaseException)         control flow of a job; caught by the engine only

Facts are attributes; the text is derived from them.
"""

import errno as errno_codes
import os
from typing import ClassVar


class BlockjobsError(Exception):
    """The root; `error_class` is what a QMP client sees as `class` (spec/qmp.md, Error classes)."""

    error_class: ClassVar[str] = "GenericError"


class UsageError(BlockjobsError):
    """The caller's mistake; its text is shown as it is."""


class CommandNotFound(UsageError):
    """A QMP command that does not exist, or not yet."""

    error_class = "CommandNotFound"


class ParameterError(UsageError):
    """An argument that is missing, unexpected, of the wrong type or out of range."""

    def __init__(self, path: str, text: str) -> None:
        self.path = path
        super().__init__(text)

    @classmethod
    def missing(cls, path: str) -> "ParameterError":
        """A mandatory argument that was not given."""
        return cls(path, f"Parameter '{path}' is missing")

    @classmethod
    def unexpected(cls, path: str) -> "ParameterError":
        """An argument the command does not know."""
        return cls(path, f"Parameter '{path}' is unexpected")

    @classmethod
    def wrong_type(cls, path: str, expected: str) -> "ParameterError":
        """`expected` is string, integer, boolean, number, object, array or an alternate's name."""
        return cls(path, f"Invalid parameter type for '{path}', expected: {expected}")

    @classmethod
    def bad_value(cls, path: str, value: str) -> "ParameterError":
        """A word that the enumeration does not have."""
        return cls(path, f"Parameter '{path}' does not accept value '{value}'")

    @classmethod
    def expects(cls, path: str, what: str) -> "ParameterError":
        """A value outside its range; `what` completes the sentence `Parameter 'x' expects ...`."""
        return cls(path, f"Parameter '{path}' expects {what}")


class NodeNotFound(UsageError):
    """No node, and no device, of that name."""

    def __init__(self, device: str = "", node: str = "") -> None:
        self.device, self.node = device, node
        super().__init__(f"Cannot find device='{device}' nor node-name='{node}'")


class DeviceNotFound(UsageError):
    """As `NodeNotFound`, where QEMU answers with a class of its own that clients probe for."""

    error_class = "DeviceNotFound"

    def __init__(self, device: str) -> None:
        self.device = device
        super().__init__(f"Device '{device}' not found")


class JobNotFound(UsageError):
    """No job of that id, asked for by a `job-*` command."""

    def __init__(self, job: str) -> None:
        self.job = job
        super().__init__("Job not found")


class BlockJobNotFound(UsageError):
    """No block job of that id, asked for by a `block-job-*` command."""

    error_class = "DeviceNotActive"

    def __init__(self, job: str) -> None:
        self.job = job
        super().__init__(f"Block job '{job}' not found")


class VerbRefused(UsageError):
    """A verb that the job's status does not allow (spec/lifecycle.md §2)."""

    def __init__(self, job: str, status: str, verb: str) -> None:
        self.job, self.status, self.verb = job, status, verb
        super().__init__(f"Job '{job}' in state '{status}' cannot accept command verb '{verb}'")


class PermissionConflict(UsageError):
    """Two users of a node want what the other does not share (spec/block-layer.md §3)."""

    def __init__(self, node: str, permissions: str, taker: str, denier: str) -> None:
        self.node, self.permissions, self.taker, self.denier = node, permissions, taker, denier
        super().__init__(
            f"Permission conflict on node '{node}': permissions '{permissions}' are both required by {taker} "
            f"and unshared by {denier}."
        )


def error_text(code: int) -> str:
    """The text QEMU shows for an errno when it has no better one; ECANCELED is spelled as libc does."""
    return os.strerror(code)


class IoFailure(BlockjobsError, OSError):
    """Input or output failed. `str()` is the errno's text, which is what QEMU puts into `error` members.

    Attributes:
        errno: positive errno code.
        where: node or file, and place, for logs: `node 'disk' at 65536+4096`.
    """

    def __init__(self, code: int, where: str = "") -> None:
        OSError.__init__(self, code, error_text(code))
        self.where = where

    def __str__(self) -> str:
        return error_text(self.errno or errno_codes.EIO)

    @classmethod
    def wrap(cls, error: OSError, where: str) -> "IoFailure":
        """The same errno, with the place added; an `IoFailure` passes unchanged."""
        return error if isinstance(error, IoFailure) else cls(error.errno or errno_codes.EIO, where)


class ImageCorrupt(BlockjobsError):
    """An image breaks its format's rules; what had to be changed was not changed.

    Attributes:
        at, length: the run of the file that would have been written wrongly, in bytes, if that is what it was.
    """

    def __init__(self, name: str, text: str, *, at: int | None = None, length: int | None = None) -> None:
        self.name, self.text = name, text
        self.at, self.length = at, length
        super().__init__(f"Image '{name}' is corrupt: {text}")


class WireError(BlockjobsError):
    """The peer broke NBD or QMP framing."""


class JobCancelled(BaseException):
    """Raised by a job's checkpoint when it must stop; a job's `except Exception` must not catch it."""


def first_failure(failures: BaseExceptionGroup[BlockjobsError]) -> BlockjobsError:
    """The first error of a task group whose tasks did parts of one piece of work."""
    found = failures.exceptions[0]
    return first_failure(found) if isinstance(found, BaseExceptionGroup) else found
