import asyncio
import itertools
import json
import subprocess

import pytest

from blockjobs.base.errors import UsageError
from blockjobs.base.units import GiB, KiB, MiB, TiB
from blockjobs.block.drivers.file_create import PreallocMode
from blockjobs.block.drivers.qcow2.create import NewImage, Plan, create_image
from blockjobs.block.drivers.qcow2.header import read_header
from blockjobs.testing.child import MemoryChild
from blockjobs.wire.qcow2_tables import decode_table


def made(image, before=b"", data_file=None):
    file = MemoryChild(before)
    image.check()
    asyncio.run(create_image(file, data_file, image))
    return file


def refusal(**options):
    image = NewImage(**{"size": 64 * KiB} | options)

    def check():
        image.check()
        image.check_limits()

    with pytest.raises(UsageError) as caught:
        check()
    return str(caught.value)


# The texts were taken from qemu-storage-daemon 7.2; faults are paired to show which one it reports first.
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"size": 1000, "cluster_size": 1000}, "Image size must be a multiple of 512 bytes"),
        ({"size": -1}, "Image size must be a multiple of 512 bytes"),
        ({"size": -512}, "Could not resize image: Image size cannot be negative"),
        ({"size": (1 << 63) - 512}, "Could not resize image: offset(9223372036854775296) exceeds maximum("),
        (
            {"extended_l2": True, "is_v2": True, "cluster_size": 1000},
            "Extended L2 entries are only supported with compatibility level 1.1 and above (use version=v3 or greater)",
        ),
        (
            {"cluster_size": 1000, "refcount_bits": 3},
            "Cluster size must be a power of two between 512 and 2048k",
        ),
        ({"cluster_size": 256}, "Cluster size must be a power of two between 512 and 2048k"),
        ({"cluster_size": 0}, "Cluster size must be a power of two between 512 and 2048k"),
        ({"cluster_size": 4 * MiB}, "Cluster size must be a power of two between 512 and 2048k"),
        (
            {"extended_l2": True, "cluster_size": 4096, "backing_format": "raw"},
            "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes",
        ),
        (
            {"preallocation": PreallocMode.FULL, "backing_file": "b", "is_v2": True, "lazy_refcounts": True},
            "Backing file and preallocation can only be used at the same time if extended_l2 is on",
        ),
        (
            {"backing_format": "qcow2", "is_v2": True, "lazy_refcounts": True},
            "Backing format cannot be used without backing file",
        ),
        (
            {"is_v2": True, "lazy_refcounts": True, "refcount_bits": 3},
            "Lazy refcounts only supported with compatibility level 1.1 and above (use version=v3 or greater)",
        ),
        (
            {"refcount_bits": 3, "data_file_raw": True},
            "Refcount width must be a power of two and may not exceed 64 bits",
        ),
        ({"refcount_bits": 128}, "Refcount width must be a power of two and may not exceed 64 bits"),
        (
            {"is_v2": True, "refcount_bits": 8},
            "Different refcount widths than 16 bits require compatibility level 1.1 or above "
            "(use version=v3 or greater)",
        ),
        (
            {"data_file_raw": True, "data_file_name": "d", "backing_file": "b", "is_v2": True},
            "Backing file and data-file-raw cannot be used at the same time",
        ),
        (
            {"data_file_name": "d", "is_v2": True, "zstd": True},
            "External data files are only supported with compatibility level 1.1 and above (use version=v3 or greater)",
        ),
        ({"data_file_raw": True, "is_v2": True, "zstd": True}, "data-file-raw requires data-file"),
        (
            {"is_v2": True, "zstd": True, "size": 1 << 62},
            "Non-zlib compression type is only supported with compatibility level 1.1 and above "
            "(use version=v3 or greater)",
        ),
        (
            {"size": 1 << 62, "backing_file": "x" * 1024},
            "Could not resize image: Failed to grow the L1 table: File too large",
        ),
        (
            {"size": 128 * GiB + 512, "cluster_size": 512},
            "Could not resize image: Failed to grow the L1 table: File too large",
        ),
        (
            {"size": 40 * GiB, "cluster_size": 512, "refcount_bits": 64, "preallocation": PreallocMode.METADATA},
            "Could not resize image: Failed to grow the refcount table: File too large",
        ),
        (
            {"backing_file": "x" * 1024},
            f"Could not assign backing file '{'x' * 1024}' with format '(null)': Invalid argument",
        ),
        (
            {"backing_file": "x" * 1024, "backing_format": "qcow2"},
            f"Could not assign backing file '{'x' * 1024}' with format 'qcow2': Invalid argument",
        ),
        (
            {"backing_file": "x" * 393, "cluster_size": 512},
            f"Could not assign backing file '{'x' * 393}' with format '(null)': No space left on device",
        ),
    ],
)
def test_refused_as_qemu_does(options, text):
    assert refusal(**options).startswith(text)


def test_limits_that_are_just_met():
    NewImage(size=128 * GiB, cluster_size=512).check_limits()
    NewImage(size=0, backing_file="x" * 392, cluster_size=512).check_limits()
    NewImage(size=1 << 61, cluster_size=2 * MiB).check_limits()


def test_the_plan_counts_its_own_refcount_blocks():
    plan = Plan.of(NewImage(size=1 * TiB, preallocation=PreallocMode.METADATA))
    per_block = plan.header.refcounts_per_block
    assert (plan.refcount_blocks - 1) * per_block < plan.clusters <= plan.refcount_blocks * per_block
    assert plan.data_at + plan.data_clusters * 64 * KiB == plan.clusters * 64 * KiB


def test_a_half_made_image_never_opens():
    old = made(NewImage(size=1 * MiB)).content
    whole = made(NewImage(size=2 * MiB, preallocation=PreallocMode.METADATA), bytes(old)).log
    for steps in range(1, len(whole)):
        file = MemoryChild(bytes(old))
        file.fail_at = steps
        with pytest.raises(OSError):
            asyncio.run(create_image(file, None, NewImage(size=2 * MiB, preallocation=PreallocMode.METADATA)))
        if steps < len(whole) - 1:  # the last step is the flush after the magic was written
            with pytest.raises(UsageError):
                asyncio.run(read_header(file, read_only=True))
    kinds = [change[0] for change in whole]
    assert kinds[:2] == ["write", "flush"]
    assert kinds[-3:] == ["flush", "write", "flush"]


class FixedChild(MemoryChild):
    """As a block device: its length cannot change."""

    async def resize(self, length):
        raise UsageError("Cannot resize")


def test_on_a_device_old_content_is_zeroed():
    file = FixedChild(b"\xff" * (1 * MiB))
    asyncio.run(create_image(file, None, NewImage(size=1 * GiB)))
    assert asyncio.run(read_header(file, read_only=False)).size == 1 * GiB
    l1_at = 3 * 64 * KiB
    assert file.content[l1_at : l1_at + 64 * KiB] == bytes(64 * KiB)
    with pytest.raises(UsageError, match="Cannot resize"):
        asyncio.run(create_image(FixedChild(bytes(4096)), None, NewImage(size=1 * GiB)))


def test_data_files_keep_their_content_and_get_the_disks_length():
    for before in (b"A" * 4096, b"A" * (2 * MiB)):
        data_file = MemoryChild(before)
        image = NewImage(size=1 * MiB, data_file_name="d", data_file_raw=True, preallocation=PreallocMode.FALLOC)
        file = made(image, data_file=data_file)
        assert data_file.length == 1 * MiB
        assert data_file.content[:4096] == b"A" * 4096
        l2 = decode_table(file.content[4 * 64 * KiB :][: 16 * 8])
        assert list(l2) == [1 << 63 | guest << 16 for guest in range(16)]


def test_preallocation_modes_touch_the_data():
    changes = {mode: made(NewImage(size=1 * MiB, preallocation=mode)).log for mode in PreallocMode}
    data = 5 * 64 * KiB
    assert ("zero", data, 1 * MiB) in changes[PreallocMode.FALLOC]
    assert ("write", data, bytes(data and 1 * MiB - data % MiB)) in changes[PreallocMode.FULL]
    assert not any(change[0] == "write" and change[1] >= data for change in changes[PreallocMode.METADATA])


def run_qemu_img(tmp_path, *arguments):
    done = subprocess.run(["qemu-img", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


COMBINATIONS = [
    *itertools.product(
        [{}, {"is_v2": True}, {"extended_l2": True, "zstd": True}, {"refcount_bits": 1, "lazy_refcounts": True}],
        [{}, {"preallocation": PreallocMode.METADATA}],
        [0, 512, 5 * MiB],
    ),
    *itertools.product(
        [{"cluster_size": 512}, {"cluster_size": 2 * MiB}, {"cluster_size": 4096, "refcount_bits": 64}],
        [{}, {"preallocation": PreallocMode.FULL}],
        [512, 1 * MiB],
    ),
    ({"cluster_size": 512, "refcount_bits": 64}, {"preallocation": PreallocMode.METADATA}, 4 * MiB),
    ({"extended_l2": True, "backing_file": "base", "backing_format": "raw"}, {"preallocation": "falloc"}, 5 * MiB),
    ({"backing_file": "base" * 200, "backing_format": "raw"}, {}, 5 * MiB),
    ({"backing_file": "base", "backing_format": "qcow2"}, {}, 3 * TiB),
    ({}, {}, 3 * TiB),
    ({"data_file_name": "d"}, {}, 5 * MiB),
    ({"data_file_name": "d"}, {"preallocation": "metadata"}, 5 * MiB),
    ({"data_file_name": "d", "data_file_raw": True}, {}, 5 * MiB),
    ({"data_file_name": "d", "data_file_raw": True, "extended_l2": True}, {}, 5 * MiB),
]

QEMU_NAMES = {
    "is_v2": ("compat", lambda value: "0.10"),
    "extended_l2": ("extended_l2", lambda value: "on"),
    "zstd": ("compression_type", lambda value: "zstd"),
    "lazy_refcounts": ("lazy_refcounts", lambda value: "on"),
    "data_file_name": ("data_file", str),
    "data_file_raw": ("data_file_raw", lambda value: "on"),
    "backing_format": ("backing_fmt", str),
}


@pytest.mark.qemu
@pytest.mark.parametrize("parts", COMBINATIONS, ids=lambda parts: str(parts))
def test_qemu_sees_what_it_would_have_made(tmp_path, parts):
    *options, size = parts
    options = options[0] | options[1]
    data_file = MemoryChild() if "data_file_name" in options else None
    file = made(NewImage(size=size, **options), data_file=data_file)
    (tmp_path / "ours").write_bytes(file.content)
    named = [(*QEMU_NAMES.get(name, (name, str)), value) for name, value in options.items()]
    listed = ",".join(f"{name}={text(value)}" for name, text, value in named)
    run_qemu_img(
        tmp_path, "create", "-q", "-u", "-f", "qcow2", *(["-o", listed] if listed else []), "theirs", str(size)
    )
    if data_file is not None:
        (tmp_path / "d").write_bytes(data_file.content)
    infos = [json.loads(run_qemu_img(tmp_path, "info", "--output=json", name)) for name in ("ours", "theirs")]
    for info in infos:
        del info["filename"], info["actual-size"]
    assert infos[0] == infos[1]
    alone = json.dumps({"driver": "qcow2", "file": {"driver": "file", "filename": "ours"}, "backing": None})
    checked = json.loads(run_qemu_img(tmp_path, "check", "--output=json", f"json:{alone}"))
    assert not checked["check-errors"] and "leaks" not in checked and "corruptions" not in checked
    # QEMU calls the subclusters of a raw data file unallocated, and so hides what the file holds.
    if "backing_file" not in options and not ("extended_l2" in options and "data_file_raw" in options):
        assert mapped(tmp_path, "ours") == mapped(tmp_path, "theirs")


def mapped(tmp_path, name):
    """Which guest bytes are data, wherever in the file; neighbours joined."""
    joined = []
    for run in json.loads(run_qemu_img(tmp_path, "map", "--output=json", name)):
        kind = run["data"], run["depth"]
        if joined and joined[-1][1] == kind:
            joined[-1][0] += run["length"]
        else:
            joined.append([run["length"], kind])
    return joined
