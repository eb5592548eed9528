"""Backup against qemu-storage-daemon, and compressed backup against it and `qemu-img convert -c`.

Our figures include making the target durable before BLOCK_JOB_COMPLETED; QEMU's do not. So there are three ratios: as
the two jobs are, with a target of ours whose flushes are dropped (cache.no-flush), so that neither waits for the disk,
and with an fdatasync of its target added to QEMU's time, so that both do.
"""

import argparse
import functools
import os
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from bounds import Bound, written
from counts import compared
from daemons import NO_FLUSH, OURS, idle, is_peer, lasting
from memory import settle
from pairs import Took, job_options, measure, with_lazy
from processes import run_process
from rows import Row, of_pairs, show

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


def scatter(path: Path, length: int, *, marked: bool = False) -> None:
    """A qcow2 image with a quarter of its clusters written, in random order; `marked` in a bitmap, b, if wanted."""
    chance = random.Random(2)
    clusters = chance.sample(range(length // CLUSTER), length // CLUSTER // 4)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, str(length)], check=True)
    if marked:
        subprocess.run(["qemu-img", "bitmap", "--add", path, "b"], check=True)
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
    level: str | None = None,
    *,
    bitmap: bool = False,
    lazy: bool = False,
) -> Took:
    """One backup into a fresh target; one that is `lazy` leaves it to the page cache, as QEMU does."""
    source_format, target_format = formats
    folder = source.parent
    target = folder / f"target.{target_format}"
    target.unlink(missing_ok=True)
    create = ["qemu-img", "create", "-q", "-f", target_format, str(target), str(length_of(source, options))]
    if compress:
        create[2:2] = ["-o", f"compression_type={compress}"]
    subprocess.run(create, check=True)
    more: dict[str, object] = {"x_compress_level": level} if level and not is_peer(program) else {}
    more |= {"sync": "bitmap", "bitmap": "b", "bitmap_mode": "never"} if bitmap else {"sync": "full"}
    settle(source)
    with idle(program, folder) as daemon:
        daemon.open("source", source_format, source, read_only=not bitmap)
        daemon.open("target", target_format, target, **(NO_FLUSH if lazy else {}))
        took = daemon.timed_job(
            "blockdev-backup",
            job_id="job",
            device="source",
            target="target",
            compress=bool(compress),
            **more,
        )
        if is_peer(program):  # before its nodes are closed, since that would flush
            began_s = time.perf_counter()
            with target.open("rb") as written:
                os.fdatasync(written.fileno())
            took = took._replace(durable_s=took.wall_s + time.perf_counter() - began_s)
    if options.verify:
        command = ["qemu-img", "compare", "-q", "-f", source_format, "-F", target_format, str(source), str(target)]
        subprocess.run(command, check=True)
    return took


def length_of(source: Path, options: argparse.Namespace) -> int:
    """The virtual size of one of the disks below."""
    return {"full": options.full_bytes, "text": options.text_bytes}.get(source.stem, options.bytes)


def copy_sparsely(source: Path, target: Path) -> Took:
    """The same bytes by cp, holes kept; durable afterwards."""
    target.unlink(missing_ok=True)
    settle(source)
    began_s = time.perf_counter()
    took = run_process(["cp", "--sparse=always", str(source), str(target)])
    with target.open("rb") as written:
        os.fdatasync(written.fileno())
    return took._replace(durable_s=time.perf_counter() - began_s)


def limit_of(cp: Callable[[], Took]) -> str:
    """How long the machine takes to copy, and to have it on the disk."""
    runs = [cp() for _ in range(3)]
    wall_s = statistics.median(run.wall_s for run in runs)
    durable_s = statistics.median(run.durable_s for run in runs)
    return f"cp {wall_s:.3f} s, on disk {durable_s:.3f} s"


def options(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    return job_options(__doc__, words)


class Case(NamedTuple):
    """A backup, what is promised of it, its compression and level if it has any, and whether a bitmap says what."""

    name: str
    source: str
    formats: tuple[str, str]
    at_least: float
    aim: float
    compress: str | None = None
    level: str | None = None
    bitmap: bool = False


CASES = (
    Case("raw to raw, scattered", "quarter.raw", ("raw", "raw"), 1.8, 2.5),
    Case("raw to raw", "full.raw", ("raw", "raw"), 1.5, 2),
    Case("raw to qcow2, scattered", "quarter.raw", ("raw", "qcow2"), 1.8, 2.5),
    Case("raw to qcow2", "full.raw", ("raw", "qcow2"), 1.5, 2),
    Case("qcow2 to qcow2, scattered", "quarter.qcow2", ("qcow2", "qcow2"), 1.8, 3),
    Case("qcow2 to qcow2, scattered, by a bitmap", "marked.qcow2", ("qcow2", "qcow2"), 1.8, 3, bitmap=True),
    Case("qcow2 to qcow2", "full.qcow2", ("qcow2", "qcow2"), 1.5, 2.5),
    Case("raw to qcow2, zlib", "text.raw", ("raw", "qcow2"), 4, 8, "zlib"),
    Case("raw to qcow2, zlib, level best", "text.raw", ("raw", "qcow2"), 1.2, 1.5, "zlib", "best"),
    Case("raw to qcow2, zstd", "text.raw", ("raw", "qcow2"), 1.3, 2, "zstd"),
)


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """A row for each case; raw to raw against `cp` too."""
    with lasting(), tempfile.TemporaryDirectory(prefix="blockjobs-bench-", dir=options.dir) as name:
        folder = Path(name)
        cases = [case for case in CASES if options.only in f"backup {case.name}"]
        make_disks(folder, options, (case.source for case in cases))
        limits: dict[Path, str] = {}
        bounds: dict[tuple[Path, str], Bound] = {}
        for case in cases:
            source = folder / case.source
            run = functools.partial(
                backup,
                source=source,
                formats=case.formats,
                options=options,
                compress=case.compress,
                level=case.level,
                bitmap=case.bitmap,
            )
            cp = functools.partial(copy_sparsely, source, folder / "copy.raw")
            if not case.compress and source not in limits:
                limits[source] = limit_of(cp)
            target = source, case.formats[1]
            if not (case.compress or options.brief or target in bounds):
                bounds[target] = written(source, folder / "written", in_place=target[1] == "raw")
            promised = {"at_least": case.at_least, "aim": case.aim}
            lazily = functools.partial(run, lazy=True)
            known = {"limit": limits.get(source, ""), "bound": bounds.get(target)}
            yield compared(f"backup {case.name}", run, options, lazily=lazily, **known, **promised)
            if case.formats == ("raw", "raw"):
                measured = functools.partial(run, OURS)
                if options.waits:
                    measured, cp = with_lazy(measured, functools.partial(lazily, OURS)), with_lazy(cp)
                pairs = measure(f"backup {case.name}", measured, cp, runs=options.runs, budget_s=options.budget_s)
                yield of_pairs(pairs, "cp --sparse=always", at_least=0.85, aim=1)
            (folder / "copy.raw").unlink(missing_ok=True)
        if options.only in (name := "backup of an empty disk of 1 TiB, qcow2 to qcow2"):
            yield empty_row(name, folder, options)


def make_disks(folder: Path, options: argparse.Namespace, names: Iterable[str]) -> None:
    """Sources by name: `full` ones, `quarter` in scattered clusters, which are `marked` in a bitmap, and a quarter that
    compresses, `prose` and `text`, or is compressed, `zlib` and `zstd`.

    They are made once and linked if `options.sources` is a folder on the same file system that keeps them.
    """
    kept = options.sources or folder
    for name in sorted(set(names)):
        (folder / name).hardlink_to(_made(kept, name, options))


def _made(kept: Path, name: str, options: argparse.Namespace) -> Path:
    """A source of the length that it has to have, made now if it is not there."""
    length = length_of(Path(name), options)
    path = kept / f"{length}-{name}"
    if path.exists():
        return path
    if name == "full.raw":
        fill(path, length, text=False)
    elif name in ("quarter.qcow2", "marked.qcow2"):
        scatter(path, length, marked=name == "marked.qcow2")
    elif name in ("prose.raw", "text.raw"):
        fill(path, length >> 2, text=True)
        os.truncate(path, length)
    elif name in ("zlib.qcow2", "zstd.qcow2"):
        command = ["qemu-img", "convert", "-c", "-W", "-m", "16", "-f", "raw", "-O", "qcow2"]
        how = ["-o", f"compression_type={Path(name).stem}"]
        subprocess.run([*command, *how, _made(kept, "prose.raw", options), path], check=True)
    else:
        formats = ("raw", "qcow2") if name == "full.qcow2" else ("qcow2", "raw")
        origin = _made(kept, f"{Path(name).stem}.{formats[0]}", options)
        subprocess.run(["qemu-img", "convert", "-f", formats[0], "-O", formats[1], origin, path], check=True)
    return path


def empty_row(name: str, folder: Path, options: argparse.Namespace) -> Row:
    """Only metadata is looked at."""
    source = folder / "empty.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(source), str(1 << 40)], check=True)
    once = {"runs": 1, "budget_s": 0} if options.brief else {}  # the peer takes a third of a minute
    large = argparse.Namespace(**vars(options) | {"bytes": 1 << 40, "verify": False} | once)
    run = functools.partial(backup, source=source, formats=("qcow2", "qcow2"), options=large, compress=None)
    return compared(name, run, large, at_least=50)


if __name__ == "__main__":
    show(rows(options()))
