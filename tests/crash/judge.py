"""A second opinion on small images: reads a qcow2 file whole and shares no code with the program (docs: qcow2's own).

It exists to be fast, a tenth of a millisecond per image, so that hundreds of thousands of crash states can be looked at
one by one, and to be independent of the check that the program ships. It knows what the runs in `short_runs` make, and
calls everything else a problem.
"""

import struct
import zlib
from array import array
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from sectors import DISK_PLACES, SECTOR, ZERO_SECTOR, Place, Sectors

from blockjobs.testing.toy_cipher import ToyCipher

COPIED, COMPRESSED, OFFSET = 1 << 63, 1 << 62, 0x00FF_FFFF_FFFF_FE00
L1_RESERVED, L2_RESERVED = 0x7F00_0000_0000_01FF, 0x3F00_0000_0000_01FE
DIRTY, CORRUPT, DATA_FILE, COMPRESSION_TYPE, EXTENDED = 1, 2, 4, 8, 16
BITMAPS, DATA_FILE_RAW = 1, 2
_HEADER = struct.Struct(">4sIQIIQIIQQIIQ")
_SNAPSHOT = struct.Struct(">QIHHIIQII")
_BITMAP = struct.Struct(">QIIBBHI")
EXT_BITMAPS, EXT_LUKS = 0x23852875, 0x0537BE77

Content = tuple[bytes, ...]
Owner = tuple[str, int]
"""What refers to a cluster, the same in all snapshots of a disk: ("data", sector of the disk), ("L2", its index)."""
HEADER, COMPRESSED_DATA = ("header", 0), ("compressed", 0)


class Bitmap(NamedTuple):
    """A stored bitmap: one bit for each `granularity` bytes, as a number; not to be believed if `in_use`."""

    in_use: bool
    granularity: int
    bits: int


@dataclass
class Verdict:
    """What the image says.

    Attributes:
        problems: what `qemu-img check` would call corruption, apart from flags that do no harm; leaks are none.
        content: the sectors of the disk; `snapshots`, those of each snapshot, by id.
        raw: the sectors of a data file that is to show the disk too; empty if there is none.
        owners: of each cluster in use.
        is_dirty: the counts are to be rebuilt before anything is written, so they are not judged.
        read: the sectors that were looked at; the verdict depends on nothing else.
    """

    problems: list[str] = field(default_factory=list)
    content: Content = ()
    raw: Content = ()
    snapshots: dict[bytes, Content] = field(default_factory=dict)
    bitmaps: dict[bytes, Bitmap] = field(default_factory=dict)
    is_dirty: bool = False
    cluster_size: int = 0
    owners: dict[int, list[Owner]] = field(default_factory=dict)
    read: set[Place] = field(default_factory=set)


def judge(
    file: Sectors, data: Sectors | None = None, cipher: ToyCipher | None = None, *, tweaks_on_disk: bool = False
) -> Verdict:
    """Read an image; `data` is its data file if it has one, `cipher` what its clusters are enciphered with.

    Args:
        tweaks_on_disk: it counts from the beginning of the disk and not of the file.
    """
    reader = _Reader(file, data, cipher, tweaks_on_disk=tweaks_on_disk)
    try:
        reader.read()
    except (struct.error, IndexError, zlib.error, ValueError) as error:
        reader.verdict.problems.append(f"cannot be read: {error!r}")
    reader.verdict.cluster_size, reader.verdict.owners = reader.size, reader.owners
    return reader.verdict


@lru_cache(50_000)
def _words(sectors: Content) -> tuple[tuple[int, int], ...]:
    """(index, word) of the words of a table that are not 0."""
    words = array("Q", b"".join(sectors))
    words.byteswap()
    return tuple((index, word) for index, word in enumerate(words) if word)


@lru_cache(50_000)
def _counts(sectors: Content, order: int) -> tuple[int, ...]:
    """The refcounts of a block."""
    raw, width = b"".join(sectors), 1 << order
    if width >= 8:
        counts = array({8: "B", 16: "H", 32: "I", 64: "Q"}[width], raw)
        counts.byteswap()
        return tuple(counts)
    mask = (1 << width) - 1
    return tuple(byte >> shift & mask for byte in raw for shift in range(0, 8, width))


@lru_cache(50_000)
def _inflated(stream: bytes, length: int) -> Content:
    found = zlib.decompressobj(-12).decompress(stream, length)
    if len(found) != length:
        raise ValueError("a compressed cluster is cut off")
    return tuple(found[at : at + SECTOR] for at in range(0, length, SECTOR))


@lru_cache(50_000)
def _deciphered(cipher: ToyCipher, at: int, sector: bytes) -> bytes:
    return cipher.encipher(at, sector)  # the same both ways


class _Reader:
    def __init__(self, file: Sectors, data: Sectors | None, cipher: ToyCipher | None, *, tweaks_on_disk: bool) -> None:
        self.file, self.data, self.cipher, self.tweaks_on_disk = file, data, cipher, tweaks_on_disk
        self.verdict = Verdict()
        self.size = 0
        self.references: dict[int, int] = {}
        self.owners: dict[int, list[Owner]] = {}
        self.copied: list[int] = []

    def sectors(self, at: int, length: int, *, of_data_file: bool = False) -> Sectors:
        """The sectors of a file with some bytes, zeroes past its end."""
        first, end = at // SECTOR, -(-(at + length) // SECTOR)
        source, place = self.file, 0
        if of_data_file and self.data is not None:
            source, place = self.data, DISK_PLACES
        self.verdict.read.update(range(place + first, place + end))
        found = source[first:end]
        return found if len(found) == end - first else found + [ZERO_SECTOR] * (end - first - len(found))

    def bytes_at(self, at: int, length: int) -> bytes:
        """Bytes of the file."""
        found = b"".join(self.sectors(at, length))
        return found[at % SECTOR :][:length] if at % SECTOR or length % SECTOR else found

    def table(self, at: int, length: int) -> Content:
        """The sectors with a table that begins at a cluster."""
        return tuple(self.sectors(at, length))

    def words(self, at: int, count: int) -> list[tuple[int, int]]:
        """(index, word) of those of `count` words that are not 0."""
        return [pair for pair in _words(self.table(at, count * 8)) if pair[0] < count]

    def refer(self, at: int, owner: Owner, clusters: int = 1) -> None:
        """Something refers to clusters of the file."""
        if at % self.size:
            self.verdict.problems.append(f"{at} is in the middle of a cluster")
        first = at // self.size
        for cluster in range(first, first + clusters):
            self.references[cluster] = self.references.get(cluster, 0) + 1
            self.owners.setdefault(cluster, []).append(owner)

    def clusters(self, length: int) -> int:
        """How many clusters so many bytes need."""
        return -(-length // self.size)

    def read(self) -> None:
        """All of it."""
        header = self.bytes_at(0, 512)
        (magic, version, _, _, bits, length, _, l1_entries, l1_at, table_at, table_clusters, snapshots,
         snapshots_at) = _HEADER.unpack_from(header)  # fmt: skip
        if magic != b"QFI\xfb" or version not in (2, 3):
            raise ValueError("no header")
        self.size, self.order, features, autoclear, at = 1 << bits, 4, 0, 0, 72
        if version == 3:
            features, _, autoclear, self.order, at = struct.unpack_from(">QQQII", header, 72)
        self.version, self.is_extended, self.has_data = version, bool(features & EXTENDED), bool(features & DATA_FILE)
        self.verdict.is_dirty = bool(features & DIRTY)
        if features & ~(DIRTY | DATA_FILE | EXTENDED) or self.has_data != (self.data is not None):
            self.verdict.problems.append(f"features {features:#x}")
        self.refer(0, HEADER)
        extensions = self.extensions(at)
        if EXT_LUKS in extensions:
            luks_at, luks_length = struct.unpack(">QQ", extensions[EXT_LUKS])
            self.refer(luks_at, HEADER, self.clusters(luks_length))
        self.verdict.content = self.disk(l1_at, l1_entries, length, is_active=True)
        if autoclear & DATA_FILE_RAW:
            self.verdict.raw = tuple(self.sectors(0, length, of_data_file=True))
        self.snapshots(snapshots_at, snapshots, length)
        if EXT_BITMAPS in extensions and autoclear & BITMAPS:
            self.bitmaps(extensions[EXT_BITMAPS], length)
        self.count(table_at, table_clusters)

    def extensions(self, at: int) -> dict[int, bytes]:
        """The header extensions by type."""
        cluster, found = self.bytes_at(0, self.size), {}
        while True:
            kind, length = struct.unpack_from(">II", cluster, at)
            if kind == 0:
                return found
            found[kind] = cluster[at + 8 : at + 8 + length]
            at += 8 + length + -length % 8

    def disk(self, l1_at: int, entries: int, length: int, *, is_active: bool) -> Content:
        """What an L1 table shows, with everything below it referred to."""
        step = 16 if self.is_extended else 8
        span = self.size // step * self.size
        if entries * span < length:
            self.verdict.problems.append(f"an L1 table of {entries} entries for {length} bytes")
        if entries:
            self.refer(l1_at, ("L1", l1_at), self.clusters(entries * 8))
        shown = [ZERO_SECTOR] * max(-(-length // span) * span // SECTOR, 1)
        for index, entry in self.words(l1_at, entries):
            table_at = entry & OFFSET
            if entry & L1_RESERVED or not table_at:
                self.verdict.problems.append(f"L1 entry {entry:#x}")
                continue
            self.refer(table_at, ("L2", index))
            if is_active and entry & COPIED:
                self.copied.append(table_at // self.size)
            self.l2_table(self.table(table_at, self.size), shown, index * span, is_active=is_active)
        return tuple(shown[: length // SECTOR])

    def l2_table(self, sectors: Content, shown: list[bytes], at: int, *, is_active: bool) -> None:
        """The clusters of an L2 table; those past the end of the disk are machine state and not shown."""
        per, end = self.size // SECTOR, len(shown)
        words = _words(sectors)
        if self.is_extended:
            pairs: dict[int, list[int]] = {}
            for index, word in words:
                pairs.setdefault(index // 2, [0, 0])[index % 2] = word
            entries = [(index, word, bits) for index, (word, bits) in pairs.items()]
        else:
            entries = [(index, word, -1) for index, word in words]
        for index, word, bits in entries:
            first = at // SECTOR + index * per
            visible = first < end
            if word & COMPRESSED:
                stream = self.compressed(word)
                if visible:
                    shown[first : first + per] = _inflated(stream, self.size)
                continue
            host = word & OFFSET
            if word & (L2_RESERVED | self.is_extended) or (word & 1 and self.version == 2):
                self.verdict.problems.append(f"L2 entry {word:#x}")
            if host or (self.has_data and word & COPIED):
                self.stored(host, word, first, is_active=is_active)
                if visible and not word & 1:
                    self.show(shown, first, host, bits)

    def stored(self, host: int, word: int, at: int, *, is_active: bool) -> None:
        if self.has_data:
            if not word & COPIED:
                self.verdict.problems.append("a cluster of the data file that is not owned")
            return
        self.refer(host, ("data", at))
        if is_active and word & COPIED:
            self.copied.append(host // self.size)

    def show(self, shown: list[bytes], first: int, host: int, bits: int) -> None:
        per = self.size // SECTOR
        here = self.sectors(host, self.size, of_data_file=self.has_data)
        if self.cipher is not None:
            start = first * SECTOR if self.tweaks_on_disk else host
            here = [_deciphered(self.cipher, start + place * SECTOR, each) for place, each in enumerate(here)]
        if self.is_extended:
            if bits & bits >> 32:
                self.verdict.problems.append(f"subclusters {bits:#x} both allocated and zero")
            if bits & 0xFFFF_FFFF == 0xFFFF_FFFF:
                shown[first : first + per] = here
                return
            each = per // 32
            for sub in range(32):
                if bits >> sub & 1:
                    shown[first + sub * each : first + (sub + 1) * each] = here[sub * each : (sub + 1) * each]
            return
        shown[first : first + per] = here

    def compressed(self, word: int) -> bytes:
        """The stream of a compressed cluster."""
        shift = 62 - (self.size.bit_length() - 1 - 8)
        at = word & ((1 << shift) - 1)
        sectors = (word & ~(COPIED | COMPRESSED)) >> shift
        end = (at // SECTOR + sectors + 1) * SECTOR
        if word & COPIED:
            self.verdict.problems.append(f"compressed and copied: {word:#x}")
        for cluster in range(at // self.size, (end - 1) // self.size + 1):
            self.refer(cluster * self.size, COMPRESSED_DATA)
        return self.bytes_at(at, end - at)

    def snapshots(self, at: int, count: int, length: int) -> None:
        """The snapshot table and what it refers to."""
        start = at
        for _ in range(count):
            l1_at, entries, id_bytes, name_bytes, _, _, _, _, extra = _SNAPSHOT.unpack(
                self.bytes_at(at, _SNAPSHOT.size))  # fmt: skip
            disk_length = struct.unpack(">Q", self.bytes_at(at + 48, 8))[0] if extra >= 16 else length
            id_at = at + _SNAPSHOT.size + extra
            name = self.bytes_at(id_at, id_bytes)
            self.verdict.snapshots[name] = self.disk(l1_at, entries, disk_length, is_active=False)
            at = id_at + id_bytes + name_bytes
            at += -at % 8
        if count:
            self.refer(start, ("snapshots", start), self.clusters(at - start))

    def bitmaps(self, extension: bytes, length: int) -> None:
        """The directory of bitmaps and what it refers to."""
        count, _, directory_bytes, start = struct.unpack(">IIQQ", extension)
        self.refer(start, ("bitmaps", start), self.clusters(directory_bytes))
        at = start
        for _ in range(count):
            table_at, entries, flags, kind, granularity, name_bytes, extra = _BITMAP.unpack(
                self.bytes_at(at, _BITMAP.size))  # fmt: skip
            name = self.bytes_at(at + _BITMAP.size + extra, name_bytes)
            at += _BITMAP.size + extra + name_bytes
            at += -at % 8
            self.refer(table_at, ("bitmap table", table_at), self.clusters(entries * 8))
            bits = 0
            for index, word in self.words(table_at, entries):
                piece = b"\xff" * self.size
                if word & OFFSET:
                    self.refer(word & OFFSET, ("bitmap", table_at))
                    piece = self.bytes_at(word & OFFSET, self.size)
                bits |= int.from_bytes(piece, "little") << index * self.size * 8
            if kind != 1 or flags & ~7 or ((entries * self.size * 8 << granularity) < length and not flags & 1):
                self.verdict.problems.append(f"bitmap {name!r}: kind {kind}, flags {flags}, {entries} clusters")
            self.verdict.bitmaps[name] = Bitmap(bool(flags & 1), 1 << granularity, bits)
        if at - start != directory_bytes:
            self.verdict.problems.append("a bitmap directory of another length than its entries have")

    def count(self, table_at: int, table_clusters: int) -> None:
        """Compare the refcounts with the references."""
        self.refer(table_at, ("counts", table_at), table_clusters)
        blocks = self.words(table_at, table_clusters * self.size // 8)
        for index, block_at in blocks:
            self.refer(block_at, ("block", index))
        per = self.size * 8 >> self.order
        counts = {index: _counts(self.table(at, self.size), self.order) for index, at in blocks}
        problems, references = self.verdict.problems, self.references
        for cluster, needed in references.items():
            block = counts.get(cluster // per)
            has = block[cluster % per] if block else 0
            if has < needed and not self.verdict.is_dirty:
                problems.append(f"cluster {cluster}: {needed} references, refcount {has}")
        problems += [
            f"cluster {cluster}: copied, with {references[cluster]} references"
            for cluster in self.copied
            if references[cluster] > 1 and not self.verdict.is_dirty
        ]
