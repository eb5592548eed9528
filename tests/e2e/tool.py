"""Runs the command `blockjobs` as a process."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from blockjobs.cli.main import main

if TYPE_CHECKING:
    from pathlib import Path

WORDS = (sys.executable, "-m", "blockjobs")
COMPILED = tempfile.TemporaryDirectory(prefix="blockjobs-tests-")
"""Compiling the package anew for each process would take longer than the tests."""


@dataclass(frozen=True, slots=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def json_lines(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]


def environment() -> dict[str, str]:
    """Ours, without what would change the command's behaviour."""
    unwanted = ("BLOCKJOBS_", "PYTHONDONTWRITEBYTECODE")
    ours = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
    return {**ours, "PYTHONPYCACHEPREFIX": COMPILED.name}


def blockjobs(*words: str | Path, cwd: Path, code: int | None = 0) -> Done:
    """Run a command to its end; it must end with `code` if that is not None, and never with a traceback."""
    done = subprocess.run(
        [*WORDS, *map(str, words)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=40,
        env=environment(),
        stdin=subprocess.DEVNULL,
    )
    assert "Traceback" not in done.stderr, done.stderr
    assert code is None or done.returncode == code, (done.returncode, done.stdout, done.stderr)
    return Done(done.returncode, done.stdout, done.stderr)


def quick(*words: str | Path, cwd: Path, code: int | None = 0) -> Done:
    """As `blockjobs`, in this process: starting one takes longer than most commands."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        ended = main([str(word) for word in words])
    assert code is None or ended == code, (ended, out.getvalue(), err.getvalue())
    return Done(ended, out.getvalue(), err.getvalue())


def refused(*words: str | Path, cwd: Path, code: int = 1) -> str:
    """Run a command that must fail with one line; return it."""
    done = quick(*words, cwd=cwd, code=code)
    assert done.out == ""
    assert done.err.startswith("blockjobs: ") and done.err.count("\n") == 1, done.err
    return done.err


def start(*words: str | Path, cwd: Path) -> subprocess.Popen[str]:
    """Start a command and leave it running."""
    return subprocess.Popen(
        [*WORDS, *map(str, words)],
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )


def wait_for(path: Path, process: subprocess.Popen[str], *, wait_s: float = 15.0) -> None:
    """Wait until a file that a process makes is there."""
    deadline = time.monotonic() + wait_s
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.005)
