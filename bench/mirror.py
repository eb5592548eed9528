"""Mirror against qemu-storage-daemon: from the command to BLOCK_JOB_READY.

Ours flushes the target before it is ready, QEMU's flushes it too but for what its file system still holds of a raw one;
the durable ratio adds an fdatasync of the target to QEMU's time.
"""

import argparse
import functools
import os
import subprocess
import time
from pathlib import Path

from backup import fill, scatter
from counts import report
from daemons import PEER, Daemon
from pairs import Took, in_folder, job_options


def mirror(program: tuple[str, ...], source: Path, format: str, options: argparse.Namespace) -> Took:
    """One mirror to READY into a fresh target, then cancelled."""
    folder = source.parent
    target = folder / f"target.{format}"
    target.unlink(missing_ok=True)
    subprocess.run(["qemu-img", "create", "-q", "-f", format, str(target), str(options.bytes)], check=True)
    os.sync()
    with Daemon(program, folder) as daemon:
        daemon.open("source", format, source, read_only=True)
        daemon.open("target", format, target, discard="unmap")
        took = daemon.timed_job(
            "blockdev-mirror", until="BLOCK_JOB_READY", job_id="job", device="source", target="target", sync="full"
        )
        if program == PEER:  # before it quits, since that would flush
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


def main() -> None:
    """Print a line for each case."""
    in_folder(run_cases, job_options(__doc__))


def run_cases(folder: Path, options: argparse.Namespace) -> None:
    raw, full, quarter, scattered = (
        folder / name for name in ("full.raw", "full.qcow2", "quarter.raw", "quarter.qcow2")
    )
    fill(raw, options.bytes, text=False)
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, full], check=True)
    scatter(scattered, options.bytes)
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", scattered, quarter], check=True)
    cases = [
        ("raw -> raw", raw, "raw"),
        ("raw -> raw, 25 % scattered", quarter, "raw"),
        ("qcow2 -> qcow2", full, "qcow2"),
        ("qcow2 -> qcow2, 25 % scattered", scattered, "qcow2"),
    ]
    print(f"{options.mib} MiB disks, {options.runs} pairs after a warm-up, {os.cpu_count()} cores")
    for name, source, format in cases:
        if options.only in name:
            run = functools.partial(mirror, source=source, format=format, options=options)
            report(name, run, options)


if __name__ == "__main__":
    main()
