"""`blockjobs amend` and `blockjobs snapshot` as processes, judged by the real qemu-img."""

from __future__ import annotations

import asyncio
import json
import os

import disks
import pytest
import tool

from blockjobs.block.internal_snapshots import GroupMark, Stage
from blockjobs.host import Host
from blockjobs.jobs.snapshot_group import snapshots_of

pytestmark = pytest.mark.qemu


def test_amend_and_back(tmp_path):
    disks.make_full(tmp_path, "a.qcow2", mib=4)
    disks.run("qemu-img", "convert", "-O", "raw", "a.qcow2", "a.raw", cwd=tmp_path)
    for options in ("compat=0.10", "compat=1.1,refcount_bits=64", "lazy_refcounts=on,refcount_bits=8", "size=8M"):
        assert tool.blockjobs("amend", "-o", options, "a.qcow2", cwd=tmp_path).out == ""
        assert disks.check_exit_code(tmp_path / "a.qcow2") == 0
    info = json.loads(disks.run("qemu-img", "info", "--output=json", "a.qcow2", cwd=tmp_path))
    assert info["virtual-size"] == 8 << 20
    assert info["format-specific"]["data"]["refcount-bits"] == 8
    assert info["format-specific"]["data"]["lazy-refcounts"] is True
    tool.blockjobs("amend", "-o", "size=4M", "--force", "a.qcow2", cwd=tmp_path)
    assert disks.same_content(tmp_path, "a.raw", "raw", "a.qcow2", "qcow2")


def test_amend_for_programs(tmp_path):
    disks.make(tmp_path, "a.qcow2", size="1M")
    lines = [
        json.loads(line)
        for line in tool.blockjobs(
            "amend", "--json", "-o", "refcount_bits=64", "a.qcow2", cwd=tmp_path
        ).out.splitlines()
    ]
    assert (lines[-1]["status"], lines[-1]["type"], lines[-1]["error"]) == ("concluded", "amend", None)
    assert lines[-1]["current"] == lines[-1]["total"]


def test_amend_names_another_backing_file(tmp_path):
    disks.make_full(tmp_path, "base.qcow2", mib=4)
    disks.run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2", cwd=tmp_path)
    os.rename(tmp_path / "base.qcow2", tmp_path / "renamed.qcow2")
    tool.blockjobs("amend", "-o", "backing_file=renamed.qcow2", "top.qcow2", cwd=tmp_path)
    assert disks.same_content(tmp_path, "renamed.qcow2", "qcow2", "top.qcow2", "qcow2")
    tool.blockjobs("amend", "-o", "backing_file=", "top.qcow2", cwd=tmp_path)
    assert "backing" not in disks.run("qemu-img", "info", "top.qcow2", cwd=tmp_path)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["-o", "nonsense=1", "a.qcow2"], "Invalid parameter 'nonsense'"),
        (["a.qcow2"], "Must specify options (-o)"),
        (["-o", "size=1M", "a.qcow2"], "Shrinking an image"),
        (
            ["-o", "compat=0.10,refcount_bits=8", "a.qcow2"],
            "Refcount widths other than 16 bits require compatibility level 1.1",
        ),
        (["-o", "size=3M", "a.raw"], "Format driver 'raw' does not support option amendment"),
    ],
)
def test_amend_refuses(tmp_path, words, text):
    before = disks.digest(disks.make_full(tmp_path, "a.qcow2", mib=4))
    (tmp_path / "a.raw").write_bytes(bytes(512))
    assert text in tool.refused("amend", *words, cwd=tmp_path)
    assert disks.digest(tmp_path / "a.qcow2") == before


def test_amend_knows_what_only_new_images_can_have(tmp_path):
    disks.make(tmp_path, "a.qcow2", size="1M")
    before = disks.digest(tmp_path / "a.qcow2")
    error = tool.quick("amend", "-o", "cluster_size=4K", "a.qcow2", cwd=tmp_path, code=1).err
    assert error.endswith("Invalid parameter 'cluster_size'\nThis option is only supported for image creation\n")
    assert disks.digest(tmp_path / "a.qcow2") == before


def test_amend_refuses_version_2_for_a_data_file(tmp_path):
    disks.make(tmp_path, "d.qcow2", size="1M", options="data_file=d.raw")
    before = disks.digest(tmp_path / "d.qcow2")
    error = tool.refused("amend", "-o", "compat=0.10", "d.qcow2", cwd=tmp_path)
    assert "Cannot downgrade an image with a data file" in error
    assert disks.digest(tmp_path / "d.qcow2") == before


def test_snapshots_beside_qemu_img(tmp_path):
    disks.make_full(tmp_path, "a.qcow2", mib=4)
    tool.blockjobs("snapshot", "-c", "one", "a.qcow2", cwd=tmp_path)
    disks.run("qemu-io", "-c", "write -P 1 0 1M", "a.qcow2", cwd=tmp_path)
    disks.run("qemu-img", "snapshot", "-c", "two", "a.qcow2", cwd=tmp_path)
    disks.run("qemu-io", "-c", "write -P 2 0 1M", "a.qcow2", cwd=tmp_path)
    names = [each["name"] for each in tool.blockjobs("snapshot", "--json", "a.qcow2", cwd=tmp_path).json]
    assert names == ["one", "two"]
    listed = tool.blockjobs("snapshot", "-l", "a.qcow2", cwd=tmp_path).out
    theirs = disks.run("qemu-img", "snapshot", "-l", "a.qcow2", cwd=tmp_path)
    assert listed.split() == theirs.split()
    tool.blockjobs("snapshot", "-a", "two", "a.qcow2", cwd=tmp_path)
    assert "read 1048576" in disks.run("qemu-io", "-c", "read -P 1 0 1M", "a.qcow2", cwd=tmp_path)
    disks.run("qemu-img", "snapshot", "-a", "one", "a.qcow2", cwd=tmp_path)
    disks.make_full(tmp_path, "again.qcow2", mib=4)
    assert disks.same_content(tmp_path, "again.qcow2", "qcow2", "a.qcow2", "qcow2")
    tool.blockjobs("snapshot", "-d", "one", "a.qcow2", cwd=tmp_path)
    disks.run("qemu-img", "snapshot", "-d", "two", "a.qcow2", cwd=tmp_path)
    assert tool.blockjobs("snapshot", "a.qcow2", cwd=tmp_path).out == ""
    assert disks.check_exit_code(tmp_path / "a.qcow2") == 0


def test_snapshot_refuses(tmp_path):
    disks.make_full(tmp_path, "a.qcow2", mib=4)
    (tmp_path / "a.raw").write_bytes(bytes(512))
    assert "snapshot 'x': snapshot not found" in tool.refused("snapshot", "-a", "x", "a.qcow2", cwd=tmp_path)
    assert "snapshot 'x': snapshot not found" in tool.refused("snapshot", "-d", "x", "a.qcow2", cwd=tmp_path)
    assert "Cannot mix" in tool.refused("snapshot", "-c", "x", "-d", "x", "a.qcow2", cwd=tmp_path)
    assert "a format without snapshots" in tool.refused("snapshot", "-c", "x", "a.raw", cwd=tmp_path)
    disks.make(tmp_path, "narrow.qcow2", size="1M", options="refcount_bits=1")
    disks.run("qemu-io", "-c", "write 0 64k", "narrow.qcow2", cwd=tmp_path)
    error = tool.refused("snapshot", "-c", "x", "narrow.qcow2", cwd=tmp_path)
    assert "Could not create snapshot 'x': Numerical result out of range" in error
    assert disks.check_exit_code(tmp_path / "narrow.qcow2") == 0


def test_a_snapshot_is_not_applied_under_bitmaps(tmp_path):
    """They would go on saying that nothing has changed."""
    disks.make_full(tmp_path, "a.qcow2", mib=4)
    tool.blockjobs("snapshot", "-c", "x", "a.qcow2", cwd=tmp_path)
    disks.run("qemu-img", "bitmap", "--add", "a.qcow2", "b", cwd=tmp_path)
    before = disks.digest(tmp_path / "a.qcow2")
    error = tool.refused("snapshot", "-a", "x", "a.qcow2", cwd=tmp_path)
    assert "Could not apply snapshot 'x': Device has active dirty bitmaps" in error
    assert disks.digest(tmp_path / "a.qcow2") == before
    disks.run("qemu-img", "bitmap", "--remove", "a.qcow2", "b", cwd=tmp_path)
    tool.blockjobs("snapshot", "-a", "x", "a.qcow2", cwd=tmp_path)


def test_half_a_group_is_not_applied(tmp_path):
    """What a crash has left of a snapshot of several disks is not listed, kept by QEMU, and gone at the next change."""
    disks.make_full(tmp_path, "a.qcow2", mib=4)

    async def leave_half() -> None:
        mark = GroupMark(stage=Stage.SAVING, group="0123", is_first=True, peers=(str(tmp_path / "b.qcow2"),))
        async with Host() as host:
            node = await host.open(str(tmp_path / "a.qcow2"))
            async with host.access(node, write=True, resize=True):
                await snapshots_of(node).create("half", date_ns=0, mark=mark)
            await host.close_nodes(node)

    asyncio.run(leave_half())
    disks.run("qemu-img", "snapshot", "-c", "whole", "a.qcow2", cwd=tmp_path)
    assert "half" in disks.run("qemu-img", "snapshot", "-l", "a.qcow2", cwd=tmp_path)
    names = [each["name"] for each in tool.blockjobs("snapshot", "--json", "a.qcow2", cwd=tmp_path).json]
    assert names == ["whole"]
    for name in ("half", "1"):
        error = tool.refused("snapshot", "-a", name, "a.qcow2", cwd=tmp_path)
        assert f"Could not apply snapshot '{name}': snapshot not found" in error
    listed = disks.run("qemu-img", "snapshot", "-l", "a.qcow2", cwd=tmp_path)
    assert "half" not in listed and "whole" in listed
    assert disks.check_exit_code(tmp_path / "a.qcow2") == 0
