"""`blockjobs resize --preallocation` without space, or with faults in the middle: the disk is what it was."""

from __future__ import annotations

import contextlib
import itertools
import json
import resource
from typing import TYPE_CHECKING

import disks
import pytest
import tool

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = disks.MIB
pytestmark = pytest.mark.qemu
OPTIONS = ("", "cluster_size=4096", "cluster_size=512,refcount_bits=64", "extended_l2=on")


@contextlib.contextmanager
def files_up_to(length: int) -> Iterator[None]:
    """No file may become longer (EFBIG)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (length, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def virtual_size(name: str, fmt: str, *, cwd) -> int:
    told = disks.run("qemu-img", "info", "-f", fmt, "--output=json", name, cwd=cwd)
    return int(json.loads(told)["virtual-size"])


@pytest.mark.parametrize("how", ["falloc", "full"])
def test_a_raw_file_is_as_long_as_before(tmp_path, how):
    path = tmp_path / "a.raw"
    path.write_bytes(b"x" * MIB)
    with files_up_to(4 * MIB):
        told = tool.refused("resize", f"--preallocation={how}", "a.raw", "9M", cwd=tmp_path)
    assert "Could not preallocate new data: File too large; the disk is as before" in told
    assert path.read_bytes() == b"x" * MIB


@pytest.mark.parametrize(("how", "options"), [*itertools.product(["falloc", "full", "metadata"], OPTIONS)])
def test_an_image_without_room_is_not_touched(tmp_path, how, options):
    path = disks.make(tmp_path, "a.qcow2", size="1M", options=options)
    disks.run("qemu-io", "-c", "write -P 7 0 1M", "a.qcow2", cwd=tmp_path)
    content = path.read_bytes()
    with files_up_to(4 * MIB):
        told = tool.refused("resize", f"--preallocation={how}", "a.qcow2", "9M", cwd=tmp_path)
    assert "Could not preallocate new data: File too large; the disk is as before" in told
    found = path.read_bytes()
    assert (found[: len(content)], found[len(content) :].strip(b"\0")) == (content, b"")
    assert len(found) - len(content) < 512  # a file that ends inside a sector may get the rest of it


def test_a_data_file_without_room_is_as_long_as_before(tmp_path):
    for how in ("falloc", "full"):
        options = f"data_file={how}.raw,data_file_raw=on"
        disks.make(tmp_path, f"{how}.qcow2", size="1M", options=options)
        with files_up_to(4 * MIB):
            told = tool.refused("resize", f"--preallocation={how}", f"{how}.qcow2", "9M", cwd=tmp_path)
        assert "the disk is as before" in told
        assert (tmp_path / f"{how}.raw").stat().st_size == MIB
        assert virtual_size(f"{how}.qcow2", "qcow2", cwd=tmp_path) == MIB
        assert disks.check_exit_code(tmp_path / f"{how}.qcow2") == 0


@pytest.mark.parametrize(("how", "options"), [*itertools.product(["falloc", "full", "metadata"], OPTIONS)])
def test_with_room_no_more_than_before_is_left_over(tmp_path, how, options):
    """The file ends where its last cluster does."""
    path = disks.make(tmp_path, "a.qcow2", size="1M", options=options)
    disks.run("qemu-io", "-c", "write -P 7 64k 512k", "a.qcow2", cwd=tmp_path)
    tool.quick("resize", f"--preallocation={how}", "a.qcow2", "9M", cwd=tmp_path)
    report = json.loads(disks.run("qemu-img", "check", "--output=json", "a.qcow2", cwd=tmp_path))
    assert report["image-end-offset"] == path.stat().st_size
    disks.run("qemu-io", "-c", "read -P 7 64k 512k", "-c", "read -P 0 1M 8M", "a.qcow2", cwd=tmp_path)


FAULTS = [
    *((event, "write") for event in ("pwritev", "write_aio", "refblock_update_part", "refblock_alloc_hookup")),
    *((event, "write") for event in ("l2_alloc_write", "l2_update", "l1_update", "l1_grow_write_table")),
    *((event, kind) for event in ("pwritev", "l1_grow_activate_table") for kind in ("write-zeroes", "flush")),
    *((event, "flush") for event in ("flush_to_os", "flush_to_disk", "refblock_alloc_switch_table")),
]


@pytest.mark.parametrize(("how", "options"), [*itertools.product(["falloc", "full", "metadata"], OPTIONS[:2])])
def test_after_a_fault_in_the_middle_the_disk_is_as_before(tmp_path, how, options):
    failed = set()
    for event, kind in FAULTS:
        disks.make(tmp_path, "a.qcow2", size="1M", options=options)
        disks.run("qemu-io", "-c", "write -P 7 64k 512k", "a.qcow2", cwd=tmp_path)
        fault = f"file.inject-error.0.event={event},file.inject-error.0.iotype={kind},file.inject-error.0.once=on"
        image = f"driver=qcow2,file.driver=blkdebug,file.image.driver=file,file.image.filename=a.qcow2,{fault}"
        done = tool.quick("resize", f"--preallocation={how}", "--image-opts", image, "9M", cwd=tmp_path, code=None)
        where = (event, kind, done.err)
        assert disks.check_exit_code(tmp_path / "a.qcow2") == 0, where
        if done.code:
            assert "the disk is as before" in done.err and done.err.count("\n") == 1, where
            failed.add(event)
        assert virtual_size("a.qcow2", "qcow2", cwd=tmp_path) == (MIB if done.code else 9 * MIB), where
        disks.run("qemu-io", "-c", "read -P 7 64k 512k", "-c", "read -P 0 0 64k", "a.qcow2", cwd=tmp_path)
    assert len(failed) >= 4
