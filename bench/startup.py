"""What a start costs: the smallest commands against qemu-img, and a daemon until it answers against QEMU's.

An interpreter is not as fast as a C program here, and need not be: what matters is the time itself.
"""

import argparse
import functools
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import daemons
from daemons import Daemon
from pairs import Pairs, Took, measure, parse
from processes import ENVIRONMENT, OURS, run_process
from rows import Row, of_pairs

INFO_S_MAX, READY_S_MAX = 0.25, 0.5
"""What is promised (the medians of a machine that does nothing else)."""


def options(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, from the command line unless `words` are given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--budget", type=float, default=math.inf, dest="budget_s", help="seconds for each case")
    parser.add_argument("--dir", type=Path, help="where the images go (default: a temporary folder)")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--quick", action="store_true", help="two pairs")
    parser.set_defaults(mib=64)
    return parse(parser, words)


def create(program: tuple[str, ...], image: Path) -> Took:
    """Make a small image where none is."""
    image.unlink(missing_ok=True)
    return run_process([*program, "create", "-q", "-f", "qcow2", str(image), "64M"])


def ready(program: tuple[str, ...], folder: Path) -> Took:
    """A daemon until it has answered its first command."""
    began_s = time.perf_counter()
    with Daemon(program, folder, at_once=True) as daemon:
        wall_s = time.perf_counter() - began_s
        return Took(wall_s, daemon.cpu_s(), wall_s)


def modules(*words: str) -> int:
    """How many modules a command of ours loads: a figure that no neighbour disturbs."""
    script = (
        "import sys; from blockjobs.cli.main import main; main(sys.argv[1:]); print(len(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *words], capture_output=True, text=True, check=True, env=ENVIRONMENT
    )
    return int(done.stderr)


def cases(folder: Path) -> Iterator[tuple[str, Callable[[], Took], Callable[[], Took], str, str]]:
    """Name, ours, the peer's, the peer's name, and what the time may be."""
    image, peer = folder / "a.qcow2", ("qemu-img",)
    create(peer, image)
    for words in (("--version",), ("info", str(image)), ("check", str(image)), ("map", str(image))):
        both = [functools.partial(run_process, [*program, *words]) for program in (OURS, peer)]
        promise = f"at most {INFO_S_MAX} s" if words[0] == "info" else ""
        yield f"start: {words[0]}", both[0], both[1], "qemu-img", promise
    new = folder / "new.qcow2"
    yield "start: create", functools.partial(create, OURS, new), functools.partial(create, peer, new), "qemu-img", ""
    both = [functools.partial(ready, program, folder) for program in (daemons.OURS, daemons.PEER)]
    yield "start: daemon until it answers", both[0], both[1], "QSD", f"at most {READY_S_MAX} s"


def measured(options: argparse.Namespace) -> Iterator[tuple[Pairs, Row]]:
    folder = Path(tempfile.mkdtemp(prefix="blockjobs-bench-", dir=options.dir))
    try:
        for name, ours, theirs, peer, promise in cases(folder):
            if options.only not in name:
                continue
            pairs = measure(name, ours, theirs, runs=options.runs, budget_s=options.budget_s)
            row = of_pairs(pairs, peer)
            command = name.rpartition(" ")[2]
            if command in ("info", "check", "map"):
                row = replace(row, counts=f"{modules(command, str(folder / 'a.qcow2'))} modules")
            yield pairs, replace(row, limit=promise)
    finally:
        shutil.rmtree(folder)


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """The lines of the table."""
    for _, row in measured(options):
        yield row


def main() -> None:
    """Print a line for each case."""
    for pairs, row in measured(options()):
        print(f"{pairs}  {row.counts}", flush=True)


if __name__ == "__main__":
    main()
