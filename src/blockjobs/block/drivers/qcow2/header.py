"""Opening an image: every number in the header is checked before it is used for anything (spec/durability.md §2, §3).

Texts and order of the checks are QEMU's where it has such a check. It has none for tables that lie outside the file
or on top of the header; we refuse them when opening, and `check` reports them.
"""

from itertools import pairwise
from typing import Final

from blockjobs.base.errors import UsageError
from blockjobs.base.span import Span
from blockjobs.block.driver import Child
from blockjobs.wire.qcow2 import (
    BITMAP_DIRECTORY_BYTES_MAX,
    BITMAPS_MAX,
    CLUSTER_BITS_MAX,
    CLUSTER_BITS_MIN,
    CRYPT_AES,
    CRYPT_LUKS,
    CRYPT_NONE,
    EXT_BACKING_FORMAT,
    EXT_BITMAPS,
    EXT_FEATURE_NAMES,
    EXT_LUKS,
    EXTENDED_L2_CLUSTER_BITS_MIN,
    L1_BYTES_MAX,
    REFCOUNT_ORDER_MAX,
    REFCOUNT_TABLE_BYTES_MAX,
    SECTOR,
    SNAPSHOTS_MAX,
    V3_BYTES,
    ZLIB,
    ZSTD,
    Autoclear,
    BitmapsExtension,
    Header,
    Incompatible,
    LuksExtension,
    decode_feature_names,
    iter_extensions,
)

KNOWN_INCOMPATIBLE: Final = int(sum(Incompatible))
BACKING_FORMAT_MAX: Final = 15
_SNAPSHOT_ENTRY_MIN: Final = 40


async def read_header(file: Child, *, read_only: bool, for_check: bool = False) -> Header:
    """Read cluster 0 and refuse whatever no reader could make sense of.

    Reads at most one cluster, and holds no more than that in memory.

    Args:
        file: the node that has the image.
        read_only: an image marked corrupt may be read only.
        for_check: accept tables outside the file or on top of each other, and a corrupt mark: the checker reports
            them, or does not need to know.

    Raises:
        UsageError: the image is refused; one line that names what is wrong.
        IoFailure: the file could not be read.

    Checkpoint: no. Waits: two reads.
    """
    start = await _read_start(file, SECTOR)
    try:
        header = Header.decode_fields(start)
        _check_sizes(header, len(start))
        cluster = await _read_start(file, header.cluster_size)
        _check_features(header, cluster)
        if header.incompatible & Incompatible.CORRUPT and not (read_only or for_check):
            raise ValueError("qcow2: Image is corrupt; cannot be opened read/write")
        _check_tables(header)
        header = header.decode_rest(cluster)
        _check_extensions(header)
        if not for_check:
            _check_places(header, file.length)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return header


async def _read_start(file: Child, length: int) -> bytes:
    return await file.read(0, min(length, file.length))


def _check_sizes(header: Header, available: int) -> None:
    if not CLUSTER_BITS_MIN <= header.cluster_bits <= CLUSTER_BITS_MAX:
        raise ValueError(f"Unsupported cluster size: 2^{header.cluster_bits}")
    if available < header.header_bytes and available < V3_BYTES:
        raise ValueError("qcow2 header too short")
    if header.version > 2 and header.header_bytes < V3_BYTES:
        raise ValueError("qcow2 header too short")
    if header.header_bytes > header.cluster_size:
        raise ValueError("qcow2 header exceeds cluster size")
    if header.backing_at > header.cluster_size:
        raise ValueError("Invalid backing file offset")


def _check_features(header: Header, cluster: bytes) -> None:
    if header.compression_type not in (ZLIB, ZSTD):
        raise ValueError(f"qcow2: unknown compression type: {header.compression_type}")
    if bool(header.incompatible & Incompatible.COMPRESSION_TYPE) != (header.compression_type != ZLIB):
        must = "must" if header.compression_type != ZLIB else "must not"
        raise ValueError(f"qcow2: Compression type incompatible feature bit {must} be set")
    unknown = header.incompatible & ~KNOWN_INCOMPATIBLE
    if unknown:
        raise ValueError(f"Unsupported qcow2 feature(s): {_feature_texts(header, cluster, unknown)}")


def _feature_texts(header: Header, cluster: bytes, unknown: int) -> str:
    """The names the image itself gives its features, and the bits without a name in hexadecimal."""
    names: dict[int, str] = {}
    try:
        for extension in iter_extensions(cluster, header.header_bytes, header.backing_at or len(cluster)):
            if extension.type == EXT_FEATURE_NAMES:  # of several tables the last counts, as in QEMU
                names = {}
                for feature in decode_feature_names(extension.content):
                    if feature.kind == 0 and feature.name:
                        names.setdefault(feature.bit, feature.name)
    except ValueError:
        pass  # a broken extension further on: the names found before it are still the best answer
    texts = [name for bit, name in names.items() if bit < 64 and unknown >> bit & 1]
    unknown &= ~sum(1 << bit for bit in names if bit < 64)
    if unknown:
        texts.append(f"Unknown incompatible feature: {unknown:x}")
    return ", ".join(texts)


def _check_table(what: str, at: int, size: int, size_max: int, cluster_size: int) -> None:
    if size > size_max:
        raise ValueError(f"{what} too large")
    if at % cluster_size or at >= 1 << 63 or at + size >= 1 << 63:
        raise ValueError(f"{what} offset invalid")


def _check_tables(header: Header) -> None:
    cluster_size = header.cluster_size
    if header.refcount_order > REFCOUNT_ORDER_MAX:
        raise ValueError("Reference count entry width too large; may not exceed 64 bits")
    if header.crypt_method not in (CRYPT_NONE, CRYPT_AES, CRYPT_LUKS):
        raise ValueError(f"Unsupported encryption method {header.crypt_method}")
    if header.has_extended_l2 and header.cluster_bits < EXTENDED_L2_CLUSTER_BITS_MIN:
        raise ValueError(f"Unsupported subcluster size: {header.subcluster_size}")
    if header.refcount_table_clusters == 0:
        raise ValueError("Image does not contain a reference count table")
    table_bytes = header.refcount_table_clusters * cluster_size
    _check_table("Reference count table", header.refcount_table_at, table_bytes, REFCOUNT_TABLE_BYTES_MAX, cluster_size)
    if header.snapshots > SNAPSHOTS_MAX:
        raise ValueError("Snapshot table too large")
    if header.snapshots:
        _check_table("Snapshot table", header.snapshots_at, 0, 0, cluster_size)
    _check_table("Active L1 table", header.l1_at, header.l1_entries * 8, L1_BYTES_MAX, cluster_size)
    needed = -(-header.size // header.l2_span)
    if header.size >= 1 << 63 or needed > (1 << 31) - 1:
        raise ValueError("Image is too big")
    if header.l1_entries < needed:
        raise ValueError("L1 table is too small")


def _check_extensions(header: Header) -> None:
    for kind, content in header.extensions:
        if kind == EXT_BACKING_FORMAT and len(content) > BACKING_FORMAT_MAX:
            raise ValueError(f"ERROR: ext_backing_format: len={len(content)} too large (>=16)")
        if kind == EXT_LUKS:
            _check_luks(header, content)
        if kind == EXT_BITMAPS and header.autoclear & Autoclear.BITMAPS:
            _check_bitmaps(BitmapsExtension.decode(content), header.cluster_size)
    if header.autoclear & Autoclear.DATA_FILE_RAW and not header.has_data_file:
        raise ValueError("data-file-raw requires a data file")
    if header.crypt_method == CRYPT_LUKS and header.extension(EXT_LUKS) is None:
        raise ValueError("Missing CRYPTO header for crypt method 2")


def _check_luks(header: Header, content: bytes) -> None:
    if header.crypt_method != CRYPT_LUKS:
        raise ValueError("CRYPTO header extension only expected with LUKS encryption method")
    at = LuksExtension.decode(content).at
    if at % header.cluster_size:
        raise ValueError(f"Encryption header offset '{at}' is not a multiple of cluster size '{header.cluster_size}'")


def _check_bitmaps(bitmaps: BitmapsExtension, cluster_size: int) -> None:
    if bitmaps.bitmaps == 0:
        raise ValueError("found bitmaps extension with zero bitmaps")
    if bitmaps.directory_at % cluster_size:
        raise ValueError("bitmaps_ext: invalid bitmap directory offset")
    if bitmaps.bitmaps > BITMAPS_MAX:
        raise ValueError(
            f"bitmaps_ext: Image has {bitmaps.bitmaps} bitmaps, exceeding the QEMU supported maximum of {BITMAPS_MAX}"
        )
    if bitmaps.directory_bytes > BITMAP_DIRECTORY_BYTES_MAX:
        raise ValueError(
            f"bitmaps_ext: bitmap directory size ({bitmaps.directory_bytes}) exceeds the maximum supported size "
            f"({BITMAP_DIRECTORY_BYTES_MAX})"
        )


def metadata_places(header: Header) -> list[tuple[str, Span]]:
    """The places in the file that the header itself names, for messages and overlap checks, at byte granularity."""
    places = [
        ("header", Span(0, header.cluster_size)),
        ("reference count table", Span(header.refcount_table_at, header.refcount_table_clusters * header.cluster_size)),
    ]
    if header.l1_entries:
        places.append(("active L1 table", Span(header.l1_at, header.l1_entries * 8)))
    if header.crypt_method == CRYPT_LUKS and header.luks is not None:
        places.append(("encryption header", Span(header.luks.at, header.luks.length)))
    if header.snapshots:
        places.append(("snapshot table", Span(header.snapshots_at, header.snapshots * _SNAPSHOT_ENTRY_MIN)))
    return places


def _check_places(header: Header, file_bytes: int) -> None:
    # The last cluster of a file may be cut off: QEMU writes tables without padding, and the rest reads as zeroes.
    end = -(-file_bytes // header.cluster_size) * header.cluster_size
    places = metadata_places(header)
    for what, span in places[1:]:
        if span.end > end:
            raise ValueError(f"The {what} lies beyond the end of the file")
    in_order = sorted(places, key=lambda place: place[1].at)
    for (what, span), (other, after) in pairwise(in_order):
        if span.overlaps(after):
            raise ValueError(f"The {other} overlaps with the {what}")
