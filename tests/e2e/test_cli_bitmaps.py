"""`blockjobs bitmap` as a process, on qcow2 and raw images; judged by the real qemu-img and qemu-io."""

from __future__ import annotations

import json
import os
import subprocess

import disks
import pytest
import tool

pytestmark = pytest.mark.qemu


def bitmap(*words, cwd):
    return tool.blockjobs("bitmap", *words, cwd=cwd)


def listed(image, cwd, *words):
    return {each["name"]: each for each in bitmap("list", image, "--json", *words, cwd=cwd).json}


def qemu_lists(image, cwd):
    told = json.loads(disks.run("qemu-img", "info", "--output=json", image, cwd=cwd))
    return {each["name"]: each for each in told["format-specific"]["data"].get("bitmaps", [])}


def test_every_verb_on_a_qcow2_image(tmp_path):
    disks.run("qemu-img", "create", "-q", "-f", "qcow2", "a.qcow2", "8M", cwd=tmp_path)
    assert bitmap("list", "a.qcow2", cwd=tmp_path).out == "'a.qcow2' has no bitmaps\n"
    said = bitmap("add", "a.qcow2", "b", "-g", "4K", cwd=tmp_path).out
    assert said == "Added bitmap 'b' to 'a.qcow2': 4 KiB a bit\n"
    bitmap("add", "a.qcow2", "sum", "--disabled", cwd=tmp_path)
    flags = {name: (each["granularity"], each["flags"]) for name, each in qemu_lists("a.qcow2", tmp_path).items()}
    assert flags == {"b": (4096, ["auto"]), "sum": (65536, [])}
    disks.run("qemu-io", "-c", "write 1M 8k", "a.qcow2", cwd=tmp_path)
    assert listed("a.qcow2", tmp_path)["b"]["count"] == 8192
    bitmap("merge", "a.qcow2", "sum", "b", cwd=tmp_path)
    bitmap("clear", "a.qcow2", "b", cwd=tmp_path)
    found = listed("a.qcow2", tmp_path)
    assert (found["b"]["count"], found["sum"]["count"]) == (0, 65536)
    bitmap("disable", "a.qcow2", "b", cwd=tmp_path)
    bitmap("enable", "a.qcow2", "sum", cwd=tmp_path)
    assert {name: each["flags"] for name, each in qemu_lists("a.qcow2", tmp_path).items()} == {"b": [], "sum": ["auto"]}
    shown = bitmap("list", "a.qcow2", cwd=tmp_path).out.splitlines()
    assert [line.split()[-2:] for line in shown[1:]] == [["recording", "sum"], ["disabled", "b"]]
    bitmap("remove", "a.qcow2", "b", cwd=tmp_path)
    assert list(qemu_lists("a.qcow2", tmp_path)) == ["sum"]
    assert disks.check_exit_code(tmp_path / "a.qcow2") == 0


def test_bitmaps_of_an_overlay_are_merged_into_its_base(tmp_path):
    disks.run("qemu-img", "create", "-q", "-f", "qcow2", "base.qcow2", "8M", cwd=tmp_path)
    bitmap("add", "base.qcow2", "b", cwd=tmp_path)
    disks.run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2", cwd=tmp_path)
    bitmap("add", "top.qcow2", "t", cwd=tmp_path)
    disks.run("qemu-io", "-c", "write 2M 64k", "top.qcow2", cwd=tmp_path)
    bitmap("merge", "base.qcow2", "b", "t", "-b", "top.qcow2", cwd=tmp_path)
    assert listed("base.qcow2", tmp_path)["b"]["count"] == 65536


def test_a_raw_image_has_its_bitmaps_beside_it(tmp_path):
    (tmp_path / "a.raw").write_bytes(bytes(1 << 20))
    assert bitmap("list", "a.raw", cwd=tmp_path).out == "'a.raw' has no bitmaps\n"
    assert os.listdir(tmp_path) == ["a.raw"]
    bitmap("add", "a.raw", "b", cwd=tmp_path)
    bitmap("add", "a.raw", "other", "--disabled", cwd=tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["a.raw", "a.raw.bitmaps"]
    bitmap("merge", "a.raw", "other", "b", cwd=tmp_path)
    assert {name: each["count"] for name, each in listed("a.raw", tmp_path).items()} == {"other": 0, "b": 0}
    # Somebody who does not know of the bitmaps writes to the image.
    disks.run("qemu-io", "-f", "raw", "-c", "write 0 512", "a.raw", cwd=tmp_path)
    assert all(each["inconsistent"] for each in listed("a.raw", tmp_path).values())
    assert "inconsistent" in tool.refused("bitmap", "clear", "a.raw", "b", cwd=tmp_path)
    bitmap("remove", "a.raw", "b", cwd=tmp_path)
    bitmap("remove", "a.raw", "other", cwd=tmp_path)
    assert os.listdir(tmp_path) == ["a.raw"]
    bitmap("add", "a.raw", "b", "--bitmap-file", "elsewhere", cwd=tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["a.raw", "elsewhere"]
    assert list(listed("a.raw", tmp_path, "--bitmap-file", "elsewhere")) == ["b"]


def test_mistakes_are_one_line_and_change_nothing(tmp_path):
    disks.run("qemu-img", "create", "-q", "-f", "qcow2", "a.qcow2", "8M", cwd=tmp_path)
    bitmap("add", "a.qcow2", "b", cwd=tmp_path)
    before = disks.digest(tmp_path / "a.qcow2")
    for words, text in (
        (("add", "a.qcow2", "b"), "Bitmap already exists: b"),
        (("add", "a.qcow2", "c", "-g", "3K"), "Granularity must be power of 2"),
        (("add", "a.qcow2", ""), "Bitmap name cannot be empty"),
        (("add", "a.qcow2", "c", "--bitmap-file", "x"), "leave --bitmap-file out"),
        (("remove", "a.qcow2", "c"), "Dirty bitmap 'c' not found"),
        (("merge", "a.qcow2", "b", "c"), "Dirty bitmap 'c' not found"),
        (("clear", "missing.qcow2", "b"), "'missing.qcow2': No such file"),
        (("clear", "a.qcow2"), "NAME is missing"),
    ):
        assert text in tool.refused("bitmap", *words, cwd=tmp_path)
    assert disks.digest(tmp_path / "a.qcow2") == before
    holder = subprocess.Popen(
        ["qemu-io", "a.qcow2"], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdin is not None and holder.stdout is not None
        holder.stdin.write("length\n")
        holder.stdin.flush()
        while "MiB" not in holder.stdout.readline():
            pass
        assert "another program is using the image" in tool.refused("bitmap", "clear", "a.qcow2", "b", cwd=tmp_path)
    finally:
        holder.communicate("quit\n")
