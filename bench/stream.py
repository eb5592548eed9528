"""block-stream of a raw base into a qcow2 overlay, against qemu-storage-daemon.

Our figures include making the overlay durable before BLOCK_JOB_COMPLETED; QEMU's do not. So there are three ratios, as
for backups (`backup.py`).
"""

import argparse
import functools
import os
import random
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


def fill(path: Path, length: int, *, share: float) -> None:
    """A raw disk with that share of its clusters written, scattered; holes elsewhere."""
    chance = random.Random(1)
    count = length // CLUSTER
    with path.open("wb") as out:
        out.truncate(length)
        for cluster in sorted(chance.sample(range(count), int(count * share))):
            out.seek(cluster * CLUSTER)
            out.write(chance.randbytes(CLUSTER))


def stream(program: tuple[str, ...], base: Path, options: argparse.Namespace, *, lazy: bool = False) -> Took:
    """One stream into a fresh overlay; one that is `lazy` leaves it to the page cache, as QEMU does."""
    folder = base.parent
    overlay = folder / "overlay.qcow2"
    overlay.unlink(missing_ok=True)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(base), "-F", "raw", str(overlay)], check=True)
    settle(base)
    with idle(program, folder) as daemon:
        daemon.open("base", "raw", base, read_only=True)
        daemon.open("overlay", "qcow2", overlay, backing="base", **(NO_FLUSH if lazy else {}))
        took = daemon.timed_job("block-stream", job_id="job", device="overlay")
        if is_peer(program):  # before its nodes are closed, since that would flush
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


def options(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    return job_options(__doc__, words)


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """A row for each fill."""
    with lasting(), tempfile.TemporaryDirectory(prefix="blockjobs-bench-", dir=options.dir) as name:
        base = Path(name) / "base.raw"
        for amount, share, at_least, aim in ((", scattered", 0.25, 5, 12), ("", 1.0, 1.5, 2.5)):
            case = f"stream, raw base to qcow2 overlay{amount}"
            if options.only in case:
                fill(base, options.full_bytes if share == 1 else options.bytes, share=share)
                run = functools.partial(stream, base=base, options=options)
                lazily = functools.partial(run, lazy=True)
                yield compared(case, run, options, lazily=lazily, at_least=at_least, aim=aim)


if __name__ == "__main__":
    show(rows(options()))
