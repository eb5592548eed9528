"""A week of `blockjobs backup --incremental`, with guests of `blockjobs nbd serve` and of QEMU writing in between."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import disks
import pytest
import tool

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.qemu

SIZE = 8 << 20


class Disk:
    """An image and what is in it."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder, self.kind, self.name = folder, kind, f"disk.{kind}"
        self.model, self.chance = bytearray(SIZE), random.Random(kind)
        disks.run("qemu-img", "create", "-q", "-f", kind, self.name, str(SIZE), cwd=folder)

    def write(self, kind: str, where: str) -> None:
        """Somebody writes here and there."""
        words: list[str] = []
        for _ in range(self.chance.randrange(1, 6)):
            at = self.chance.randrange(SIZE // 512) * 512
            length = min(self.chance.randrange(1, 200) * 512, SIZE - at)
            pattern = self.chance.randrange(1, 256)
            words += ["-c", f"write -P {pattern} {at} {length}"]
            self.model[at : at + length] = bytes([pattern]) * length
        disks.run("qemu-io", "-f", kind, *words, where, cwd=self.folder)

    def write_over_nbd(self) -> None:
        """Somebody writes through a server of ours, which records it."""
        served = tool.start("nbd", "serve", self.name, "--writable", "--socket", "nbd.sock", "--json", cwd=self.folder)
        try:
            assert served.stdout is not None
            assert served.stdout.readline(), served.communicate()
            self.write("raw", "nbd+unix:///disk?socket=nbd.sock")
        finally:
            served.terminate()
            assert "Traceback" not in served.communicate()[1]

    def check_backup(self, name: str) -> None:
        disks.run("qemu-img", "convert", "-O", "raw", name, "restored", cwd=self.folder)
        assert (self.folder / "restored").read_bytes() == bytes(self.model), name


@pytest.mark.parametrize("kind", ["qcow2", "raw"])
def test_every_day_can_be_restored(kind: str, tmp_path: Path) -> None:
    disk = Disk(tmp_path, kind)
    disk.write(kind, disk.name)
    tool.blockjobs("backup", "--bitmap", "week", disk.name, "day0.qcow2", cwd=tmp_path)
    disk.check_backup("day0.qcow2")
    for day in range(1, 6):
        disk.write_over_nbd()
        name, base = f"day{day}.qcow2", f"day{day - 1}.qcow2"
        tool.blockjobs("backup", "--incremental", "week", "--base", base, disk.name, name, cwd=tmp_path)
        disk.check_backup(name)
        assert disks.check_exit_code(tmp_path / name) == 0
    assert (tmp_path / "day5.qcow2").stat().st_size < SIZE // 2


def test_a_raw_image_written_behind_our_back_needs_a_full_backup(tmp_path: Path) -> None:
    disk = Disk(tmp_path, "raw")
    tool.blockjobs("backup", "--bitmap", "week", disk.name, "day0.qcow2", cwd=tmp_path)
    disk.write("raw", disk.name)
    words = ("backup", "--incremental", "week", "--base", "day0.qcow2", disk.name, "day1.qcow2")
    assert "Bitmap 'week' is inconsistent" in tool.refused(*words, cwd=tmp_path)
    assert not (tmp_path / "day1.qcow2").exists()
    tool.blockjobs("bitmap", "remove", disk.name, "week", cwd=tmp_path)
    tool.blockjobs("backup", "--bitmap", "week", disk.name, "day1.qcow2", cwd=tmp_path)
    disk.check_backup("day1.qcow2")
