import msgspec
import pytest

from blockjobs.lifecycle.effect import Hook
from blockjobs.lifecycle.error_policy import IoStatus
from blockjobs.lifecycle.failure import Failure
from blockjobs.lifecycle.stimulus import (
    Cancel,
    Create,
    ErrorStopped,
    HookDone,
    QuiesceBegin,
    Returned,
    SetSpeed,
    Start,
    Stimulus,
    from_json,
    to_json,
)


@pytest.mark.parametrize(
    "stimulus",
    [
        Create("j", group=3, auto_finalize=False, speed_bytes_per_s=9),
        Start("#internal1"),
        Cancel("j", force=False),
        SetSpeed("j", 2**40),
        QuiesceBegin("j"),
        ErrorStopped("j", IoStatus.NOSPACE),
        Returned("j"),
        Returned("j", Failure("No space left on device", 28)),
        HookDone("j", Hook.PREPARE, Failure("no")),
    ],
)
def test_a_journal_line_reads_back(stimulus: Stimulus) -> None:
    line = to_json(stimulus)
    assert b"\n" not in line
    assert from_json(line) == stimulus


def test_the_line_names_the_stimulus() -> None:
    assert to_json(Start("j")) == b'{"stimulus":"start","job":"j"}'


@pytest.mark.parametrize("line", [b"{}", b'{"stimulus":"explode","job":"j"}', b'{"stimulus":"start"}', b"nonsense"])
def test_other_lines_are_refused(line: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        from_json(line)
