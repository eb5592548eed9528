"""A real disk for the demonstration: an ext4 file system in a qcow2 overlay on a qcow2 base."""

import json
import os
import random
import shutil
import subprocess
import zlib
from pathlib import Path
from typing import Final

from blockjobs.base.errors import UsageError
from blockjobs.base.span import Span, coalesce
from blockjobs.base.units import KiB, MiB
from blockjobs.host import Host

DISK_BYTES: Final = 512 * MiB
CLUSTER: Final = 64 * KiB
PIECE: Final = 4 * MiB
UUID: Final = "2b8c5c1e-8d0a-4c56-9a0e-6f1d3b7a9e10"
WORDS: Final = (
    "volume mount request served cache miss retry checksum verified snapshot tenant region disk sector "
    "latency flush queue worker accepted closed timeout session token renewed policy applied"
).split()


async def build_disk(host: Host, folder: Path) -> Path:
    """Make `base.qcow2` and `disk.qcow2` (its overlay) in `folder`; returns the overlay.

    The overlay holds what a second version of the file system changed, so reading it needs both files.

    Raises:
        UsageError: mke2fs is missing or failed.
    """
    files = folder / "files"
    _write_base_files(files)
    before = _make_file_system(files, folder / "before.raw")
    _write_new_files(files)
    after = _make_file_system(files, folder / "after.raw")
    base, overlay = folder / "base.qcow2", folder / "disk.qcow2"
    await host.create_image(str(base), "qcow2", DISK_BYTES)
    source = await host.open(str(before), format="raw", read_only=True)
    target = await host.open(str(base))
    job = await host.backup(source, target)
    outcome = await job.outcome()
    assert outcome.error is None, outcome.error
    await host.close_nodes(source, target)
    await host.create_image(str(overlay), "qcow2", DISK_BYTES, backing_file=base.name, backing_fmt="qcow2")
    await _write_difference(host, overlay, before, after)
    for path in (before, after):
        path.unlink()
    shutil.rmtree(files)
    return overlay


async def _write_difference(host: Host, overlay: Path, before: Path, after: Path) -> None:
    node = await host.open(str(overlay))
    with before.open("rb") as old, after.open("rb") as new:
        async with host.access(node, write=True):
            for piece in Span(0, DISK_BYTES).split(PIECE):
                was, now = old.read(piece.length), new.read(piece.length)
                for part in _changed(was, now):
                    await node.write(piece.at + part.at, now[part.at : part.end])
            await node.flush()
    await host.close_nodes(node)


def _changed(was: bytes, now: bytes) -> list[Span]:
    """Runs of whole clusters that differ."""
    if was == now:
        return []
    clusters = Span(0, len(now)).split(CLUSTER)
    return coalesce(each for each in clusters if was[each.at : each.end] != now[each.at : each.end])


def _make_file_system(files: Path, image: Path) -> Path:
    program = shutil.which("mke2fs", path=f"{os.environ.get('PATH', '')}:/sbin:/usr/sbin")
    if program is None:
        raise UsageError("mke2fs is missing: install e2fsprogs, the demonstration makes a real file system with it")
    with image.open("wb") as out:
        out.truncate(DISK_BYTES)
    # Fixed identifiers, so that two versions of the file system differ only where their files do.
    options = ["-q", "-F", "-t", "ext4", "-U", UUID, "-E", f"hash_seed={UUID},root_owner=0:0", "-d", str(files)]
    done = subprocess.run([program, *options, str(image)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UsageError(f"mke2fs failed: {done.stderr.strip()}")
    return image


def _write_base_files(files: Path) -> None:
    """About 270 MiB: logs, tables, source code, photographs (incompressible) and a preallocated, empty database."""
    chance = random.Random(7)
    _write(files / "var/log/service.log", _log_lines(chance, 2 * MiB), 36)
    _write(files / "srv/export/orders.csv", _table(chance, 2 * MiB), 28)
    _write(files / "srv/export/events.json", _records(chance, 2 * MiB), 24)
    for number in range(20):
        _write(files / f"home/ada/photos/{number:04d}.jpg", chance.randbytes(4 * MiB), 1)
    database = files / "var/lib/db/data.img"
    _write(database, _table(chance, 1 * MiB), 16)
    with database.open("r+b") as grown:
        grown.truncate(96 * MiB)
    for module in sorted(Path(zlib.__file__ or os.__file__).parent.parent.glob("*.py"))[:200]:
        target = files / "usr/lib/python" / module.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(module, target)


def _write_new_files(files: Path) -> None:
    chance = random.Random(11)
    _write(files / "var/log/service.log.1", _log_lines(chance, 2 * MiB), 16)
    for number in range(6):
        _write(files / f"home/ada/photos/new-{number:04d}.jpg", chance.randbytes(4 * MiB), 1)
    (files / "home/ada/notes.txt").write_text("remember to make backups\n")


def _write(path: Path, block: bytes, times: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as out:
        for number in range(times):
            out.write(f"# part {number}\n".encode() if times > 1 else b"")
            out.write(block)


def _log_lines(chance: random.Random, length: int) -> bytes:
    line = "2026-01-{:02d}T{:02d}:{:02d}:07Z host{} {}[{}]: {}\n".format
    lines, size = [], 0
    while size < length:
        text = " ".join(chance.choices(WORDS, k=8))
        stamp = (chance.randrange(1, 29), chance.randrange(24), chance.randrange(60))
        lines.append(line(*stamp, chance.randrange(9), chance.choice(WORDS), chance.randrange(9999), text))
        size += len(lines[-1])
    return "".join(lines).encode()


def _table(chance: random.Random, length: int) -> bytes:
    rows = [f"{chance.randrange(10**9)},{chance.choice(WORDS)},{chance.random():.6f}\n" for _ in range(length // 28)]
    return "".join(rows).encode()


def _records(chance: random.Random, length: int) -> bytes:
    records = (
        json.dumps({"id": number, "kind": chance.choice(WORDS), "tags": chance.choices(WORDS, k=4)})
        for number in range(length // 80)
    )
    return "\n".join(records).encode()
