"""Paired measurement: ours and the peer's in turn, ratio by ratio, because the machine itself drifts.

Beside the time on the clock there is the time on the processors, which others on the machine disturb much less.
"""

import argparse
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from machine import file_system

ENOUGH = 3
"""Pairs below which a median says nothing."""
LONG_TURN_S = 2.5
"""Runs that take so long hardly differ: two pairs tell as much."""


class Took(NamedTuple):
    """What one run cost: seconds on the clock, of all processors, and on the clock until the result was durable.

    `lazy_s` is what it takes on the clock if nobody waits for the disk; None where that is no question.
    """

    wall_s: float
    cpu_s: float
    durable_s: float
    lazy_s: float | None = None


@dataclass(frozen=True)
class Pairs:
    """Each run, in the order they were made."""

    name: str
    ours: list[Took]
    peer: list[Took]

    def __str__(self) -> str:
        pairs = list(zip(self.ours, self.peer, strict=True))
        speeds = [_spread(peer[index] / ours[index] for ours, peer in pairs) for index in (0, 2)]
        times = f"ours {_shown(self.ours)}   peer {_shown(self.peer)}"
        return f"{self.name:36s} {times}   {speeds[0]} x the peer's speed, durably {speeds[1]} x"


def _shown(runs: list[Took]) -> str:
    wall_s, cpu_s, durable_s = (statistics.median(column) for column in list(zip(*runs, strict=True))[:3])
    return f"{wall_s:6.3f} s (cpu {cpu_s:6.3f}, durable {durable_s:6.3f})"


def _spread(ratios: Iterable[float]) -> str:
    """Peer's time divided by ours, pair by pair: 2 means twice as fast as the peer."""
    known = sorted(ratios)
    return f"{statistics.median(known):5.2f} ({known[0]:.2f} to {known[-1]:.2f})"


def measure(
    name: str,
    ours: Callable[[], Took],
    peer: Callable[[], Took],
    *,
    runs: int,
    budget_s: float = math.inf,
    now: Callable[[], float] = time.monotonic,
) -> Pairs:
    """Run both `runs` times in turn, after one uncounted turn; each callable prepares, runs, and says what it took.

    Args:
        budget_s: no further pair begins after so long, once there are three, or two if they take long. If the first
            turn alone takes more than half of it, that turn counts, since what warms up is short.
        now: the clock for the budget, in seconds.
    """
    began_s = now()
    first_turn = ours(), peer()
    turn_s = now() - began_s
    pairs = Pairs(name, [], [])
    if turn_s > budget_s / 2:
        pairs.ours.append(first_turn[0])
        pairs.peer.append(first_turn[1])
    for number in range(len(pairs.ours), runs):
        if number >= (2 if turn_s > LONG_TURN_S else ENOUGH) and now() - began_s > budget_s:
            break
        first, second = (ours, peer) if number % 2 == 0 else (peer, ours)
        took = {first: first(), second: second()}
        pairs.ours.append(took[ours])
        pairs.peer.append(took[peer])
    return pairs


def with_lazy(run: Callable[[], Took], lazily: Callable[[], Took] | None = None) -> Callable[[], Took]:
    """A run whose `lazy_s` is what another one takes that does not wait for the disk, or itself if it never does."""

    def both() -> Took:
        took = run()
        return took._replace(lazy_s=took.wall_s if lazily is None else lazily().wall_s)

    return both


def add_shortcuts(parser: argparse.ArgumentParser) -> None:
    """Options that all the benchmarks of jobs have."""
    parser.add_argument("--quick", action="store_true", help="256 MiB and two pairs: done within two minutes")
    parser.add_argument("--count", action="store_true", help="count calls and hops of one more job of each case")


def parse(parser: argparse.ArgumentParser, words: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, from the command line unless `words` are given; `--quick` settles how much is done."""
    options = parser.parse_args(words)
    if options.quick:
        options.mib, options.runs = 256, 2
    return options


def job_options(description: str | None, words: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of a benchmark over whole disks, from `words` if they are given.

    Among them are the lengths of disks in bytes: `bytes` if they are written here and there, `full_bytes` if all over,
    and `text_bytes` if with text that a backup compresses; and whether the folder is on a disk, for which one `waits`.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--mib", type=int, default=1024, help="virtual size of the disks")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--budget", type=float, default=math.inf, dest="budget_s", help="seconds for each case")
    parser.add_argument("--dir", type=Path, help="where the images go (default: a temporary folder)")
    parser.add_argument("--verify", action="store_true", help="compare source and target after each run")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--sources", type=Path, help="a folder that keeps the source disks for other benchmarks")
    parser.add_argument("--brief", action="store_true", help="half the size where all is written, no repetitions")
    add_shortcuts(parser)
    options = parse(parser, words)
    options.waits = file_system(options.dir or Path(tempfile.gettempdir())) != "tmpfs"
    options.bytes = options.mib << 20
    options.full_bytes = options.bytes >> 1 if options.brief else options.bytes
    options.text_bytes = options.bytes >> 1 if options.brief else options.bytes
    return options


def in_folder(run_cases: Callable[[Path, argparse.Namespace], None], options: argparse.Namespace) -> None:
    """Run the cases in a folder of their own, which is gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="blockjobs-bench-", dir=options.dir))
    try:
        run_cases(folder, options)
    finally:
        shutil.rmtree(folder)
