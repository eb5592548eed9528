"""What can happen to jobs. The accepted stimuli, in order, are the history of a host: they replay to the same state."""

from typing import Final

import msgspec

from blockjobs.lifecycle.effect import Hook
from blockjobs.lifecycle.error_policy import IoStatus
from blockjobs.lifecycle.failure import Failure


class _Stimulus(msgspec.Struct, frozen=True, tag_field="stimulus", tag=str.lower):
    """`job` is the job's key: its id, or a `#` name for an internal job."""

    job: str


class Create(_Stimulus, frozen=True):
    """A job object comes to be, in the group of that number, unstarted."""

    group: int
    auto_finalize: bool = True
    auto_dismiss: bool = True
    speed_bytes_per_s: int = 0


class Discard(_Stimulus, frozen=True):
    """Starting a created job was refused: it vanishes as if it had never been."""


class Start(_Stimulus, frozen=True):
    """The body may run."""


class Pause(_Stimulus, frozen=True):
    """The user's verb `pause`."""


class Resume(_Stimulus, frozen=True):
    """The user's verb `resume`."""


class Cancel(_Stimulus, frozen=True):
    """The verb `cancel`; soft only if not `force` and the job is ready (spec/lifecycle.md §5)."""

    force: bool = True


class SetSpeed(_Stimulus, frozen=True):
    """The verb `set-speed`; 0 means unlimited."""

    bytes_per_s: int


class Change(_Stimulus, frozen=True):
    """The verb `change`; what changes is the job type's business."""


class Complete(_Stimulus, frozen=True):
    """The verb `complete`."""


class Finalize(_Stimulus, frozen=True):
    """The verb `finalize`, which finalizes the whole group."""


class Dismiss(_Stimulus, frozen=True):
    """The verb `dismiss`."""


class QuiesceBegin(_Stimulus, frozen=True):
    """A drained section around one of the job's nodes begins."""


class QuiesceEnd(_Stimulus, frozen=True):
    """That section ends."""


class Parked(_Stimulus, frozen=True):
    """The body stands at a pause point with no I/O in flight."""


class BecameReady(_Stimulus, frozen=True):
    """The body reached the point from which it can be completed."""


class ErrorStopped(_Stimulus, frozen=True):
    """An I/O error met the policy `stop`."""

    io_status: IoStatus


class Returned(_Stimulus, frozen=True):
    """The body came back, well (`failure` is none) or not."""

    failure: Failure | None = None


class HookDone(_Stimulus, frozen=True):
    """The settler has run a hook; only `prepare` may fail."""

    hook: Hook
    failure: Failure | None = None


Stimulus = (
    Create
    | Discard
    | Start
    | Pause
    | Resume
    | Cancel
    | SetSpeed
    | Change
    | Complete
    | Finalize
    | Dismiss
    | QuiesceBegin
    | QuiesceEnd
    | Parked
    | BecameReady
    | ErrorStopped
    | Returned
    | HookDone
)

_ENCODER: Final = msgspec.json.Encoder()
_DECODER: Final[msgspec.json.Decoder[Stimulus]] = msgspec.json.Decoder(Stimulus)


def to_json(stimulus: Stimulus) -> bytes:
    """One line of a journal, without the line feed."""
    return _ENCODER.encode(stimulus)


def from_json(line: bytes) -> Stimulus:
    """Read what `to_json` wrote.

    Raises:
        msgspec.ValidationError: the line is no stimulus.
        msgspec.DecodeError: the line is not JSON.
    """
    return _DECODER.decode(line)
