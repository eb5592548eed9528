"""Long options that are cut short mean what they mean to qemu-img."""

from __future__ import annotations

import subprocess

import disks
import pytest
import tool

pytestmark = pytest.mark.qemu


@pytest.mark.parametrize(
    ("short", "code"),
    [
        ("info --outp=json a.qcow2", 0),
        ("info --out json --backing a.qcow2", 0),
        ("info --image driver=qcow2,file.filename=a.qcow2", 0),
        ("info --i driver=qcow2,file.filename=a.qcow2", 0),
        ("check --outp json a.qcow2", 0),
        ("map --start=0 --max=64k a.qcow2", 0),
        ("create --obj secret,id=key,data=x -q -f qcow2 new.qcow2 1M", 0),
        ("create --obj=secret,id=key,data=x -q -f qcow2 new.qcow2 1M", 0),
        ("convert --sal --targ a.qcow2 a.raw", 1),
        ("convert --sal -O raw a.qcow2 a.raw", 0),
        ("resize --pre=off --shr a.qcow2 512k", 0),
        ("bitmap --rem a.qcow2 b", 0),
        ("bitmap --ad --gr 64k a.qcow2 new", 0),
        ("info --f a.qcow2", 1),
        ("info --nothing a.qcow2", 1),
        ("info --outputs=json a.qcow2", 1),
        ("info --outp", 1),
        ("info --outp xml a.qcow2", 1),
        ("info -- --outp", 1),
    ],
)
def test_exit_codes(tmp_path, short, code):
    for program in ("ours", "theirs"):
        cwd = tmp_path / program
        cwd.mkdir()
        disks.make(cwd, "a.qcow2", size="1M")
        disks.run("qemu-img", "bitmap", "--add", "a.qcow2", "b", cwd=cwd)
        if program == "ours":
            ended = tool.quick(*short.split(), cwd=cwd, code=None).code
        else:
            ended = subprocess.run(["qemu-img", *short.split()], cwd=cwd, check=False, capture_output=True).returncode
        assert ended == code, program


def test_they_do_the_same_as_the_whole_options(tmp_path):
    disks.make(tmp_path, "a.qcow2", size="1M")
    for short, whole in (
        ("info --outp=json --back a.qcow2", "info --output=json --backing-chain a.qcow2"),
        ("measure --si 1G --outp json -O qcow2", "measure --size 1G --output json -O qcow2"),
    ):
        assert tool.quick(*short.split(), cwd=tmp_path).out == tool.quick(*whole.split(), cwd=tmp_path).out


def test_actions_of_a_bitmap_keep_their_order(tmp_path):
    disks.make(tmp_path, "a.qcow2", size="1M")
    tool.quick("bitmap", "--ad", "--disa", "a.qcow2", "b", cwd=tmp_path)
    [found] = tool.quick("bitmap", "list", "--js", "a.qcow2", cwd=tmp_path).json
    assert not found["recording"]


def test_what_could_mean_two_things_is_refused_as_it_was_said(tmp_path):
    disks.make(tmp_path, "a.qcow2", size="1M")
    assert "unknown option '--target'" in tool.refused("convert", "--target", "a.qcow2", "b.raw", cwd=tmp_path)
    assert not (tmp_path / "b.raw").exists()
