"""Snapshots inside an image, and images described by options, as sources of `convert`, `measure` and `compare`."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING

import disks
import pytest
import tool

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.qemu


@pytest.fixture
def image(tmp_path: Path) -> str:
    """Two snapshots, the first of another length, and a disk that is like neither."""
    disks.make(tmp_path, "a.qcow2", size="2M")
    for step, name in ((1, "2"), (2, "later")):
        disks.run("qemu-io", "-f", "qcow2", "-c", f"write -P {step} {step * 300}k 500k", "a.qcow2", cwd=tmp_path)
        disks.run("qemu-img", "snapshot", "-c", name, "a.qcow2", cwd=tmp_path)
        disks.run("qemu-img", "resize", "-q", "a.qcow2", f"{step + 2}M", cwd=tmp_path)
    disks.run("qemu-io", "-f", "qcow2", "-c", "write -P 9 0 1M", "a.qcow2", cwd=tmp_path)
    return "a.qcow2"


@pytest.mark.parametrize(
    "wanted", ["1", "2", "later", "snapshot.id=1", "snapshot.name=2", "snapshot.id=2,snapshot.name=later"]
)
@pytest.mark.parametrize("target", ["raw", "qcow2"])
def test_a_snapshot_is_converted_as_qemu_img_does(tmp_path, image, wanted, target):
    before = disks.digest(tmp_path / image)
    words = ["convert", "-f", "qcow2", "-O", target, "-l", wanted, image]
    disks.run("qemu-img", *words, "theirs", cwd=tmp_path)
    tool.quick(*words, "ours", cwd=tmp_path)
    assert disks.same_content(tmp_path, "ours", target, "theirs", target)
    # The copy has the length of the disk as it is, in both programs.
    shown = json.loads(disks.run("qemu-img", "info", "--output=json", "-f", target, "ours", cwd=tmp_path))
    assert shown["virtual-size"] == 4 * disks.MIB
    assert disks.digest(tmp_path / image) == before


def test_what_the_disk_has_no_room_for_is_left_out_with_a_warning(tmp_path):
    disks.make(tmp_path, "a.qcow2", size="2M")
    disks.run("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 2M", "a.qcow2", cwd=tmp_path)
    disks.run("qemu-img", "snapshot", "-c", "long", "a.qcow2", cwd=tmp_path)
    disks.run("qemu-img", "resize", "-q", "--shrink", "a.qcow2", "1M", cwd=tmp_path)
    words = ["convert", "-f", "qcow2", "-O", "raw", "-l", "long", "a.qcow2"]
    disks.run("qemu-img", *words, "theirs", cwd=tmp_path)
    done = tool.quick(*words, "ours", cwd=tmp_path)
    assert "shorter than the snapshot was: bytes from 1048576 on are left out" in done.err
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    words = ["measure", "-O", "qcow2", "-l", "long", "a.qcow2"]
    assert tool.quick(*words, cwd=tmp_path).out == disks.run("qemu-img", *words, cwd=tmp_path)


def test_a_snapshot_is_measured(tmp_path, image):
    words = ["measure", "-f", "qcow2", "-O", "qcow2", "--output=json", "-l", "1", image]
    assert tool.quick(*words, cwd=tmp_path).out == disks.run("qemu-img", *words, cwd=tmp_path)


@pytest.mark.parametrize(
    "words",
    [
        ["-l", "nope", "a.qcow2", "x"],
        ["-l", "snapshot.id=7", "a.qcow2", "x"],
        ["-l", "1", "a.qcow2", "a.qcow2", "x"],
        ["--target-image-opts", "a.qcow2", "driver=raw,file.filename=x"],
        ["--image-opts", "driver=qcow2,file.filename=nope", "x"],
        ["--image-opts", "-f", "qcow2", "driver=qcow2,file.filename=a.qcow2", "x"],
    ],
)
def test_what_is_refused(tmp_path, image, words):
    code = subprocess.run(["qemu-img", "convert", *words], cwd=tmp_path, check=False, capture_output=True).returncode
    assert code == 1
    tool.refused("convert", *words, cwd=tmp_path)
    assert not (tmp_path / "x").exists()


def test_described_images(tmp_path, image):
    disks.make(tmp_path, "there.qcow2", size="4M")
    source, target = (f"driver=qcow2,file.driver=file,file.filename={name}" for name in (image, "there.qcow2"))
    tool.quick("convert", "-n", "--image-opts", "--target-image-opts", source, target, cwd=tmp_path)
    assert disks.same_content(tmp_path, image, "qcow2", "there.qcow2", "qcow2")
    assert "identical" in tool.quick("compare", "--image-opts", source, target, cwd=tmp_path).out
    words = ["measure", "--output=json", "-O", "qcow2", "--image-opts", source]
    assert tool.quick(*words, cwd=tmp_path).json == json.loads(disks.run("qemu-img", *words, cwd=tmp_path))
