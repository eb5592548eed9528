"""create, info, check, map and compare as processes, judged by the real qemu-img."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import disks
import pytest
import tool

pytestmark = pytest.mark.qemu


def qemu_json(*words, cwd):
    return json.loads(disks.run("qemu-img", *words, "--output=json", cwd=cwd))


def test_create_makes_what_qemu_img_makes(tmp_path):
    options = "cluster_size=128K,compression_type=zstd,lazy_refcounts=on,refcount_bits=32"
    done = tool.blockjobs("create", "a.qcow2", "1.5G", "-o", options, cwd=tmp_path)
    assert done.out == "Created 'a.qcow2': qcow2, 1.5 GiB (1610612736 bytes)\n"
    info = qemu_json("info", "a.qcow2", cwd=tmp_path)
    assert (info["virtual-size"], info["cluster-size"]) == (1610612736, 131072)
    specific = info["format-specific"]["data"]
    assert (specific["compression-type"], specific["lazy-refcounts"], specific["refcount-bits"]) == ("zstd", True, 32)
    assert disks.check_exit_code(tmp_path / "a.qcow2") == 0
    assert tool.blockjobs("create", "b.raw", "3M", "--json", cwd=tmp_path).json["format"] == "raw"
    assert (tmp_path / "b.raw").stat().st_size == 3 * disks.MIB
    assert sorted(os.listdir(tmp_path)) == ["a.qcow2", "b.raw"]


@pytest.mark.parametrize("raw", ["", ",data_file_raw=on"])
def test_a_data_file_that_is_not_there_is_made(tmp_path, raw):
    tool.blockjobs("create", "-q", "a.qcow2", "3M", "-o", f"data_file=a.raw{raw}", cwd=tmp_path)
    disks.run("qemu-io", "-c", "write -P 7 1M 1M", "a.qcow2", cwd=tmp_path)
    assert disks.check_exit_code(tmp_path / "a.qcow2") == 0
    os.chmod(tmp_path / "a.qcow2", 0o600)
    tool.blockjobs("convert", "-q", "-O", "qcow2", "-o", f"data_file=b.raw{raw}", "a.qcow2", "b.qcow2", cwd=tmp_path)
    assert disks.same_content(tmp_path, "a.qcow2", "qcow2", "b.qcow2", "qcow2")
    assert (tmp_path / "b.raw").stat().st_mode & 0o777 == 0o600
    # What is there is used as it is, and stays where the image does not come to be; what was made for it does not.
    before = (tmp_path / "a.raw").read_bytes()
    for name in ("a.raw", "c.raw"):
        tool.refused("create", "c.qcow2", "3M", "-o", f"data_file={name},compat=0.10", cwd=tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["a.qcow2", "a.raw", "b.qcow2", "b.raw"]
    assert (tmp_path / "a.raw").read_bytes() == before


def test_create_an_overlay_of_the_size_of_its_base(tmp_path):
    (tmp_path / "sub").mkdir()
    disks.make_full(tmp_path / "sub", "base.qcow2", mib=4)
    tool.blockjobs("create", "sub/top.qcow2", "-b", "base.qcow2", "-F", "qcow2", cwd=tmp_path)
    assert disks.same_content(tmp_path / "sub", "top.qcow2", "qcow2", "base.qcow2", "qcow2")
    error = tool.refused("create", "sub/other.qcow2", "-b", "sub/base.qcow2", "-F", "qcow2", cwd=tmp_path)
    assert "'sub/sub/base.qcow2': No such file" in error
    assert "count from the folder of the new image" in error
    error = tool.refused("create", "sub/base.qcow2", "-b", "base.qcow2", "-F", "qcow2", "--force", cwd=tmp_path)
    assert "the new image itself" in error


def test_create_does_not_overwrite_unless_told(tmp_path):
    before = disks.digest(disks.make_full(tmp_path, "a.qcow2", mib=4))
    assert "--force" in tool.refused("create", "a.qcow2", "1G", cwd=tmp_path)
    bad = ("create", "a.qcow2", "1G", "--force", "-o", "cluster_size=3K")
    assert "Cluster size must be a power of two" in tool.refused(*bad, cwd=tmp_path)
    assert disks.digest(tmp_path / "a.qcow2") == before
    assert os.listdir(tmp_path) == ["a.qcow2"]
    tool.blockjobs("create", "a.qcow2", "1G", "--force", cwd=tmp_path)
    assert qemu_json("info", "a.qcow2", cwd=tmp_path)["virtual-size"] == 1 << 30


def test_create_and_backup_leave_images_in_use_alone(tmp_path):
    disks.make_full(tmp_path, "a.qcow2", mib=4)
    disks.make(tmp_path, "b.qcow2")
    words = ["qemu-io", "-c", "sleep 60000", "b.qcow2"]
    guest = subprocess.Popen(words, cwd=tmp_path, stdin=subprocess.DEVNULL)
    try:
        is_locked = f":{(tmp_path / 'b.qcow2').stat().st_ino} "
        while is_locked not in Path("/proc/locks").read_text():
            assert guest.poll() is None
        assert "using" in tool.refused("create", "b.qcow2", "1G", "--force", cwd=tmp_path)
        assert "using" in tool.refused("backup", "a.qcow2", "b.qcow2", "--force", cwd=tmp_path)
        assert "using" in tool.refused("check", "b.qcow2", cwd=tmp_path)
        assert "using" in tool.refused("backup", "b.qcow2", "c.qcow2", cwd=tmp_path)
        assert tool.quick("info", "b.qcow2", cwd=tmp_path).code == 0
    finally:
        guest.kill()
        guest.wait()


IMAGES = {
    "plain": "",
    "old": "compat=0.10",
    "zstd": "compression_type=zstd,cluster_size=32K",
    "extended": "extended_l2=on,lazy_refcounts=on",
}


@pytest.mark.parametrize("kind", IMAGES)
def test_info_agrees_with_qemu_img(tmp_path, kind):
    disks.make(tmp_path, "base.raw", fmt="raw")
    words = ["-b", "base.raw", "-F", "raw"] if kind == "plain" else []
    options = ["-o", IMAGES[kind]] if IMAGES[kind] else []
    disks.run("qemu-img", "create", "-q", "-f", "qcow2", *options, *words, "a.qcow2", "8M", cwd=tmp_path)
    disks.run("qemu-io", "-c", "write -P 3 0 1M", "a.qcow2", cwd=tmp_path)
    disks.run("qemu-img", "snapshot", "-c", "before", "a.qcow2", cwd=tmp_path)
    if kind != "old":
        disks.run("qemu-img", "bitmap", "--add", "a.qcow2", "daily", cwd=tmp_path)
    ours = tool.quick("info", "a.qcow2", "--json", cwd=tmp_path).json
    theirs = qemu_json("info", "a.qcow2", cwd=tmp_path)
    assert ours == theirs
    if "zstd" not in IMAGES[kind]:
        text = tool.quick("info", "a.qcow2", cwd=tmp_path).out
        reference = disks.run("qemu-img", "info", "a.qcow2", cwd=tmp_path)
        shared = {line for line in reference.splitlines() if ":" in line and "date" not in line.lower()}
        assert {line for line in shared if not line.startswith(("1 ", "        "))} - set(text.splitlines()) <= {
            "    bitmaps:",
            "        [0]:",
        }


def test_info_of_a_raw_file_and_of_a_hostile_image(tmp_path):
    disks.make(tmp_path, "a.raw", fmt="raw", size="3M")
    assert tool.quick("info", "a.raw", "--json", cwd=tmp_path).json == qemu_json(
        "info", "-f", "raw", "a.raw", cwd=tmp_path
    )
    os.mkfifo(tmp_path / "fifo")
    disks.run("qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", "fifo", "-F", "raw", "b.qcow2", "1M", cwd=tmp_path)
    assert "backing file: fifo" in tool.quick("info", "b.qcow2", cwd=tmp_path).out
    disks.run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "data_file=data.raw", "c.qcow2", "1M", cwd=tmp_path)
    (tmp_path / "data.raw").unlink()
    os.mkfifo(tmp_path / "data.raw")
    assert "data file: data.raw" in tool.quick("info", "c.qcow2", cwd=tmp_path).out


def test_images_that_are_none(tmp_path):
    (tmp_path / "a.qcow2").write_bytes(b"QFI\xfb" + b"\xff" * 600)
    for command in ("info", "map", "check"):
        assert "'a.qcow2'" in tool.refused(command, "a.qcow2", cwd=tmp_path)


def test_check_of_sound_leaking_and_broken_images(tmp_path):
    image = disks.make_full(tmp_path, "a.qcow2", mib=4)
    done = tool.blockjobs("check", "a.qcow2", cwd=tmp_path)
    assert done.out == disks.run("qemu-img", "check", "a.qcow2", cwd=tmp_path)
    ours = tool.quick("check", "a.qcow2", "--json", cwd=tmp_path).json
    assert ours == qemu_json("check", "a.qcow2", cwd=tmp_path)
    header = bytearray(image.read_bytes())
    refcounts_at = int.from_bytes(header[48:56], "big")
    block_at = int.from_bytes(header[refcounts_at : refcounts_at + 8], "big")
    last = image.stat().st_size // 65536
    for index, code in ((last + 3, 3), (1, 2)):
        broken = bytearray(header)
        broken[block_at + 2 * index : block_at + 2 * index + 2] = b"\0\5" if code == 3 else b"\0\0"
        image.write_bytes(broken + bytes(8 * 65536))
        assert tool.quick("check", "a.qcow2", cwd=tmp_path, code=code).err
        assert disks.check_exit_code(image) == code
        tool.quick("check", "a.qcow2", "--repair", "leaks", cwd=tmp_path, code=0 if code == 3 else 2)
        repaired = tool.quick("check", "a.qcow2", "--repair", "all", "--json", cwd=tmp_path).json
        assert repaired.get("corruptions-fixed", 0) == (code == 2)
        assert disks.check_exit_code(image) == 0
    disks.make(tmp_path, "a.raw", fmt="raw")
    assert "raw" in tool.refused("check", "a.raw", cwd=tmp_path, code=63)


def test_map_and_compare(tmp_path):
    disks.make_full(tmp_path, "a.qcow2")
    disks.run("qemu-img", "convert", "-O", "raw", "a.qcow2", "a.raw", cwd=tmp_path)
    ours = tool.quick("map", "a.qcow2", "--json", cwd=tmp_path).json
    assert {(each["start"], each["offset"]) for each in ours if each["data"] and not each["zero"]} == {
        (each["start"], each["offset"]) for each in qemu_json("map", "a.qcow2", cwd=tmp_path) if each["data"]
    }
    assert tool.quick("map", "a.qcow2", cwd=tmp_path).out == disks.run("qemu-img", "map", "a.qcow2", cwd=tmp_path)
    assert tool.blockjobs("compare", "a.qcow2", "a.raw", cwd=tmp_path).out == "Images are identical.\n"
    os.truncate(tmp_path / "a.raw", 32 << 20)
    longer = tool.quick("compare", "a.qcow2", "a.raw", "--json", cwd=tmp_path).json
    assert longer == {"identical": True, "same-size": False, "first-difference": None}
    tool.quick("compare", "a.qcow2", "a.raw", "--strict", cwd=tmp_path, code=1)
    with (tmp_path / "a.raw").open("r+b") as out:
        out.seek((32 << 20) - 1)
        out.write(b"x")
    differ = tool.quick("compare", "a.raw", "a.qcow2", cwd=tmp_path, code=1)
    assert differ.out == f"Warning: Image size mismatch!\nContent mismatch at offset {(32 << 20) - 512}!\n"
    tool.refused("compare", "a.qcow2", "missing", cwd=tmp_path, code=2)
    tool.refused("compare", "a.qcow2", "a.raw", "-f", "raw", "-F", "qcow2", cwd=tmp_path, code=2)


def test_backing_files_elsewhere_need_leave(tmp_path):
    for folder in ("bases", "disks"):
        (tmp_path / folder).mkdir()
    disks.make_full(tmp_path / "bases", "base.qcow2")
    words = ("-b", "../bases/base.qcow2", "-F", "qcow2")
    disks.run("qemu-img", "create", "-q", "-f", "qcow2", *words, "disks/top.qcow2", cwd=tmp_path)
    outside = tool.refused("backup", "disks/top.qcow2", "copy.qcow2", cwd=tmp_path)
    assert "'disks/../bases/base.qcow2': the image names a file outside" in outside
    assert "image root" in outside
    leave = ("--image-root", "bases")
    tool.quick("backup", "disks/top.qcow2", "copy.qcow2", *leave, cwd=tmp_path)
    tool.quick("compare", "disks/top.qcow2", "copy.qcow2", *leave, cwd=tmp_path)
    assert "bases/base.qcow2" in tool.quick("map", "disks/top.qcow2", *leave, cwd=tmp_path).out
    tool.quick("create", "top2.qcow2", "-b", "disks/top.qcow2", "-F", "qcow2", *leave, cwd=tmp_path)
    assert "'nowhere' is no folder" in tool.refused("map", "disks/top.qcow2", "--image-root", "nowhere", cwd=tmp_path)


def test_output_that_nobody_reads_to_the_end(tmp_path):
    path = tmp_path / "a.raw"
    with path.open("wb") as out:
        for number in range(3000):
            out.seek(number * 16384)
            out.write(b"x")
    command = " ".join([*tool.WORDS, "map", "--json", "a.raw", "|", "head", "-n", "1"])
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.startswith('[{"start": 0')
    assert done.stderr == ""
