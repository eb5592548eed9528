import asyncio
import errno
import json
import random
import struct
import subprocess
import time
from array import array
from collections import Counter
from contextlib import suppress

import numpy as np
import pytest

from blockjobs.base.errors import IoFailure, UsageError
from blockjobs.base.offload import InlineOffload
from blockjobs.base.units import GiB, KiB, MiB, TiB
from blockjobs.block.drivers.file_create import PreallocMode
from blockjobs.block.drivers.qcow2 import check_counts, check_outline
from blockjobs.block.drivers.qcow2.check import check_image
from blockjobs.block.drivers.qcow2.check_counts import Counts
from blockjobs.block.drivers.qcow2.check_tally import Tally
from blockjobs.block.drivers.qcow2.create import NewImage, create_image
from blockjobs.testing.child import MemoryChild
from blockjobs.wire.qcow2 import EXT_LUKS, Header, HostAt
from blockjobs.wire.qcow2_tables import COPIED, SnapshotEntry, encode_table

OFFSET = 0x00FF_FFFF_FFFF_FE00


def checked(raw):
    return asyncio.run(check_image(MemoryChild(raw), offload=InlineOffload()))


def made(size=8 * MiB, **options):
    file = MemoryChild()
    asyncio.run(create_image(file, None, NewImage(size=size, **options)))
    return file.content


def word(raw, at):
    return int.from_bytes(raw[at : at + 8], "big")


def with_words(raw, *pokes):
    raw = bytearray(raw)
    for at, fmt, value in pokes:
        struct.pack_into(fmt, raw, at, value)
    return raw


# Damage by hand. Each entry gives pokes for an image with one L2 table, one refcount block, 64 KiB clusters.


def damages(raw):
    l1, table = word(raw, 40), word(raw, 48)
    l2, block = word(raw, l1) & OFFSET, word(raw, table) & OFFSET
    data, entry = l2 + 64 * KiB, word(raw, l2)
    return {
        "good": [],
        "refcount 0": [(block + 2 * 8, ">H", 0)],
        "refcount 2": [(block + 2 * 8, ">H", 2)],
        "refcount past the end": [(block + 2 * 300, ">H", 1)],
        "no entry": [(l2, ">Q", 0)],
        "COPIED missing": [(l2, ">Q", entry & ~COPIED)],
        "two entries, one cluster": [(l2, ">Q", word(raw, l2 + 8))],
        "data unaligned": [(l2, ">Q", entry + 512)],
        "reserved bit": [(l2, ">Q", entry | 2)],
        "data beyond": [(l2, ">Q", COPIED | 1 << 40)],
        "data beyond, not COPIED": [(l2, ">Q", 1 << 40)],
        "data on L1": [(l2, ">Q", COPIED | l1)],
        "offset 0": [(l2, ">Q", COPIED)],
        "zero flag": [(l2, ">Q", entry | 1)],
        "compressed": [(l2, ">Q", 1 << 62 | 1 << 55 | data + 100), (l2 + 8, ">Q", 1 << 62 | data + 700)],
        "compressed and COPIED": [(l2, ">Q", 1 << 63 | 1 << 62 | data)],
        "no L1 entry": [(l1, ">Q", 0)],
        "L2 beyond": [(l1, ">Q", COPIED | 1 << 40)],
        "L1 COPIED missing": [(l1, ">Q", l2)],
        "L1 reserved bit": [(l1, ">Q", COPIED | l2 | 1)],
        "block beyond": [(table, ">Q", 1 << 40)],
        "block with reserved bit": [(table, ">Q", block | 1)],
        "no block": [(table, ">Q", 0)],
        "block twice": [(table + 8, ">Q", block)],
        "dirty": [(72, ">Q", 1)],
        "marked corrupt": [(72, ">Q", 2)],
        "refcount table beyond": [(48, ">Q", 1 << 40)],
        "L1 beyond": [(40, ">Q", 1 << 40)],
    }


def test_clean_images_of_ours_are_clean():
    result = checked(made(preallocation=PreallocMode.METADATA))
    assert result.is_clean
    assert (result.total_clusters, result.allocated_clusters, result.fragmented_clusters) == (128, 128, 0)
    assert result.image_end == 5 * 64 * KiB + 8 * MiB


def test_problems_are_named_in_qemus_words():
    raw = made(preallocation=PreallocMode.METADATA)
    cases = damages(raw)
    assert checked(with_words(raw, *cases["refcount 0"])).problems == [
        "ERROR OFLAG_COPIED data cluster: l2_entry=8000000000080000 refcount=0",
        "ERROR cluster 8 refcount=0 reference=1",
    ]
    assert checked(with_words(raw, *cases["no entry"])).problems == ["Leaked cluster 5 refcount=1 reference=0"]
    assert checked(raw[: -3 * 64 * KiB]).corruptions == 3


def test_a_broken_snapshot_table_is_a_corruption():
    raw = made(preallocation=PreallocMode.METADATA)
    data = 5 * 64 * KiB
    damaged = with_words(raw, (60, ">I", 1), (64, ">Q", data), (data + 36, ">I", 0xFFFFFFFF))
    assert checked(damaged).problems[0].startswith("ERROR snapshot table: Could not read snapshots: Too much")


def test_snapshots_that_share_one_long_table_are_not_walked_again_and_again():
    raw = made()
    l1_at = len(raw) + -len(raw) % (64 * KiB)
    table_at = l1_at + 1 * MiB
    entry = SnapshotEntry(l1_at=HostAt(l1_at), l1_entries=MiB // 8, id=b"1", name=b"s", disk_size=8 * MiB, icount=0)
    raw = with_words(raw, (60, ">I", 5000), (64, ">Q", table_at))
    raw = raw.ljust(table_at, b"\0") + entry.encode() * 5000
    file = MemoryChild(raw)
    found = asyncio.run(check_image(file, offload=InlineOffload()))
    assert found.tally.unread == "snapshot 's'"
    assert sum("L1 table lies on other metadata" in problem for problem in found.problems) > 100
    assert found.corruptions >= 4999


def test_a_luks_header_is_a_reference():
    raw = bytearray(made())
    extension = struct.pack(">IIQQI", EXT_LUKS, 16, len(raw), 3 * 64 * KiB, 0)
    raw[112 : 112 + len(extension)] = extension
    damaged = with_words(raw + bytes(3 * 64 * KiB), (32, ">I", 2))
    assert checked(damaged).problems == [f"ERROR cluster {each} refcount=0 reference=1" for each in (4, 5, 6)]


def test_more_problems_than_are_shown_are_still_counted():
    raw = made(16 * MiB, preallocation=PreallocMode.METADATA)
    result = checked(with_words(raw, (word(raw, 40), ">Q", 0)))
    assert result.leaks == 257
    assert len(result.problems) == 200


def test_what_is_no_image_cannot_be_checked():
    with pytest.raises(UsageError, match="Image is not in qcow2 format"):
        checked(b"")


class SparseChild(MemoryChild):
    """A few bytes, and a length of exbibytes."""

    @property
    def length(self):
        return 1 << 60


def test_a_huge_sparse_file_costs_little():
    image = made(1 * GiB)
    file = SparseChild(image)
    l2 = 4 * 64 * KiB
    entries = [COPIED | place << 40 for place in range(1, 200)]
    file.content[word(image, 40) :][:8] = b""
    content = with_words(image.ljust(l2, b"\0"), (word(image, 40), ">Q", COPIED | l2))
    file.content = content + encode_table(array("Q", entries))
    result = asyncio.run(check_image(file, offload=InlineOffload()))
    assert result.corruptions >= 199
    assert result.tally.references.bytes < 64 * MiB


def far_apart():
    """An image with 511 references, each terabytes from the next, in a file of an exbibyte."""
    image = made(1 * GiB, cluster_size=2 * MiB)
    file = SparseChild(image)
    l1 = word(image, 40)
    l2 = len(image)
    entries = array("Q", [COPIED | place << 46 for place in range(1, 512)])
    file.content = with_words(image, (l1, ">Q", COPIED | l2)) + encode_table(entries)
    return file


def test_references_far_apart_are_counted_one_window_after_the_other(monkeypatch):
    monkeypatch.setattr(check_counts, "COUNTS_BYTES_MAX", 128 * KiB)
    result = asyncio.run(check_image(far_apart(), offload=InlineOffload()))
    assert (result.allocated_clusters, result.leaks) == (511, 0)
    # Each of them, and the L2 table, lacks a refcount, and its flag is wrong; no table names the file's last place.
    assert result.corruptions == 2 * 512
    assert result.image_end == (511 << 46) + 2 * MiB


def test_references_too_far_apart_are_an_error_and_not_hundreds_of_walks(monkeypatch):
    monkeypatch.setattr(check_outline, "PAGES_MAX", 500)
    with pytest.raises(UsageError, match="too far apart"):
        asyncio.run(check_image(far_apart(), offload=InlineOffload()))


@pytest.mark.serial
@pytest.mark.parametrize("scattered", [False, True])
def test_counting_a_full_table_is_fast(scattered):
    header = Header(size=1 * TiB)
    tally = Tally(header, 4 * GiB)
    places = list(range(1, 8193))
    if scattered:
        random.Random(1).shuffle(places)
    for index in range(2):
        tally.set_refcounts(index, array("H", [1]) * 32768)
    raw = encode_table(array("Q", [COPIED | place << 16 for place in places]))
    began = time.perf_counter()
    tally.add_l2_tables(raw, is_active=True)
    took_s = time.perf_counter() - began
    assert tally.allocated == 8192
    assert tally.corruptions == 0
    assert took_s < (0.25 if scattered else 0.05), took_s


class DyingChild(MemoryChild):
    """A file of which only the start can be read."""

    async def read(self, at, length):
        if at >= 5 * 64 * KiB:
            raise IoFailure(errno.EIO, f"{at:#x}")
        return await super().read(at, length)


def test_tables_that_cannot_be_read_are_one_plain_failure():
    raw = made(2 * GiB, preallocation=PreallocMode.METADATA)
    with pytest.raises(IoFailure):
        asyncio.run(check_image(DyingChild(raw), offload=InlineOffload()))


def test_numbers_widen_their_chunk_and_are_exact():
    counts = Counts(1 << 20)
    runs = [(0, 300000), (5, 1), (262143, 2), (7, 900000)]
    exact = Counter()
    for _ in range(90):
        for first, count in runs:
            counts.add_run(first, count)
        counts.add(np.array([3, 99, 3, 262144, 1048575, 3]))
    for first, count in runs:
        for cluster in (0, 3, 5, 6, 7, 99, 262143, 262144, 299999, 300000, 900006, 900007, 1048575):
            exact[cluster] += 90 * (first <= cluster < first + count)
    exact.update({3: 270, 99: 90, 262144: 90, 1048575: 90})
    assert {cluster: counts[cluster] for cluster in exact} == exact
    assert counts.of(np.array([1048575, 3, 3, 262144])).tolist() == [90, exact[3], exact[3], exact[262144]]
    assert counts.first_above(300) == 3
    assert counts.first_above(1000) is None
    assert counts.used_groups(1 << 19) == {0, 1}
    assert counts.bytes < 3 * 1 << 20


# Against qemu-img


def qemu_img(directory, *arguments):
    done = subprocess.run(["qemu-img", *arguments], cwd=directory, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 2, 3), done.stderr
    return done.stdout


def qemu_io(directory, image, *commands):
    options = [part for command in commands for part in ("-c", command)]
    subprocess.run(["qemu-io", *options, image], cwd=directory, capture_output=True, check=True)


def qemus_view(directory, name):
    found = json.loads(qemu_img(directory, "check", "--output=json", name))
    del found["filename"], found["format"]
    return found


def written_by_qemu(directory, name, *options):
    qemu_img(directory, "create", "-q", "-f", "qcow2", *options, name, "8M")
    writes = ["write -P 1 0 1M", "write -P 2 3M 64k", "write -z 5M 256k", "write -P 3 2M 100k"]
    qemu_io(directory, name, *writes)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    directory = tmp_path_factory.mktemp("written")
    written_by_qemu(directory, "t.qcow2")
    return directory


@pytest.mark.qemu
@pytest.mark.parametrize("case", damages(made(preallocation=PreallocMode.METADATA)))
def test_damage_counts_as_in_qemu(written, case):
    raw = (written / "t.qcow2").read_bytes()
    damaged = with_words(raw, *damages(raw)[case])
    (written / "damaged").write_bytes(damaged)
    assert checked(damaged).members() == qemus_view(written, "damaged")


SUBCLUSTERS = {
    "both bits": (8, 1 << 32 | 1),
    "bits without cluster": (16 * 20 + 8, 1),
    "zero bits without cluster": (16 * 20 + 8, 1 << 40),
    "both bits without cluster": (16 * 20 + 8, 1 << 32 | 1),
    "half a cluster": (8, 0xFFFF),
}


@pytest.mark.qemu
@pytest.mark.parametrize("case", SUBCLUSTERS)
def test_bitmaps_of_subclusters_count_as_in_qemu(tmp_path, case):
    written_by_qemu(tmp_path, "t.qcow2", "-o", "extended_l2=on")
    raw = (tmp_path / "t.qcow2").read_bytes()
    at, bitmap = SUBCLUSTERS[case]
    damaged = with_words(raw, ((word(raw, word(raw, 40)) & OFFSET) + at, ">Q", bitmap))
    (tmp_path / "t.qcow2").write_bytes(damaged)
    result = checked(damaged)
    assert result.members() == qemus_view(tmp_path, "t.qcow2")
    assert result.corruptions == ("bits" in case and not case.startswith("zero"))


FEATURES = [
    [],
    ["-o", "compat=0.10"],
    ["-o", "cluster_size=512"],
    ["-o", "cluster_size=2M"],
    ["-o", "extended_l2=on"],
    ["-o", "refcount_bits=1"],
    ["-o", "refcount_bits=2,cluster_size=4k"],
    ["-o", "refcount_bits=64,lazy_refcounts=on"],
    ["-o", "preallocation=falloc"],
    ["-o", "data_file=d,data_file_raw=on"],
    ["-o", "data_file=d"],
]


@pytest.mark.qemu
@pytest.mark.parametrize("options", FEATURES, ids=str)
def test_images_with_each_feature_count_as_in_qemu(tmp_path, options):
    name = "t.qcow2"
    written_by_qemu(tmp_path, name, *options)
    assert checked((tmp_path / name).read_bytes()).members() == qemus_view(tmp_path, name)


@pytest.mark.qemu
@pytest.mark.parametrize("options", [[], ["-o", "compression_type=zstd"], ["-o", "cluster_size=4k"]], ids=str)
def test_compressed_images_count_as_in_qemu(written, tmp_path, options):
    qemu_img(tmp_path, "convert", "-c", "-O", "qcow2", *options, str(written / "t.qcow2"), "c.qcow2")
    qemu_io(tmp_path, "c.qcow2", "write -P 7 0 64k", "write -z 64k 64k")
    assert checked((tmp_path / "c.qcow2").read_bytes()).members() == qemus_view(tmp_path, "c.qcow2")


@pytest.mark.qemu
@pytest.mark.parametrize("options", [[], ["-o", "compat=0.10"], ["-o", "cluster_size=512"]], ids=str)
def test_snapshots_are_references(tmp_path, options):
    written_by_qemu(tmp_path, "s.qcow2", *options)
    for name in ("one", "two"):
        qemu_img(tmp_path, "snapshot", "-c", name, "s.qcow2")
        qemu_io(tmp_path, "s.qcow2", "write -P 9 0 192k")
    raw = (tmp_path / "s.qcow2").read_bytes()
    assert checked(raw).is_clean
    assert checked(raw).members() == qemus_view(tmp_path, "s.qcow2")
    forgotten = with_words(raw, (60, ">I", 1))
    (tmp_path / "s.qcow2").write_bytes(forgotten)
    assert checked(forgotten).members() == qemus_view(tmp_path, "s.qcow2")


@pytest.mark.qemu
def test_bitmaps_are_references(written, tmp_path):
    (tmp_path / "b.qcow2").write_bytes((written / "t.qcow2").read_bytes())
    qemu_img(tmp_path, "bitmap", "--add", "b.qcow2", "b0")
    qemu_img(tmp_path, "bitmap", "--add", "-g", "512", "b.qcow2", "b1")
    qemu_io(tmp_path, "b.qcow2", "write -P 9 4M 128k")
    raw = (tmp_path / "b.qcow2").read_bytes()
    assert checked(raw).is_clean
    assert checked(raw).members() == qemus_view(tmp_path, "b.qcow2")
    without = with_words(raw, (88, ">Q", 0))
    (tmp_path / "b.qcow2").write_bytes(without)
    assert checked(without).members() == qemus_view(tmp_path, "b.qcow2")


@pytest.mark.qemu
def test_random_damage_never_stops_the_check(written):
    rng = random.Random(5)
    raw = (written / "t.qcow2").read_bytes()
    for _ in range(60):
        damaged = bytearray(raw)
        for _ in range(rng.randrange(1, 12)):
            area = rng.choice([word(raw, 40), word(raw, 48), 4 * 64 * KiB, 2 * 64 * KiB, 24])
            damaged[area + rng.randrange(64)] = rng.randrange(256)
        with suppress(UsageError):
            checked(damaged)
