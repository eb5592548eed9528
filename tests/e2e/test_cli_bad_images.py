"""Broken images and the command: one line or a clean result, little memory, little time, and nothing left behind.

The classes are those of spec/durability.md §3, the limits those of its §2. The daemon is asked about the same images in
test_daemon_bad_images; here each of the three ways to look at an image that somebody sent in is tried. Every limit has
an image in the list that claims more.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import disks
import pytest
from bad_images import BAD_IMAGES, INCOMPATIBLE, L1_AT, L1_SIZE, SIZE, SNAPSHOTS, Bad, patch, u32, u64

if TYPE_CHECKING:
    from pathlib import Path

MiB = 1 << 20
GROWTH_BYTES_MAX = 128 * MiB
SECONDS_MAX = 30.0
"""Generous: the machine may be busy. What hangs, hangs longer."""

AUTOCLEAR, EXTENSIONS = 88, 112


def bitmaps(count: int, directory_bytes: int) -> Bad:
    extension = u32(0x23852875) + u32(24) + u32(count) + u32(0) + u64(directory_bytes) + u64(0x50000)

    def spoil(image: Path) -> None:
        patch(AUTOCLEAR, u64(1))(image)
        patch(EXTENSIONS, extension + bytes(8))(image)

    return Bad(f"{count}-bitmaps-in-{directory_bytes}", spoil, "")


def snapshots(extra_bytes: int, name_bytes: int) -> Bad:
    """One snapshot whose entry claims so much extra data and so long a name."""
    entry = u64(0x30000) + u32(1) + u32(name_bytes << 0 & 0xFFFF) + bytes(20) + u32(extra_bytes) + bytes(1024)

    def spoil(image: Path) -> None:
        with open(image, "r+b") as file:
            at = -(-file.seek(0, os.SEEK_END) // 65536) * 65536
            file.seek(at)
            file.write(entry.ljust(65536, b"\0"))
        patch(SNAPSHOTS, u32(1) + u64(at))(image)

    return Bad(f"snapshot-extra-{extra_bytes}-name-{name_bytes}", spoil, "", shows="either")


def huge(image: Path) -> None:
    """As large as the format allows, with an L1 table that the file does not hold."""
    patch(SIZE, u64(4 * MiB * (512 * MiB)))(image)
    patch(L1_SIZE, u32(4 * MiB))(image)
    patch(L1_AT, u64(1 << 40))(image)


MORE = [
    bitmaps(70_000, 1 << 20),
    bitmaps(1, 1 << 62),
    bitmaps(65_535, 64 * MiB),
    snapshots(1 << 30, 5),
    snapshots(2000, 5),
    snapshots(24, 60_000),
    Bad("most-snapshots", patch(SNAPSHOTS, u32(65_536) + u64(0x10000)), "", shows="either"),
    Bad("largest-l1-not-there", huge, "", shows="either"),
    Bad("dirty-and-corrupt", patch(INCOMPATIBLE, u64(3)), "", shows="either"),
]


class Ended:
    """What became of one command."""

    def __init__(self, words: list[str], folder: Path) -> None:
        began_s = time.monotonic()
        child = subprocess.Popen(
            [sys.executable, "-m", "blockjobs", *words],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        timer = threading.Timer(SECONDS_MAX, child.kill)
        timer.start()
        assert child.stdout is not None
        self.output = child.stdout.read().decode(errors="replace")
        child.stdout.close()
        _, status, usage = os.wait4(child.pid, 0)
        timer.cancel()
        child.returncode = self.code = os.waitstatus_to_exitcode(status)
        self.seconds = time.monotonic() - began_s
        self.peak_bytes = usage.ru_maxrss * 1024


def sound(folder: Path) -> None:
    """An image with 1 MiB of data."""
    disks.make(folder, "disk.qcow2", size="1M")
    disks.run("qemu-io", "-f", "qcow2", "-c", "write -P 5 0 1M", "disk.qcow2", cwd=folder)


@pytest.fixture(scope="module")
def usual_bytes(tmp_path_factory: pytest.TempPathFactory) -> int:
    """Memory that the same commands take for a sound image."""
    folder = tmp_path_factory.mktemp("sound")
    sound(folder)
    return max(Ended(words, folder).peak_bytes for words in commands())


def commands() -> list[list[str]]:
    return [
        ["info", "-f", "qcow2", "disk.qcow2"],
        ["check", "-f", "qcow2", "disk.qcow2"],
        ["convert", "-f", "qcow2", "-O", "raw", "disk.qcow2", "out.raw"],
    ]


@pytest.mark.qemu
@pytest.mark.parametrize("bad", [*BAD_IMAGES, *MORE], ids=lambda bad: bad.name)
def test_looking_at_a_broken_image_costs_little_and_tells_no_tales(bad: Bad, tmp_path: Path, usual_bytes: int) -> None:
    sound(tmp_path)
    bad.spoil(tmp_path / "disk.qcow2")
    for words in commands():
        before = (tmp_path / "disk.qcow2").read_bytes()
        ended = Ended(words, tmp_path)
        assert ended.code in (0, 1, 2, 3), ended.output
        assert "Traceback" not in ended.output
        assert "Error:" not in ended.output
        assert ended.peak_bytes - usual_bytes <= GROWTH_BYTES_MAX
        assert ended.seconds < SECONDS_MAX
        assert (tmp_path / "disk.qcow2").read_bytes() == before
        if ended.code == 1:
            assert ended.output.startswith("blockjobs: ") or words[0] == "check", ended.output
            assert ended.output.count("\n") == 1 or words[0] == "check", ended.output
            if bad.shows == "open" and words[0] != "check":
                assert bad.complaint in ended.output
        if words[0] == "convert":
            assert ended.code or (tmp_path / "out.raw").exists()
            assert not (ended.code and (tmp_path / "out.raw").exists()), "half a copy is left"
            if bad.shows == "open" and bad.complaint:
                assert ended.code == 1


def test_the_limits_are_those_of_the_specification() -> None:
    from blockjobs.block.drivers.qcow2.options import METADATA_CACHE_BYTES_MAX
    from blockjobs.wire import qcow2, qcow2_tables

    assert 32 * MiB == qcow2.L1_BYTES_MAX
    assert 8 * MiB == qcow2.REFCOUNT_TABLE_BYTES_MAX
    assert qcow2.SNAPSHOTS_MAX == 65_536
    assert qcow2_tables.SNAPSHOT_EXTRA_BYTES_MAX == 1024
    assert qcow2.BITMAPS_MAX == 65_535
    assert 64 * MiB >= qcow2.BITMAP_DIRECTORY_BYTES_MAX
    assert 64 * MiB >= METADATA_CACHE_BYTES_MAX
