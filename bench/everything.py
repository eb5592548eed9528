"""All the benchmarks in one run (`make bench`): one table, one picture: in `build`, or in the README with `--publish`.

Suites are run one after another, each on a folder of its own; the copies once more, with smaller disks, on the second
`--dir`, which is in memory. If the machine is slow, what is behind the first folder's suites is left out as far as it
would take longer than `--minutes`: first how time grows, then suites of the second folder. At the end it is told what
took how long, and what was left out.
"""

import argparse
import contextlib
import datetime
import importlib
import json
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import chart
import machine
from growth import Curve, curves
from rows import Row

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
BEGIN, END = "<!-- figures of make bench -->\n", "<!-- end of figures -->\n"


class Suite(NamedTuple):
    """A module with `rows(options)`, its words, and those for the second folder if it goes there, too."""

    module: str
    words: str = ""
    elsewhere: str | None = None


COPIES = "--runs 7 --budget 3"
IN_MEMORY = "--mib 256 --runs 7 --budget 2"
WITH_SOURCES = ("backup", "mirror", "convert")
"""Suites whose disks are the same: they are made once."""
SUITES = (
    Suite("startup", "--runs 7"),
    Suite("backup", COPIES, elsewhere=f"{IN_MEMORY} --only 'backup qcow2 to qcow2'"),
    Suite("mirror", COPIES, elsewhere=IN_MEMORY),
    Suite("commit", COPIES, elsewhere=IN_MEMORY),
    Suite("stream", COPIES, elsewhere=IN_MEMORY),
    Suite("convert", COPIES, elsewhere=f"{IN_MEMORY} --only 'qcow2 to '"),
    Suite("metadata", "--runs 7 --budget 3 --only preallocated"),
    Suite("nbd", "--runs 3 --seconds 0.4"),
    Suite("control", "--runs 5"),
    Suite("latency", "--quick"),
    Suite("limits", "--seconds 5"),
    Suite("scale", "--images 1000"),
)
ELSEWHERE_SHARE = 0.25
"""About how long a suite takes in the second folder, of what it took in the first."""
GROWTH_S = 60.0
"""About how long it takes to see how time grows."""
GROWTH_MIB = 256
IN_MEMORY_DIR = Path("/dev/shm")
ROOM_BYTES = 2 << 30
"""What the suites in memory need at most."""


class Clock:
    """What took how long, and what else would fit."""

    def __init__(self, limit_s: float) -> None:
        self._began_s = time.monotonic()
        self._limit_s = limit_s
        self.took_s: dict[str, float] = {}
        self.left_out: list[str] = []

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Note how long the block takes."""
        began_s = time.monotonic()
        yield
        self.took_s[name] = time.monotonic() - began_s

    def allows(self, name: str, about_s: float) -> bool:
        """Whether there is time for what takes about so long; if not, it is noted that it was left out."""
        if time.monotonic() - self._began_s + about_s <= self._limit_s:
            return True
        self.left_out.append(name)
        return False

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {took_s:.0f} s" for name, took_s in self.took_s.items())
        missing = f"; for want of time without {', '.join(self.left_out)}" if self.left_out else ""
        return f"{time.monotonic() - self._began_s:.0f} s: {parts}{missing}"


def measured(
    suite: Suite, words: str, folder: Path | None, sources: Path, options: argparse.Namespace
) -> Iterator[Row]:
    """The rows of one suite."""
    module = importlib.import_module(suite.module)
    more = [*(["--quick"] if options.quick else []), *([f"--dir={folder}"] if folder else [])]
    if suite.module in WITH_SOURCES:
        more.append(f"--sources={sources}")
    yield from module.rows(module.options([*shlex.split(words), *more]))


def all_rows(folders: Sequence[Path | None], clock: Clock, options: argparse.Namespace) -> Iterator[Row]:
    """The rows of all suites, in the first folder, then in the others."""
    for folder in folders:
        with tempfile.TemporaryDirectory(prefix="blockjobs-bench-", dir=folder) as sources:
            for suite in SUITES:
                words = suite.words if folder is folders[0] else suite.elsewhere
                if options.only not in suite.module or words is None:
                    continue
                name = suite.module if folder is folders[0] else f"{suite.module} on {folder}"
                about_s = clock.took_s[suite.module] * ELSEWHERE_SHARE if folder is not folders[0] else 0.0
                if about_s and not clock.allows(name, about_s):
                    continue
                with clock.timed(name):
                    for row in measured(suite, words, folder, Path(sources), options):
                        yield row if folder is folders[0] else replace(row, operation=f"{row.operation}, on {folder}")


def growth(folder: Path | None, clock: Clock, *, quick: bool) -> list[Curve]:
    """How the time of a backup grows, if there is time."""
    found: list[Curve] = []
    if clock.allows("growth", GROWTH_S):
        with clock.timed("growth"), tempfile.TemporaryDirectory(prefix="blockjobs-bench-", dir=folder) as name:
            found.extend(curve for curve, _pairs in curves(Path(name), 64 if quick else GROWTH_MIB, 2 if quick else 3))
    return found


def line(row: Row) -> str:
    """One line of the table in Markdown."""
    ratio = f"**{row.median:.2f}** ({min(row.ratios):.2f} to {max(row.ratios):.2f})"
    durable = f"{sorted(row.durable)[len(row.durable) // 2]:.2f}" if row.durable else ""
    promised = " / ".join(f"{each:g}" if each is not None else "" for each in (row.at_least, row.aim)).strip(" /")
    pairs = str(len(row.ratios))
    cells = (row.operation, row.peer, row.ours, row.theirs, ratio, durable, pairs, promised, row.limit)
    return "| " + " | ".join(cells) + " |"


HEAD = (
    "| operation | peer | ours | peer's | ratio (least to most) | durably | pairs | at least / aim "
    "| the machine's limit |\n|---|---|---|---|---|---|---|---|---|"
)


def publish(table: str) -> None:
    """Put the table between the marks in the README."""
    text = README.read_text()
    before, rest = text.split(BEGIN)
    README.write_text(before + BEGIN + table + END + rest.split(END)[1])


def main() -> None:
    """Print each row as it comes; at the end write results.json and results.svg, if asked where the README has them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small disks, two pairs each")
    parser.add_argument("--only", default="", help="suites whose name contains this")
    parser.add_argument("--dir", type=Path, action="append", help="where images go; a second one is for comparison")
    parser.add_argument("--publish", action="store_true", help="write the table into the README, too")
    parser.add_argument("--no-growth", action="store_true", help="leave out how time grows")
    parser.add_argument("--minutes", type=float, default=10, help="see above")
    options = parser.parse_args()
    clock = Clock(options.minutes * 60)
    folders = options.dir or [None, *([IN_MEMORY_DIR] if is_roomy(IN_MEMORY_DIR) else [])]
    where = machine.described(folders[0] or Path(tempfile.gettempdir()))
    print(f"{where}\n\n{HEAD}", flush=True)
    rows: list[Row] = []
    for row in all_rows(folders, clock, options):
        rows.append(row)
        print(line(row), flush=True)
    finish(rows, [] if options.no_growth else growth(folders[0], clock, quick=options.quick), where, options)
    print(f"\n{clock}")


def is_roomy(folder: Path) -> bool:
    """Whether there is a file system in memory with room for disks."""
    try:
        kind = subprocess.run(["stat", "-f", "-c", "%T", folder], capture_output=True, text=True, check=True).stdout
        return kind.strip() == "tmpfs" and shutil.disk_usage(folder).free > ROOM_BYTES
    except (OSError, subprocess.CalledProcessError):
        return False


def finish(rows: Sequence[Row], found: Sequence[Curve], where: str, options: argparse.Namespace) -> None:
    """Write what was found."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    caption = f"blockjobs, {today}: {where}"
    folder = HERE if options.publish else HERE.parent / "build"
    folder.mkdir(exist_ok=True)
    chart.draw(folder / "results.svg", rows, found, caption)
    results = {
        "date": today,
        "machine": where,
        "rows": [asdict(row) for row in rows],
        "growth": [asdict(each) for each in found],
    }
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    if options.publish:
        publish("\n".join([f"Measured on {today}: {where}.\n", HEAD, *(line(row) for row in rows)]) + "\n")


if __name__ == "__main__":
    main()
