"""`blockjobs resize`, `rebase` and `dd`, beside the real qemu-img."""

from __future__ import annotations

import json
import random
import subprocess
from typing import TYPE_CHECKING

import disks
import pytest
import tool

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.qemu


def qemu_img(*words: str, cwd: Path) -> int:
    return subprocess.run(["qemu-img", *words], cwd=cwd, check=False, capture_output=True).returncode


def length(path: Path, fmt: str) -> int:
    found = disks.run("qemu-img", "info", "--output=json", "-f", fmt, path.name, cwd=path.parent)
    return int(json.loads(found)["virtual-size"])


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
@pytest.mark.parametrize(
    "words",
    [
        ["1M"],
        ["--shrink", "1M"],
        ["+1M"],
        ["-512K"],
        ["--shrink", "-512K"],
        ["--shrink", "-100M"],
        ["abc"],
        ["+0"],
        ["1000"],
        ["--preallocation=full", "+1M"],
        ["--preallocation=bad", "+1M"],
        ["--preallocation=full", "--shrink", "-64K"],
        ["-q", "+65536"],
    ],
)
def test_resize_as_qemu_img(tmp_path, fmt, words):
    for name in ("ours", "theirs"):
        disks.make_full(tmp_path, name, fmt=fmt, mib=4)
    *options, size = words
    code = qemu_img("resize", "-f", fmt, *options, "theirs", size, cwd=tmp_path)
    done = tool.quick("resize", "-f", fmt, *options, "ours", size, cwd=tmp_path, code=code)
    assert done.out == ("Image resized.\n" if not code and "-q" not in words else "")
    assert length(tmp_path / "ours", fmt) == length(tmp_path / "theirs", fmt)
    assert disks.same_content(tmp_path, "ours", fmt, "theirs", fmt)
    if fmt == "qcow2":
        assert disks.check_exit_code(tmp_path / "ours") == 0


@pytest.mark.parametrize("words", [["--shrink", "512K"], ["2M"]])
def test_a_raw_data_file_shows_what_a_resized_disk_shows(tmp_path, words):
    """Bytes that another program has left behind its end are not the disk's."""
    disks.run("qemu-img", "create", "-f", "qcow2", "-o", "data_file=d,data_file_raw=on", "a", "1M", cwd=tmp_path)
    with (tmp_path / "d").open("r+b") as data:
        data.write(b"a" * disks.MIB + b"b" * disks.MIB)
    tool.quick("resize", "-f", "qcow2", *words[:-1], "a", words[-1], cwd=tmp_path)
    disks.run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", "a", "shown", cwd=tmp_path)
    assert (tmp_path / "shown").read_bytes() == (tmp_path / "d").read_bytes()
    assert (tmp_path / "d").read_bytes() == (b"a" * disks.MIB + bytes(disks.MIB))[: length(tmp_path / "a", "qcow2")]


def test_space_is_taken_when_a_raw_image_grows(tmp_path):
    (tmp_path / "a.raw").write_bytes(b"a" * disks.MIB)
    for how, size in (("falloc", 2), ("full", 3), ("off", 4)):
        tool.quick("resize", f"--preallocation={how}", "a.raw", f"{size}M", cwd=tmp_path)
        assert (tmp_path / "a.raw").stat().st_blocks * 512 >= min(size, 3) * disks.MIB
    assert (tmp_path / "a.raw").read_bytes() == b"a" * disks.MIB + bytes(3 * disks.MIB)
    disks.make(tmp_path, "a.qcow2")
    assert "Unsupported" in tool.refused("resize", "--preallocation=metadata", "a.raw", "+1M", cwd=tmp_path)


@pytest.mark.parametrize("options", ["cluster_size=4k", "compat=0.10", "extended_l2=on", "refcount_bits=1"])
@pytest.mark.parametrize("how", ["metadata", "falloc", "full"])
def test_what_is_new_of_a_qcow2_image_has_its_clusters_and_reads_as_zeroes(tmp_path, how, options):
    disks.make(tmp_path, "a.qcow2", size="3M", options=options)
    # Clusters that were in use are free again, with what they held.
    disks.run("qemu-io", "-f", "qcow2", "-c", "write -P 7 0 3M", "a.qcow2", cwd=tmp_path)
    disks.run("qemu-img", "resize", "-q", "--shrink", "a.qcow2", "1M", cwd=tmp_path)
    tool.quick("resize", f"--preallocation={how}", "a.qcow2", "9M", cwd=tmp_path)
    assert disks.check_exit_code(tmp_path / "a.qcow2") == 0
    (tmp_path / "same.raw").write_bytes(b"\7" * disks.MIB + bytes(8 * disks.MIB))
    assert disks.same_content(tmp_path, "a.qcow2", "qcow2", "same.raw", "raw")
    entries = json.loads(disks.run("qemu-img", "map", "--output=json", "a.qcow2", cwd=tmp_path))
    assert all(entry["present"] and "offset" in entry for entry in entries)
    space = (tmp_path / "a.qcow2").stat().st_blocks * 512
    assert space >= 9 * disks.MIB if how != "metadata" else space < 3 * disks.MIB


def test_resize_of_a_described_image_on_a_missing_backing_file(tmp_path):
    disks.make(tmp_path, "base", size="1M")
    disks.run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "top.qcow2", cwd=tmp_path)
    (tmp_path / "base").unlink()
    tool.quick("resize", "top.qcow2", "2M", cwd=tmp_path)
    words = "driver=qcow2,file.filename=top.qcow2,backing="
    assert "backing" in tool.refused("resize", "--image-opts", words[:-9], "3M", cwd=tmp_path)
    assert "2097152" in disks.run("qemu-img", "info", "-U", "top.qcow2", cwd=tmp_path)


@pytest.mark.parametrize(
    "operands",
    [
        "bs=4096 count=10",
        "bs=4096 count=10 skip=2",
        "bs=4096 skip=20",
        "bs=4096 skip=1000",
        "bs=64k skip=1",
        "count=0",
        "bs=4096 count=10 skip=20",
        "",
    ],
)
@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_dd_as_qemu_img(tmp_path, operands, fmt):
    disks.make_full(tmp_path, "in", mib=4)
    words = ["-f", "qcow2", "-O", fmt, *operands.split(), "if=in"]
    assert qemu_img("dd", *words, "of=theirs", cwd=tmp_path) == 0
    tool.quick("dd", *words, "of=ours", cwd=tmp_path)
    assert length(tmp_path / "ours", fmt) == length(tmp_path / "theirs", fmt)
    assert disks.same_content(tmp_path, "ours", fmt, "theirs", fmt)


@pytest.mark.parametrize("operands", ["if=in", "of=x", "if=nope of=x", "if=in of=x bs=0", "if=in of=x foo=1", "x"])
def test_dd_refuses(tmp_path, operands):
    disks.make(tmp_path, "in", size="1M")
    assert qemu_img("dd", "-f", "qcow2", *operands.split(), cwd=tmp_path) == 1
    tool.refused("dd", "-f", "qcow2", *operands.split(), cwd=tmp_path)
    assert not (tmp_path / "x").exists()


def scattered(tmp_path: Path, name: str, seed: int, *, size_k: int, backing: str | None = None) -> None:
    """A qcow2 image with writes, zeroes and holes from a seed."""
    words = ["-b", backing, "-F", "qcow2"] if backing else []
    disks.run("qemu-img", "create", "-q", "-f", "qcow2", *words, name, f"{size_k}K", cwd=tmp_path)
    draw = random.Random(seed)
    commands: list[str] = []
    for _ in range(12):
        at, many = draw.randrange(size_k - 100), draw.randrange(1, 100)
        kind = draw.choice(["-P 1", f"-P {draw.randrange(256)}", "-z"])
        commands += ["-c", f"write {kind} {at}K {many}K"]
    disks.run("qemu-io", "-f", "qcow2", *commands, name, cwd=tmp_path)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("onto", ["other", "", "base", "longer", "shorter"])
def test_a_rebased_image_reads_as_before(tmp_path, seed, onto):
    scattered(tmp_path, "base", seed, size_k=1024)
    scattered(tmp_path, "middle", seed + 10, size_k=900, backing="base")
    scattered(tmp_path, "top.qcow2", seed + 20, size_k=1024, backing="middle")
    for name, size_k in (("other", 1024), ("longer", 1500), ("shorter", 500)):
        scattered(tmp_path, name, seed + 30, size_k=size_k)
    disks.run("qemu-img", "convert", "-O", "raw", "top.qcow2", "before", cwd=tmp_path)
    disks.run("cp", "top.qcow2", "theirs.qcow2", cwd=tmp_path)
    tool.quick("rebase", "-b", onto, "-F", "qcow2", "top.qcow2", cwd=tmp_path)
    assert disks.same_content(tmp_path, "top.qcow2", "qcow2", "before", "raw")
    assert disks.check_exit_code(tmp_path / "top.qcow2") == 0
    named = json.loads(disks.run("qemu-img", "info", "--output=json", "top.qcow2", cwd=tmp_path))
    assert (named.get("backing-filename"), named.get("backing-filename-format")) == (
        (onto, "qcow2") if onto else (None, None)
    )
    # No more than what differs is copied.
    disks.run("qemu-img", "rebase", "-b", onto, "-F", "qcow2", "theirs.qcow2", cwd=tmp_path)
    assert (tmp_path / "top.qcow2").stat().st_size <= (tmp_path / "theirs.qcow2").stat().st_size + 65536


def test_an_unsafe_rebase_changes_the_name_only(tmp_path):
    disks.make_full(tmp_path, "base", mib=4)
    disks.run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "top.qcow2", cwd=tmp_path)
    before = disks.run("qemu-img", "map", "--output=json", "top.qcow2", cwd=tmp_path)
    (tmp_path / "base").rename(tmp_path / "moved")
    assert "must be said" in tool.refused("rebase", "-u", "-b", "gone", "top.qcow2", cwd=tmp_path)
    tool.quick("rebase", "-u", "-b", "moved", "-F", "qcow2", "top.qcow2", cwd=tmp_path)
    assert disks.run("qemu-img", "map", "--output=json", "top.qcow2", cwd=tmp_path) == before.replace("base", "moved")
    assert "Must specify backing file (-b) or use unsafe mode (-u)" in tool.refused("rebase", "top.qcow2", cwd=tmp_path)
    for words in (["-b", "nope", "-F", "qcow2"], ["-b", "moved", "-F", "raw", "-f", "raw"]):
        kept = (tmp_path / "top.qcow2").read_bytes()
        tool.refused("rebase", *words, "top.qcow2", cwd=tmp_path)
        assert (tmp_path / "top.qcow2").read_bytes() == kept
    tool.quick("rebase", "-u", "top.qcow2", cwd=tmp_path)
    assert "backing" not in disks.run("qemu-img", "info", "top.qcow2", cwd=tmp_path)
