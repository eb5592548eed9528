"""`blockjobs rebase` of overlays of every kind of qcow2, judged by the real qemu-img."""

from __future__ import annotations

import json

import disks
import pytest
import tool

pytestmark = pytest.mark.qemu


def make_chain(tmp_path, options):
    """`top` on `old`, and `new`, which is shorter and differs here and there."""
    for name, size, commands in (
        ("old", "8M", ("write -P 1 0 3M", "write -P 2 5M 100k")),
        ("new", "4M", ("write -P 1 0 1M", "write -P 3 2M 1500k", "write -P 4 3900k 64k")),
    ):
        disks.run("qemu-img", "create", "-q", "-f", "qcow2", f"{name}.qcow2", size, cwd=tmp_path)
        disks.run("qemu-io", *(x for each in commands for x in ("-c", each)), f"{name}.qcow2", cwd=tmp_path)
    chain = ("-b", "old.qcow2", "-F", "qcow2", "-o", options)
    disks.run("qemu-img", "create", "-q", "-f", "qcow2", *chain, "top.qcow2", "9M", cwd=tmp_path)
    disks.run("qemu-io", "-c", "write -P 7 2M 300k", "-c", "write -z 64k 64k", "top.qcow2", cwd=tmp_path)
    disks.run("qemu-img", "convert", "-O", "raw", "top.qcow2", "before.raw", cwd=tmp_path)


@pytest.mark.parametrize("options", ["compat=1.1", "compat=0.10", "extended_l2=on", "cluster_size=512"])
@pytest.mark.parametrize("backing", ["new.qcow2", ""])
def test_rebase_shows_the_same(tmp_path, options, backing):
    make_chain(tmp_path, options)
    tool.quick("rebase", "-b", backing, *(["-F", "qcow2"] if backing else []), "top.qcow2", cwd=tmp_path)
    info = json.loads(disks.run("qemu-img", "info", "--output=json", "top.qcow2", cwd=tmp_path))
    assert info.get("backing-filename", "") == backing
    assert disks.same_content(tmp_path, "top.qcow2", "qcow2", "before.raw", "raw")
    assert disks.check_exit_code(tmp_path / "top.qcow2") == 0
