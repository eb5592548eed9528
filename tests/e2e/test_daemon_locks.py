"""Two programs, one image: whoever comes second is refused exactly where QEMU's tools refuse each other."""

from __future__ import annotations

import subprocess

import disks
import player
import pytest
from oracle import ImageHolder

pytestmark = pytest.mark.qemu

NO_WRITE = 'Failed to get "write" lock'
NO_SHARE = 'Failed to get shared "write" lock'

OURS_FIRST = [
    # how the daemon has it, how qemu-io wants it, what qemu-io says
    ({}, [], NO_WRITE),
    ({}, ["-r"], NO_SHARE),
    ({}, ["-r", "-U"], None),
    ({"read-only": True}, [], NO_WRITE),
    ({"read-only": True}, ["-r"], None),
    ({"read-only": True, "force-share": True}, [], None),
]

OURS_SECOND = [
    # how qemu-io has it, how the daemon wants it, what the daemon says
    ([], {}, NO_WRITE),
    ([], {"read-only": True}, NO_SHARE),
    ([], {"read-only": True, "force-share": True}, None),
    (["-r"], {}, NO_WRITE),
    (["-r"], {"read-only": True}, None),
    (["-r", "-U"], {}, None),
]


@pytest.fixture(scope="module")
def daemon(program, tmp_path_factory):
    directory = tmp_path_factory.mktemp("locks")
    disks.make(directory, "a.img", size="4M")
    with player.Daemon(program, directory) as daemon:
        daemon.directory = directory
        yield daemon


def open_node(daemon, options):
    node = {"driver": "qcow2", "node-name": "n", "file": {"driver": "file", "filename": "a.img"}, **options}
    return daemon.qmp.ask({"execute": "blockdev-add", "arguments": node})[0]


def close_node(daemon):
    assert daemon.qmp.ask({"execute": "blockdev-del", "arguments": {"node-name": "n"}})[0] == {"return": {}}


@pytest.mark.parametrize(("ours", "theirs", "refusal"), OURS_FIRST)
def test_qemu_io_meets_an_image_the_daemon_has(daemon, ours, theirs, refusal):
    assert open_node(daemon, ours) == {"return": {}}
    words = ["qemu-io", "-f", "qcow2", *theirs, "-c", "length", "a.img"]
    met = subprocess.run(words, cwd=daemon.directory, capture_output=True, text=True, check=False, timeout=20)
    close_node(daemon)
    if refusal is None:
        assert met.returncode == 0, met.stderr
    else:
        assert met.returncode == 1
        assert refusal in met.stderr


@pytest.mark.parametrize(("theirs", "ours", "refusal"), OURS_SECOND)
def test_the_daemon_meets_an_image_qemu_io_has(daemon, theirs, ours, refusal):
    with ImageHolder("a.img", daemon.directory, *theirs) as holder:
        reply = open_node(daemon, ours)
        if refusal is None:
            assert reply == {"return": {}}
            close_node(daemon)
        else:
            assert reply == {"error": {"class": "GenericError", "desc": refusal}}
            holder.release()
            assert open_node(daemon, ours) == {"return": {}}, "refused although the other one left"
            close_node(daemon)


def test_one_daemon_conflicts_with_itself(daemon):
    assert open_node(daemon, {}) == {"return": {}}
    second = {"driver": "qcow2", "node-name": "m", "file": {"driver": "file", "filename": "a.img"}}
    reply, _ = daemon.qmp.ask({"execute": "blockdev-add", "arguments": second})
    assert reply == {"error": {"class": "GenericError", "desc": NO_WRITE}}
    close_node(daemon)


def test_a_backup_keeps_others_off_both_images(program, tmp_path):
    disks.make_full(tmp_path, "src", mib=4)
    disks.make(tmp_path, "dst", size="4M")
    with player.Daemon(program, tmp_path) as daemon:
        for name in ("src", "dst"):
            node = {"driver": "qcow2", "node-name": name, "file": {"driver": "file", "filename": name}}
            assert daemon.qmp.ask({"execute": "blockdev-add", "arguments": node})[0] == {"return": {}}
        job = {"job-id": "job0", "device": "src", "target": "dst", "sync": "full", "speed": 65536}
        assert daemon.qmp.ask({"execute": "blockdev-backup", "arguments": job})[0] == {"return": {}}
        for name in ("src", "dst"):
            words = ["qemu-io", "-f", "qcow2", "-c", "write 0 64k", name]
            met = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=20)
            assert met.returncode == 1
            assert NO_WRITE in met.stderr
