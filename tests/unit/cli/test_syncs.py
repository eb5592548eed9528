"""How often a command waits for the disk: once for what a file holds, and never if nobody asked for it."""

import os
from pathlib import Path

import pytest

from blockjobs.cli.main import main

MiB = 1 << 20


@pytest.fixture
def noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was synced and renamed, in order."""
    events: list[str] = []

    def fdatasync(descriptor: int) -> None:
        events.append("data")

    def fsync(descriptor: int) -> None:
        events.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")

    def replace(old: str, new: str) -> None:
        events.append("name")
        os.rename(old, new)

    def link(old: str, new: str) -> None:
        events.append("name")
        hard_link(old, new)

    hard_link = os.link
    monkeypatch.chdir(tmp_path)
    for name, instead in (("fdatasync", fdatasync), ("fsync", fsync), ("replace", replace), ("link", link)):
        monkeypatch.setattr(os, name, instead)
    Path("a.raw").write_bytes(os.urandom(MiB) + bytes(MiB))
    return events


def test_convert(noted: list[str]) -> None:
    assert main(["convert", "-q", "-f", "raw", "-O", "raw", "a.raw", "b.raw"]) == 0
    assert noted == ["data", "file", "name", "folder"]
    noted.clear()
    assert main(["convert", "-q", "-f", "raw", "-O", "qcow2", "a.raw", "b.qcow2"]) == 0
    assert noted == ["data", "data", "file", "name", "folder"]  # what its tables point at, then the tables


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_convert_of_what_may_be_lost(noted: list[str], format: str) -> None:
    assert main(["convert", "-q", "-t", "unsafe", "-f", "raw", "-O", format, "a.raw", "b"]) == 0
    assert noted == ["name"]


def test_create(noted: list[str]) -> None:
    assert main(["create", "-q", "-f", "qcow2", "c.qcow2", "1M"]) == 0
    assert noted == ["file", "name", "folder"]
