"""How exactly rate limits hold: one job whose speed is changed while it runs, against qemu-storage-daemon.

A ratio is our rate divided by the peer's; what each is of the limit is in the columns.
"""

import argparse
import itertools
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from daemons import OURS, PEER, Daemon
from rows import Row, show

MiB = 1 << 20
SPEEDS_MIB_S = (1, 16, 128, 1024)


def options(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--dir", type=Path, help="where the socket goes")
    parser.add_argument("--quick", action="store_true", help="two seconds")
    parsed = parser.parse_args(words)
    if parsed.quick:
        parsed.seconds = 2
    return parsed


def shares(program: tuple[str, ...], folder: Path, seconds: float) -> list[float]:
    """The rate at each speed, as a part of that speed, between two steps of the progress."""
    with Daemon(program, folder, quiet=True) as daemon:
        for name in ("source", "target"):
            daemon.ask("blockdev-add", driver="null-co", node_name=name, size=1 << 44, read_zeroes=False)
        first, *others = SPEEDS_MIB_S
        daemon.ask("blockdev-backup", job_id="job", device="source", target="target", sync="full", speed=first * MiB)
        found = [share(daemon, first, seconds)]
        for speed in others:
            daemon.ask("block-job-set-speed", device="job", speed=speed * MiB)
            found.append(share(daemon, speed, seconds))
        daemon.ask("block-job-cancel", device="job", force=True)
        return found


def at_once(programs: Sequence[tuple[str, ...]], folder: Path, seconds: float) -> list[list[float]]:
    """The shares of each program; all run at the same time, which a limit must hold out."""
    with ThreadPoolExecutor(len(programs)) as pool:
        homes = [Path(tempfile.mkdtemp(dir=folder)) for _ in programs]
        return list(pool.map(shares, programs, homes, itertools.repeat(seconds)))


def share(daemon: Daemon, speed_mib_s: int, seconds: float) -> float:
    """Progress from one step to another, at least so many seconds later, by the limit."""
    (began_s, began), (ended_s, ended) = step(daemon), (0.0, 0)
    while ended_s < began_s + seconds:
        ended_s, ended = step(daemon)
    return (ended - began) / (ended_s - began_s) / (speed_mib_s * MiB)


def step(daemon: Daemon) -> tuple[float, int]:
    """When the progress next changes, and what it is then."""
    before = daemon.ask("query-jobs")[0]["current-progress"]
    while (now := daemon.ask("query-jobs")[0]["current-progress"]) == before:
        time.sleep(0.0005)
    return time.perf_counter(), now


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """A row for each speed."""
    with tempfile.TemporaryDirectory(prefix="blockjobs-bench-", dir=options.dir) as folder:
        both = at_once((OURS, PEER), Path(folder), options.seconds)
    for speed, ours, theirs in zip(SPEEDS_MIB_S, *both, strict=True):
        yield Row(
            operation=f"a limit of {speed} MiB/s, changed live",
            peer="QSD",
            ours=f"{ours:.4f} of it",
            theirs=f"{theirs:.4f} of it",
            ratios=(ours / theirs,),
        )


if __name__ == "__main__":
    show(rows(options()))
