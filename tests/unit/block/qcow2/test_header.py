import asyncio
import itertools
import random
import struct
import subprocess

import pytest
from msgspec.structs import replace

from blockjobs.base.errors import UsageError
from blockjobs.block.drivers.qcow2.header import metadata_places, read_header
from blockjobs.block.drivers.qcow2.header_update import HeaderFile, tail_of, write_new_header
from blockjobs.testing.child import MemoryChild
from blockjobs.wire.qcow2 import (
    EXT_BACKING_FORMAT,
    EXT_BITMAPS,
    EXT_DATA_FILE,
    EXT_FEATURE_NAMES,
    EXT_LUKS,
    FIELD_SIZE,
    Autoclear,
    Extension,
    Header,
    HostAt,
    Incompatible,
    encode_extension,
    encode_feature_names,
)

CLUSTER = 1 << 16


def image(header=None, **fields):
    """An empty image's bytes, then fields changed without any check."""
    header = header or Header(
        size=1 << 20,
        l1_entries=1,
        l1_at=HostAt(3 * CLUSTER),
        refcount_table_at=HostAt(CLUSTER),
        refcount_table_clusters=1,
        extensions=(Extension(EXT_FEATURE_NAMES, encode_feature_names()),),
    )
    header = replace(header, **fields)
    raw = header.encode_fields() + b"".join(map(encode_extension, header.extensions)) + bytes(8)
    name = (header.backing_file or "").encode()
    return raw.ljust(header.backing_at, b"\0") + name.ljust(4 * CLUSTER - max(len(raw), header.backing_at), b"\0")


def opened(raw, **options):
    return asyncio.run(read_header(MemoryChild(raw), **{"read_only": False} | options))


def refusal(raw, **options):
    with pytest.raises(UsageError) as caught:
        opened(raw, **options)
    return str(caught.value)


def poke(raw, at, fmt, *values):
    raw = bytearray(raw)
    struct.pack_into(fmt, raw, at, *values)
    return bytes(raw)


def test_a_good_image_opens():
    header = opened(image())
    assert (header.size, header.refcount_bits, header.backing_file) == (1 << 20, 16, None)
    assert [text for text, _ in metadata_places(header)] == ["header", "reference count table", "active L1 table"]


# The right-hand texts were taken from qemu-storage-daemon 7.2 with the same bytes.
QEMU_REFUSES = {
    "empty": (b"", "Image is not in qcow2 format"),
    "magic": (poke(image(), 0, ">B", 0), "Image is not in qcow2 format"),
    "7 bytes": (image()[:7], "Unsupported qcow2 version 0"),
    "71 bytes": (image()[:71], "qcow2 header too short"),
    "100 bytes": (image()[:100], "qcow2 header too short"),
    "version": (poke(image(), 4, ">I", 4), "Unsupported qcow2 version 4"),
    "cluster 2^8": (poke(image(), 20, ">I", 8), "Unsupported cluster size: 2^8"),
    "cluster 2^22": (poke(image(), 20, ">I", 22), "Unsupported cluster size: 2^22"),
    "cluster huge": (poke(image(), 20, ">I", 0xFFFFFFFF), "Unsupported cluster size: 2^4294967295"),
    "header_length 0": (poke(image(), 100, ">I", 0), "qcow2 header too short"),
    "header_length 103": (poke(image(), 100, ">I", 103), "qcow2 header too short"),
    "header_length big": (poke(image(), 100, ">I", CLUSTER + 8), "qcow2 header exceeds cluster size"),
    "backing_at": (poke(image(), 8, ">QI", CLUSTER + 1, 4), "Invalid backing file offset"),
    "backing long": (poke(image(), 8, ">QI", 1024, 1024), "Backing file name too long"),
    "backing off the end": (poke(image(), 8, ">QI", CLUSTER - 6, 8), "Backing file name too long"),
    "compression 9": (image(compression_type=9), "qcow2: unknown compression type: 9"),
    "zstd without bit": (
        image(compression_type=1),
        "qcow2: Compression type incompatible feature bit must be set",
    ),
    "bit without zstd": (image(incompatible=8), "qcow2: Compression type incompatible feature bit must not be set"),
    "corrupt": (image(incompatible=2), "qcow2: Image is corrupt; cannot be opened read/write"),
    "refcount_order": (
        image(refcount_order=7),
        "Reference count entry width too large; may not exceed 64 bits",
    ),
    "crypt 3": (image(crypt_method=3), "Unsupported encryption method 3"),
    "crypt 2": (image(crypt_method=2), "Missing CRYPTO header for crypt method 2"),
    "refcount table 0": (image(refcount_table_clusters=0), "Image does not contain a reference count table"),
    "refcount table large": (image(refcount_table_clusters=129), "Reference count table too large"),
    "refcount table unaligned": (image(refcount_table_at=512), "Reference count table offset invalid"),
    "refcount table far": (image(refcount_table_at=1 << 63), "Reference count table offset invalid"),
    "snapshots": (image(snapshots=65537), "Snapshot table too large"),
    "snapshots unaligned": (image(snapshots=1, snapshots_at=8), "Snapshot table offset invalid"),
    "L1 large": (image(l1_entries=0x400001), "Active L1 table too large"),
    "L1 unaligned": (image(l1_at=8), "Active L1 table offset invalid"),
    "L1 far": (image(l1_at=(1 << 64) - CLUSTER), "Active L1 table offset invalid"),
    "L1 small": (image(l1_entries=0), "L1 table is too small"),
    "size": (image(size=1 << 62), "Image is too big"),
    "size negative": (image(size=(1 << 64) - 512), "Image is too big"),
    "extension": (poke(image(), 116, ">I", CLUSTER), "Header extension too large"),
    "backing format": (
        image(extensions=(Extension(EXT_BACKING_FORMAT, b"a" * 16),)),
        "ERROR: ext_backing_format: len=16 too large (>=16)",
    ),
    "luks unexpected": (
        image(extensions=(Extension(EXT_LUKS, bytes(16)),)),
        "CRYPTO header extension only expected with LUKS encryption method",
    ),
    "luks unaligned": (
        image(extensions=(Extension(EXT_LUKS, struct.pack(">QQ", 8, 8)),), crypt_method=2),
        "Encryption header offset '8' is not a multiple of cluster size '65536'",
    ),
    "data-file-raw": (image(autoclear=2), "data-file-raw requires a data file"),
    "subclusters": (image(cluster_bits=13, incompatible=16), "Unsupported subcluster size: 256"),
}


@pytest.mark.parametrize("case", QEMU_REFUSES)
def test_refused_as_qemu_does(case):
    raw, text = QEMU_REFUSES[case]
    assert refusal(raw) == text


def bitmaps(count=1, size=32, at=3 * CLUSTER, reserved=0):
    content = struct.pack(">IIQQ", count, reserved, size, at)
    return image(autoclear=Autoclear.BITMAPS, extensions=(Extension(EXT_BITMAPS, content),))


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (bitmaps(count=0), "found bitmaps extension with zero bitmaps"),
        (
            bitmaps(count=65536),
            "bitmaps_ext: Image has 65536 bitmaps, exceeding the QEMU supported maximum of 65535",
        ),
        (bitmaps(reserved=1), "bitmaps_ext: Reserved field is not zero"),
        (bitmaps(at=8), "bitmaps_ext: invalid bitmap directory offset"),
        (
            bitmaps(size=1 << 32),
            "bitmaps_ext: bitmap directory size (4294967296) exceeds the maximum supported size (67107840)",
        ),
    ],
)
def test_bitmaps_extension_is_checked_only_while_it_is_valid(raw, text):
    assert refusal(raw) == text
    opened(poke(raw, 88, ">Q", 0))


@pytest.mark.parametrize(
    ("names", "bits", "text"),
    [
        ([(0, 5, b"my great feature")], 1 << 5, "my great feature"),
        ([(0, 7, b"seven"), (0, 5, b"five"), (0, 5, b"again")], 1 << 5 | 1 << 7, "seven, five"),
        ([(0, 5, b"five"), (1, 8, b"other")], 1 << 5 | 1 << 8 | 1 << 9, "five, Unknown incompatible feature: 300"),
        ([(0, 5, b"")], 1 << 5, "Unknown incompatible feature: 20"),
        ([], 1 << 63 | 1 << 5, "Unknown incompatible feature: 8000000000000020"),
    ],
)
def test_unknown_features_are_named(names, bits, text):
    table = b"".join(struct.pack(">BB46s", *line) for line in names)
    raw = image(incompatible=bits, extensions=(Extension(EXT_FEATURE_NAMES, table),))
    assert refusal(raw) == f"Unsupported qcow2 feature(s): {text}"


def test_a_broken_extension_does_not_hide_the_feature_names():
    table = struct.pack(">BB46s", 0, 5, b"five")
    raw = image(incompatible=1 << 5, extensions=(Extension(EXT_FEATURE_NAMES, table), Extension(9, b"x")))
    raw = poke(raw, 112 + 8 + 48 + 4, ">I", 1 << 30)
    assert refusal(raw) == "Unsupported qcow2 feature(s): five"


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (image(l1_at=1 << 40), "The active L1 table lies beyond the end of the file"),
        (image(l1_entries=0x400000), "The active L1 table lies beyond the end of the file"),
        (image()[: 3 * CLUSTER], "The active L1 table lies beyond the end of the file"),
        (image(refcount_table_at=1 << 62), "The reference count table lies beyond the end of the file"),
        (image(snapshots=65536, snapshots_at=2 * CLUSTER), "The snapshot table lies beyond the end of the file"),
        (image(l1_at=0), "The active L1 table overlaps with the header"),
        (image(l1_at=CLUSTER), "The active L1 table overlaps with the reference count table"),
        (image(refcount_table_at=0), "The reference count table overlaps with the header"),
        (image(snapshots=1, snapshots_at=3 * CLUSTER), "The snapshot table overlaps with the active L1 table"),
    ],
)
def test_refused_by_us_alone_but_not_for_a_check(raw, text):
    assert refusal(raw) == text
    assert refusal(raw, read_only=True) == text
    opened(raw, for_check=True)


def test_corrupt_images_open_for_reading():
    assert opened(image(incompatible=2), read_only=True).incompatible == Incompatible.CORRUPT


def test_v2_ignores_what_only_v3_has():
    header = Header(version=2, header_bytes=72)
    raw = image(header, size=512, l1_entries=1, l1_at=3 * CLUSTER, refcount_table_at=CLUSTER, refcount_table_clusters=1)
    assert opened(raw).incompatible == 0


@pytest.mark.qemu
@pytest.mark.parametrize(
    "options",
    [
        "",
        "-o compat=0.10",
        "-o cluster_size=512",
        "-o cluster_size=2M,refcount_bits=64",
        "-o extended_l2=on,compression_type=zstd,lazy_refcounts=on",
        "-o data_file=d.raw,data_file_raw=on",
        "-o preallocation=metadata,refcount_bits=1",
        "-u -b base.img -F raw",
    ],
)
@pytest.mark.parametrize("size", ["0", "512", "1M", "40G"])
def test_images_made_by_qemu_open(tmp_path, options, size):
    if size == "40G" and ("512" in options or "preallocation" in options):
        size = "300M"
    subprocess.run(f"qemu-img create -q -f qcow2 {options} t.qcow2 {size}".split(), cwd=tmp_path, check=True)
    with (tmp_path / "t.qcow2").open("rb") as file:
        raw = file.read(32 << 20)
    header = opened(raw)
    assert header.encode_fields() == raw[: header.header_bytes]


# Updates


def header_file(raw):
    file = MemoryChild(raw)
    return HeaderFile({"file": file}, asyncio.run(read_header(file, read_only=False)))


def states_after_crash(before, log, rng):
    """Some of the files a crash may leave: every flushed write, any subset of 512-byte parts of the others."""
    durable = bytearray(before)
    pending = []
    for change in log:
        if change[0] == "flush":
            for at, part in pending:
                durable[at : at + len(part)] = part
            pending = []
            yield bytes(durable)
            continue
        _, at, content = change
        pending += [(at + cut, content[cut : cut + 512]) for cut in range(0, len(content), 512)]
        for _ in range(8):
            torn = bytearray(durable)
            for place, part in pending:
                if rng.random() < 0.5:
                    torn[place : place + len(part)] = part
            yield bytes(torn)


def meaning(header):
    kept = tuple(each for each in header.extensions if each.type not in (0x66696C6C, EXT_FEATURE_NAMES))
    return replace(header, extensions=kept, backing_at=0, backing_bytes=0)


@pytest.mark.parametrize("data_file", [None, b"d" * 300, b"d" * 900])
@pytest.mark.parametrize("header_bytes", [112, 72])
def test_a_crash_while_rewriting_leaves_the_old_or_the_new_header(data_file, header_bytes):
    rng = random.Random(7)
    base = Header(
        version=2 if header_bytes == 72 else 3,
        header_bytes=header_bytes,
        size=1 << 20,
        l1_entries=1,
        l1_at=HostAt(3 * CLUSTER),
        refcount_table_at=HostAt(CLUSTER),
        refcount_table_clusters=1,
    )
    extensions = [Extension(0x1234, b"unknown")]
    if data_file:
        extensions.append(Extension(EXT_DATA_FILE, data_file))
    headers = header_file(image(base, extensions=tuple(extensions)))
    names = ["short", None, "x" * 600, "y" * 1023, "z" * 100, "y" * 1023, "x" * 500, "a" * 1000] * 3
    for name, backing_format in zip(names, itertools.cycle(["raw", None, "qcow2-long-name"]), strict=False):
        before, old = bytes(headers.file.content), headers.header
        headers.file.log.clear()
        asyncio.run(headers.change_backing(name, backing_format))
        assert headers.header.backing_file == name
        assert headers.header.backing_format == (backing_format if name is not None else None)
        assert headers.header.extension(EXT_DATA_FILE) == data_file
        assert meaning(opened(headers.file.content)) == meaning(headers.header)
        legal = {meaning(old), meaning(headers.header)}
        for state in states_after_crash(before, headers.file.log, rng):
            assert meaning(opened(state)) in legal


@pytest.mark.parametrize("length", [104, 105, 108, 111, 112, 113, 120])
def test_a_header_of_any_length_is_rewritten_as_one_that_means_the_same(length):
    raw = bytearray(image(extensions=(Extension(0x1234, b"unknown"),)))
    found = bytes(raw[112:512])
    raw[length : length + len(found)] = found
    headers = header_file(poke(bytes(raw), 100, ">I", length))
    assert headers.header.extension(0x1234) == b"unknown"
    asyncio.run(headers.change_backing("base.img", "raw"))
    after = opened(headers.file.content)
    assert (after.extension(0x1234), after.backing_file, after.backing_format) == (b"unknown", "base.img", "raw")
    assert meaning(after) == meaning(headers.header)


@pytest.mark.parametrize("length", [505, 512, 1024, 4096])
def test_a_header_whose_fields_leave_no_room_in_the_first_sector_is_not_rewritten(length):
    raw = bytearray(image())
    raw[length : length + 8] = bytes(8)
    headers = header_file(poke(bytes(raw), 100, ">I", length))
    with pytest.raises(UsageError, match="The image's header has no room for this"):
        asyncio.run(headers.change_backing("base.img", "raw"))
    assert headers.file.log == []


def test_feature_names_give_way_so_that_one_sector_is_enough():
    headers = header_file(image())
    asyncio.run(headers.change_backing("other.img", "raw"))
    assert tail_of(headers.header).length > 0
    headers.file.log.clear()
    asyncio.run(headers.change_backing("base.img", "raw"))
    assert [change[:2] for change in headers.file.log] == [("flush",), ("write", 0), ("flush",)]
    assert tail_of(headers.header).length == 0
    assert opened(headers.file.content).backing_file == "base.img"


def test_too_long_for_the_format_changes_nothing():
    headers = header_file(image())
    with pytest.raises(UsageError, match="Backing file name too long"):
        asyncio.run(headers.change_backing("x" * 1024, None))
    assert headers.file.log == []


def test_small_clusters_may_have_no_room():
    base = Header(
        cluster_bits=9, l1_at=HostAt(1536), refcount_table_at=HostAt(512), refcount_table_clusters=1, l1_entries=1
    )
    headers = header_file(image(base))
    asyncio.run(headers.change_backing("x" * 392, None))
    with pytest.raises(UsageError, match="no room"):
        asyncio.run(headers.change_backing("x" * 393, None))
    assert opened(headers.file.content).backing_file == "x" * 392


def test_switch_keeps_the_old_header_when_the_write_fails():
    headers = header_file(image())
    headers.file.fail_at = 1
    old = headers.header
    with pytest.raises(OSError):
        asyncio.run(headers.switch(replace(old, size=2 << 20), FIELD_SIZE))
    assert headers.header is old
    asyncio.run(headers.switch(replace(old, size=2 << 20), FIELD_SIZE))
    assert [change[0] for change in headers.file.log] == ["flush", "flush", "write", "flush"]
    assert opened(headers.file.content).size == 2 << 20


def test_feature_bits():
    headers = header_file(image(autoclear=0xF0 | Autoclear.BITMAPS, incompatible=1))
    asyncio.run(headers.begin_writing(Autoclear.BITMAPS))
    assert opened(headers.file.content).autoclear == Autoclear.BITMAPS
    asyncio.run(headers.set_features(set_bits=Incompatible.CORRUPT, clear_bits=Incompatible.DIRTY))
    assert opened(headers.file.content, read_only=True).incompatible == Incompatible.CORRUPT
    headers.file.log.clear()
    asyncio.run(headers.set_features(set_bits=Incompatible.CORRUPT))
    asyncio.run(headers.begin_writing(Autoclear.BITMAPS))
    assert headers.file.log == []


def test_a_new_header_shows_its_magic_last():
    file = MemoryChild(bytes(CLUSTER))
    header = asyncio.run(write_new_header(file, Header(backing_file="b" * 600)))
    assert [change[:2] for change in file.log] == [("write", 512), ("flush",), ("write", 0), ("flush",)]
    assert header.backing_file == "b" * 600
    assert header.extension(EXT_FEATURE_NAMES) == encode_feature_names()
