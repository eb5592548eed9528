"""The control plane against qemu-storage-daemon: queries a second, and jobs that make images, over one QMP connection.

Both daemons live through all pairs of a case. The client is the same and its time counts. When a job of ours has made
a file, it is on the disk; QEMU's leave it to the kernel. So there is a second ratio, with two syncs, of the file and of
its folder, added to QEMU's time.
"""

import argparse
import functools
import itertools
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from daemons import OURS, PEER, Daemon, is_peer
from machine import spread
from pairs import Pairs, Took, measure
from rows import Row, show

GiB = 1 << 30
AT_ONCE = 16
_numbers = itertools.count()


class Case(NamedTuple):
    """Something to do many times.

    Attributes:
        name: of the row.
        prepare: brings about what it needs in a fresh daemon.
        once: what is counted; returns the seconds that were spent in it on syncs that the peer does not make.
        times: in one turn.
        at_least, aim: the promised ratios.
        counts: so many are done each time.
    """

    name: str
    prepare: Callable[[Daemon, Path], None]
    once: Callable[[Daemon, Path], float]
    times: int
    at_least: float
    aim: float
    counts: int = 1


def options(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--budget", type=float, default=math.inf, dest="budget_s", help="seconds for each case")
    parser.add_argument("--dir", type=Path, help="where images are made (default: a temporary folder)")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--quick", action="store_true", help="three pairs")
    parsed = parser.parse_args(words)
    if parsed.quick:
        parsed.runs = 3
    return parsed


def create(daemon: Daemon, folder: Path, *, format: str, dismiss: bool = True) -> float:
    """Make an image: a job for the file and one for the format, each from the command until concluded and dismissed."""
    path = folder / f"image{next(_numbers)}"
    file = {"driver": "file", "filename": str(path)}
    layers = [{**file, "size": 0 if format == "qcow2" else GiB}]
    if format == "qcow2":
        layers.append({"driver": "qcow2", "file": file, "size": GiB})
    for layer in layers:
        job = f"job{next(_numbers)}"
        daemon.say([("blockdev-create", {"job_id": job, "options": layer})])
        daemon.wait_for_lines(b'"concluded"')
        if dismiss:
            daemon.say([("job-dismiss", {"id": job})])
            daemon.wait_for_lines(b'"return"')
    synced_s = make_durable(daemon, [path])
    path.unlink()
    return synced_s


def create_many(daemon: Daemon, folder: Path) -> float:
    """Make files, all asked for at once; and their jobs are dismissed at once."""
    jobs = [f"job{next(_numbers)}" for _ in range(AT_ONCE)]
    daemon.say(
        ("blockdev-create", {"job_id": job, "options": {"driver": "file", "filename": f"{folder}/{job}", "size": GiB}})
        for job in jobs
    )
    daemon.wait_for_lines(b'"concluded"', AT_ONCE)
    daemon.say(("job-dismiss", {"id": job}) for job in jobs)
    daemon.wait_for_lines(b'"return"', AT_ONCE)
    synced_s = make_durable(daemon, [folder / job for job in jobs])
    for job in jobs:
        (folder / job).unlink()
    return synced_s


def make_durable(daemon: Daemon, files: Sequence[Path]) -> float:
    """Seconds to have new files of one folder on the disk, where the daemon has left that to the kernel."""
    if not is_peer(daemon.program):
        return 0.0
    began_s = time.perf_counter()
    for path in (*files, files[0].parent):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return time.perf_counter() - began_s


def add_nodes(daemon: Daemon, folder: Path) -> None:
    """A thousand nodes."""
    del folder
    for number in range(1000):
        daemon.ask("blockdev-add", driver="null-co", node_name=f"node{number}", size=GiB)


def ten_jobs(daemon: Daemon, folder: Path) -> None:
    """Ten jobs that nobody dismisses."""
    for _ in range(10):
        create(daemon, folder, format="raw", dismiss=False)


def nothing(daemon: Daemon, folder: Path) -> None:
    """A fresh daemon will do."""


def query(command: str) -> Callable[[Daemon, Path], float]:
    """A command whose answer is read and not decoded."""

    def ask(daemon: Daemon, folder: Path) -> float:
        del folder
        daemon.exchange(command)
        return 0.0

    return ask


CASES = (
    Case("query-jobs, 10 jobs", ten_jobs, query("query-jobs"), 2000, 3, 6),
    Case("query-named-block-nodes, 1,000 nodes", add_nodes, query("query-named-block-nodes"), 20, 8, 20),
    Case("blockdev-create, raw", nothing, functools.partial(create, format="raw"), 100, 3, 6),
    Case(f"blockdev-create, raw, {AT_ONCE} at once", nothing, create_many, 32, 3, 6, AT_ONCE),
    Case("blockdev-create, file and qcow2", nothing, functools.partial(create, format="qcow2"), 50, 3, 6),
)


def turn(case: Case, daemon: Daemon, folder: Path) -> Took:
    """The case, as often as it says."""
    cpu_then_s, began_s = daemon.cpu_s(), time.perf_counter()
    synced_s = sum(case.once(daemon, folder) for _ in range(case.times))
    durable_s = time.perf_counter() - began_s
    return Took(durable_s - synced_s, daemon.cpu_s() - cpu_then_s, durable_s)


def row(case: Case, pairs: Pairs) -> Row:
    """Times a second on either side, and the processor time of the daemon for one."""
    shown = []
    for side in (pairs.ours, pairs.peer):
        wall_s, cpu_s = (
            statistics.median(column) / case.times / case.counts for column in list(zip(*side, strict=True))[:2]
        )
        shown.append(f"{1 / wall_s:.0f}/s ({cpu_s * 1e6:.0f} µs cpu)")
    both = list(zip(pairs.ours, pairs.peer, strict=True))
    return Row(
        operation=case.name,
        peer="QSD",
        ours=shown[0],
        theirs=shown[1],
        ratios=tuple(theirs.wall_s / ours.wall_s for ours, theirs in both),
        durable=tuple(theirs.durable_s / ours.durable_s for ours, theirs in both if theirs.durable_s > theirs.wall_s),
        at_least=case.at_least,
        aim=case.aim,
        counts=f"ratio of processor time {statistics.median(b.cpu_s / a.cpu_s for a, b in both if a.cpu_s):.2f}",
    )


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """A row for each case."""
    with tempfile.TemporaryDirectory(prefix="blockjobs-bench-", dir=options.dir) as whole:
        spread(Path(whole))
        for case in CASES:
            if options.only not in case.name:
                continue
            folders = [Path(tempfile.mkdtemp(dir=whole)) for _ in range(2)]
            with Daemon(OURS, folders[0]) as ours, Daemon(PEER, folders[1]) as peer:
                for daemon, folder in zip((ours, peer), folders, strict=True):
                    case.prepare(daemon, folder)
                ours_turn, peer_turn = (
                    functools.partial(turn, case, *each) for each in zip((ours, peer), folders, strict=True)
                )
                yield row(case, measure(case.name, ours_turn, peer_turn, runs=options.runs, budget_s=options.budget_s))


if __name__ == "__main__":
    show(rows(options()))
