"""`blkdebug:RULES:IMAGE` reads QEMU's files of rules, and fails the requests that QEMU fails."""

from __future__ import annotations

import subprocess

import disks
import pytest
import tool

pytestmark = pytest.mark.qemu


@pytest.mark.parametrize(
    ("rules", "code"),
    [
        ("", 0),
        ("# nothing\n\n", 0),
        ('[inject-error]\nevent = "read_aio"\n', 1),
        ('  [inject-error]\n  event   =   "read_aio"   # of the disk\n', 1),
        ('[inject-error "first"]\nevent = "read_aio"\nerrno = "28"\n', 1),
        ('[inject-error]\r\nevent = "read_aio"\r\n', 1),
        ('[inject-error]\nevent = "none"\niotype = "read"\nsector = "4000000"\n', 0),
        ('[inject-error]\nevent = "l2_load"\nonce = "on"\n', 1),
        ('[inject-error]\nevent = "l2_update"\n', 0),
        ('[inject-error]\nevent = "read_aio"\nstate = "2"\n', 0),
        ('[set-state]\nevent = "l2_load"\nnew_state = "2"\n[inject-error]\nevent = "read_aio"\nstate = "2"\n', 1),
        ('[set-state]\nevent = "l2_load"\n', 0),
        ('[inject-error]\nerrno = "5"\n', 1),
        ('[inject-error]\nevent = "nothing"\n', 1),
        ('[inject-error]\nevent = "read_aio"\nerrno = "many"\n', 1),
        ('[inject-error]\nevent = "read_aio"\nonce = "perhaps"\n', 1),
        ('[inject-error]\nevent = "read_aio"\ncolour = "red"\n', 1),
        ('[errors]\nevent = "read_aio"\n', 1),
        ('event = "read_aio"\n', 1),
    ],
)
def test_files_of_rules(tmp_path, rules, code):
    disks.make_full(tmp_path, "a.qcow2", mib=4)
    (tmp_path / "rules").write_bytes(rules.encode())
    words = ("convert", "-f", "qcow2", "-O", "raw", "blkdebug:rules:a.qcow2")
    theirs = subprocess.run(["qemu-img", *words, "theirs.raw"], cwd=tmp_path, check=False, capture_output=True)
    assert theirs.returncode == code, theirs.stderr
    if code == 0:
        tool.quick(*words, "ours.raw", cwd=tmp_path)
        assert (tmp_path / "ours.raw").read_bytes() == (tmp_path / "theirs.raw").read_bytes()
    else:
        tool.refused(*words, "ours.raw", cwd=tmp_path)
        assert not (tmp_path / "ours.raw").exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("blkdebug:", "blkdebug requires both config file and image path"),
        ("blkdebug:a.qcow2", "blkdebug requires both config file and image path"),
        ("blkdebug:nowhere:a.qcow2", "Could not read blkdebug config file 'nowhere': No such file or directory"),
        ("blkdebug:.:a.qcow2", "Could not read blkdebug config file '.': Is a directory"),
        ("blkdebug::nowhere.qcow2", "No such file or directory"),
        ("blkdebug:bad:a.qcow2", "blkdebug config file 'bad', line 2: neither"),
        ("blkdebug:wrong:a.qcow2", "'a.qcow2': Parameter 'event' does not accept value 'x'"),
    ],
)
def test_refusals(tmp_path, name, text):
    disks.make(tmp_path, "a.qcow2")
    (tmp_path / "bad").write_text("[inject-error]\nthat's it\n")
    (tmp_path / "wrong").write_text('[inject-error]\nevent = "x"\n')
    assert text in tool.refused("info", name, cwd=tmp_path)


def test_without_rules_it_is_the_image(tmp_path):
    disks.make(tmp_path, "a.qcow2")
    words = ("info", "blkdebug::a.qcow2")
    assert tool.quick(*words, cwd=tmp_path).out.splitlines()[0] == "image: blkdebug::a.qcow2"
    assert disks.run("qemu-img", *words, cwd=tmp_path).splitlines()[0] == "image: blkdebug::a.qcow2"


def test_a_new_image_cannot_have_faults(tmp_path):
    told = tool.refused("create", "-f", "qcow2", "blkdebug::new.qcow2", "1M", cwd=tmp_path)
    assert "Unknown protocol 'blkdebug'" in told
    assert not list(tmp_path.iterdir())
