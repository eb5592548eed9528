"""`blockjobs convert` against `qemu-img convert -W -m 16`, and with `-C`: whole processes, start-up included.

Ours ends when the new image is durable; qemu-img's does not. So there are two ratios: as the commands are, and with an
fdatasync of the new image added to qemu-img's time.
"""

import argparse
import functools
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

from backup import fill, scatter
from pairs import Took, in_folder, job_options, measure
from processes import ENVIRONMENT

OURS = (sys.executable, "-m", "blockjobs", "convert")
PEER = ("qemu-img", "convert", "-W", "-m", "16")
OFFLOADED = ("qemu-img", "convert", "-C")


def convert(program: tuple[str, ...], source: Path, words: tuple[str, ...], options: argparse.Namespace) -> Took:
    """One conversion into a new file."""
    target = source.parent / "target"
    target.unlink(missing_ok=True)
    os.sync()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began_s = time.perf_counter()
    subprocess.run([*program, *words, str(source), str(target)], check=True, env=ENVIRONMENT)
    wall_s = time.perf_counter() - began_s
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    with target.open("rb") as written:
        os.fdatasync(written.fileno())
    if options.verify:
        formats = ["-f", words[1], "-F", words[3]]
        subprocess.run(["qemu-img", "compare", "-q", *formats, str(source), str(target)], check=True)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Took(wall_s, cpu_s, wall_s if program == OURS else time.perf_counter() - began_s)


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
    cases: list[tuple[str, Path, tuple[str, ...], tuple[str, ...]]] = [
        ("raw -> qcow2", raw, ("-f", "raw", "-O", "qcow2"), PEER),
        ("qcow2 -> qcow2", full, ("-f", "qcow2", "-O", "qcow2"), PEER),
        ("qcow2 -> raw", full, ("-f", "qcow2", "-O", "raw"), PEER),
        ("qcow2 -> raw, peer with -C", full, ("-f", "qcow2", "-O", "raw"), OFFLOADED),
        ("qcow2 -> qcow2, 25 % scattered", scattered, ("-f", "qcow2", "-O", "qcow2"), PEER),
        ("raw -> qcow2, zlib", prose, ("-f", "raw", "-O", "qcow2", "-c"), PEER),
        ("raw -> qcow2, zstd", prose, ("-f", "raw", "-O", "qcow2", "-c", "-o", "compression_type=zstd"), PEER),
    ]
    print(f"{options.mib} MiB disks, {options.runs} pairs after a warm-up, {os.cpu_count()} cores")
    for name, source, words, peer in cases:
        if options.only in name:
            ours, theirs = (
                functools.partial(convert, program, source=source, words=words, options=options)
                for program in (OURS, peer)
            )
            print(measure(name, ours, theirs, runs=options.runs), flush=True)


if __name__ == "__main__":
    main()
