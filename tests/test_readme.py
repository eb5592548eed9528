"""The README's example runs as printed, and its first screen names commands that exist."""

import re
import shutil
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


@pytest.mark.qemu
def test_the_live_disk_example_runs(tmp_path: Path) -> None:
    section = README.partition("## Disks in use")[2].partition("```console\n")[2].partition("```")[0]
    lines = [line.removeprefix("$ ") for line in section.splitlines()]
    assert len(lines) == 5 and all(line.startswith(("blockjobs ", "qemu-system-x86_64 ")) for line in lines)
    if shutil.which("qemu-system-x86_64") is None:
        lines = [line for line in lines if line.startswith("blockjobs ")]
    script = "\n".join(
        [
            "set -eu; trap 'kill $(jobs -p)' EXIT; unset DISPLAY; PATH=$PWD:$PATH",
            "blockjobs create disk.qcow2 64M",
            lines[0],
            "while ! [ -S qmp.sock ]; do sleep 0.05; done",
            *(line.replace("x86_64", "x86_64 -display none") for line in lines[1:]),
            "kill %1; wait %1",
        ]
    )
    command = tmp_path / "blockjobs"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m blockjobs "$@"\n')
    command.chmod(0o755)
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr
    for image in ("monday", "moved"):
        compared = subprocess.run(["qemu-img", "compare", "disk.qcow2", f"{image}.qcow2"], cwd=tmp_path, check=False)
        assert compared.returncode == 0, image


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
