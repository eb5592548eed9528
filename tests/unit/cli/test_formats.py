"""Name and content must agree before a format is taken for granted."""

import os
from pathlib import Path

import pytest

from blockjobs.base.errors import UsageError
from blockjobs.cli.formats import QCOW2_MAGIC, format_for_new, format_of


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.qcow2", QCOW2_MAGIC, "qcow2"),
        ("a", QCOW2_MAGIC, "qcow2"),
        ("a", b"boot", "raw"),
        ("a.img", b"boot", "raw"),
        ("a.raw", b"", "raw"),
    ],
)
def test_agreement(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert format_of(str(path), None) == expected


@pytest.mark.parametrize(("name", "content"), [("a.img", QCOW2_MAGIC), ("a.raw", QCOW2_MAGIC), ("a.qcow2", b"boot")])
def test_contradiction_is_refused_but_may_be_overruled(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UsageError, match="-f raw"):
        format_of(str(path), None)
    assert format_of(str(path), "raw") == "raw"


def test_strange_files_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name, text in (("fifo", "neither"), ("absent", "No such file"), (".", "neither")):
        with pytest.raises(UsageError, match=text):
            format_of(str(tmp_path / name), None)


def test_new_images_follow_their_suffix() -> None:
    assert format_for_new("a.raw", None) == "raw"
    assert format_for_new("a.qcow2", None) == "qcow2"
    assert format_for_new("a", None) == "qcow2"
    assert format_for_new("a.raw", "qcow2") == "qcow2"
    with pytest.raises(UsageError, match="vmdk"):
        format_for_new("a", "vmdk")
