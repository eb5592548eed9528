"""`blockjobs measure` says what the real qemu-img says."""

from __future__ import annotations

import itertools
import json
import subprocess

import disks
import pytest
import tool

pytestmark = pytest.mark.qemu
ENCRYPT = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10"
SECRET = ("--object", "secret,id=key,data=open")


def theirs(*words, cwd):
    done = subprocess.run(["qemu-img", "measure", *words], cwd=cwd, capture_output=True, text=True, check=False)
    return done.stdout, done.returncode


def agree(*words, cwd):
    ours = tool.quick("measure", *words, cwd=cwd)
    assert (ours.out, ours.code) == theirs(*words, cwd=cwd), words
    return ours.out


@pytest.mark.parametrize("cluster_size", ["512", "4K", "64K", "2M"])
def test_empty_disks_of_every_geometry(tmp_path, cluster_size):
    kinds = itertools.product(("1", "16", "64"), ("off", "on"), ("0", "700", "1000000000", "3T"))
    for bits, extended, size in kinds:
        if (extended == "on" and cluster_size in ("512", "4K")) or (size == "3T" and cluster_size == "512"):
            continue
        options = f"cluster_size={cluster_size},refcount_bits={bits},extended_l2={extended}"
        agree("-O", "qcow2", "-o", options, "--size", size, cwd=tmp_path)


@pytest.mark.parametrize(
    "words",
    [
        ["--size", "1000"],
        ["-O", "raw", "--size", "1000000001", "--output=json"],
        ["-O", "qcow2", "-o", "compat=0.10", "--size", "1G"],
        ["-O", "qcow2", "-o", "preallocation=metadata", "--size", "1G"],
        ["-O", "qcow2", "-o", "preallocation=falloc", "--size", "1G", "--output=json"],
        ["-O", "qcow2", "-o", "data_file=elsewhere.raw", "--size", "1G"],
        ["-O", "luks", *SECRET, "-o", "key-secret=key,iter-time=10", "--size", "1G"],
        ["-O", "luks", *SECRET, "-o", "key-secret=key,iter-time=10,cipher-alg=aes-128", "--size", "10M"],
        ["-O", "qcow2", *SECRET, "-o", f"{ENCRYPT},cluster_size=512", "--size", "1G"],
    ],
)
def test_empty_disks(tmp_path, words):
    agree(*words, cwd=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def images(tmp_path):
    """A base, an overlay of it, one with bitmaps, an old one, and a raw file with holes."""

    def image(name, *commands, options=(), size="64M"):
        disks.run("qemu-img", "create", "-q", "-f", "qcow2", *options, name, size, cwd=tmp_path)
        if commands:
            disks.run("qemu-io", *(word for each in commands for word in ("-c", each)), name, cwd=tmp_path)

    image("base.qcow2", "write 0 1M", "write 5M 320k", "write -z 10M 1M")
    image("bitmaps.qcow2", "write 1M 70000")
    for name, granularity in (("a", "512"), ("a-long-name-of-a-bitmap", "1M")):
        disks.run("qemu-img", "bitmap", "--add", "-g", granularity, "bitmaps.qcow2", name, cwd=tmp_path)
    image("top.qcow2", "write 512k 1M", "write -z 5M 64k", options=("-b", "base.qcow2", "-F", "qcow2"))
    image("tables.qcow2", "write 1M 128k", options=("-o", "preallocation=metadata"))
    image("old.qcow2", "write 1M 64k", options=("-o", "compat=0.10"))
    with (tmp_path / "holes.raw").open("wb") as file:
        file.truncate(3_000_000)
        file.write(bytes(1 << 20))
        file.seek(2_000_000)
        file.write(b"data")
    return tmp_path


@pytest.mark.parametrize("name", ["base.qcow2", "top.qcow2", "bitmaps.qcow2", "tables.qcow2", "old.qcow2", "holes.raw"])
def test_what_images_would_become(images, name):
    source = "raw" if name.endswith("raw") else "qcow2"
    agree("-f", source, name, cwd=images)
    for options in ("cluster_size=512", "compat=0.10", "extended_l2=on", "preallocation=full"):
        agree("-f", source, "-O", "qcow2", "-o", options, "--output=json", name, cwd=images)
    agree("-f", source, "-O", "qcow2", "-o", "backing_file=base.qcow2,backing_fmt=qcow2", name, cwd=images)


def test_the_image_that_convert_makes_has_that_length(images):
    told = json.loads(agree("-O", "qcow2", "--output=json", "top.qcow2", cwd=images))
    tool.quick("convert", "-S", "0", "top.qcow2", "out.qcow2", cwd=images)
    assert (images / "out.qcow2").stat().st_size <= told["required"] + disks.MIB


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "Either --size N or one filename must be specified."),
        (["--size", "1G", "base.qcow2"], "--size N cannot be used together with a filename."),
        (["--size", "1G", "-f", "raw"], "requires a filename argument"),
        (["-O", "luks", "--size", "1G"], "Parameter 'key-secret' is required for cipher"),
        (["-O", "qcow2", "-o", "cluster_size=512", "--size", "1T"], "(try using a larger cluster size)"),
        (["-O", "qcow2", "-o", "cluster_size=3K", "--size", "1T"], "Cluster size must be a power of two"),
        (["-O", "vmdk", "--size", "1T"], "-O"),
        (["nowhere.qcow2"], "No such file or directory"),
    ],
)
def test_refusals(tmp_path, words, text):
    assert text in tool.refused("measure", *words, cwd=tmp_path)
    assert theirs(*words, cwd=tmp_path) == ("", 1)
