"""The image commands and `backup` on NBD exports, judged by qemu-img."""

from __future__ import annotations

import json

import disks
import pytest
import tool
from nbd_servers import QemuNbd

pytestmark = pytest.mark.qemu


def uri(server: QemuNbd) -> str:
    return f"nbd+unix:///disk?socket={server.socket}"


def test_backup_from_and_to_an_export(tmp_path):
    disks.make_full(tmp_path, "source.raw", fmt="raw")
    disks.make(tmp_path, "over.raw", fmt="raw")
    with QemuNbd(tmp_path, "source.raw", words=("--read-only",)) as source, QemuNbd(tmp_path, "over.raw") as over:
        tool.quick("backup", uri(source), "copy.qcow2", "-q", cwd=tmp_path)
        tool.quick("backup", "copy.qcow2", uri(over), "-q", cwd=tmp_path)
        over.end()
    assert disks.same_content(tmp_path, "source.raw", "raw", "copy.qcow2", "qcow2")
    assert disks.same_content(tmp_path, "source.raw", "raw", "over.raw", "raw")
    assert disks.check_exit_code(tmp_path / "copy.qcow2") == 0


def test_looking_at_an_export(tmp_path):
    disks.make_full(tmp_path, "source.raw", fmt="raw", mib=4)
    with QemuNbd(tmp_path, "source.raw") as server:
        name = uri(server)
        ours = tool.quick("info", name, "--json", cwd=tmp_path).json
        theirs = json.loads(disks.run("qemu-img", "info", "-f", "raw", "--output=json", name, cwd=tmp_path))
        for member in ("virtual-size", "format", "filename"):
            assert ours[member] == theirs[member]
        ours = tool.quick("map", name, "--json", cwd=tmp_path).json
        theirs = json.loads(disks.run("qemu-img", "map", "-f", "raw", "--output=json", name, cwd=tmp_path))
        told = ("start", "length", "zero", "data")
        assert [[run[each] for each in told] for run in ours] == [[run[each] for each in told] for run in theirs]
        assert "identical" in tool.quick("compare", name, "source.raw", cwd=tmp_path).out.lower()


def test_what_is_refused(tmp_path):
    disks.make_full(tmp_path, "source.raw", fmt="raw", mib=4)
    disks.make(tmp_path, "over.raw", fmt="raw", size="8M")
    with QemuNbd(tmp_path, "over.raw") as server:
        assert "cannot be made to fit" in tool.refused("backup", "source.raw", uri(server), cwd=tmp_path)
        taken = tool.refused("backup", "source.raw", uri(server), "-o", "preallocation=full", cwd=tmp_path)
        assert "takes no options" in taken
        missing = f"nbd+unix:///other?socket={server.socket}"
        assert "Requested export not available" in tool.refused("info", missing, cwd=tmp_path)
    assert "Failed to connect" in tool.refused("info", uri(server), cwd=tmp_path)
    assert "write nbd://HOST" in tool.refused("backup", "nbd:///x", "a.raw", cwd=tmp_path)
