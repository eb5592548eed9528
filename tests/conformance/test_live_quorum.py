"""What a quorum makes of children that differ or fail: QEMU's daemon and ours tell and leave the same.

A backup job reads and writes it, so that no client is needed: 64 KiB, which both move by one request.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import player
import pytest

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.qemu

SIZE = 64 << 10
PLAIN = b"p" * SIZE


@dataclass(frozen=True)
class Case:
    """Children by what they hold and what fails there, and the quorum over them.

    Attributes:
        faults: by child: (kind of request, errno).
        options: of the quorum.
        is_target: the job writes to the quorum instead of reading it.
    """

    contents: tuple[bytes, ...]
    options: dict[str, Any]
    faults: dict[int, tuple[str, int]] = field(default_factory=dict)
    is_target: bool = False


def spoiled(mark: bytes, at: int = 5000, length: int = 100) -> bytes:
    return PLAIN[:at] + mark * length + PLAIN[at + length :]


CASES = {
    "all agree": Case((PLAIN,) * 3, {"vote-threshold": 3}),
    "minority": Case((PLAIN, PLAIN, spoiled(b"x")), {"vote-threshold": 2}),
    "minority is corrected": Case((spoiled(b"x"), PLAIN, PLAIN), {"vote-threshold": 2, "rewrite-corrupted": True}),
    "three versions": Case((PLAIN, spoiled(b"x"), spoiled(b"y")), {"vote-threshold": 2}),
    "tie": Case((PLAIN, spoiled(b"x")), {"vote-threshold": 1}),
    "one cannot be read": Case((PLAIN,) * 3, {"vote-threshold": 2}, {1: ("read", 28)}),
    "two cannot be read": Case((PLAIN,) * 3, {"vote-threshold": 2}, {0: ("read", 28), 1: ("read", 5)}),
    "none can be read": Case((PLAIN,) * 2, {"vote-threshold": 1}, {0: ("read", 5), 1: ("read", 28)}),
    "in turn": Case((PLAIN, spoiled(b"x")), {"vote-threshold": 1, "read-pattern": "fifo"}, {0: ("read", 28)}),
    "in turn, none": Case(
        (PLAIN, PLAIN), {"vote-threshold": 1, "read-pattern": "fifo"}, {0: ("read", 5), 1: ("read", 28)}
    ),
    "written to all": Case((bytes(SIZE),) * 3, {"vote-threshold": 2}, is_target=True),
    "one cannot be written": Case((bytes(SIZE),) * 3, {"vote-threshold": 2}, {2: ("write", 28)}, is_target=True),
    "two cannot be written": Case(
        (bytes(SIZE),) * 3, {"vote-threshold": 2}, {0: ("write", 28), 2: ("write", 28)}, is_target=True
    ),
}


def play(program: player.Program, directory: Path, case: Case) -> dict[str, Any]:
    """Run one backup; returns the quorum's events, the job's error, and what all files hold."""
    directory.mkdir()
    names = [f"c{index}" for index in range(len(case.contents))]
    for name, content in zip(names, case.contents, strict=True):
        (directory / name).write_bytes(content)
    (directory / "other").write_bytes(PLAIN[::-1] if case.is_target else bytes(SIZE))
    with player.Daemon(program, directory) as daemon:
        events: list[dict[str, Any]] = []

        def ask(command: str, **arguments: Any) -> Any:
            named = {name.replace("_", "-"): value for name, value in arguments.items()}
            reply, heard = daemon.qmp.ask({"execute": command, "arguments": named})
            events.extend(heard)
            return reply["return"]

        for index, name in enumerate(names):
            ask("blockdev-add", driver="file", node_name=f"{name}-file", filename=name)
            kind, code = case.faults.get(index, ("flush", 5))
            rule = {"event": "none", "iotype": kind, "errno": code}
            faulty = {} if kind == "flush" else {"inject_error": [rule]}
            ask("blockdev-add", driver="blkdebug", node_name=name, image=f"{name}-file", **faulty)
        ask("blockdev-add", driver="quorum", node_name="q", children=names, **case.options)
        ask("blockdev-add", driver="file", node_name="o", filename="other")
        source, target = ("o", "q") if case.is_target else ("q", "o")
        ask("blockdev-backup", job_id="j", device=source, target=target, sync="full", auto_dismiss=False)
        while (job := ask("query-jobs")[0])["status"] != "concluded":
            time.sleep(0.02)
        ask("query-version")
        while (event := daemon.qmp.hear(wait_s=0.1)) is not None:
            events.append(event)
    told = [(event["event"], event["data"]) for event in events if event["event"].startswith("QUORUM")]
    files = {name: (directory / name).read_bytes() for name in [*names, "other"]}
    return {"told": told, "error": job.get("error"), **files}


@pytest.mark.parametrize("name", CASES)
def test_both_tell_and_leave_the_same(name: str, tmp_path: Path) -> None:
    theirs, ours = (play(program, tmp_path / program.name, CASES[name]) for program in player.PROGRAMS)
    assert ours == theirs
