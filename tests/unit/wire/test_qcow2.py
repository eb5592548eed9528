import random
import subprocess
from array import array

import pytest

from blockjobs.wire.qcow2 import (
    EXT_BACKING_FORMAT,
    EXT_DATA_FILE,
    EXT_FEATURE_NAMES,
    FEATURE_NAMES,
    FIELD_FEATURES,
    FIELD_L1,
    FIELD_SIZE,
    BitmapsExtension,
    Extension,
    Header,
    HostAt,
    Incompatible,
    LuksExtension,
    decode_feature_names,
    encode_extension,
    encode_feature_names,
    iter_extensions,
)
from blockjobs.wire.qcow2_tables import (
    COMPRESSED,
    BitmapEntry,
    SnapshotEntry,
    decode_refcounts,
    decode_table,
    encode_refcounts,
    encode_table,
    pack_compressed,
    refcount_array,
    unpack_compressed,
)


def header_of(raw):
    header = Header.decode_fields(raw[:512])
    return header.decode_rest(raw[: header.cluster_size])


def test_v3_fields_survive_both_ways():
    header = Header(
        size=1 << 40,
        l1_entries=2048,
        l1_at=HostAt(0x30000),
        refcount_table_at=HostAt(0x10000),
        refcount_table_clusters=1,
        snapshots=3,
        snapshots_at=HostAt(0x50000),
        incompatible=8,
        compatible=1,
        autoclear=2,
        refcount_order=5,
        compression_type=1,
        header_bytes=120,
        extra=b"\x01" * 8,
    )
    assert header_of(header.encode_fields().ljust(1 << 16, b"\0")) == header


def test_v2_has_the_meaning_of_its_missing_fields():
    header = Header.decode_fields(Header(version=2, header_bytes=72, size=512).encode_fields())
    assert (header.refcount_order, header.incompatible, header.header_bytes) == (4, 0, 72)
    assert len(header.encode_fields()) == 72


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"", "Image is not in qcow2 format"),
        (b"QFI\xfb", "Unsupported qcow2 version 0"),
        (b"QFI\xfb\0\0\0\4", "Unsupported qcow2 version 4"),
    ],
)
def test_what_is_no_qcow2(raw, text):
    with pytest.raises(ValueError, match=text):
        Header.decode_fields(raw)


def test_field_slices_hold_their_fields():
    header = Header(size=0x1122, l1_entries=7, l1_at=HostAt(0x30000), incompatible=1)
    assert header.encode_field(FIELD_SIZE) == (0x1122).to_bytes(8, "big")
    assert header.encode_field(FIELD_L1) == (7).to_bytes(4, "big") + (0x30000).to_bytes(8, "big")
    assert header.encode_field(FIELD_FEATURES)[:8] == (1).to_bytes(8, "big")


def test_geometry():
    header = Header(cluster_bits=16, incompatible=Incompatible.EXTENDED_L2)
    assert (header.l2_entries, header.subcluster_size, header.l2_span) == (4096, 2048, 256 << 20)
    assert Header(cluster_bits=9).l2_entries == 64
    assert Header(refcount_order=0, cluster_bits=9).refcounts_per_block == 4096


def test_extensions_round_trip_and_unknown_ones_stay():
    extensions = [Extension(EXT_BACKING_FORMAT, b"raw"), Extension(0x99, b"12345678"), Extension(EXT_DATA_FILE, b"d")]
    raw = b"".join(map(encode_extension, extensions)) + bytes(8)
    assert list(iter_extensions(raw, 0, len(raw))) == extensions
    header = Header(extensions=tuple(extensions))
    assert (header.backing_format, header.data_file_name) == ("raw", "d")
    assert header.with_extension(0x99, None).extension(0x99) is None
    assert header.with_extension(0x99, b"x").extension(0x99) == b"x"
    assert len(header.with_extension(0x98, b"x").extensions) == 4


def test_an_extension_too_long_still_gives_those_before_it():
    raw = encode_extension(Extension(1, b"abc")) + b"\0\0\0\2\0\0\1\0"
    found = iter_extensions(raw, 0, len(raw))
    assert next(found) == Extension(1, b"abc")
    with pytest.raises(ValueError, match="Header extension too large"):
        next(found)


def test_feature_names_are_as_qemu_writes_them():
    raw = encode_feature_names(FEATURE_NAMES)
    assert tuple(decode_feature_names(raw)) == FEATURE_NAMES
    assert decode_feature_names(raw[:20]) == []


def test_bitmaps_and_luks_extensions():
    bitmaps = BitmapsExtension(2, 64, HostAt(0x70000))
    assert BitmapsExtension.decode(bitmaps.encode()) == bitmaps
    luks = LuksExtension(HostAt(0x40000), 4096)
    assert LuksExtension.decode(luks.encode()) == luks
    with pytest.raises(ValueError, match="Reserved field"):
        BitmapsExtension.decode(bitmaps.encode()[:4] + b"\0\0\0\1" + bitmaps.encode()[8:])
    with pytest.raises(ValueError, match="length"):
        BitmapsExtension.decode(b"")
    with pytest.raises(ValueError, match="size 3, but expected size 16"):
        LuksExtension.decode(b"abc")


def test_tables_are_big_endian():
    table = array("Q", [1, 1 << 63, 0x30000])
    raw = encode_table(table)
    assert raw[:8] == b"\0\0\0\0\0\0\0\1"
    assert decode_table(raw) == table


@pytest.mark.parametrize("width", [1, 2, 4, 8, 16, 32, 64])
def test_refcounts_of_every_width(width):
    rng = random.Random(width)
    counts = refcount_array(width, 1024)
    for place in range(len(counts)):
        counts[place] = rng.getrandbits(width)
    raw = encode_refcounts(counts, width)
    assert len(raw) == 1024 * width // 8
    assert decode_refcounts(raw, width) == counts
    assert decode_refcounts(memoryview(raw), width) == counts


def test_narrow_refcounts_start_at_the_lowest_bits():
    assert list(decode_refcounts(b"\x21", 4)) == [1, 2]
    assert list(decode_refcounts(b"\x01", 1)) == [1, 0, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("cluster_bits", [9, 12, 16, 21])
def test_compressed_descriptors(cluster_bits):
    cluster = 1 << cluster_bits
    for at, length in [(0x50000, 1), (0x50001, cluster - 1), (0x501FF, 2), ((1 << 40) + 511, 513 % cluster or 2)]:
        entry = pack_compressed(at, length, cluster_bits)
        stream = unpack_compressed(entry, cluster_bits)
        assert entry & COMPRESSED
        assert stream.at == at
        assert length <= stream.length < length + 512
        assert (stream.at + stream.length) % 512 == 0


def test_snapshot_entries():
    v2 = SnapshotEntry(l1_at=HostAt(1 << 16), l1_entries=1, id=b"1", name=b"old", date_s=5, vm_state_bytes=7)
    v3 = SnapshotEntry(
        l1_at=HostAt(1 << 17),
        l1_entries=2,
        id=b"2",
        name="ä".encode(),
        vm_state_bytes=1 << 33,
        disk_size=1 << 40,
        icount=9,
        extra=b"more",
    )
    raw = v2.encode() + v3.encode()
    first, at = SnapshotEntry.decode(raw, 0)
    second, end = SnapshotEntry.decode(raw, at)
    assert (first, second, end) == (v2, v3, len(raw))
    for cut in (len(raw) - 8, at + 20):
        with pytest.raises(ValueError, match="cut off"):
            SnapshotEntry.decode(raw[:cut], at)
    with pytest.raises(ValueError, match="Too much extra"):
        SnapshotEntry.decode(raw[:36] + b"\xff\xff\xff\xff" + raw[40:], 0)


def test_bitmap_entries():
    entry = BitmapEntry(table_at=HostAt(1 << 16), table_entries=1, flags=2, granularity_bits=16, name=b"b0", extra=b"e")
    raw = entry.encode()
    assert len(raw) % 8 == 0
    assert BitmapEntry.decode(raw, 0) == (entry, len(raw))
    for cut in (10, 26):
        with pytest.raises(ValueError, match="Broken bitmap directory"):
            BitmapEntry.decode(raw[:cut], 0)


@pytest.mark.qemu
def test_headers_made_by_qemu(tmp_path):
    image = tmp_path / "t.qcow2"
    create = "qemu-img create -q -f qcow2 -o lazy_refcounts=on,compression_type=zstd -u -b base.img -F raw"
    subprocess.run([*create.split(), str(image), "1G"], check=True)
    raw = image.read_bytes()
    header = header_of(raw)
    assert (header.size, header.backing_file, header.backing_format) == (1 << 30, "base.img", "raw")
    assert tuple(header.feature_names) == FEATURE_NAMES
    assert header.encode_fields() == raw[:112]
    listed = b"".join(map(encode_extension, header.extensions))
    assert raw[112 : 112 + len(listed)] == listed
    assert header.extension(EXT_FEATURE_NAMES) == encode_feature_names()
