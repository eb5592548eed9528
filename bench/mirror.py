"""Mirror against qemu-storage-daemon: from the command to BLOCK_JOB_READY.

Ours flushes the target before it is ready, QEMU's flushes it too but for what its file system still holds of a raw one;
the durable ratio adds an fdatasync of the target to QEMU's time.
"""

import argparse
import functools
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from backup import length_of, make_disks
from counts import compared
from daemons import idle, is_peer, lasting
from memory import settle
from pairs import Took, job_options
from rows import Row, show


def mirror(program: tuple[str, ...], source: Path, format: str, options: argparse.Namespace) -> Took:
    """One mirror to READY into a fresh target, then cancelled."""
    folder = source.parent
    target = folder / f"target.{format}"
    target.unlink(missing_ok=True)
    create = ["qemu-img", "create", "-q", "-f", format, str(target), str(length_of(source, options))]
    subprocess.run(create, check=True)
    settle(source)
    with idle(program, folder) as daemon:
        daemon.open("source", format, source, read_only=True)
        daemon.open("target", format, target, discard="unmap")
        took = daemon.timed_job(
            "blockdev-mirror", until="BLOCK_JOB_READY", job_id="job", device="source", target="target", sync="full"
        )
        if is_peer(program):  # before its nodes are closed, since that would flush
            began_s = time.perf_counter()
            with target.open("rb") as written:
                os.fdatasync(written.fileno())
            took = took._replace(durable_s=took.wall_s + time.perf_counter() - began_s)
        daemon.ask("block-job-cancel", device="job")
        daemon.wait("BLOCK_JOB_COMPLETED")
    if options.verify:
        command = ["qemu-img", "compare", "-q", "-f", format, "-F", format, str(source), str(target)]
        subprocess.run(command, check=True)
    return took


def options(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    return job_options(__doc__, words)


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """A row for each format and fill."""
    with lasting(), tempfile.TemporaryDirectory(prefix="blockjobs-bench-", dir=options.dir) as name:
        folder = Path(name)
        make_disks(folder, options, [f"{fill}.{kind}" for fill in ("full", "quarter") for kind in ("raw", "qcow2")])
        for kind in ("raw", "qcow2"):
            for fill, at_least, aim in (("quarter", 1.2, 1.5), ("full", 1.0, 1.2)):
                case = f"mirror to READY, {kind} to {kind}{', scattered' if fill == 'quarter' else ''}"
                if options.only in case:
                    run = functools.partial(mirror, source=folder / f"{fill}.{kind}", format=kind, options=options)
                    yield compared(case, run, options, at_least=at_least, aim=aim)


if __name__ == "__main__":
    show(rows(options()))
