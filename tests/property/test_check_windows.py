"""A check that counts the clusters window by window finds and repairs the same as one that counts all at once."""

import asyncio
import random
import struct
import subprocess

import pytest

from blockjobs.base.errors import UsageError
from blockjobs.base.offload import InlineOffload
from blockjobs.base.units import KiB
from blockjobs.block.drivers.file_create import PreallocMode
from blockjobs.block.drivers.qcow2 import check_counts, check_outline, check_tally, check_walk
from blockjobs.block.drivers.qcow2.check import check_image
from blockjobs.block.drivers.qcow2.check_tally import PROBLEMS_MAX
from blockjobs.block.drivers.qcow2.check_walk import MetadataWalk
from blockjobs.block.drivers.qcow2.create import NewImage, create_image
from blockjobs.block.drivers.qcow2.repair import repair_image, repair_leaks
from blockjobs.testing.child import MemoryChild

OFFSET = 0x00FF_FFFF_FFFF_FE00
PAGE_BITS = 3
WINDOW = 64
"""Clusters: that is also the smallest number for which an image of the smallest clusters has one refcount block."""
ROUNDS = 14
KINDS = {
    "wide": "-o cluster_size=512,refcount_bits=64",
    "old": "-o cluster_size=512,compat=0.10",
    "narrow": "-o cluster_size=512,refcount_bits=8",
    "bits": "-o cluster_size=512,refcount_bits=1",
    "subclusters": "-o cluster_size=16k,extended_l2=on,refcount_bits=64",
    "data file": "-o cluster_size=512,refcount_bits=64,data_file=data",
}


def with_small_windows(monkeypatch):
    for module in (check_counts, check_outline, check_tally, check_walk):
        monkeypatch.setattr(module, "PAGE_BITS", PAGE_BITS)
    monkeypatch.setattr(check_counts, "COUNTS_BYTES_MAX", WINDOW)


def written(directory, kind):
    """An image with snapshots, a bitmap and compressed clusters, as far as its kind has them."""

    def run(*command):
        subprocess.run(command, cwd=directory, check=True, capture_output=True)

    path = "t.qcow2"
    run(*f"qemu-img create -q -f qcow2 {KINDS[kind]} {path} 256k".split())
    run("qemu-io", "-c", "write -P 1 0 60k", "-c", "write -z 100k 3k", "-c", "write -P 2 200k 20k", path)
    if kind == "data file":
        return (directory / path).read_bytes()
    run("qemu-io", "-c", "write -c -P 3 64k 16k", path)
    if kind != "bits":
        run("qemu-img", "snapshot", "-c", "one", path)
        run("qemu-io", "-c", "write -P 4 10k 40k", "-c", "discard 200k 10k", path)
        run("qemu-img", "snapshot", "-c", "two", path)
    if kind not in ("old", "bits"):
        run("qemu-img", "bitmap", "--add", "-g", "512", path, "b")
        run("qemu-io", "-c", "write -P 5 90k 9k", path)
    return (directory / path).read_bytes()


def word(raw, at):
    return int.from_bytes(raw[at : at + 8], "big")


def damaged(raw, rng):
    """Some words of the metadata are made others that could stand there."""
    raw = bytearray(raw)
    size = 1 << struct.unpack_from(">I", raw, 20)[0]
    l1, table, snapshots = word(raw, 40), word(raw, 48), word(raw, 64)
    places = [word(raw, at) & OFFSET for at in range(l1, l1 + 64, 8)]
    blocks = [word(raw, at) for at in range(table, table + 32, 8)]
    for _ in range(rng.randrange(1, 9)):
        area = rng.choice([l1, table, snapshots, *places, *places, *blocks, *blocks])
        at = area + 8 * rng.randrange(size // 8)
        if area <= 0 or at + 8 > len(raw) or at < 104:
            continue
        cluster = rng.randrange(len(raw) // size + 4) * size
        new = rng.choice(
            [0, 1, cluster, cluster | 1 << 63, word(raw, at) ^ 1 << 63, word(raw, at) ^ 1 << rng.randrange(64), 2 << 48]
        )
        struct.pack_into(">Q", raw, at, new)
    return bytes(raw)


def outcome(raw, action):
    file = MemoryChild(raw)
    try:
        result = asyncio.run(action(file, offload=InlineOffload()))
    except UsageError as error:
        return str(error), bytes(file.content) == raw
    lines = sorted(result.problems) if len(result.problems) < PROBLEMS_MAX else []
    return result.members(), lines, result.wrong_flags, result.tally.unread, bytes(file.content)


@pytest.mark.qemu
@pytest.mark.parametrize("kind", KINDS)
def test_windows_make_no_difference(kind, tmp_path, monkeypatch):
    rng = random.Random(kind)
    raw = written(tmp_path, kind)
    images = [raw, *(damaged(raw, rng) for _ in range(ROUNDS))]
    actions = (check_image, repair_leaks, repair_image)
    at_once = [[outcome(image, action) for action in actions] for image in images]
    walks = []
    walk_all = MetadataWalk._walk_all
    monkeypatch.setattr(MetadataWalk, "_walk_all", lambda walk: walks.append(walk) or walk_all(walk))
    with_small_windows(monkeypatch)
    for image, expected in zip(images, at_once, strict=True):
        for action, whole in zip(actions, expected, strict=True):
            assert outcome(image, action) == whole
    if kind not in ("subclusters", "data file"):  # of which there are fewer clusters than a window has
        assert len(walks) > 5 * len(images), "each check and repair takes several walks"


def test_numbers_that_outgrow_a_window_make_it_smaller(monkeypatch):
    """Hundreds of references to one cluster need two bytes each, in a window that has room for one each."""
    file = MemoryChild()
    preallocated = PreallocMode.METADATA
    new = NewImage(size=512 * KiB, cluster_size=512, refcount_bits=8, preallocation=preallocated)
    asyncio.run(create_image(file, None, new))
    raw = bytearray(file.content)
    l1 = word(raw, 40)
    tables = [word(raw, at) & OFFSET for at in range(l1, l1 + 8 * 16, 8)]
    named = word(raw, tables[3] + 8)
    for table in tables:
        raw[table : table + 512] = struct.pack(">Q", named) * 64
    whole = outcome(bytes(raw), check_image)
    assert (whole[0]["corruptions"], whole[0]["leaks"]) == (1, 1023)
    with_small_windows(monkeypatch)
    assert outcome(bytes(raw), check_image) == whole
    text = f"Cluster {(named & OFFSET) // 512} has 1024 references, more than refcounts of 8 bits can hold"
    assert outcome(bytes(raw), repair_image) == (text, True)
