"""The NBD server against qemu-nbd and qemu-storage-daemon: fio as the client, a file in the page cache.

Each server has a copy of the image. One run lasts a fixed time; all servers take their turns one after another, and
ratios are taken within a turn. The processor time that a server took for an operation is shown, too: it suffers far
less from a busy machine than the speed does.
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

MiB = 1 << 20
KiB = 1 << 10
CASES = (
    # name, fio's pattern, block size, depth
    ("1 MiB sequential read, depth 16", "read", MiB, 16),
    ("1 MiB sequential write, depth 16", "write", MiB, 16),
    ("4 KiB random read, depth 1", "randread", 4 * KiB, 1),
    ("4 KiB random read, depth 16", "randread", 4 * KiB, 16),
    ("4 KiB random read, depth 64", "randread", 4 * KiB, 64),
    ("4 KiB random write, depth 1", "randwrite", 4 * KiB, 1),
    ("4 KiB random write, depth 16", "randwrite", 4 * KiB, 16),
    ("4 KiB random write, depth 64", "randwrite", 4 * KiB, 64),
)


TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class Run(NamedTuple):
    """What came out of one run: bytes per second, and the server's processor time for an operation."""

    speed: float
    cpu_us: float


class Server(NamedTuple):
    """One that is up."""

    pid: int
    url: str

    def cpu_s(self) -> float:
        """Processor time that all its threads have taken, in the kernel and outside."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def words_of(server: str, image: Path, path: Path, format: str) -> list[str]:
    """How to serve `image` on the unix socket `path`."""
    if server == "qemu-nbd":
        return ["qemu-nbd", "-t", "-e", "8", "-f", format, "-x", "disk", "-k", str(path), str(image)]
    program = [sys.executable, "-m", "blockjobs.daemon"] if server == "ours" else ["qemu-storage-daemon"]
    return [
        *program,
        *("--blockdev", f"driver={format},node-name=disk,file.driver=file,file.filename={image}"),
        *("--nbd-server", f"addr.type=unix,addr.path={path}"),
        *("--export", "type=nbd,id=e,node-name=disk,name=disk,writable=on"),
    ]


@contextlib.contextmanager
def serving(server: str, image: Path, format: str) -> Iterator[Server]:
    """A server while the block runs."""
    path = image.parent / f"{server}.sock"
    process = subprocess.Popen(words_of(server, image, path, format), stderr=subprocess.PIPE)
    url = f"nbd+unix:///disk?socket={path}"
    try:
        for _ in range(100):
            if subprocess.run(["nbdinfo", "--size", url], capture_output=True, check=False).returncode == 0:
                break
            time.sleep(0.05)
        yield Server(process.pid, url)
    finally:
        process.terminate()
        process.communicate()


def measure(server: Server, pattern: str, block_bytes: int, depth: int, options: argparse.Namespace) -> Run:
    """One run."""
    words = ["fio", "--name=x", "--ioengine=nbd", f"--uri={server.url}", f"--rw={pattern}", f"--bs={block_bytes}"]
    words += [f"--iodepth={depth}", f"--size={options.mib}M"]
    words += ["--time_based", f"--runtime={int(options.seconds * 1000)}ms"]
    words += ["--randrepeat=1", "--output-format=json"]
    before_s = server.cpu_s()
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    cpu_s = server.cpu_s() - before_s
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]["write" if "write" in pattern else "read"]
    return Run(float(job["bw_bytes"]), cpu_s * 1e6 / max(1, job["total_ios"]))


def main() -> None:
    """Print a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=256, help="length of the disk")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each run")
    parser.add_argument("--quick", action="store_true", help="three runs of 0.7 s: all is over in two minutes")
    parser.add_argument("--format", choices=("raw", "qcow2"), default="raw")
    parser.add_argument("--dir", type=Path, help="where the image goes (default: a temporary folder)")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--servers", default="ours,qemu-storage-daemon,qemu-nbd")
    options = parser.parse_args()
    if options.quick:
        options.runs, options.seconds, options.mib = 3, 0.7, 128
    folder = Path(tempfile.mkdtemp(prefix="blockjobs-bench-", dir=options.dir))
    try:
        run_cases(folder, options)
    finally:
        shutil.rmtree(folder)


def run_cases(folder: Path, options: argparse.Namespace) -> None:
    """All cases, each server on an image of its own."""
    raw = folder / "content"
    with raw.open("wb") as out:
        for _ in range(options.mib):
            out.write(os.urandom(MiB))
    print(f"{options.mib} MiB {options.format}, {options.runs} turns of {options.seconds:g} s, {os.cpu_count()} cores")
    with contextlib.ExitStack() as stack:
        servers: dict[str, Server] = {}
        for name in options.servers.split(","):
            image = folder / f"{name}.{options.format}"
            subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", options.format, raw, image], check=True)
            servers[name] = stack.enter_context(serving(name, image, options.format))
        for name, pattern, block_bytes, depth in CASES:
            if options.only not in name:
                continue
            found: dict[str, list[Run]] = {server: [] for server in servers}
            for number in range(options.runs):
                for server in servers if number % 2 == 0 else reversed(servers):
                    found[server].append(measure(servers[server], pattern, block_bytes, depth, options))
            print(f"{name:34s} {_shown(found, block_bytes)}", flush=True)


def _shown(found: dict[str, list[Run]], block_bytes: int) -> str:
    scale, unit = (MiB, "MiB/s") if block_bytes >= MiB else (block_bytes, "IOPS")
    parts = [
        f"{server} {statistics.median(run.speed for run in runs) / scale:.0f} {unit}"
        f" {statistics.median(run.cpu_us for run in runs):.1f} us"
        for server, runs in found.items()
    ]
    ours = found.get("ours")
    for server, runs in found.items():
        if ours and server != "ours":
            ratios = sorted(mine.speed / theirs.speed for mine, theirs in zip(ours, runs, strict=True))
            parts.append(f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) x {server}")
    return "   ".join(parts)


if __name__ == "__main__":
    main()
