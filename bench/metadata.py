"""`map`, `check` and `info` of large images against qemu-img: whole processes, start of the interpreter included.

The scattered image is made by hand, since writing it takes an hour: every cluster in its own place, in random order.
"""

import argparse
import functools
import math
import os
import random
import shutil
import subprocess
import tempfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from pairs import Pairs, Took, measure, parse
from processes import ENVIRONMENT, OURS, run_process
from rows import Row, of_pairs

TiB = 1 << 40
GiB = 1 << 30
CLUSTER = 65536
OFFSET = 0x00FF_FFFF_FFFF_FE00
PEER = ("qemu-img",)


def create(path: Path, length: int, *options: str) -> None:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *options, path, str(length)], check=True)


def scatter(path: Path, length: int) -> None:
    """A preallocated image whose clusters are mapped in random order."""
    create(path, length, "-o", "preallocation=metadata")
    with path.open("r+b") as image:

        def words(at: int, count: int) -> "array[int]":
            image.seek(at)
            found = array("Q", image.read(count * 8))
            found.byteswap()
            return found

        l1_at, l1_entries = words(40, 1)[0], words(32, 1)[0] & 0xFFFF_FFFF
        tables = [entry & OFFSET for entry in words(l1_at, l1_entries)]
        entries = array("Q")
        for at in tables:
            entries += words(at, CLUSTER // 8)
        random.Random(3).shuffle(entries)
        entries.byteswap()
        for number, at in enumerate(tables):
            image.seek(at)
            image.write(entries[number * CLUSTER // 8 : (number + 1) * CLUSTER // 8].tobytes())


def run(program: tuple[str, ...], arguments: tuple[str, ...]) -> Took:
    """One process, its output thrown away."""
    return run_process([*program, *arguments])


def peak_mib(program: tuple[str, ...], arguments: tuple[str, ...]) -> float:
    """The most memory that one process has had."""
    child = subprocess.Popen([*program, *arguments], stdout=subprocess.DEVNULL, env=ENVIRONMENT)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0
    return usage.ru_maxrss / 1024


def options(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, from the command line unless `words` are given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=1 << 20, help="virtual size of the larger images")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--budget", type=float, default=math.inf, dest="budget_s", help="seconds for each case")
    parser.add_argument("--dir", type=Path, help="where the images go (default: a temporary folder)")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--no-memory", action="store_true", help="do not look at the most memory that each takes")
    parser.add_argument("--quick", action="store_true", help="256 MiB and two pairs")
    return parse(parser, words)


def measured(options: argparse.Namespace) -> Iterator[tuple[Pairs, Row]]:
    """Each case with the line of the table that it becomes."""
    folder = Path(tempfile.mkdtemp(prefix="blockjobs-bench-", dir=options.dir))
    try:
        yield from _cases(folder, options)
    finally:
        shutil.rmtree(folder)


def _cases(folder: Path, options: argparse.Namespace) -> Iterator[tuple[Pairs, Row]]:
    length = options.mib << 20
    kinds: tuple[tuple[str, Callable[[Path], None]], ...] = (
        ("preallocated", lambda path: create(path, length, "-o", "preallocation=metadata")),
        ("empty", lambda path: create(path, length)),
        ("scattered", lambda path: scatter(path, min(length, 100 * GiB))),
    )
    for what, make in kinds:
        image = folder / f"{what}.qcow2"
        for command in ("info", "map", "check"):
            name = f"{command}, {what}"
            if options.only not in name:
                continue
            if not image.exists():
                make(image)
            both = [functools.partial(run, program, (command, "-f", "qcow2", str(image))) for program in (OURS, PEER)]
            pairs = measure(name, *both, runs=options.runs, budget_s=options.budget_s)
            memory = ""
            if not options.no_memory:
                memory = "peak memory {:.0f} MiB, peer {:.0f} MiB".format(*(peak_mib(*each.args) for each in both))
            promised = (1.0, 2.0) if what == "preallocated" and command != "info" else (None, None)
            row = of_pairs(pairs, "qemu-img", at_least=promised[0], aim=promised[1])
            yield pairs, replace(row, counts=memory)


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """The lines of the table: images of a terabyte, for what needs to look at all of their metadata."""
    for _, row in measured(options):
        yield row


def main() -> None:
    """Print a line for each case."""
    chosen = options()
    print(f"{chosen.mib} MiB (scattered: at most 100 GiB), {chosen.runs} pairs after a warm-up")
    for pairs, row in measured(chosen):
        print(pairs)
        print(f"    {row.counts}", flush=True)


if __name__ == "__main__":
    main()
