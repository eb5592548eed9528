"""Copies that the table does not have: chains, small clusters, subclusters, data files, compressed and full images.

Nobody waits for the disk where QEMU does not.
"""

import argparse
import functools
import random
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from counts import compared
from daemons import NO_FLUSH, idle, is_peer, lasting
from memory import settle
from pairs import Took, job_options, measure
from processes import OURS, run_process
from rows import Row, of_pairs, show

CLUSTER = 65536


def create(path: Path, length: int, how: str = "", *, backing: Path | None = None) -> None:
    """An empty qcow2 image, with options as qemu-img has them."""
    command = ["qemu-img", "create", "-q", "-f", "qcow2", *(["-o", how] if how else [])]
    if backing is not None:
        command += ["-b", str(backing), "-F", "qcow2"]
    subprocess.run([*command, str(path), str(length)], check=True)


def scatter(path: Path, length: int, *, unit: int = CLUSTER, share: float = 0.25, seed: int = 2) -> None:
    """Write a share of the units of an image, in random order."""
    chance = random.Random(seed)
    units = chance.sample(range(length // unit), int(length // unit * share))
    script = "".join(f"write -q -P {chance.randrange(1, 255)} {number * unit} {unit}\n" for number in units)
    subprocess.run(
        ["qemu-io", "-f", "qcow2", str(path)], input=script, text=True, check=True, stdout=subprocess.DEVNULL
    )


def scattered(path: Path, length: int, how: str = "", *, unit: int = CLUSTER, share: float = 0.25) -> None:
    """A new image of which a share is written."""
    create(path, length, how)
    scatter(path, length, unit=unit, share=share)


def chain(path: Path, length: int, how: str = "", *, unit: int = CLUSTER, share: float = 0.25) -> None:
    """The top of three images, each with a third of what is written."""
    below: Path | None = None
    for number, each in enumerate((path.with_suffix(".base"), path.with_suffix(".mid"), path)):
        create(each, length, how, backing=below)
        scatter(each, length, unit=unit, share=share / 3, seed=number)
        below = each


def compressed(path: Path, length: int) -> None:
    """An image of which a quarter is written and compressed."""
    plain = path.with_suffix(".plain")
    scattered(plain, length)
    subprocess.run(["qemu-img", "convert", "-c", "-f", "qcow2", "-O", "qcow2", plain, path], check=True)


def marked(path: Path, length: int) -> None:
    """A scattered image with a bitmap, b, of what was written."""
    create(path, length)
    subprocess.run(["qemu-img", "bitmap", "--add", path, "b"], check=True)
    scatter(path, length)


def full(path: Path, length: int) -> None:
    """An image that is written all over, raw or qcow2 by its suffix."""
    kind = path.suffix[1:]
    subprocess.run(["qemu-img", "create", "-q", "-f", kind, path, str(length)], check=True)
    subprocess.run(
        ["qemu-io", "-f", kind, "-c", f"write -q -P 7 0 {length}", path], check=True, stdout=subprocess.DEVNULL
    )


Maker = Callable[[Path, int], None]
EMPTY: Maker = create
SUBCLUSTERS, SMALL = "extended_l2=on", "cluster_size=4k"


class Case(NamedTuple):
    """A job, what makes its source, and what its target; whether the source is a bitmap's."""

    name: str
    command: str
    source: Maker
    target: Maker = EMPTY
    suffix: str = "qcow2"
    bitmap: bool = False


def with_options(how: str) -> Maker:
    """An empty image with options."""
    return lambda path, length: create(path, length, how)


def with_data_file(path: Path, length: int) -> None:
    """An empty image whose data has a file of its own."""
    create(path, length, f"data_file={path.with_suffix('.data')}")


BACKUP, MIRROR, STREAM = "blockdev-backup", "blockdev-mirror", "block-stream"
SMALLS = {"how": SMALL, "unit": 4096, "share": 1 / 32}
CASES = (
    Case("backup of a chain of three", BACKUP, chain),
    Case("mirror of a chain of three", MIRROR, chain),
    Case("backup from clusters of 4 KiB", BACKUP, functools.partial(scattered, **SMALLS)),
    Case("mirror from clusters of 4 KiB", MIRROR, functools.partial(scattered, **SMALLS)),
    Case("stream of a chain with clusters of 4 KiB", STREAM, functools.partial(chain, **SMALLS)),
    Case(
        "backup from and to subclusters",
        BACKUP,
        functools.partial(scattered, how=SUBCLUSTERS),
        with_options(SUBCLUSTERS),
    ),
    Case(
        "backup from subclusters written in part",
        BACKUP,
        functools.partial(scattered, how=SUBCLUSTERS, unit=8192, share=1 / 16),
    ),
    Case("backup of a compressed image", BACKUP, compressed),
    Case("backup to a data file", BACKUP, scattered, with_data_file),
    Case("backup over a full raw copy", BACKUP, scattered, full, "raw"),
    Case("backup over a full qcow2 copy", BACKUP, scattered, full),
    Case("mirror over a full raw copy", MIRROR, scattered, full, "raw"),
    Case("mirror over a full qcow2 copy", MIRROR, scattered, full),
    Case("backup by a bitmap over a full copy", BACKUP, marked, full, bitmap=True),
)


def job(program: tuple[str, ...], case: Case, source: Path, options: argparse.Namespace) -> Took:
    """One job into a fresh target; a stream into a copy of its top."""
    folder = source.parent
    target = folder / f"target.{case.suffix}"
    target.unlink(missing_ok=True)
    lazy = {} if is_peer(program) else NO_FLUSH
    if case.command == STREAM:
        subprocess.run(["cp", source, target], check=True)
    else:
        case.target(target, options.bytes)
    settle(source)
    with idle(program, folder) as daemon:
        if case.command == STREAM:
            daemon.open("target", "qcow2", target, **lazy)
            return daemon.timed_job(STREAM, job_id="job", device="target")
        daemon.open("source", "qcow2", source, read_only=not case.bitmap)
        # A mirror gives space of the target back if it may, a backup of QEMU's never does.
        may_unmap = {"discard": "unmap"} if case.command == MIRROR else {}
        daemon.open("target", case.suffix, target, **may_unmap, **lazy)
        more = {"sync": "bitmap", "bitmap": "b", "bitmap_mode": "never"} if case.bitmap else {"sync": "full"}
        until = "BLOCK_JOB_READY" if case.command == MIRROR else "BLOCK_JOB_COMPLETED"
        took = daemon.timed_job(case.command, until=until, job_id="job", device="source", target="target", **more)
        if case.command == MIRROR:
            daemon.ask("block-job-cancel", device="job")
            daemon.wait("BLOCK_JOB_COMPLETED")
    if options.verify and not case.bitmap:
        kinds = ["-f", "qcow2", "-F", case.suffix]
        subprocess.run(["qemu-img", "compare", "-q", *kinds, str(source), str(target)], check=True)
    return took


def rebase(command: tuple[str, ...], top: Path) -> Took:
    """Make a copy of an overlay do without its backing file."""
    overlay = top.with_name("rebased.qcow2")
    subprocess.run(["cp", top, overlay], check=True)
    settle(top)
    return run_process([*command, "rebase", "-f", "qcow2", "-b", "", str(overlay)])


def options(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    return job_options(__doc__, words)


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """A row for each case."""
    options.waits = False
    with lasting(), tempfile.TemporaryDirectory(prefix="blockjobs-bench-", dir=options.dir) as name:
        for case in CASES:
            if options.only in case.name:
                with tempfile.TemporaryDirectory(dir=name) as folder:
                    source = Path(folder) / "source.qcow2"
                    case.source(source, options.bytes)
                    run = functools.partial(job, case=case, source=source, options=options)
                    yield compared(case.name, run, options)
        if options.only in (name_of := "rebase to no backing file"):
            top = Path(name) / "top.qcow2"
            chain(top, options.bytes)
            ours, peer = (functools.partial(rebase, command, top) for command in (OURS, ("qemu-img",)))
            yield of_pairs(measure(name_of, ours, peer, runs=options.runs, budget_s=options.budget_s), "qemu-img")


if __name__ == "__main__":
    show(rows(options()))
