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
MIB = 1 << 20
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
    assert same(folder, "t.raw", "raw")


def test_a_servers_image_that_was_not_finished_is_not_left_behind(served):
    folder, daemon = served
    words = ("mirror", "disk", "t.qcow2", "--speed", "1M", "--converge", "deadline=0.4s", *SOCKET)
    done = tool.blockjobs(*words, cwd=folder, code=1)
    assert "not ready in time" in done.err or "does not catch up" in done.err, done.err
    assert not (folder / "t.qcow2").exists()
    backup = tool.start("backup", "disk", "b.qcow2", "--speed", "1M", *SOCKET, cwd=folder)
    assert backup.stderr is not None
    assert "running" in backup.stderr.readline()
    backup.send_signal(signal.SIGINT)
    backup.communicate(timeout=10)
    assert backup.returncode == 130
    assert not (folder / "b.qcow2").exists()
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


def test_files_are_mirrored_and_their_chains_shortened(tmp_path):
    make_chain(tmp_path)
    tool.quick("mirror", "top.qcow2", "copy.qcow2", cwd=tmp_path)
    assert same(tmp_path, "copy.qcow2")
    assert backing_of(tmp_path, "copy.qcow2") is None
    tool.quick("mirror", "top.qcow2", "layer.qcow2", "--sync", "top", "--copy-mode", "write-blocking", cwd=tmp_path)
    assert same(tmp_path, "layer.qcow2")
    assert backing_of(tmp_path, "layer.qcow2") == "mid.qcow2"
    assert "is not in the chain" in tool.refused("stream", "top.qcow2", "--base", "copy.qcow2", cwd=tmp_path)
    tool.quick("commit", "top.qcow2", "--top", "mid.qcow2", cwd=tmp_path)
    assert backing_of(tmp_path, "top.qcow2") == "base.qcow2"
    assert same(tmp_path, "top.qcow2")
    tool.quick("stream", "top.qcow2", cwd=tmp_path)
    assert backing_of(tmp_path, "top.qcow2") is None
    assert same(tmp_path, "top.qcow2")
    folder = tmp_path / "again"
    folder.mkdir()
    make_chain(folder)
    tool.quick("commit", "top.qcow2", "--base", "base.qcow2", cwd=folder)
    assert same(folder, "base.qcow2")
    for name in CHAIN:
        assert disks.check_exit_code(tmp_path / name) == 0
        assert disks.check_exit_code(folder / name) == 0


def test_wrong_orders_are_refused_before_anything_is_touched(tmp_path):
    make_chain(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    for words, reason in (
        (("mirror", "top.qcow2", "t.raw", "--pivot"), "--pivot and --stay are for disks in use"),
        (("mirror", "top.qcow2", "t.raw", "--converge", "soon"), "--converge: 'soon' is neither"),
        (("mirror", "top.qcow2", "t.raw", "--granularity", "1000"), "Parameter 'granularity' expects"),
        (("mirror", "top.qcow2", "base.qcow2"), "'base.qcow2' exists"),
        (("backup", "top.qcow2", "i.qcow2", "--incremental", "b"), "name the backup that it builds on with --base"),
        (
            ("backup", "top.qcow2", "i.qcow2", "--incremental", "b", "--base", "base.qcow2"),
            "there is no bitmap 'b' yet",
        ),
        (("backup", "top.qcow2", "i.raw", "--incremental", "b", "--base", "base.qcow2"), "needs a qcow2 target"),
        (("commit", "top.qcow2", "--base", "top.qcow2"), "cannot commit an image into itself"),
    ):
        assert reason in tool.refused(*words, cwd=tmp_path), words
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_backups_build_on_each_other(tmp_path):
    disks.make_full(tmp_path, "disk.qcow2", mib=8)
    tool.quick("backup", "disk.qcow2", "sunday.qcow2", "--bitmap", "daily", cwd=tmp_path)
    below = "sunday.qcow2"
    for number, name in enumerate(("monday.qcow2", "tuesday.qcow2")):
        disks.run("qemu-io", "-f", "qcow2", "-c", f"write -P {90 + number} {number}M 70k", "disk.qcow2", cwd=tmp_path)
        tool.quick("backup", "disk.qcow2", name, "--incremental", "daily", "--base", below, cwd=tmp_path)
        assert disks.same_content(tmp_path, "disk.qcow2", "qcow2", name, "qcow2")
        assert backing_of(tmp_path, name) == below
        assert (tmp_path / name).stat().st_blocks * 512 < MIB, "it holds more than what has changed"
        below = name
    for name in ("disk.qcow2", below):
        assert disks.check_exit_code(tmp_path / name) == 0


def test_a_servers_disk_is_backed_up_bit_by_bit(served):
    folder, daemon = served
    tool.blockjobs("backup", "disk", "full.qcow2", "--bitmap", "daily", *SOCKET, cwd=folder)
    assert "has no bitmap 'x'" in tool.refused(
        "backup", "disk", "i.qcow2", "--incremental", "x", "--base", "full.qcow2", *SOCKET, cwd=folder
    )
    tool.blockjobs("backup", "disk", "i.qcow2", "--incremental", "daily", "--base", "full.qcow2", *SOCKET, cwd=folder)
    stop(daemon)
    assert same(folder, "i.qcow2")
    assert backing_of(folder, "i.qcow2") == "full.qcow2"


def test_images_are_served_over_nbd_and_moved_while_they_are_written_to(tmp_path):
    make_chain(tmp_path)
    words = ("top.qcow2", "--socket", "n.sock", "--writable", "--qmp", "q.sock")
    server = tool.start("nbd", "serve", *words, cwd=tmp_path)
    tool.wait_for(tmp_path / "q.sock", server)
    try:
        uri = f"nbd+unix:///top?socket={tmp_path}/n.sock"
        assert json.loads(disks.run("nbdinfo", "--json", uri, cwd=tmp_path))["exports"][0]["export-size"] == 4 * MIB
        tool.blockjobs("mirror", "top", "new.qcow2", "--pivot", "--connect", "q.sock", cwd=tmp_path)
        disks.run("qemu-io", "-f", "raw", "-c", "write -P 123 1M 64k", uri, cwd=tmp_path)
    finally:
        server.send_signal(signal.SIGTERM)
        out, err = server.communicate(timeout=20)
    assert server.returncode == 0, err
    assert f"at {uri}" in out
    shown = disks.run("qemu-io", "-f", "qcow2", "-c", "read -P 123 1M 64k", "new.qcow2", cwd=tmp_path)
    assert "Pattern verification failed" not in shown
    assert disks.check_exit_code(tmp_path / "new.qcow2") == 0
    assert same(tmp_path, "top.qcow2"), "the source was written to after the move"
