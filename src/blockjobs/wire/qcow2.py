"""The qcow2 header and its extensions: bytes to values and back, without any I/O (spec/block-layer.md §6).

Codecs here know syntax only. Whether an image makes sense (limits, places in the file, features) is decided by
`block/drivers/qcow2/header.py`.
"""

import struct
from collections.abc import Iterator
from enum import IntFlag
from typing import Final, NamedTuple, NewType, Self

from msgspec import Struct
from msgspec.structs import replace

GuestAt = NewType("GuestAt", int)
"""Bytes from the start of what the guest sees."""
HostAt = NewType("HostAt", int)
"""Bytes from the start of the image file (or of the external data file)."""

MAGIC: Final = b"QFI\xfb"
SECTOR: Final = 512
"""Bytes written atomically by the medium model; H0 is the first one (spec/durability.md §1)."""

CLUSTER_BITS_MIN: Final = 9
CLUSTER_BITS_MAX: Final = 21
REFCOUNT_ORDER_MAX: Final = 6
BACKING_NAME_MAX: Final = 1023
L1_BYTES_MAX: Final = 32 << 20
REFCOUNT_TABLE_BYTES_MAX: Final = 8 << 20
SNAPSHOTS_MAX: Final = 65536
BITMAPS_MAX: Final = 65535
BITMAP_DIRECTORY_BYTES_MAX: Final = BITMAPS_MAX * 1024
EXTENDED_L2_CLUSTER_BITS_MIN: Final = 14
SUBCLUSTERS: Final = 32
"""Parts of a cluster with extended L2 entries."""

V2_BYTES: Final = 72
V3_BYTES: Final = 104
WRITTEN_V3_BYTES: Final = 112
"""Length of the headers that we and QEMU write: v3 with the compression type and its padding."""

_V2: Final = struct.Struct(">4sIQIIQIIQQIIQ")
_V3: Final = struct.Struct(">QQQII")
assert _V2.size == V2_BYTES and _V2.size + _V3.size == V3_BYTES

EXT_END: Final = 0
EXT_BACKING_FORMAT: Final = 0xE2792ACA
EXT_FEATURE_NAMES: Final = 0x6803F857
EXT_BITMAPS: Final = 0x23852875
EXT_LUKS: Final = 0x0537BE77
EXT_DATA_FILE: Final = 0x44415441

CRYPT_NONE: Final = 0
CRYPT_AES: Final = 1
CRYPT_LUKS: Final = 2

ZLIB: Final = 0
ZSTD: Final = 1


class Incompatible(IntFlag):
    """Features that a reader must know."""

    DIRTY = 1
    CORRUPT = 2
    DATA_FILE = 4
    COMPRESSION_TYPE = 8
    EXTENDED_L2 = 16


class Compatible(IntFlag):
    """Features that anybody may ignore."""

    LAZY_REFCOUNTS = 1


class Autoclear(IntFlag):
    """Features that a writer who does not know them clears."""

    BITMAPS = 1
    DATA_FILE_RAW = 2


class Feature(NamedTuple):
    """A line of the feature name table: `kind` 0 incompatible, 1 compatible, 2 autoclear."""

    kind: int
    bit: int
    name: str


FEATURE_NAMES: Final = (
    Feature(0, 0, "dirty bit"),
    Feature(0, 1, "corrupt bit"),
    Feature(0, 2, "external data file"),
    Feature(0, 3, "compression type"),
    Feature(0, 4, "extended L2 entries"),
    Feature(1, 0, "lazy refcounts"),
    Feature(2, 0, "bitmaps"),
    Feature(2, 1, "raw external data"),
)
_FEATURE: Final = struct.Struct(">BB46s")


def decode_feature_names(content: bytes) -> list[Feature]:
    """The feature name table; a torn last line is ignored."""
    whole = len(content) // _FEATURE.size * _FEATURE.size
    return [
        Feature(kind, bit, name.split(b"\0")[0].decode("utf-8", "replace"))
        for kind, bit, name in _FEATURE.iter_unpack(content[:whole])
    ]


def encode_feature_names(features: tuple[Feature, ...] = FEATURE_NAMES) -> bytes:
    """The content of the extension."""
    return b"".join(_FEATURE.pack(each.kind, each.bit, each.name.encode()) for each in features)


class Extension(NamedTuple):
    """A header extension as it is stored, without padding; unknown ones are kept as they are."""

    type: int
    content: bytes


def iter_extensions(cluster: bytes, at: int, end: int) -> Iterator[Extension]:
    """The extensions from `at` on, up to the end mark or `end`.

    Raises:
        ValueError: one reaches beyond `end`; those before it have been yielded.
    """
    while at + 8 <= end:
        kind, length = struct.unpack_from(">II", cluster, at)
        if kind == EXT_END:
            return
        at += 8
        if length > end - at:
            raise ValueError("Header extension too large")
        yield Extension(kind, cluster[at : at + length])
        at += length + -length % 8


def encode_extension(extension: Extension) -> bytes:
    """Type, length, content and padding."""
    content = extension.content
    return struct.pack(">II", extension.type, len(content)) + content + bytes(-len(content) % 8)


_BITMAPS: Final = struct.Struct(">IIQQ")


class BitmapsExtension(NamedTuple):
    """Where the directory of persistent bitmaps is."""

    bitmaps: int
    directory_bytes: int
    directory_at: HostAt

    @classmethod
    def decode(cls, content: bytes) -> Self:
        """Read the content of the extension.

        Raises:
            ValueError: wrong length or a reserved field in use.
        """
        if len(content) != _BITMAPS.size:
            raise ValueError("bitmaps_ext: Invalid extension length")
        bitmaps, reserved, size, at = _BITMAPS.unpack(content)
        if reserved:
            raise ValueError("bitmaps_ext: Reserved field is not zero")
        return cls(bitmaps, size, HostAt(at))

    def encode(self) -> bytes:
        """The content of the extension."""
        return _BITMAPS.pack(self.bitmaps, 0, self.directory_bytes, self.directory_at)


class LuksExtension(NamedTuple):
    """Where the LUKS header is."""

    at: HostAt
    length: int

    @classmethod
    def decode(cls, content: bytes) -> Self:
        """Read the content of the extension.

        Raises:
            ValueError: wrong length.
        """
        if len(content) != 16:
            raise ValueError(f"CRYPTO header extension size {len(content)}, but expected size 16")
        at, length = struct.unpack(">QQ", content)
        return cls(HostAt(at), length)

    def encode(self) -> bytes:
        """The content of the extension."""
        return struct.pack(">QQ", self.at, self.length)


class Field(NamedTuple):
    """Bytes of H0 that one root change rewrites (spec/durability.md §1, I5)."""

    at: int
    end: int


FIELD_BACKING: Final = Field(8, 20)
FIELD_SIZE: Final = Field(24, 32)
FIELD_L1: Final = Field(36, 48)
FIELD_REFCOUNT_TABLE: Final = Field(48, 60)
FIELD_SNAPSHOTS: Final = Field(60, 72)
FIELD_FEATURES: Final = Field(72, 96)
FIELD_INCOMPATIBLE: Final = Field(72, 80)
FIELD_AUTOCLEAR: Final = Field(88, 96)
FIELD_SIZE_AND_L1: Final = Field(24, 48)
FIELD_REFCOUNTS: Final = Field(48, 100)
"""Refcount table and width in one write; rewrites snapshots and features between them as they are."""


class Header(Struct, frozen=True, kw_only=True):
    """All that cluster 0 says. A value: changes make a new one (`msgspec.structs.replace`).

    Attributes:
        size: virtual length in bytes.
        l1_entries: length of the active L1 table, in entries.
        header_bytes: the header_length field, where extensions begin; 72 for version 2.
        extra: header bytes past the compression type that this program does not know, kept as they are.
        backing_file: None if there is none; the bytes' own encoding survives (surrogateescape).
        backing_at: place of that string in the file, 0 if there is none.
    """

    version: int = 3
    cluster_bits: int = 16
    size: int = 0
    crypt_method: int = CRYPT_NONE
    l1_entries: int = 0
    l1_at: HostAt = HostAt(0)
    refcount_table_at: HostAt = HostAt(0)
    refcount_table_clusters: int = 0
    snapshots: int = 0
    snapshots_at: HostAt = HostAt(0)
    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    refcount_order: int = 4
    header_bytes: int = WRITTEN_V3_BYTES
    compression_type: int = ZLIB
    extra: bytes = b""
    backing_file: str | None = None
    backing_at: int = 0
    backing_bytes: int = 0
    extensions: tuple[Extension, ...] = ()

    @classmethod
    def decode_fields(cls, raw: bytes) -> Self:
        """Read the fixed fields from the first bytes of the file; unused fields of v2 get their meaning in v2.

        `raw` should reach to `header_bytes` if that is more than 112; what is missing counts as zero.

        Raises:
            ValueError: no qcow2 magic, or a version that is neither 2 nor 3; the text is QEMU's.
        """
        raw = raw.ljust(WRITTEN_V3_BYTES, b"\0")
        magic, version, backing_at, backing_bytes, bits, size, crypt, l1, l1_at, rt_at, rt, snapshots, snapshots_at = (
            _V2.unpack_from(raw)
        )
        if magic != MAGIC:
            raise ValueError("Image is not in qcow2 format")
        if version not in (2, 3):
            raise ValueError(f"Unsupported qcow2 version {version}")
        header = cls(
            version=version,
            cluster_bits=bits,
            size=size,
            crypt_method=crypt,
            l1_entries=l1,
            l1_at=HostAt(l1_at),
            refcount_table_at=HostAt(rt_at),
            refcount_table_clusters=rt,
            snapshots=snapshots,
            snapshots_at=HostAt(snapshots_at),
            header_bytes=V2_BYTES,
            backing_at=backing_at,
            backing_bytes=backing_bytes,
        )
        if version == 2:
            return header
        incompatible, compatible, autoclear, refcount_order, header_bytes = _V3.unpack_from(raw, V2_BYTES)
        return replace(
            header,
            incompatible=incompatible,
            compatible=compatible,
            autoclear=autoclear,
            refcount_order=refcount_order,
            header_bytes=header_bytes,
            compression_type=raw[V3_BYTES] if header_bytes > V3_BYTES else ZLIB,
        )

    def decode_rest(self, cluster: bytes) -> Self:
        """The same with unknown fields, extensions and backing string, read from cluster 0.

        `cluster` may be shorter than a cluster, if the file is.

        Raises:
            ValueError: an extension or the string does not fit; the text is QEMU's.
        """
        cluster = cluster.ljust(self.cluster_size, b"\0")
        extensions = tuple(iter_extensions(cluster, self.header_bytes, self.backing_at or len(cluster)))
        backing_file = None
        if self.backing_at:
            if self.backing_bytes > min(BACKING_NAME_MAX, len(cluster) - self.backing_at):
                raise ValueError("Backing file name too long")
            name = cluster[self.backing_at : self.backing_at + self.backing_bytes]
            backing_file = name.decode("utf-8", "surrogateescape")
        extra = cluster[WRITTEN_V3_BYTES : self.header_bytes] if self.version > 2 else b""
        return replace(self, extra=extra, extensions=extensions, backing_file=backing_file)

    def encode_fields(self) -> bytes:
        """The fixed fields: the first `header_bytes` bytes of the file."""
        fields = _V2.pack(
            MAGIC,
            self.version,
            self.backing_at,
            self.backing_bytes,
            self.cluster_bits,
            self.size,
            self.crypt_method,
            self.l1_entries,
            self.l1_at,
            self.refcount_table_at,
            self.refcount_table_clusters,
            self.snapshots,
            self.snapshots_at,
        )
        if self.version == 2:
            return fields
        fields += _V3.pack(self.incompatible, self.compatible, self.autoclear, self.refcount_order, self.header_bytes)
        if self.header_bytes > V3_BYTES:
            fields += bytes([self.compression_type]).ljust(8, b"\0") + self.extra
        return fields

    def encode_field(self, part: Field) -> bytes:
        """Only the bytes of `part`, to be written at `part.at`."""
        return self.encode_fields()[part.at : part.end]

    @property
    def cluster_size(self) -> int:
        """Bytes of a cluster."""
        return 1 << self.cluster_bits

    @property
    def has_extended_l2(self) -> bool:
        """Whether L2 entries are 16 bytes long and clusters have 32 subclusters."""
        return bool(self.incompatible & Incompatible.EXTENDED_L2)

    @property
    def l2_entry_bytes(self) -> int:
        """8, or 16 with extended L2 entries."""
        return 16 if self.has_extended_l2 else 8

    @property
    def l2_entries(self) -> int:
        """Entries of one L2 table."""
        return self.cluster_size // self.l2_entry_bytes

    @property
    def l2_span(self) -> int:
        """Guest bytes that one L2 table maps."""
        return self.l2_entries * self.cluster_size

    @property
    def subcluster_size(self) -> int:
        """Bytes of the unit of allocation: the subcluster, or the cluster where there are none."""
        return self.cluster_size // SUBCLUSTERS if self.has_extended_l2 else self.cluster_size

    @property
    def refcount_bits(self) -> int:
        """Width of a refcount."""
        return 1 << self.refcount_order

    @property
    def refcounts_per_block(self) -> int:
        """Clusters that one refcount block counts."""
        return self.cluster_size * 8 // self.refcount_bits

    @property
    def has_data_file(self) -> bool:
        """Whether guest data is in an external file."""
        return bool(self.incompatible & Incompatible.DATA_FILE)

    @property
    def is_data_file_raw(self) -> bool:
        """Whether the external file alone shows the whole disk."""
        return self.has_data_file and bool(self.autoclear & Autoclear.DATA_FILE_RAW)

    def extension(self, kind: int) -> bytes | None:
        """Content of the first extension of that type."""
        return next((each.content for each in self.extensions if each.type == kind), None)

    def with_extension(self, kind: int, content: bytes | None) -> Self:
        """The same header with the extension of that type replaced, appended, or with None removed."""
        if content is None:
            return replace(self, extensions=tuple(each for each in self.extensions if each.type != kind))
        new = Extension(kind, content)
        if self.extension(kind) is None:
            return replace(self, extensions=(*self.extensions, new))
        return replace(self, extensions=tuple(new if each.type == kind else each for each in self.extensions))

    @property
    def backing_format(self) -> str | None:
        """What the header says of the backing file's format."""
        return self._text(EXT_BACKING_FORMAT)

    @property
    def data_file_name(self) -> str | None:
        """What the header calls the external data file."""
        return self._text(EXT_DATA_FILE)

    def _text(self, kind: int) -> str | None:
        content = self.extension(kind)
        return None if content is None else content.decode("utf-8", "surrogateescape")

    @property
    def bitmaps(self) -> BitmapsExtension | None:
        """The bitmaps extension, if it is valid; call only after the open checks, which have decoded it then."""
        content = self.extension(EXT_BITMAPS) if self.autoclear & Autoclear.BITMAPS else None
        return None if content is None else BitmapsExtension.decode(content)

    @property
    def luks(self) -> LuksExtension | None:
        """The LUKS extension; call only after the open checks, which have decoded it once."""
        content = self.extension(EXT_LUKS)
        return None if content is None else LuksExtension.decode(content)

    @property
    def feature_names(self) -> list[Feature]:
        """The image's own feature name table."""
        return decode_feature_names(self.extension(EXT_FEATURE_NAMES) or b"")
