"""A thousand throttled jobs on two thousand nodes, and ten thousand jobs one after the other, in one daemon."""

import argparse
import functools
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import control
from daemons import OURS, PEER, Daemon
from machine import spread
from rows import Row

SPEED_BYTES_PER_S = 4096


class Load(NamedTuple):
    """What so many jobs at once cost: seconds to start one, to query all, of processor time per second, KiB per job."""

    start_s: float
    query_s: float
    busy: float
    memory_kib: float


def options(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=1000, help="at once")
    parser.add_argument("--images", type=int, default=10_000, help="one after the other")
    parser.add_argument("--dir", type=Path, help="where images are made")
    parser.add_argument("--quick", action="store_true", help="a fifth, and a fiftieth, of that")
    parsed = parser.parse_args(words)
    if parsed.quick:
        parsed.jobs, parsed.images = 200, 200
    return parsed


def at_once(program: tuple[str, ...], folder: Path, jobs: int) -> Load:
    """Start backups that wait for their rate limit, and look at the daemon."""
    daemon = Daemon(program, folder, quiet=True)
    with daemon:
        for number in range(jobs):
            for kind in ("source", "target"):
                daemon.ask(
                    "blockdev-add", driver="null-co", node_name=f"{kind}{number}", size=1 << 30, read_zeroes=False
                )
        memory_kib, began_s = daemon.memory_kib(), time.perf_counter()
        for number in range(jobs):
            daemon.ask(
                "blockdev-mirror",
                job_id=f"job{number}",
                device=f"source{number}",
                target=f"target{number}",
                sync="full",
                speed=SPEED_BYTES_PER_S,
            )
        start_s = (time.perf_counter() - began_s) / jobs
        daemon.forget_events()
        time.sleep(2)
        memory_kib = daemon.memory_kib() - memory_kib
        cpu_s, began_s = daemon.cpu_s(), time.perf_counter()
        time.sleep(5)
        busy = (daemon.cpu_s() - cpu_s) / (time.perf_counter() - began_s)
        began_s = time.perf_counter()
        for _ in range(20):
            daemon.exchange("query-jobs")
        return Load(start_s, (time.perf_counter() - began_s) / 20, busy, memory_kib / jobs)


def making(program: tuple[str, ...], folder: Path, images: int, at_once: int) -> tuple[float, float]:
    """Seconds to make an image of a file and dismiss the job, with so many on their way; and to have it on the disk."""
    work = control.create_many if at_once > 1 else functools.partial(control.create, format="raw")
    case = control.Case("", control.nothing, work, images // at_once, 0, 0)
    with Daemon(program, folder) as daemon:
        took = control.turn(case, daemon, folder)
    made = case.times * at_once
    return took.wall_s / made, took.durable_s / made


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """A row for each figure; ratios are the peer's figure by ours."""
    with tempfile.TemporaryDirectory(prefix="blockjobs-bench-", dir=options.dir) as name:
        folder = Path(name)
        spread(folder)
        ours, theirs = (at_once(program, folder, options.jobs) for program in (OURS, PEER))
        figures = (
            ("start one more", f"{ours.start_s * 1e3:.2f} ms", f"{theirs.start_s * 1e3:.2f} ms", 0),
            ("query-jobs", f"{ours.query_s * 1e3:.1f} ms", f"{theirs.query_s * 1e3:.1f} ms", 1),
            ("one core busy", f"{ours.busy:.2%}", f"{theirs.busy:.2%}", 2),
            ("memory for each", f"{ours.memory_kib:.0f} KiB", f"{theirs.memory_kib:.0f} KiB", 3),
        )
        for name, mine, peers, index in figures:
            ratio = theirs[index] / ours[index] if ours[index] else 1.0
            yield Row(f"{options.jobs} throttled jobs: {name}", "QSD", mine, peers, (ratio,))
        for name, count in (("one after the other", 1), (f"{control.AT_ONCE} at once", control.AT_ONCE)):
            (mine_s, mine_durable_s), (peers_s, peers_durable_s) = (
                making(program, Path(tempfile.mkdtemp(dir=folder)), options.images, count) for program in (OURS, PEER)
            )
            yield Row(
                f"{options.images} blockdev-create jobs, {name}", "QSD", f"{1 / mine_s:.0f}/s", f"{1 / peers_s:.0f}/s",
                (peers_s / mine_s,), durable=(peers_durable_s / mine_durable_s,), at_least=3, aim=6,
            )  # fmt: skip


if __name__ == "__main__":
    control.show(rows(options()))
