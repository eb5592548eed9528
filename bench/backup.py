"""Backup against qemu-storage-daemon, and compressed backup against it and `qemu-img convert -c`.

Our figures include making the target durable before BLOCK_JOB_COMPLETED; QEMU's do not. So there are two ratios: as the
two jobs are, and with an fdatasync of its target added to QEMU's time.
"""

import argparse
import functools
import os
import random
import subprocess
import time
from pathlib import Path

from counts import report
from daemons import PEER, Daemon
from pairs import Took, in_folder, job_options

MiB = 1 << 20
CLUSTER = 65536


def fill(path: Path, length: int, *, text: bool) -> None:
    """A raw file: random bytes, or prose-like bytes that compress to about a third."""
    chance = random.Random(1)
    words = [chance.randbytes(chance.randrange(2, 7)).hex().encode() + b" " for _ in range(4000)]
    with path.open("wb") as out:
        for _ in range(length // MiB):
            block = b"".join(chance.choices(words, k=MiB // 6))[:MiB] if text else chance.randbytes(MiB)
            assert len(block) == MiB
            out.write(block)


def scatter(path: Path, length: int) -> None:
    """A qcow2 image with a quarter of its clusters written, in random order."""
    chance = random.Random(2)
    clusters = chance.sample(range(length // CLUSTER), length // CLUSTER // 4)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, str(length)], check=True)
    script = "".join(f"write -q -P {chance.randrange(1, 255)} {cluster * CLUSTER} 64k\n" for cluster in clusters)
    subprocess.run(
        ["qemu-io", "-f", "qcow2", str(path)], input=script, text=True, check=True, stdout=subprocess.DEVNULL
    )


def backup(
    program: tuple[str, ...],
    source: Path,
    formats: tuple[str, str],
    options: argparse.Namespace,
    compress: str | None,
) -> Took:
    """One backup into a fresh target."""
    source_format, target_format = formats
    folder = source.parent
    target = folder / f"target.{target_format}"
    target.unlink(missing_ok=True)
    create = ["qemu-img", "create", "-q", "-f", target_format, str(target), str(options.bytes)]
    if compress:
        create[2:2] = ["-o", f"compression_type={compress}"]
    subprocess.run(create, check=True)
    os.sync()
    with Daemon(program, folder) as daemon:
        daemon.open("source", source_format, source, read_only=True)
        daemon.open("target", target_format, target)
        took = daemon.timed_job(
            "blockdev-backup", job_id="job", device="source", target="target", sync="full", compress=bool(compress)
        )
        if program == PEER:  # before it quits, since that would flush
            began_s = time.perf_counter()
            with target.open("rb") as written:
                os.fdatasync(written.fileno())
            took = took._replace(durable_s=took.wall_s + time.perf_counter() - began_s)
    if options.verify:
        command = ["qemu-img", "compare", "-q", "-f", source_format, "-F", target_format, str(source), str(target)]
        subprocess.run(command, check=True)
    return took


def main() -> None:
    """Print a line for each case."""
    in_folder(run_cases, job_options(__doc__))


def run_cases(folder: Path, options: argparse.Namespace) -> None:
    raw, full, scattered, prose = (folder / name for name in ("full.raw", "full.qcow2", "quarter.qcow2", "prose.raw"))
    fill(raw, options.bytes, text=False)
    fill(prose, options.bytes // 4, text=True)
    os.truncate(prose, options.bytes)
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, full], check=True)
    scatter(scattered, options.bytes)
    cases: list[tuple[str, Path, str, str, str | None]] = [
        ("raw -> raw", raw, "raw", "raw", None),
        ("raw -> qcow2", raw, "raw", "qcow2", None),
        ("qcow2 -> qcow2", full, "qcow2", "qcow2", None),
        ("qcow2 -> qcow2, 25 % scattered", scattered, "qcow2", "qcow2", None),
        ("raw -> qcow2, compressed with zlib", prose, "raw", "qcow2", "zlib"),
        ("raw -> qcow2, compressed with zstd", prose, "raw", "qcow2", "zstd"),
    ]
    print(f"{options.mib} MiB disks, {options.runs} pairs after a warm-up, {os.cpu_count()} cores")
    for name, source, source_format, target_format, compress in cases:
        if options.only not in name:
            continue

        run = functools.partial(
            backup, source=source, formats=(source_format, target_format), options=options, compress=compress
        )
        report(name, run, options)


if __name__ == "__main__":
    main()
