"""`blockjobs convert` against `qemu-img convert -W -m 16`, and with `-C`: whole processes, start-up included.

Ours ends when the new image is durable; qemu-img's does not, as its default is `-t unsafe`. So there are three ratios:
as the commands are, with `-t unsafe` for ours too, so that neither waits for the disk, and with an fdatasync of the new
image added to qemu-img's time, so that both do.
"""

import argparse
import functools
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from backup import make_disks
from bounds import Bound, written
from memory import settle
from pairs import Took, job_options, measure, with_lazy
from processes import OURS, run_process
from rows import Row, of_pairs, show

PEER = ("qemu-img", "convert", "-W", "-m", "16")
OFFLOADED = ("qemu-img", "convert", "-C")
ZSTD = ("-o", "compression_type=zstd")
UNSAFE = ("-t", "unsafe")


def convert(
    program: tuple[str, ...],
    source: Path,
    formats: tuple[str, str],
    words: tuple[str, ...],
    options: argparse.Namespace,
    *,
    more: tuple[str, ...] = (),
) -> Took:
    """One conversion into a new file, which is durable afterwards."""
    target = source.parent / "target"
    target.unlink(missing_ok=True)
    settle(source)
    began_s = time.perf_counter()
    took = run_process([*program, "-f", formats[0], "-O", formats[1], *words, *more, str(source), str(target)])
    with target.open("rb") as written:
        os.fdatasync(written.fileno())
    durable_s = time.perf_counter() - began_s
    if options.verify:
        command = ["qemu-img", "compare", "-q", "-f", formats[0], "-F", formats[1], str(source), str(target)]
        subprocess.run(command, check=True)
    return took._replace(durable_s=durable_s)


def options(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; full disks are never smaller, as the start of a process is part of what is measured."""
    options = job_options(__doc__, words)
    options.full_bytes = options.bytes
    return options


class Case(NamedTuple):
    """A conversion, what is promised of it, and further words: of both command lines, and of ours only.

    One that `repeats` says hardly more than another one, or than the backup of the same name.
    """

    name: str
    source: str
    formats: tuple[str, str]
    at_least: float | None = 1.3
    aim: float | None = 2
    words: tuple[str, ...] = ()
    own: tuple[str, ...] = ()
    peer: tuple[str, ...] = PEER
    repeats: bool = False


CASES = (
    Case("raw to qcow2", "full.raw", ("raw", "qcow2")),
    Case("qcow2 to qcow2", "full.qcow2", ("qcow2", "qcow2")),
    Case("qcow2 to raw", "full.qcow2", ("qcow2", "raw")),
    Case("qcow2 to qcow2", "full.qcow2", ("qcow2", "qcow2"), peer=OFFLOADED),
    Case("qcow2 to raw", "full.qcow2", ("qcow2", "raw"), peer=OFFLOADED, repeats=True),
    Case("qcow2 to qcow2, scattered", "quarter.qcow2", ("qcow2", "qcow2")),
    Case("zlib to raw", "zlib.qcow2", ("qcow2", "raw"), None, None),
    Case("zstd to raw", "zstd.qcow2", ("qcow2", "raw"), None, None),
    Case("raw to qcow2, zlib", "prose.raw", ("raw", "qcow2"), 4, 8, ("-c",)),
    Case(
        "raw to qcow2, zlib, level best",
        "prose.raw",
        ("raw", "qcow2"),
        1.2,
        1.5,
        ("-c",),
        ("--level", "best"),
        repeats=True,
    ),
    Case("raw to qcow2, zstd", "prose.raw", ("raw", "qcow2"), 1.3, 2, ("-c", *ZSTD)),
)


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """A row for each case."""
    with tempfile.TemporaryDirectory(prefix="blockjobs-bench-", dir=options.dir) as name:
        folder = Path(name)
        cases = [
            case for case in CASES if options.only in f"convert {case.name}" and not (case.repeats and options.brief)
        ]
        make_disks(folder, options, (case.source for case in cases))
        bounds: dict[Path, Bound] = {}
        for case in cases:
            source = folder / case.source
            if case.at_least and not (case.words or options.brief or source in bounds):
                bounds[source] = written(source, folder / "written").later(start_of_ours(folder))
            ours, theirs = (
                functools.partial(
                    convert,
                    program,
                    source=source,
                    formats=case.formats,
                    words=words,
                    options=options,
                )
                for program, words in (((*OURS, "convert"), case.words + case.own), (case.peer, case.words))
            )
            if options.waits and not case.words:
                ours, theirs = with_lazy(ours, functools.partial(ours, more=UNSAFE)), with_lazy(theirs)
            pairs = measure(f"convert {case.name}", ours, theirs, runs=options.runs, budget_s=options.budget_s)
            promised = {"at_least": case.at_least, "aim": case.aim}
            yield of_pairs(pairs, " ".join(case.peer), bound=bounds.get(source), **promised)


def start_of_ours(folder: Path) -> float:
    """The least time that ours takes, in seconds: for an image of nothing."""
    nothing = folder / "nothing.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", nothing, "1M"], check=True)
    command = [*OURS, "convert", "-f", "qcow2", "-O", "qcow2", *UNSAFE, str(nothing), str(folder / "target")]
    return min(run_process(command).wall_s for _ in range(4))


if __name__ == "__main__":
    show(rows(options()))
