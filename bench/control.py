"""The control plane against qemu-storage-daemon: queries a second, and jobs that make images, over one QMP connection.

Both daemons live through all pairs of a case. The client is the same and its time counts, so it does little: packets
are made, and files are removed, while the clock stands still. When a job of ours has made a file, it is on the disk;
QEMU's leave it to the kernel. So there is a second ratio, with two syncs, of the file and of its folder, added to
QEMU's time.
"""

import argparse
import functools
import itertools
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from daemons import OURS, PEER, Daemon, is_peer, packet_of
from machine import spread
from pairs import Pairs, Took, measure
from rows import Row, show

GiB = 1 << 30
AT_ONCE = 16
BARE = (sys.executable, str(Path(__file__).with_name("bare.py")))
BARE_TURNS = 5
LISTING = "query-named-block-nodes"
_numbers = itertools.count()


class Exchange(NamedTuple):
    """A packet to send, and what to wait for: so many lines that contain something."""

    packet: bytes
    until: bytes
    count: int = 1


class Work(NamedTuple):
    """What is counted, and the files that it makes."""

    exchanges: tuple[Exchange, ...]
    files: tuple[Path, ...] = ()


class Case(NamedTuple):
    """Something to do many times.

    Attributes:
        name: of the row.
        prepare: brings about what it needs in a fresh daemon.
        work: says what to do with files in a folder, which is new each time.
        times: in one turn.
        at_least, aim: the promised ratios.
        counts: so many are done each time.
        has_bound: whether `bare.py` can do it, too.
    """

    name: str
    prepare: Callable[[Daemon, Path], None]
    work: Callable[[Path], Work]
    times: int
    at_least: float
    aim: float
    counts: int = 1
    has_bound: bool = False


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


def create(folder: Path, *, format: str, dismiss: bool = True) -> Work:
    """Make an image: a job for the file and one for the format, each from the command until concluded and dismissed."""
    path = folder / f"image{next(_numbers)}"
    file = {"driver": "file", "filename": str(path)}
    layers = [{**file, "size": 0 if format == "qcow2" else GiB}]
    if format == "qcow2":
        layers.append({"driver": "qcow2", "file": file, "size": GiB})
    exchanges = []
    for layer in layers:
        job = f"job{next(_numbers)}"
        exchanges.append(Exchange(packet_of([("blockdev-create", {"job_id": job, "options": layer})]), b'"concluded"'))
        if dismiss:
            exchanges.append(Exchange(packet_of([("job-dismiss", {"id": job})]), b'"return"'))
    return Work(tuple(exchanges), (path,))


def create_many(folder: Path) -> Work:
    """Make files, all asked for at once; and their jobs are dismissed at once."""
    jobs = [f"job{next(_numbers)}" for _ in range(AT_ONCE)]
    creation = packet_of(
        ("blockdev-create", {"job_id": job, "options": {"driver": "file", "filename": f"{folder}/{job}", "size": GiB}})
        for job in jobs
    )
    dismissal = packet_of(("job-dismiss", {"id": job}) for job in jobs)
    exchanges = Exchange(creation, b'"concluded"', AT_ONCE), Exchange(dismissal, b'"return"', AT_ONCE)
    return Work(exchanges, tuple(folder / job for job in jobs))


def make_durable(daemon: Daemon, files: Sequence[Path]) -> float:
    """Seconds to have new files of one folder on the disk, where the daemon has left that to the kernel."""
    if not files or not is_peer(daemon.program):
        return 0.0
    began_s = time.perf_counter()
    for path in (*files, files[0].parent):
        _sync(path)
    return time.perf_counter() - began_s


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def add_nodes(daemon: Daemon, folder: Path) -> None:
    """A thousand nodes."""
    del folder
    for number in range(1000):
        daemon.ask("blockdev-add", driver="null-co", node_name=f"node{number}", size=GiB)


def ten_jobs(daemon: Daemon, folder: Path) -> None:
    """Ten jobs that nobody dismisses."""
    for _ in range(10):
        do(daemon, create(folder, format="raw", dismiss=False))


def nothing(daemon: Daemon, folder: Path) -> None:
    """A fresh daemon will do."""


def query(folder: Path, *, command: str) -> Work:
    """A command whose answer is read and not decoded."""
    del folder
    return Work((Exchange(packet_of([(command, {})]), b'"return"'),))


CASES = (
    Case("query-jobs, 10 jobs", ten_jobs, functools.partial(query, command="query-jobs"), 2000, 3, 6),
    Case(f"{LISTING}, 1,000 nodes", add_nodes, functools.partial(query, command=LISTING), 20, 8, 20),
    Case("blockdev-create, raw", nothing, functools.partial(create, format="raw"), 100, 3, 6, has_bound=True),
    Case(f"blockdev-create, raw, {AT_ONCE} at once", nothing, create_many, 32, 3, 6, AT_ONCE, True),
    Case("blockdev-create, file and qcow2", nothing, functools.partial(create, format="qcow2"), 50, 3, 6),
)


def do(daemon: Daemon, work: Work) -> None:
    """Send what it says, and wait for what it says."""
    for exchange in work.exchanges:
        daemon.send(exchange.packet)
        daemon.wait_for_lines(exchange.until, exchange.count)


def turn(case: Case, daemon: Daemon, folder: Path) -> Took:
    """The case, as often as it says; the clock stands still while the client makes packets and removes files.

    Files are removed one by one: ext4 takes ten times as long for a new file once hundreds beside it have just gone.
    """
    works = [case.work(folder) for _ in range(case.times)]
    wall_s = synced_s = 0.0
    cpu_then_s = daemon.cpu_s()
    for work in works:
        began_s = time.perf_counter()
        do(daemon, work)
        wall_s += time.perf_counter() - began_s
        synced_s += make_durable(daemon, work.files)
        for path in work.files:
            path.unlink()
    return Took(wall_s, daemon.cpu_s() - cpu_then_s, wall_s + synced_s)


def bound(case: Case, peer_turn: Callable[[], Took], folder: Path) -> str:
    """What a server without jobs would make of it, in turn with the peer, as the disk drifts."""
    with Daemon(BARE, folder) as bare:
        both = [(turn(case, bare, folder).wall_s, peer_turn().wall_s) for _ in range(BARE_TURNS)]
    alone_s = statistics.median(alone_s for alone_s, _ in both) / case.times / case.counts
    at_most = statistics.median(peer_s / alone_s for alone_s, peer_s in both)
    return f"a server without jobs {1 / alone_s:.0f}/s: at most {at_most:.2f}"


def row(case: Case, pairs: Pairs, limit: str) -> Row:
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
        limit=limit,
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
                pairs = measure(case.name, ours_turn, peer_turn, runs=options.runs, budget_s=options.budget_s)
                limit = bound(case, peer_turn, Path(tempfile.mkdtemp(dir=whole))) if case.has_bound else ""
            yield row(case, pairs, limit)


if __name__ == "__main__":
    show(rows(options()))
