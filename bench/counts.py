"""What a job costs in figures that no neighbour on the machine disturbs: calls of Python, worker hops, system calls.

As a program it is our daemon with counters, which it writes as JSON to the file named by BENCH_COUNTS.
"""

import argparse
import functools
import json
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FrameType

from bounds import Bound
from daemons import OURS, PEER, Daemon
from pairs import Took, measure, with_lazy
from processes import ENVIRONMENT
from rows import Row, of_pairs

COUNTED = (sys.executable, __file__)
Run = Callable[[tuple[str, ...]], Took]


def compared(
    name: str,
    run: Run,
    options: argparse.Namespace,
    *,
    lazily: Run | None = None,
    at_least: float | None = None,
    aim: float | None = None,
    limit: str = "",
    bound: Bound | None = None,
) -> Row:
    """Measure a case against QEMU's daemon, and count what it costs if that is asked for.

    Args:
        run: as for `counts`.
        lazily: the same without a wait for the disk, where QEMU's job has none.
        options: `runs`, `budget_s` and `count` of them.
    """
    ours, peer = functools.partial(run, OURS), functools.partial(run, PEER)
    if lazily is not None and options.waits:
        ours, peer = with_lazy(ours, functools.partial(lazily, OURS)), with_lazy(peer)
    pairs = measure(name, ours, peer, runs=options.runs, budget_s=options.budget_s)
    row = of_pairs(pairs, "QSD", at_least=at_least, aim=aim, limit=limit, bound=bound)
    return replace(row, counts=counts(run)) if options.count else row


def counts(run: Run) -> str:
    """One line about one more run of ours with counters, and one of each under strace if that is installed.

    Args:
        run: makes the images, runs the job in a daemon started by this command line, and tidies up.
    """
    with tempfile.TemporaryDirectory(prefix="blockjobs-bench-") as folder:
        path = Path(folder) / "counts"
        ENVIRONMENT["BENCH_COUNTS"] = str(path)
        idle, busy = _counted(_do_nothing, path), _counted(run, path)
        parts = [f"{busy[name] - idle[name]} {name}" for name in busy]
        if shutil.which("strace"):
            for name, program in (("ours", OURS), ("peer", PEER)):
                parts.append(f"{_system_calls(run, program, path)} system calls ({name})")
    return "one job: " + ", ".join(parts)


def _counted(run: Run, path: Path) -> dict[str, int]:
    run(COUNTED)
    return json.loads(path.read_text())


def _do_nothing(program: tuple[str, ...]) -> Took:
    """A daemon that is started and stopped: its cost is not the job's."""
    with tempfile.TemporaryDirectory(prefix="blockjobs-bench-") as folder, Daemon(program, Path(folder)):
        return Took(0, 0, 0)


def _system_calls(run: Run, program: tuple[str, ...], path: Path) -> int:
    """But for futex: how often threads wait for each other is chance."""
    totals = []
    for each in (run, _do_nothing):
        each(("strace", "-f", "-c", "-e", "trace=!futex", "-o", str(path), *program))
        [total] = [line for line in path.read_text().splitlines() if line.endswith(" total")]
        totals.append(int(total.split()[3]))
    return totals[0] - totals[1]


def main() -> int:
    """Be the daemon, and count."""
    from blockjobs.base.offload import ThreadOffload
    from blockjobs.daemon.main import main as serve

    calls = hops = 0
    offload_run = ThreadOffload.run

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    def hop(self: ThreadOffload, *arguments: object) -> object:
        nonlocal hops
        hops += 1
        return offload_run(self, *arguments)

    ThreadOffload.run = hop
    threading.setprofile(count)
    sys.setprofile(count)
    try:
        return serve()
    finally:
        sys.setprofile(None)
        Path(os.environ["BENCH_COUNTS"]).write_text(json.dumps({"Python calls": calls, "worker hops": hops}))


if __name__ == "__main__":
    sys.exit(main())
