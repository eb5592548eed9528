"""`blockjobs convert` as a process, judged by the real qemu-img."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import disks
import pytest
import tool

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.qemu


def convert(tmp_path: Path, *words: str) -> None:
    done = tool.blockjobs("convert", *words, cwd=tmp_path)
    assert (done.out, done.err) == ("", "")


def allocated(tmp_path: Path, name: str, fmt: str) -> int:
    """Bytes that an image holds as data."""
    runs = json.loads(disks.run("qemu-img", "map", "-f", fmt, "--output=json", name, cwd=tmp_path))
    return sum(run["length"] for run in runs if run["data"])


@pytest.mark.parametrize(
    ("source", "target", "options"),
    [
        ("raw", "qcow2", []),
        ("qcow2", "raw", []),
        ("qcow2", "qcow2", ["-o", "cluster_size=4K,extended_l2=off"]),
        ("qcow2", "qcow2", ["-c", "-o", "compression_type=zstd"]),
        ("qcow2", "qcow2", ["-c", "-W", "-m", "4", "-o", "compat=0.10"]),
        ("raw", "raw", ["-C", "-t", "none", "-T", "none"]),
    ],
)
def test_same_content(tmp_path, source, target, options):
    disks.make_full(tmp_path, "in", fmt=source)
    convert(tmp_path, "-f", source, "-O", target, *options, "in", "out")
    assert disks.same_content(tmp_path, "in", source, "out", target)
    if target == "qcow2":
        assert disks.check_exit_code(tmp_path / "out") == 0
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]


def test_zeroes_that_are_stored_are_left_out(tmp_path):
    content = b"a" * disks.MIB + bytes(3 * disks.MIB) + b"b" * disks.MIB
    (tmp_path / "in.raw").write_bytes(content)
    convert(tmp_path, "in.raw", "out.qcow2")
    convert(tmp_path, "in.raw", "out.raw")
    convert(tmp_path, "-S", "0", "in.raw", "full.qcow2")
    assert allocated(tmp_path, "out.qcow2", "qcow2") == allocated(tmp_path, "out.raw", "raw") == 2 * disks.MIB
    assert (tmp_path / "out.raw").read_bytes() == content
    assert allocated(tmp_path, "full.qcow2", "qcow2") == 5 * disks.MIB
    assert disks.same_content(tmp_path, "in.raw", "raw", "out.qcow2", "qcow2")


def test_several_become_one_disk(tmp_path):
    disks.make_full(tmp_path, "a.qcow2", mib=4)
    (tmp_path / "b.raw").write_bytes(b"b" * 1000)
    disks.make_full(tmp_path, "c.qcow2", mib=4)
    convert(tmp_path, "a.qcow2", "b.raw", "c.qcow2", "out.qcow2")
    disks.run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", "a.qcow2", "a.raw", cwd=tmp_path)
    disks.run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", "c.qcow2", "c.raw", cwd=tmp_path)
    whole = (tmp_path / "a.raw").read_bytes() + b"b" * 1000 + bytes(24) + (tmp_path / "c.raw").read_bytes()
    (tmp_path / "whole.raw").write_bytes(whole)
    assert disks.same_content(tmp_path, "whole.raw", "raw", "out.qcow2", "qcow2")


def test_an_overlay_of_another_base(tmp_path):
    disks.make_full(tmp_path, "base.qcow2", mib=4)
    disks.run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2", cwd=tmp_path)
    disks.run("qemu-io", "-c", "write -P 5 1M 64k", "top.qcow2", cwd=tmp_path)
    convert(tmp_path, "-B", "base.qcow2", "-F", "qcow2", "top.qcow2", "out.qcow2")
    assert disks.same_content(tmp_path, "top.qcow2", "qcow2", "out.qcow2", "qcow2")
    runs = json.loads(disks.run("qemu-img", "map", "--output=json", "out.qcow2", cwd=tmp_path))
    assert sum(run["length"] for run in runs if run["depth"] == 0) == 65536


def test_into_an_image_that_is_there(tmp_path):
    disks.make_full(tmp_path, "in.qcow2", mib=4)
    disks.make(tmp_path, "out.qcow2", size="8M", options="cluster_size=128k")
    disks.run("qemu-io", "-c", "write -P 9 0 8M", "out.qcow2", cwd=tmp_path)
    convert(tmp_path, "-n", "in.qcow2", "out.qcow2")
    disks.run("qemu-img", "convert", "-O", "raw", "in.qcow2", "in.raw", cwd=tmp_path)
    disks.run("qemu-img", "convert", "-O", "raw", "out.qcow2", "out.raw", cwd=tmp_path)
    out = (tmp_path / "out.raw").read_bytes()
    assert out[: 4 * disks.MIB] == (tmp_path / "in.raw").read_bytes()
    assert out[4 * disks.MIB :] == b"\x09" * 4 * disks.MIB
    assert "cluster_size: 131072" in disks.run("qemu-img", "info", "out.qcow2", cwd=tmp_path)
    disks.make(tmp_path, "small.qcow2", size="1M")
    assert "1048576 bytes, and 4194304" in tool.refused("convert", "-n", "in.qcow2", "small.qcow2", cwd=tmp_path)
    assert "takes no options" in tool.refused(
        "convert", "-n", "-o", "cluster_size=4k", "in.qcow2", "out.qcow2", cwd=tmp_path
    )


def test_bitmaps_go_along(tmp_path):
    disks.make_full(tmp_path, "in.qcow2", mib=4)
    for name in ("one", "two"):
        disks.run("qemu-img", "bitmap", "--add", "in.qcow2", name, cwd=tmp_path)
    disks.run("qemu-io", "-c", "write 1M 64k", "in.qcow2", cwd=tmp_path)
    disks.run("qemu-img", "bitmap", "--disable", "in.qcow2", "two", cwd=tmp_path)
    convert(tmp_path, "--bitmaps", "in.qcow2", "out.qcow2")
    disks.run("qemu-img", "convert", "--bitmaps", "-O", "qcow2", "in.qcow2", "peer.qcow2", cwd=tmp_path)
    shown = []
    for name in ("out.qcow2", "peer.qcow2"):
        info = json.loads(disks.run("qemu-img", "info", "--output=json", name, cwd=tmp_path))
        shown.append(sorted(info["format-specific"]["data"]["bitmaps"], key=lambda each: each["name"]))
    assert shown[0] == shown[1] != []
    assert disks.check_exit_code(tmp_path / "out.qcow2") == 0
    assert "cannot hold bitmaps" in tool.refused("convert", "--bitmaps", "in.qcow2", "out.raw", cwd=tmp_path)


def test_an_existing_target_is_replaced_whole_or_not_at_all(tmp_path):
    disks.make_full(tmp_path, "in.qcow2", mib=4)
    before = disks.digest(disks.make_full(tmp_path, "out.qcow2", mib=8))
    assert "Cluster size" in tool.refused("convert", "-o", "cluster_size=3k", "in.qcow2", "out.qcow2", cwd=tmp_path)
    assert disks.digest(tmp_path / "out.qcow2") == before
    assert "source itself" in tool.refused("convert", "in.qcow2", "in.qcow2", cwd=tmp_path)
    convert(tmp_path, "in.qcow2", "out.qcow2")
    assert disks.same_content(tmp_path, "in.qcow2", "qcow2", "out.qcow2", "qcow2")
    assert sorted(os.listdir(tmp_path)) == ["in.qcow2", "out.qcow2"]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["in.qcow2"], "needs the image to read and the image to make"),
        (["-c", "in.qcow2", "out.raw"], "raw images cannot be compressed"),
        (["-B", "in.qcow2", "in.qcow2", "out.qcow2"], "-B needs the backing file's format"),
        (["-c", "-C", "in.qcow2", "out.qcow2"], "Cannot enable copy offloading when -c is used"),
        (["no.qcow2", "out.qcow2"], "Could not open 'no.qcow2': No such file or directory"),
    ],
)
def test_refusals(tmp_path, words, text):
    disks.make(tmp_path, "in.qcow2", size="1M")
    assert text in tool.refused("convert", *words, cwd=tmp_path)
    assert os.listdir(tmp_path) == ["in.qcow2"]
