"""block-stream of a raw base into a qcow2 overlay, against qemu-storage-daemon.

Our figures include making the overlay durable before BLOCK_JOB_COMPLETED; QEMU's do not. So there are two ratios: as
the two jobs are, and with an fdatasync of the overlay added to QEMU's time.
"""

import argparse
import functools
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


def fill(path: Path, length: int, *, share: float) -> None:
    """A raw disk with that share of its clusters written, scattered; holes elsewhere."""
    chance = random.Random(1)
    count = length // CLUSTER
    with path.open("wb") as out:
        out.truncate(length)
        for cluster in sorted(chance.sample(range(count), int(count * share))):
            out.seek(cluster * CLUSTER)
            out.write(chance.randbytes(CLUSTER))


def stream(program: tuple[str, ...], base: Path, options: argparse.Namespace) -> Took:
    """One stream into a fresh overlay."""
    folder = base.parent
    overlay = folder / "overlay.qcow2"
    overlay.unlink(missing_ok=True)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(base), "-F", "raw", str(overlay)], check=True)
    os.sync()
    with Daemon(program, folder) as daemon:
        daemon.open("base", "raw", base, read_only=True)
        daemon.open("overlay", "qcow2", overlay, backing="base")
        took = daemon.timed_job("block-stream", job_id="job", device="overlay")
        if program == PEER:  # before it quits, since that would flush
            began_s = time.perf_counter()
            with overlay.open("rb") as written:
                os.fdatasync(written.fileno())
            took = took._replace(durable_s=took.wall_s + time.perf_counter() - began_s)
    if options.verify:
        command = ["qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2", str(base), str(overlay)]
        subprocess.run(command, check=True)
        named = subprocess.run(["qemu-img", "info", str(overlay)], check=True, capture_output=True, text=True).stdout
        assert "backing file" not in named, named
    return took


def main() -> None:
    """Print a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=1024, help="virtual size of the disks")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--dir", type=Path, help="where the images go (default: a temporary folder)")
    parser.add_argument("--verify", action="store_true", help="compare base and overlay after each run")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    add_shortcuts(parser)
    options = parse(parser)
    length = options.mib * MiB
    folder = Path(tempfile.mkdtemp(prefix="blockjobs-bench-", dir=options.dir))
    print(f"{options.mib} MiB disks, {options.runs} pairs after a warm-up, {os.cpu_count()} cores")
    try:
        for name, share in (("raw -> qcow2, 25 % scattered", 0.25), ("raw -> qcow2, full", 1.0)):
            if options.only not in name:
                continue
            base = folder / "base.raw"
            fill(base, length, share=share)
            run = functools.partial(stream, base=base, options=options)
            report(name, run, options)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
