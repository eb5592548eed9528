"""Backups of every kind of qcow2 image that qemu-img makes, judged by qemu-img; one daemon for all of them."""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import disks
import player
import pytest

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.qemu

LENGTH = 3 * disks.MIB + 2560
"""Neither whole clusters of any size but 512, nor whole subclusters."""


@dataclass(frozen=True)
class Source:
    """An image to back up: qemu-img's options, qemu-io's commands, and what lies below."""

    options: str = ""
    writes: tuple[str, ...] = (
        "write -P 1 0 100k",
        "write -P 2 300k 1000",
        "write -P 3 1M 700k",
        "write -z 1200k 130k",
        "discard 64k 64k",
        "write -P 4 3145728 2560",
    )
    compressed: bool = False
    snapshots: bool = False
    below: tuple[tuple[str, str, str], ...] = ()
    """(format, qemu-img's options, length) of the backing images, the lowest first."""
    data_file: bool = False


SOURCES = {
    "v2": Source("compat=0.10"),
    **{f"cluster-{size}": Source(f"cluster_size={size}") for size in ("512", "4k", "64k", "2M")},
    **{f"refcount-{bits}": Source(f"refcount_bits={bits}") for bits in (1, 2, 8, 64)},
    "zlib": Source("compression_type=zlib", compressed=True),
    "zstd": Source("compression_type=zstd", compressed=True),
    "zlib-2M": Source("cluster_size=2M", compressed=True),
    "zlib-512": Source("cluster_size=512", compressed=True),
    "extended-l2": Source("extended_l2=on"),
    "extended-l2-16k": Source("extended_l2=on,cluster_size=16k"),
    "data-file": Source("data_file=data", data_file=True),
    "data-file-raw": Source("data_file=data,data_file_raw=on", data_file=True),
    "lazy-refcounts": Source("lazy_refcounts=on"),
    "snapshots": Source(snapshots=True),
    **{f"preallocation-{mode}": Source(f"preallocation={mode}") for mode in ("metadata", "falloc", "full")},
    "on-raw": Source(below=(("raw", "", "2M"),)),
    "on-shorter": Source(below=(("qcow2", "cluster_size=2M", "1000k"),)),
    "on-longer": Source(below=(("qcow2", "compat=0.10,cluster_size=4k", "5M"),)),
    "chain": Source(
        "cluster_size=4k", below=(("raw", "", "1M"), ("qcow2", "extended_l2=on", "4M"), ("qcow2", "", "2M"))
    ),
    "extended-l2-chain": Source("extended_l2=on,cluster_size=16k", below=(("qcow2", "cluster_size=64k", "3M"),)),
}

TARGETS = {
    # sync, compress, options of the target
    "full": ("full", False, ""),
    "full-compressed": ("full", True, "compression_type=zlib"),
    "full-zstd": ("full", True, "compression_type=zstd,cluster_size=4k"),
    "top": ("top", False, "cluster_size=4k"),
    "top-compressed": ("top", True, ""),
}


class Backups:
    """A daemon and the means to run one backup after another."""

    def __init__(self, daemon: player.Daemon) -> None:
        self._qmp, self._numbers = daemon.qmp, itertools.count()

    def ask(self, command: str, **arguments: Any) -> Any:
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        reply, _ = self._qmp.ask({"execute": command, "arguments": named})
        assert "return" in reply, reply
        return reply["return"]

    def run(self, source: Path, target: Path, target_backing: dict[str, Any] | None, sync: str, compress: bool) -> None:
        number = next(self._numbers)
        names = [f"s{number}", f"t{number}"]
        self.ask("blockdev-add", driver="qcow2", node_name=names[0], read_only=True, file=_file(source))
        self.ask("blockdev-add", driver="qcow2", node_name=names[1], file=_file(target), backing=target_backing)
        job = {"job_id": "j", "device": names[0], "target": names[1], "sync": sync, "compress": compress}
        self.ask("blockdev-backup", **job, auto_dismiss=False)
        if sync == "none":
            self.ask("job-cancel", id="j")
        deadline = time.monotonic() + 20
        while (found := self.ask("query-jobs")[0])["status"] != "concluded":
            assert time.monotonic() < deadline, found
            time.sleep(0.002)
        self.ask("job-dismiss", id="j")
        for name in reversed(names):
            self.ask("blockdev-del", node_name=name)
        assert found.get("error") == ("Operation canceled" if sync == "none" else None), found


@pytest.fixture(scope="module")
def backups(tmp_path_factory):
    with player.Daemon(player.OURS, tmp_path_factory.mktemp("daemon")) as daemon:
        yield Backups(daemon)
        assert "Traceback" not in daemon.stderr


@pytest.mark.parametrize("kind", SOURCES)
def test_a_backup_holds_what_the_source_shows(kind, backups, tmp_path):
    source = SOURCES[kind]
    lowest = _make(source, tmp_path)
    for name, (sync, compress, options) in TARGETS.items():
        is_overlay = sync == "top" and lowest is not None
        below = ["-b", lowest[0], "-F", lowest[1], "-u"] if is_overlay else []
        words = ["qemu-img", "create", "-q", "-f", "qcow2", *(["-o", options] if options else []), *below]
        disks.run(*words, name, str(LENGTH), cwd=tmp_path)
        backing = _opened(tmp_path, *lowest) if is_overlay else None
        backups.run(tmp_path / "source", tmp_path / name, backing, sync, compress)
        assert disks.same_content(tmp_path, "source", "qcow2", name, "qcow2"), name
        assert disks.check_exit_code(tmp_path / name) == 0, name
        if compress:
            assert disks.compressed_clusters(tmp_path / name) > 0, name
    assert disks.check_exit_code(tmp_path / "source") == 0


def test_sync_none_copies_nothing_by_itself(backups, tmp_path):
    _make(Source(), tmp_path)
    disks.make(tmp_path, "target", size=str(LENGTH))
    backups.run(tmp_path / "source", tmp_path / "target", None, "none", False)
    assert json.loads(disks.run("qemu-img", "map", "--output=json", "target", cwd=tmp_path))[0]["data"] is False
    assert disks.check_exit_code(tmp_path / "target") == 0


def test_clusters_that_are_holes_in_the_file_are_not_copied(backups, tmp_path):
    disks.make(tmp_path, "source", size="64M", options="preallocation=metadata")
    disks.run("qemu-io", "-f", "qcow2", "-c", "write -P 5 20M 1M", "source", cwd=tmp_path)
    disks.make(tmp_path, "target", size="64M")
    backups.run(tmp_path / "source", tmp_path / "target", None, "full", False)
    assert disks.same_content(tmp_path, "source", "qcow2", "target", "qcow2")
    assert (tmp_path / "target").stat().st_blocks * 512 < 3 * disks.MIB


def _make(source: Source, directory: Path) -> tuple[str, str] | None:
    """Make the image `source`; return the name and format of the image right below it."""
    below: tuple[str, str] | None = None
    for number, (fmt, options, length) in enumerate(source.below):
        _create(directory, name := f"below{number}", fmt, options, length, below)
        commands = [f"write -P {10 + number} {256 * number}k 512k", f"write -P {20 + number} 900k 4k"]
        disks.run("qemu-io", "-f", fmt, *_each(commands), name, cwd=directory)
        below = name, fmt
    plain = "plain" if source.compressed else "source"
    _create(directory, plain, "qcow2", source.options, str(LENGTH), below)
    disks.run("qemu-io", "-f", "qcow2", *_each(source.writes), plain, cwd=directory)
    if source.compressed:
        words = ["qemu-img", "convert", "-c", "-f", "qcow2", "-O", "qcow2", "-o", source.options, plain, "source"]
        disks.run(*words, cwd=directory)
        disks.run("qemu-io", "-f", "qcow2", "-c", "write -P 9 33k 20k", "source", cwd=directory)
    if source.snapshots:
        disks.run("qemu-img", "snapshot", "-c", "one", "source", cwd=directory)
        disks.run("qemu-io", "-f", "qcow2", "-c", "write -P 8 50k 900k", "source", cwd=directory)
        disks.run("qemu-img", "snapshot", "-c", "two", "source", cwd=directory)
    return below


def _create(directory: Path, name: str, fmt: str, options: str, length: str, below: tuple[str, str] | None) -> None:
    chosen = ["-o", options] if options else []
    backing = ["-b", below[0], "-F", below[1]] if below else []
    disks.run("qemu-img", "create", "-q", "-f", fmt, *chosen, *backing, name, length, cwd=directory)


def _each(commands: Any) -> list[str]:
    return [word for command in commands for word in ("-c", command)]


def _file(path: Path) -> dict[str, Any]:
    return {"driver": "file", "filename": str(path)}


def _opened(directory: Path, name: str, fmt: str) -> dict[str, Any]:
    return {"driver": fmt, "file": _file(directory / name)}
