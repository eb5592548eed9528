"""The README's example runs as printed, and its first screen names commands that exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import blockjobs

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_library_example_runs(tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    make = [sys.executable, "-m", "blockjobs", "create", "disk.qcow2", "64M"]
    subprocess.run(make, cwd=tmp_path, check=True, capture_output=True)
    done = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "scrub completed 8388608 bytes" in done.stdout
    assert re.search(r"^backup\d+ completed", done.stdout, re.MULTILINE)


def test_the_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"^\$ make (\w+)", README, re.MULTILINE)) <= targets


def test_named_files_exist() -> None:
    for document in (README, (ROOT / "ARCHITECTURE.md").read_text()):
        for target in re.findall(r"\]\(([^)#:]+)\)", document) + re.findall(r"`((?:src|tests)/[\w./]+)`", document):
            assert (ROOT / target).exists(), target


@pytest.mark.parametrize("name", blockjobs.__all__)
def test_public_names_are_there(name: str) -> None:
    assert getattr(blockjobs, name).__name__ == name
