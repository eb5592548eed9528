"""How soon the daemon reacts while it copies at full speed, and how long a guest's writes take under a mirror.

Backups and mirrors of one file go on for as long as it takes. A ratio is the peer's 99th percentile by ours.
"""

import argparse
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from daemons import OURS, PEER, Daemon
from rows import Row

MiB = 1 << 20
POLL_S = 0.002


class Waits(NamedTuple):
    """Seconds: of each query, from each pause to PAUSED, between steps of the progress, and of each guest's write."""

    queries: list[float]
    pauses: list[float]
    steps: list[float]
    writes_p99: float


def options(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=2048, help="length of the file that is copied")
    parser.add_argument("--seconds", type=float, default=10, help="for queries; as long for a guest")
    parser.add_argument("--pauses", type=int, default=100)
    parser.add_argument("--dir", type=Path, help="where the files go")
    parser.add_argument("--quick", action="store_true", help="three seconds, thirty pauses, 1 GiB")
    parsed = parser.parse_args(words)
    if parsed.quick:
        parsed.mib, parsed.seconds, parsed.pauses = 1024, 3, 30
    return parsed


class Copying:
    """Keeps a backup of the file going, one after the other."""

    def __init__(self, daemon: Daemon, folder: Path) -> None:
        self._daemon, self._target = daemon, folder / "target"
        self._number = 0
        daemon.open("source", "raw", folder / "source", read_only=True)

    def go_on(self) -> dict[str, Any]:
        """The running job as query-jobs shows it; a new one is started if none runs."""
        while not (found := self._daemon.ask("query-jobs")) or found[0]["status"] not in ("running", "paused"):
            if found:
                time.sleep(POLL_S)
                continue
            self._number += 1
            node = f"target{self._number}"
            if self._number > 1:
                self._daemon.ask("blockdev-del", node_name=f"target{self._number - 1}")
            self._target.unlink(missing_ok=True)
            with self._target.open("wb") as target:
                target.truncate((self._target.parent / "source").stat().st_size)
            self._daemon.open(node, "raw", self._target)
            self._daemon.ask("blockdev-backup", job_id="job", device="source", target=node, sync="full")
            self._daemon.forget_events()
        return found[0]


def queries(daemon: Daemon, folder: Path, seconds: float) -> tuple[list[float], list[float]]:
    """How long each query-jobs took, and how long the progress stood still between two steps."""
    copying = Copying(daemon, folder)
    took, steps = [], []
    ends_s = time.perf_counter() + seconds
    while time.perf_counter() < ends_s:
        before = copying.go_on()["current-progress"]
        moved_s = time.perf_counter()
        while True:
            began_s = time.perf_counter()
            found = daemon.ask("query-jobs")
            now_s = time.perf_counter()
            took.append(now_s - began_s)
            if not found or found[0]["status"] != "running":
                break
            if found[0]["current-progress"] != before:
                steps.append(now_s - moved_s)
                before, moved_s = found[0]["current-progress"], now_s
            time.sleep(POLL_S)
    return took, steps


def pauses(daemon: Daemon, folder: Path, count: int, seconds: float) -> list[float]:
    """From job-pause to the event that the job is paused; so many, or as many as there is time for."""
    copying, took = Copying(daemon, folder), []
    ends_s = time.perf_counter() + seconds
    while len(took) < count and (time.perf_counter() < ends_s or not took):
        copying.go_on()
        time.sleep(0.005)
        daemon.ask("query-jobs")
        daemon.forget_events()
        try:
            began_s = time.perf_counter()
            daemon.ask("job-pause", id="job")
            if daemon.wait("JOB_STATUS_CHANGE")["status"] == "paused":
                took.append(time.perf_counter() - began_s)
            daemon.ask("job-resume", id="job")
        except RuntimeError:  # it has just ended
            continue
    return took


def guest(daemon: Daemon, folder: Path, seconds: float) -> float:
    """The 99th percentile of 4 KiB writes, 500 a second, to a disk that is being mirrored."""
    length = (folder / "source").stat().st_size
    daemon.open("disk", "raw", folder / "source")
    (folder / "mirror").unlink(missing_ok=True)
    with (folder / "mirror").open("wb") as target:
        target.truncate(length)
    daemon.open("mirror", "raw", folder / "mirror")
    socket = folder / "nbd.sock"
    daemon.ask("nbd-server-start", addr={"type": "unix", "data": {"path": str(socket)}})
    daemon.ask("block-export-add", type="nbd", id="disk", node_name="disk", writable=True)
    uri = f"nbd+unix:///disk?socket={socket}"
    words = ["fio", "--name=guest", "--ioengine=nbd", f"--uri={uri}", "--rw=randwrite", "--bs=4k", "--iodepth=1"]
    words += [f"--size={length}", "--rate_iops=500", "--time_based", f"--runtime={int(seconds * 1000)}ms"]
    fio = subprocess.Popen([*words, "--output-format=json"], stdout=subprocess.PIPE, text=True, cwd=folder)
    time.sleep(0.3)
    daemon.ask("blockdev-mirror", job_id="job", device="disk", target="mirror", sync="full")
    output, _ = fio.communicate()
    daemon.ask("block-job-cancel", device="job", force=True)
    written = json.loads(output[output.index("{") :])["jobs"][0]["write"]
    return float(written["clat_ns"]["percentile"]["99.000000"]) / 1e9


def waits(program: tuple[str, ...], folder: Path, options: argparse.Namespace) -> Waits:
    """All of them, each with a fresh daemon."""
    with Daemon(program, folder) as daemon:
        took, steps = queries(daemon, folder, options.seconds)
    with Daemon(program, folder) as daemon:
        paused = pauses(daemon, folder, options.pauses, 3 * options.seconds)
    with Daemon(program, folder) as daemon:
        written = guest(daemon, folder, options.seconds)
    return Waits(took, paused, steps, written)


def p99(found: list[float]) -> float:
    """The 99th percentile."""
    return sorted(found)[int(len(found) * 0.99)]


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """A row for each kind of wait."""
    with tempfile.TemporaryDirectory(prefix="blockjobs-bench-", dir=options.dir) as name:
        folder = Path(name)
        with (folder / "source").open("wb") as source:
            for _ in range(options.mib):
                source.write(os.urandom(4096) * 256)
        ours, theirs = (waits(program, folder, options) for program in (OURS, PEER))
    figures = (
        ("query-jobs under a backup, p99 (at most 20 ms)", p99(ours.queries), p99(theirs.queries)),
        ("job-pause to PAUSED, p99 (at most 150 ms)", p99(ours.pauses), p99(theirs.pauses)),
        ("progress stands still, longest (at most 200 ms)", max(ours.steps), max(theirs.steps)),
        ("a guest's 4 KiB write under a mirror, p99", ours.writes_p99, theirs.writes_p99),
    )
    for name, mine_s, peers_s in figures:
        yield Row(name, "QSD", f"{mine_s * 1e3:.2f} ms", f"{peers_s * 1e3:.2f} ms", (peers_s / mine_s,))


if __name__ == "__main__":
    from control import show

    show(rows(options()))
