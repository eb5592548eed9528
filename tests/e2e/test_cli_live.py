"""`blockjobs mirror`, `commit` and `stream` on the images of a server, ours or the real one, and on files."""

from __future__ import annotations

import json
import signal

import disks
import player
import pytest
import tool

pytestmark = pytest.mark.qemu
SOCKET = ("--connect", "qmp.sock")
CHAIN = ("base.qcow2", "mid.qcow2", "top.qcow2")


def make_chain(folder):
    """Three images, each with something of its own; the bytes that the top shows are kept in `model.raw`."""
    disks.make_full(folder, "base.qcow2", mib=4)
    for below, name, write in (("base", "mid", "write -P 5 1M 300k"), ("mid", "top", "write -P 6 2M 100k")):
        words = ("-b", f"{below}.qcow2", "-F", "qcow2", f"{name}.qcow2")
        disks.run("qemu-img", "create", "-q", "-f", "qcow2", *words, cwd=folder)
        disks.run("qemu-io", "-c", write, f"{name}.qcow2", cwd=folder)
    disks.run("qemu-img", "convert", "-O", "raw", "top.qcow2", "model.raw", cwd=folder)


def backing_of(folder, name):
    info = json.loads(disks.run("qemu-img", "info", "-U", "--output=json", name, cwd=folder))
    return info.get("backing-filename")


def same(folder, name, fmt="qcow2"):
    return disks.same_content(folder, "model.raw", "raw", name, fmt)


@pytest.fixture
def served(program, tmp_path):
    """A server with the chain open as `disk`."""
    make_chain(tmp_path)
    node = "driver=qcow2,node-name=disk,discard=unmap,file.driver=file,file.filename=top.qcow2"
    with player.Daemon(program, tmp_path, "--blockdev", node) as daemon:
        daemon.qmp.close()
        yield tmp_path, daemon


def stop(daemon):
    daemon.process.terminate()
    daemon.process.wait(10)


@pytest.mark.parametrize("target", ["t.qcow2", "t.raw"])
def test_a_servers_image_is_mirrored_by_its_file_name(served, target):
    folder, daemon = served
    done = tool.blockjobs("mirror", "top.qcow2", target, *SOCKET, "--json", cwd=folder)
    assert done.json_lines[-1]["fate"] == "completed"
    assert "exists: choose another name" in tool.refused("mirror", "disk", target, *SOCKET, cwd=folder)
    assert "has no node and no image 'nobody'" in tool.refused("mirror", "nobody", "u.raw", *SOCKET, cwd=folder)
    stop(daemon)
    assert same(folder, target, target.partition(".")[2])


def test_a_mirror_that_stays_ends_with_ctrl_c(served):
    folder, daemon = served
    mirror = tool.start("mirror", "disk", "t.raw", "--stay", *SOCKET, cwd=folder)
    assert mirror.stderr is not None
    while "in step" not in (line := mirror.stderr.readline()):
        assert line, "it ended by itself"
    mirror.send_signal(signal.SIGINT)
    mirror.communicate(timeout=10)
    assert mirror.returncode == 130
    assert tool.quick("jobs", *SOCKET, cwd=folder).out == "no jobs\n"
    stop(daemon)


def test_a_servers_chain_is_shortened_and_shows_the_same(served):
    folder, daemon = served
    tool.blockjobs("stream", "disk", "--base", "base.qcow2", *SOCKET, cwd=folder)
    assert backing_of(folder, "top.qcow2") == "base.qcow2"
    tool.blockjobs("commit", "disk", *SOCKET, cwd=folder)
    stop(daemon)
    assert same(folder, "top.qcow2")
    assert same(folder, "base.qcow2")
    for name in CHAIN:
        assert disks.check_exit_code(folder / name) == 0


def test_a_middle_image_is_merged_down_on_a_server(served):
    folder, daemon = served
    tool.blockjobs("commit", "disk", "--top", "mid.qcow2", "--base", "base.qcow2", *SOCKET, cwd=folder)
    stop(daemon)
    assert backing_of(folder, "top.qcow2") == "base.qcow2"
    assert same(folder, "top.qcow2")
