"""Disks for the end-to-end tests, made and judged by the real qemu-img and qemu-io."""

from __future__ import annotations

import hashlib
import json
import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20
CHECK_LEAKS_ONLY = 3
"""qemu-img check's exit code for an image that only lost space."""


def run(*words: str | Path, cwd: Path) -> str:
    """Run a tool that must succeed; return what it printed."""
    return subprocess.run([str(word) for word in words], cwd=cwd, check=True, capture_output=True, text=True).stdout


def make(directory: Path, name: str, *, size: str = "16M", fmt: str = "qcow2", options: str = "") -> Path:
    """Create an empty image."""
    run("qemu-img", "create", "-q", "-f", fmt, *(["-o", options] if options else []), name, size, cwd=directory)
    return directory / name


def make_full(directory: Path, name: str, *, fmt: str = "qcow2", mib: int = 16) -> Path:
    """Create an image with data, zeroes, holes, and writes that end in the middle of a cluster."""
    make(directory, name, size=f"{mib}M", fmt=fmt)
    commands = [f"write -P {1 + at % 200} {at}M 1M" for at in range(0, mib, 2)]
    commands += ["write -P 77 1234k 3k", "write -P 78 3333k 511", "write -P 79 2500000 100000"]
    commands += [f"write -z {mib // 2}M 256k"]
    run("qemu-io", "-f", fmt, *[word for command in commands for word in ("-c", command)], name, cwd=directory)
    return directory / name


def same_content(directory: Path, one: str, one_fmt: str, other: str, other_fmt: str) -> bool:
    """Whether qemu-img finds two images equal."""
    words = ["qemu-img", "compare", "-q", "-f", one_fmt, "-F", other_fmt, one, other]
    return subprocess.run(words, cwd=directory, check=False).returncode == 0


def check_exit_code(image: Path) -> int:
    """What qemu-img check says: 0 clean, 2 corrupt, 3 leaks only."""
    words = ["qemu-img", "check", "-q", "-f", "qcow2", image.name]
    return subprocess.run(words, cwd=image.parent, check=False, capture_output=True).returncode


def compressed_clusters(image: Path) -> int:
    """How many clusters of a qcow2 image are compressed."""
    report = json.loads(run("qemu-img", "check", "-f", "qcow2", "--output=json", image.name, cwd=image.parent))
    return int(report.get("compressed-clusters", 0))


def digest(path: Path) -> str:
    """A file's content in a few bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
