"""block-commit of a qcow2 image into its qcow2 base, intermediate and active, against qemu-storage-daemon.

Our figures include making the base durable before BLOCK_JOB_COMPLETED; QEMU's do not. So there are two ratios: as the
two jobs are, and with an fdatasync of the base added to QEMU's time.
"""

import argparse
import functools
import itertools
import os
import random
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from counts import report
from daemons import PEER, Daemon
from pairs import Took, add_shortcuts, parse

MiB = 1 << 20
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


def commit(program: tuple[str, ...], originals: Path, options: argparse.Namespace, *, active: bool) -> Took:
    """One commit in a fresh copy of the chain: of the middle image, or of what is the uppermost then."""
    folder = originals.parent / "work"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in ("base", "overlay"):
        shutil.copy(originals / f"{name}.qcow2", folder)
    os.link(originals / "middle.qcow2", folder / "middle.qcow2")  # it is only read
    os.sync()
    with Daemon(program, folder) as daemon:
        daemon.open("base", "qcow2", folder / "base.qcow2")
        daemon.open("middle", "qcow2", folder / "middle.qcow2", backing="base", read_only=True)
        if active:
            took = daemon.timed_job("block-commit", completes=True, job_id="job", device="middle", base_node="base")
        else:
            daemon.open("overlay", "qcow2", folder / "overlay.qcow2", backing="middle")
            took = daemon.timed_job(
                "block-commit",
                job_id="job",
                device="overlay",
                top_node="middle",
                base_node="base",
                backing_file="base.qcow2",
            )
        if program == PEER:  # before it quits, since that would flush
            began_s = time.perf_counter()
            with (folder / "base.qcow2").open("rb") as written:
                os.fdatasync(written.fileno())
            took = took._replace(durable_s=took.wall_s + time.perf_counter() - began_s)
    if options.verify:
        shown = folder / ("base.qcow2" if active else "overlay.qcow2")
        command = ["qemu-img", "compare", "-q", str(originals / "overlay.qcow2"), str(shown)]
        subprocess.run(command, check=True)
    return took


def main() -> None:
    """Print a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=1024, help="virtual size of the disks")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--dir", type=Path, help="where the images go (default: a temporary folder)")
    parser.add_argument("--verify", action="store_true", help="compare the disk before and after each run")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    add_shortcuts(parser)
    options = parse(parser)
    folder = Path(tempfile.mkdtemp(prefix="blockjobs-bench-", dir=options.dir))
    print(f"{options.mib} MiB disks, {options.runs} pairs after a warm-up, {os.cpu_count()} cores")
    try:
        cases = itertools.product((("25 % scattered", 0.25), ("full", 1.0)), ("intermediate", "active"))
        for (amount, share), kind in cases:
            name = f"{kind} commit, {amount}"
            if options.only not in name:
                continue
            originals = folder / "originals"
            shutil.rmtree(originals, ignore_errors=True)
            originals.mkdir()
            make_chain(originals, options.mib * MiB, share=share)
            run = functools.partial(commit, originals=originals, options=options, active=kind == "active")
            report(name, run, options)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
