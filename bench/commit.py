"""block-commit of a qcow2 image into its qcow2 base, intermediate and active, against qemu-storage-daemon.

Our figures include making the base durable before BLOCK_JOB_COMPLETED; QEMU's do not. So there are three ratios, as for
backups (`backup.py`); an active commit of QEMU's flushes, and has two.
"""

import argparse
import functools
import os
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from counts import compared
from daemons import NO_FLUSH, idle, is_peer, lasting
from memory import settle
from pairs import Took, job_options
from rows import Row, show

CLUSTER = 65536


def make_chain(folder: Path, length: int, *, share: float) -> None:
    """An empty base, a middle image with that share of its clusters written in random order, an empty overlay."""
    chance = random.Random(2)
    clusters = chance.sample(range(length // CLUSTER), int(length // CLUSTER * share))
    if share == 1:
        clusters.sort()
    for name, backing in (("base", None), ("middle", "base"), ("overlay", "middle")):
        options = ["-b", f"{backing}.qcow2", "-F", "qcow2"] if backing else []
        command = ["qemu-img", "create", "-q", "-f", "qcow2", *options, f"{name}.qcow2", str(length)]
        subprocess.run(command, check=True, cwd=folder)
    script = "".join(f"write -q -P {chance.randrange(1, 255)} {cluster * CLUSTER} 64k\n" for cluster in clusters)
    subprocess.run(
        ["qemu-io", "-f", "qcow2", "middle.qcow2"],
        input=script,
        text=True,
        check=True,
        stdout=subprocess.DEVNULL,
        cwd=folder,
    )


def commit(
    program: tuple[str, ...], originals: Path, options: argparse.Namespace, *, active: bool, lazy: bool = False
) -> Took:
    """One commit in a fresh copy of the chain: of the middle image, or of what is the uppermost then.

    One that is `lazy` leaves all that is written to the page cache, as QEMU does with the middle image.
    """
    folder = originals.parent / "work"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in ("base", "overlay"):
        shutil.copy(originals / f"{name}.qcow2", folder)
    os.link(originals / "middle.qcow2", folder / "middle.qcow2")  # it is only read
    settle(originals / "middle.qcow2")
    with idle(program, folder) as daemon:
        cache = NO_FLUSH if lazy else {}
        daemon.open("base", "qcow2", folder / "base.qcow2", **cache)
        daemon.open("middle", "qcow2", folder / "middle.qcow2", backing="base", read_only=True)
        if active:
            took = daemon.timed_job("block-commit", completes=True, job_id="job", device="middle", base_node="base")
        else:
            daemon.open("overlay", "qcow2", folder / "overlay.qcow2", backing="middle", **cache)
            took = daemon.timed_job(
                "block-commit",
                job_id="job",
                device="overlay",
                top_node="middle",
                base_node="base",
                backing_file="base.qcow2",
            )
        if is_peer(program):  # before its nodes are closed, since that would flush
            began_s = time.perf_counter()
            with (folder / "base.qcow2").open("rb") as written:
                os.fdatasync(written.fileno())
            took = took._replace(durable_s=took.wall_s + time.perf_counter() - began_s)
    if options.verify:
        shown = folder / ("base.qcow2" if active else "overlay.qcow2")
        command = ["qemu-img", "compare", "-q", str(originals / "overlay.qcow2"), str(shown)]
        subprocess.run(command, check=True)
    return took


def options(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    return job_options(__doc__, words)


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """A row for each kind and fill."""
    with lasting(), tempfile.TemporaryDirectory(prefix="blockjobs-bench-", dir=options.dir) as name:
        originals = Path(name) / "originals"
        for amount, share, at_least, aim in ((", scattered", 0.25, 1.2, 1.5), ("", 1.0, 1.0, 1.2)):
            cases = {kind: f"{kind} commit{amount}" for kind in ("intermediate", "active")}
            if not any(options.only in case for case in cases.values()):
                continue
            shutil.rmtree(originals, ignore_errors=True)
            originals.mkdir()
            make_chain(originals, options.full_bytes if share == 1 else options.bytes, share=share)
            for kind, case in cases.items():
                if options.only in case:
                    run = functools.partial(commit, originals=originals, options=options, active=kind == "active")
                    # QEMU's active commit flushes before it is ready; the other one never.
                    lazily = functools.partial(run, lazy=True) if kind == "intermediate" else None
                    yield compared(case, run, options, lazily=lazily, at_least=at_least, aim=aim)


if __name__ == "__main__":
    show(rows(options()))
