"""The NBD server against qemu-nbd and qemu-storage-daemon: fio as the client, a file in the page cache.

Each server has a copy of the image; ours serves a raw one and a fully allocated qcow2. One run lasts a fixed time; all
servers take their turns one after another, and ratios are taken within a turn. The processor time that a server took
for an operation is shown, too: it suffers far less from a busy machine than the speed does.
"""

import argparse
import contextlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from pairs import ENOUGH
from rows import Row

MiB = 1 << 20
KiB = 1 << 10
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class Case(NamedTuple):
    """What fio does, and the speed against the peers' that was promised and hoped for; on qcow2 it is ours on raw."""

    name: str
    pattern: str
    block_bytes: int
    depth: int
    at_least: float
    aim: float


CASES = (
    Case("1 MiB read, depth 16", "read", MiB, 16, 1.3, 3),
    Case("1 MiB write, depth 16", "write", MiB, 16, 1, 1.5),
    Case("4 KiB random read, depth 1", "randread", 4 * KiB, 1, 1.1, 1.5),
    Case("4 KiB random read, depth 16", "randread", 4 * KiB, 16, 1.5, 2.5),
    Case("4 KiB random read, depth 64", "randread", 4 * KiB, 64, 1.5, 2.5),
    Case("4 KiB random write, depth 1", "randwrite", 4 * KiB, 1, 1.1, 1.5),
    Case("4 KiB random write, depth 16", "randwrite", 4 * KiB, 16, 1.3, 2.5),
    Case("4 KiB random write, depth 64", "randwrite", 4 * KiB, 64, 1.3, 2.5),
)
QCOW2_AT_LEAST, QCOW2_AIM = 0.8, 1.0
OURS, QCOW2 = "ours", "ours, qcow2"
SERVERS = (OURS, QCOW2, "qemu-storage-daemon", "qemu-nbd")


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
    program = [sys.executable, "-m", "blockjobs.daemon"] if server in (OURS, QCOW2) else ["qemu-storage-daemon"]
    return [
        *program,
        *("--blockdev", f"driver={format},node-name=disk,file.driver=file,file.filename={image}"),
        *("--nbd-server", f"addr.type=unix,addr.path={path}"),
        *("--export", "type=nbd,id=e,node-name=disk,name=disk,writable=on"),
    ]


@contextlib.contextmanager
def serving(server: str, image: Path, format: str) -> Iterator[Server]:
    """A server while the block runs."""
    path = image.with_suffix(".sock")
    process = subprocess.Popen(words_of(server, image, path, format), stderr=subprocess.PIPE)
    url = f"nbd+unix:///disk?socket={path}"
    try:
        for _ in range(200):
            if subprocess.run(["nbdinfo", "--size", url], capture_output=True, check=False).returncode == 0:
                break
            time.sleep(0.05)
        else:
            raise TimeoutError(f"{server} does not answer")
        yield Server(process.pid, url)
    finally:
        process.terminate()
        process.communicate()


def measure(server: Server, case: Case, options: argparse.Namespace) -> Run:
    """One run."""
    words = ["fio", "--name=x", "--ioengine=nbd", f"--uri={server.url}", f"--rw={case.pattern}"]
    words += [f"--bs={case.block_bytes}", f"--iodepth={case.depth}", f"--size={options.mib}M"]
    words += ["--thread", f"--numjobs={options.connections}", "--group_reporting"]
    words += ["--time_based", f"--runtime={int(options.seconds * 1000)}ms"]
    words += ["--randrepeat=1", "--output-format=json"]
    before_s = server.cpu_s()
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    cpu_s = server.cpu_s() - before_s
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]["write" if "write" in case.pattern else "read"]
    return Run(float(job["bw_bytes"]), cpu_s * 1e6 / max(1, job["total_ios"]))


def options(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=256, help="length of the disk")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.5, help="of each run")
    parser.add_argument("--budget", type=float, default=math.inf, dest="budget_s", help="seconds for each case")
    parser.add_argument("--connections", type=int, default=1, help="of fio, each with the whole depth")
    parser.add_argument("--quick", action="store_true", help="three runs of 0.3 s")
    parser.add_argument("--dir", type=Path, help="where the images go (default: a temporary folder)")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--format", choices=("raw", "qcow2"), default="raw", help="of all images but the one of ours")
    parser.add_argument("--servers", default="", help="some of: " + "; ".join(SERVERS) + " (default: all)")
    parsed = parser.parse_args(words)
    if parsed.quick:
        parsed.runs, parsed.seconds, parsed.mib = 3, 0.3, 128
    return parsed


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """A row for each case and peer, and one of ours on qcow2 against ours on raw."""
    folder = Path(tempfile.mkdtemp(prefix="blockjobs-bench-", dir=options.dir))
    try:
        with contextlib.ExitStack() as stack:
            servers = serve_all(folder, stack, options)
            for case in CASES:
                if options.only in case.name:
                    found: dict[str, list[Run]] = {server: [] for server in servers}
                    began_s = time.monotonic()
                    for number in range(options.runs):
                        if number >= ENOUGH and time.monotonic() - began_s > options.budget_s:
                            break
                        for server in servers if number % 2 == 0 else reversed(servers):
                            found[server].append(measure(servers[server], case, options))
                    yield from rows_of(case, found)
    finally:
        shutil.rmtree(folder)


def serve_all(folder: Path, stack: contextlib.ExitStack, options: argparse.Namespace) -> dict[str, Server]:
    """Each server with an image of its own."""
    raw = folder / "content"
    with raw.open("wb") as out:
        for _ in range(options.mib):
            out.write(os.urandom(MiB))
    wanted = [name.strip() for name in options.servers.split(";")] if options.servers else SERVERS
    servers = {}
    for number, name in enumerate(wanted):
        format = "qcow2" if name == QCOW2 else options.format
        image = folder / f"{number}.{format}"
        origin = folder / f"content.{format}"
        if not origin.exists():
            subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", format, raw, origin], check=True)
        # What qemu-img writes, 2 MiB at a time, lies in the page cache in pieces so large that each short write to it
        # takes the kernel 27 us instead of 6: all servers would look the same.
        subprocess.run(["cp", origin, image], check=True)
        servers[name] = stack.enter_context(serving(name, image, format))
    return servers


def rows_of(case: Case, found: dict[str, list[Run]]) -> Iterator[Row]:
    """The rows of one case, from the runs of each server."""
    ours = found[OURS]
    for peer, runs in found.items():
        if peer == OURS:
            continue
        # One row for each peer; what is ours on qcow2 is the numerator there.
        mine, theirs = (runs, ours) if peer == QCOW2 else (ours, runs)
        at_least, aim = (QCOW2_AT_LEAST, QCOW2_AIM) if peer == QCOW2 else (case.at_least, case.aim)
        yield Row(
            operation=f"NBD, {case.name}" + (", qcow2" if peer == QCOW2 else ""),
            peer="ours on raw" if peer == QCOW2 else peer,
            ours=shown(mine, case),
            theirs=shown(theirs, case),
            ratios=tuple(one.speed / other.speed for one, other in zip(mine, theirs, strict=True)),
            at_least=at_least,
            aim=aim,
            counts=f"server's processors: {cpu_us(mine):.1f} us each, {cpu_us(theirs):.1f} us the peer's",
        )


def shown(runs: Sequence[Run], case: Case) -> str:
    """The median speed."""
    speed = statistics.median(run.speed for run in runs)
    return f"{speed / MiB:.0f} MiB/s" if case.block_bytes >= MiB else f"{speed / case.block_bytes:.0f} IOPS"


def cpu_us(runs: Sequence[Run]) -> float:
    """The median of the server's processor time for an operation."""
    return statistics.median(run.cpu_us for run in runs)


def main() -> None:
    """Print a line for each case and peer."""
    chosen = options()
    print(f"{chosen.mib} MiB, {chosen.runs} turns of {chosen.seconds:g} s, {os.cpu_count()} cores")
    for row in rows(chosen):
        ratios = f"{row.median:.2f} ({min(row.ratios):.2f} to {max(row.ratios):.2f})"
        print(f"{row.operation:40s} {row.ours:>12s}  {ratios} x {row.peer} {row.theirs}   {row.counts}", flush=True)


if __name__ == "__main__":
    main()
