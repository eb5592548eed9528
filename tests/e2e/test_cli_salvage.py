"""`convert --salvage` from images with unreadable places gives what qemu-img makes of them."""

from __future__ import annotations

import subprocess

import disks
import pytest
import tool

pytestmark = pytest.mark.qemu


def described(fmt, name, *rules):
    """An image whose host sectors fail: pairs of a blkdebug event and a sector, None for any."""
    words = [f"driver={fmt},file.driver=blkdebug,file.image.filename={name}"]
    for index, (event, sector) in enumerate(rules):
        rule = f"file.inject-error.{index}"
        words.append(f"{rule}.event={event},{rule}.once=off" + ("" if sector is None else f",{rule}.sector={sector}"))
    return ",".join(words)


def losses(text):
    """The offsets that a program says it could not read, in order."""
    return sorted(
        int(line.split("offset ")[1].split(":")[0]) for line in text.splitlines() if " reading offset" in line
    )


@pytest.mark.parametrize(
    ("fmt", "rules"),
    [
        ("raw", [("read_aio", 256)]),
        ("raw", [("read_aio", 0), ("read_aio", 1), ("read_aio", 700), ("read_aio", 2047)]),
        ("qcow2", [("read_aio", 700), ("read_aio", 701)]),
        ("qcow2", [("l2_load", None)]),
    ],
)
@pytest.mark.parametrize("options", [["-O", "raw"], ["-O", "qcow2"], ["-O", "qcow2", "-c"], ["-O", "raw", "-S", "0"]])
def test_unreadable_sectors_become_zeroes(tmp_path, fmt, rules, options):
    content = bytes(range(1, 251)) * 4195
    (tmp_path / "in.raw").write_bytes(content[: disks.MIB])
    disks.run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "in.raw", "in.qcow2", cwd=tmp_path)
    words = ["convert", "--salvage", "--image-opts", *options, described(fmt, f"in.{fmt}", *rules)]
    theirs = subprocess.run(
        ["qemu-img", *words, "theirs"], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stderr
    done = tool.quick(*words, "ours", cwd=tmp_path)
    assert losses(done.err) == losses(theirs)
    assert losses(done.err) or rules[0][0] == "l2_load"
    assert disks.same_content(tmp_path, "ours", options[1], "theirs", options[1])
    assert tool.quick(*words, "-q", "ours", cwd=tmp_path).err == ""


def test_without_it_nothing_is_made(tmp_path):
    (tmp_path / "in.raw").write_bytes(b"a" * disks.MIB)
    source = described("raw", "in.raw", ("read_aio", 256))
    assert "Input/output error" in tool.refused("convert", "--image-opts", "-O", "raw", source, "ours", cwd=tmp_path)
    assert "copy offloading in salvaging" in tool.refused("convert", "--salvage", "-C", "in.raw", "o", cwd=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["in.raw"]
