"""All the benchmarks in one run (`make bench`): one table, one picture: in `build`, or in the README with `--publish`.

Suites are run one after another, each on a folder of its own; the copies once more, with smaller disks, on the second
`--dir`, which is in memory; then how time grows. All have their share of `--minutes`: on a slow machine there are fewer
pairs of runs for each figure (never less than three, or two long ones), and if that does not suffice suites are left
out, but none of those in memory for one on the disk. At the end it is told what took how long, and what was left out.

`--thorough` takes the time for seven pairs of each, larger disks, longer runs, and the rows that say nearly the same.
With `--only`, `--publish` keeps all else that was published, and tells what was measured on another day.
"""

import argparse
import datetime
import importlib
import math
import shlex
import shutil
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import machine
import publication
from growth import Curve, curves
from pace import Clock, Piece
from publication import Figure, Occasion, Results
from rows import Row

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
RESULTS, PICTURE = "results.json", "results.svg"


class Suite(NamedTuple):
    """A module with `rows(options)`, and what to tell it.

    Args:
        module: its name.
        about_s: seconds that it takes on a slow machine.
        brief: its words within the ten minutes; "{budget:.1f}" in them is for seconds of a case.
        thorough: its words if there is time enough.
        budget_s: of each case, at the usual pace.
        elsewhere: whether it goes to the second folder too, and further words there.
        elsewhere_s: seconds that it takes there.
    """

    module: str
    about_s: float
    brief: str = ""
    thorough: str = ""
    budget_s: float = math.inf
    elsewhere: str | None = None
    elsewhere_s: float = 0.0


COPIES, ALL_COPIES = "--brief --runs 7 --budget {budget:.1f}", "--runs 7"
WITH_SOURCES = ("backup", "mirror", "convert")
"""Suites whose disks are the same: they are made once."""
SUITES = (
    Suite("startup", 13, "--runs 7 --budget {budget:.1f}", "--runs 15", 2),
    Suite(
        "control",
        *(13, "--runs 7 --budget {budget:.1f}", "--runs 7", 2),
        elsewhere="--only blockdev-create",
        elsewhere_s=8,
    ),
    Suite("nbd", 60, "--runs 7 --seconds 0.3 --budget {budget:.1f}", "--runs 7 --seconds 1", 5),
    Suite("latency", 34, "--quick"),
    Suite("limits", 22, "--seconds 5", "--seconds 10"),
    Suite("scale", 30, "--images 1000"),
    Suite("metadata", 25, "--no-memory --runs 7 --budget {budget:.1f} --only preallocated", "--runs 7", 2),
    Suite("mirror", 35, COPIES, ALL_COPIES, 3, elsewhere="--mib 512", elsewhere_s=10),
    Suite("commit", 45, COPIES, ALL_COPIES, 3, elsewhere="--mib 512", elsewhere_s=11),
    Suite("stream", 28, COPIES, ALL_COPIES, 3, elsewhere="--mib 512", elsewhere_s=9),
    Suite("backup", 120, COPIES, ALL_COPIES, 3, elsewhere="--mib 512 --only 'backup qcow2 to qcow2'", elsewhere_s=10),
    Suite("convert", 90, COPIES, ALL_COPIES, 3, elsewhere="--only 'qcow2 to '", elsewhere_s=30),
)
"""What a slow disk can take most from comes last."""
GROWTH, GROWTH_S, GROWTH_MIB = "growth", 45, 256
SPARE_S = 20.0
"""Of the time, for the picture, and for a last piece that takes longer than it should."""
IN_MEMORY_DIR = Path("/dev/shm")
ROOM_BYTES = 5 << 30
"""What the suites in memory need at most."""


class Task(NamedTuple):
    """A suite on a folder: the first one, which needs not be told, or another."""

    suite: Suite
    folder: Path | None
    is_first: bool

    @property
    def name(self) -> str:
        """To tell it by."""
        return self.suite.module if self.is_first else f"{self.suite.module} on {self.folder}"

    @property
    def piece(self) -> Piece:
        """Its place in the time; what is in memory comes last, and has its time kept."""
        about_s = self.suite.about_s if self.is_first else self.suite.elsewhere_s
        return Piece(self.name, about_s, reserved=not self.is_first)

    def rows(self, pace: float, sources: Path, options: argparse.Namespace) -> Iterator[Row]:
        """Measure."""
        module = importlib.import_module(self.suite.module)
        words = self.suite.thorough if options.thorough else self.suite.brief
        more = [words.format(budget=self.suite.budget_s * pace)]
        if not self.is_first:
            more.append(self.suite.elsewhere or "")
        parsed = shlex.split(" ".join(more))
        if options.quick:
            parsed.append("--quick")
        if self.folder:
            parsed.append(f"--dir={self.folder}")
        if self.suite.module in WITH_SOURCES:
            parsed.append(f"--sources={sources}")
        for row in module.rows(module.options(parsed)):
            yield row if self.is_first else replace(row, folder=str(self.folder))


def wanted(name: str, options: argparse.Namespace) -> bool:
    """Whether a suite is to be measured."""
    return not options.only or any(each in name for each in options.only)


def tasks(folders: Sequence[Path | None], options: argparse.Namespace) -> list[Task]:
    """What is wanted, in order."""
    found = [Task(suite, folders[0], True) for suite in SUITES]
    found += [Task(suite, folder, False) for folder in folders[1:] for suite in SUITES if suite.elsewhere is not None]
    return [each for each in found if wanted(each.suite.module, options)]


def figures(ahead: Sequence[Task], occasion: Occasion, clock: Clock, options: argparse.Namespace) -> Iterator[Figure]:
    """The rows of all tasks; of one that fails, those that it had until then."""
    for folder in dict.fromkeys(each.folder for each in ahead):
        with tempfile.TemporaryDirectory(prefix="blockjobs-bench-", dir=folder) as sources:
            for task in ahead:
                if task.folder != folder:
                    continue
                with clock.timed(task.name) as pace:
                    if pace is None:
                        continue
                    try:
                        for row in task.rows(pace, Path(sources), options):
                            yield Figure(task.name, occasion, row)
                    except Exception:  # an hour's work of other suites is not lost by it
                        traceback.print_exc()
                        clock.failed.append(task.name)


def growth(folder: Path | None, clock: Clock, options: argparse.Namespace) -> list[Curve]:
    """How the time of a backup grows, if there is time."""
    with clock.timed(GROWTH) as pace:
        if pace is None:
            return []
        runs = 7 if options.thorough else 2 if pace < 1 or options.quick else 3
        with tempfile.TemporaryDirectory(prefix="blockjobs-bench-", dir=folder) as name:
            return [curve for curve, _pairs in curves(Path(name), 64 if options.quick else GROWTH_MIB, runs)]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small disks, two pairs each")
    parser.add_argument("--thorough", action="store_true", help="seven pairs of each, however long it takes")
    parser.add_argument(
        "--only",
        action="append",
        help=f"suites whose name contains this ('{GROWTH}' is how time grows); or more",
    )
    parser.add_argument("--dir", type=Path, action="append", help="where images go; a second one is for comparison")
    parser.add_argument("--publish", action="store_true", help="put what was measured into README, picture and JSON")
    parser.add_argument("--minutes", type=float, default=10, help="see above")
    options = parser.parse_args()
    if options.publish and options.only and not (HERE / RESULTS).exists():
        parser.error(f"there is no bench/{RESULTS} to put them into: publish a whole run first")
    return options


def main() -> None:
    """Print each row as it comes; at the end write JSON and picture, if asked where the README has them."""
    options = parse()
    folders = options.dir or [None, *([IN_MEMORY_DIR] if is_roomy(IN_MEMORY_DIR) else [])]
    ahead = tasks(folders, options)
    pieces = [each.piece for each in ahead]
    if wanted(GROWTH, options):
        pieces.append(Piece(GROWTH, GROWTH_S, reserved=True))
    clock = Clock(math.inf if options.thorough else options.minutes * 60 - SPARE_S, pieces)
    where = machine.described(folders[0] or Path(tempfile.gettempdir()))
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    occasion, results = Occasion(today, where), Results()
    print(f"{where}\n\n{publication.HEAD}", flush=True)
    for figure in figures(ahead, occasion, clock, options):
        results.figures.append(figure)
        print(publication.line(figure.row), flush=True)
    if wanted(GROWTH, options):
        results.growth = growth(folders[0], clock, options)
        results.grown = occasion if results.growth else None
    if results.figures:
        finish(results, options)
    print(f"\n{clock}")
    sys.exit(1 if clock.failed else 0)


def is_roomy(folder: Path) -> bool:
    """Whether there is a file system in memory with room for disks."""
    return folder.exists() and machine.file_system(folder) == "tmpfs" and shutil.disk_usage(folder).free > ROOM_BYTES


def finish(results: Results, options: argparse.Namespace) -> None:
    """Write what was found, with what was published if it is to be."""
    import chart  # the only one that needs matplotlib

    folder = HERE if options.publish else HERE.parent / "build"
    folder.mkdir(exist_ok=True)
    if options.publish and not (options.thorough and not options.only):
        results = publication.load(folder / RESULTS).merged(results, anew=options.thorough)
    publication.save(folder / RESULTS, results)
    chart.draw(folder / PICTURE, results)
    if options.publish:
        publication.publish(README, results)


if __name__ == "__main__":
    main()
