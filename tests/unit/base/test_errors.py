"""Texts that clients see."""

import errno

import pytest

from blockjobs.base import errors


@pytest.mark.parametrize(
    ("error", "text", "error_class"),
    [
        (errors.ParameterError.missing("a.b"), "Parameter 'a.b' is missing", "GenericError"),
        (errors.ParameterError.unexpected("x"), "Parameter 'x' is unexpected", "GenericError"),
        (
            errors.ParameterError.wrong_type("x", "string"),
            "Invalid parameter type for 'x', expected: string",
            "GenericError",
        ),
        (errors.ParameterError.bad_value("d", "v"), "Parameter 'd' does not accept value 'v'", "GenericError"),
        (errors.ParameterError.expects("size", "a >0 size"), "Parameter 'size' expects a >0 size", "GenericError"),
        (errors.NodeNotFound(device="d", node="d"), "Cannot find device='d' nor node-name='d'", "GenericError"),
        (errors.NodeNotFound(node="n"), "Cannot find device='' nor node-name='n'", "GenericError"),
        (errors.DeviceNotFound("d"), "Device 'd' not found", "DeviceNotFound"),
        (errors.JobNotFound("j"), "Job not found", "GenericError"),
        (errors.BlockJobNotFound("j"), "Block job 'j' not found", "DeviceNotActive"),
        (
            errors.VerbRefused("j", "paused", "pause"),
            "Job 'j' in state 'paused' cannot accept command verb 'pause'",
            "GenericError",
        ),
        (errors.IoFailure(errno.ENOSPC, "node 'x'"), "No space left on device", "GenericError"),
        (errors.ImageCorrupt("a", "L2 beyond the end"), "Image 'a' is corrupt: L2 beyond the end", "GenericError"),
    ],
)
def test_texts_and_classes(error: errors.BlockjobsError, text: str, error_class: str) -> None:
    assert (str(error), error.error_class) == (text, error_class)


def test_io_failures_are_os_errors_and_keep_the_first_place() -> None:
    inner = errors.IoFailure.wrap(OSError(errno.EIO, "x"), "file 'a'")
    assert isinstance(inner, OSError)
    assert (inner.errno, inner.where) == (errno.EIO, "file 'a'")
    assert errors.IoFailure.wrap(inner, "node 'b'") is inner
    assert errors.IoFailure.wrap(OSError("no number"), "c").errno == errno.EIO
