"""All the benchmarks in one run (`make bench`): one table, one picture: in `build`, or in the README with `--publish`.

Suites are run one after another, each on a folder of its own; some once more on the second `--dir`, which is in memory.
"""

import argparse
import datetime
import importlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import chart
import machine
from growth import Curve, curves
from pairs import in_folder
from rows import Row

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
BEGIN, END = "<!-- figures of make bench -->\n", "<!-- end of figures -->\n"


class Suite(NamedTuple):
    """A module with `rows(options)`, its words, and those for the second folder if it goes there, too."""

    module: str
    words: str = ""
    elsewhere: str | None = None


SUITES = (
    Suite("startup", "--runs 7"),
    Suite("backup", "--runs 7 --budget 3", elsewhere="--runs 3 --budget 3 --only qcow2"),
    Suite("mirror", "--runs 7 --budget 3"),
    Suite("commit", "--runs 7 --budget 3"),
    Suite("stream", "--runs 7 --budget 3"),
    Suite("convert", "--runs 7 --budget 3", elsewhere="--runs 3 --budget 3 --only qcow2"),
    Suite("metadata", "--runs 7 --budget 3 --only preallocated"),
    Suite("nbd", "--runs 3 --seconds 0.4"),
    Suite("control", "--runs 5"),
    Suite("latency", "--quick"),
    Suite("limits", "--seconds 5"),
    Suite("scale", "--images 1000"),
)


def measured(suite: Suite, words: str, folder: Path | None, options: argparse.Namespace) -> Iterator[Row]:
    """The rows of one suite."""
    module = importlib.import_module(suite.module)
    more = [*(["--quick"] if options.quick else []), *([f"--dir={folder}"] if folder else [])]
    yield from module.rows(module.options([*words.split(), *more]))


def line(row: Row) -> str:
    """One line of the table in Markdown."""
    ratio = f"**{row.median:.2f}** ({min(row.ratios):.2f} to {max(row.ratios):.2f})"
    durable = f"{sorted(row.durable)[len(row.durable) // 2]:.2f}" if row.durable else ""
    promised = " / ".join(f"{each:g}" if each is not None else "" for each in (row.at_least, row.aim)).strip(" /")
    cells = (row.operation, row.peer, row.ours, row.theirs, ratio, durable, promised, row.limit)
    return "| " + " | ".join(cells) + " |"


HEAD = (
    "| operation | peer | ours | peer's | ratio (least to most) | durably | at least / aim | the machine's limit |\n"
    "|---|---|---|---|---|---|---|---|"
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
    options = parser.parse_args()
    began_s = time.monotonic()
    first, *others = options.dir or [None, Path("/dev/shm")]
    where = machine.described(first or Path("/tmp"))
    print(f"{where}\n\n{HEAD}", flush=True)
    rows: list[Row] = []
    for folder in (first, *others):
        for suite in SUITES:
            words = suite.words if folder is first else suite.elsewhere
            if options.only in suite.module and words is not None:
                for row in measured(suite, words, folder, options):
                    shown = row if folder is first else replace(row, operation=f"{row.operation}, on {folder}")
                    rows.append(shown)
                    print(line(shown), flush=True)
    found: list[Curve] = []
    if not options.no_growth:
        in_folder(
            lambda folder, _: found.extend(
                curve for curve, _pairs in curves(folder, 128 if options.quick else 1024, 3)
            ),
            argparse.Namespace(dir=first),
        )
    finish(rows, found, where, options)
    print(f"\n{time.monotonic() - began_s:.0f} s")


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
