"""The NBD server against qemu-nbd and qemu-storage-daemon: fio as the client, a raw file in the page cache.

One run lasts a fixed time; all servers take their turns one after another, and ratios are taken within a turn.
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
def serving(server: str, image: Path, format: str) -> Iterator[str]:
    """A server while the block runs; yields the URL."""
    path = image.parent / f"{server}.sock"
    process = subprocess.Popen(words_of(server, image, path, format), stderr=subprocess.PIPE)
    url = f"nbd+unix:///disk?socket={path}"
    try:
        for _ in range(100):
            if subprocess.run(["nbdinfo", "--size", url], capture_output=True, check=False).returncode == 0:
                break
            time.sleep(0.05)
        yield url
    finally:
        process.terminate()
        process.communicate()


def measure(url: str, pattern: str, block_bytes: int, depth: int, options: argparse.Namespace) -> float:
    """Bytes per second."""
    words = ["fio", "--name=x", "--ioengine=nbd", f"--uri={url}", f"--rw={pattern}", f"--bs={block_bytes}"]
    words += [f"--iodepth={depth}", f"--size={options.mib}M", "--time_based", f"--runtime={options.seconds}"]
    words += ["--randrepeat=1", "--output-format=json"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    return float(job["write" if "write" in pattern else "read"]["bw_bytes"])


def main() -> None:
    """Print a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=256, help="length of the disk")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each run")
    parser.add_argument("--format", choices=("raw", "qcow2"), default="raw")
    parser.add_argument("--dir", type=Path, help="where the image goes (default: a temporary folder)")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--servers", default="ours,qemu-storage-daemon,qemu-nbd")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="blockjobs-bench-", dir=options.dir))
    try:
        run_cases(folder, options)
    finally:
        shutil.rmtree(folder)


def run_cases(folder: Path, options: argparse.Namespace) -> None:
    """All cases on one image."""
    image, raw = folder / f"disk.{options.format}", folder / "content"
    with raw.open("wb") as out:
        for _ in range(options.mib):
            out.write(os.urandom(MiB))
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", options.format, raw, image], check=True)
    servers = options.servers.split(",")
    print(f"{options.mib} MiB {options.format}, {options.runs} turns of {options.seconds:g} s, {os.cpu_count()} cores")
    with contextlib.ExitStack() as stack:
        for name, pattern, block_bytes, depth in CASES:
            if options.only not in name:
                continue
            found: dict[str, list[float]] = {server: [] for server in servers}
            for number in range(options.runs):
                for server in servers if number % 2 == 0 else reversed(servers):
                    # One server at a time has the image, because of the locks.
                    with serving(server, image, options.format) as url:
                        found[server].append(measure(url, pattern, block_bytes, depth, options))
            print(f"{name:34s} {_shown(found, block_bytes)}", flush=True)
        stack.close()


def _shown(found: dict[str, list[float]], block_bytes: int) -> str:
    scale, unit = (MiB, "MiB/s") if block_bytes >= MiB else (block_bytes, "IOPS")
    parts = [f"{server} {statistics.median(speeds) / scale:8.0f} {unit}" for server, speeds in found.items()]
    ours = found.get("ours")
    for server, speeds in found.items():
        if ours and server != "ours":
            ratios = sorted(mine / theirs for mine, theirs in zip(ours, speeds, strict=True))
            parts.append(f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) x {server}")
    return "   ".join(parts)


if __name__ == "__main__":
    main()
