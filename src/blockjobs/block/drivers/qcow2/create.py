"""Laying out a new image: refcounts, L1, preallocated tables ▷ the header, magic last (spec/durability.md §1, Create).

Everything is contiguous: header, refcount table, refcount blocks, L1, and with preallocation L2 tables, then data.
Texts and order of the checks are QEMU's (spec/jobs.md §5).
"""

from array import array
from collections.abc import Iterator
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from blockjobs.base.buffers import zeroes
from blockjobs.base.errors import IoFailure, UsageError
from blockjobs.base.span import Span
from blockjobs.block.driver import Child
from blockjobs.block.drivers.file_create import PreallocMode
from blockjobs.block.drivers.qcow2.header_update import lay_out, write_new_header
from blockjobs.block.vocabulary import ZeroMode
from blockjobs.wire.qcow2 import (
    BACKING_NAME_MAX,
    CLUSTER_BITS_MAX,
    CLUSTER_BITS_MIN,
    CRYPT_NONE,
    EXT_BACKING_FORMAT,
    EXT_DATA_FILE,
    EXT_LUKS,
    EXTENDED_L2_CLUSTER_BITS_MIN,
    L1_BYTES_MAX,
    REFCOUNT_TABLE_BYTES_MAX,
    SECTOR,
    V2_BYTES,
    WRITTEN_V3_BYTES,
    ZLIB,
    ZSTD,
    Autoclear,
    Compatible,
    Extension,
    Header,
    HostAt,
    Incompatible,
    LuksExtension,
)
from blockjobs.wire.qcow2_tables import COPIED, ZERO, encode_refcounts, encode_table, refcount_array

SIZE_MAX: Final = (1 << 63) - (1 << 30)
"""Largest virtual size: QEMU's limit for any node, which is below 2^63 - 512 (spec/durability.md §2)."""
WRITE_BYTES: Final = 1 << 20
"""Tables are written in pieces of about this length."""
SMALL_BYTES_MAX: Final = 4 << 20
"""A new file up to this long is written in one go."""


DEFAULT_CLUSTER_SIZE: Final = 1 << 16
DEFAULT_REFCOUNT_BITS: Final = 16


class NewImage(Struct, frozen=True, kw_only=True):
    """What a new image shall be. Sizes in bytes; nothing is checked until `check` and `check_limits` are called."""

    size: int
    is_v2: bool = False
    cluster_size: int = DEFAULT_CLUSTER_SIZE
    refcount_bits: int = DEFAULT_REFCOUNT_BITS
    backing_file: str | None = None
    backing_format: str | None = None
    data_file_name: str | None = None
    data_file_raw: bool = False
    extended_l2: bool = False
    lazy_refcounts: bool = False
    zstd: bool = False
    preallocation: PreallocMode = PreallocMode.OFF
    crypt_method: int = CRYPT_NONE
    encryption_bytes: int = 0
    """Length of the LUKS header, if it is enciphered so; its content is given to `create_image`."""

    def check(self) -> None:
        """Refuse options that make no sense, alone or together.

        Raises:
            UsageError: with QEMU's text, for the first fault in QEMU's order.
        """
        if self.size % SECTOR:
            raise UsageError("Image size must be a multiple of 512 bytes")
        self._check_clusters()
        if self.backing_file is not None and self.preallocation != PreallocMode.OFF and not self.extended_l2:
            raise UsageError("Backing file and preallocation can only be used at the same time if extended_l2 is on")
        if self.backing_format is not None and self.backing_file is None:
            raise UsageError("Backing format cannot be used without backing file")
        if self.is_v2 and self.lazy_refcounts:
            raise UsageError(_needs_v3("Lazy refcounts only supported"))
        if self.refcount_bits not in (1, 2, 4, 8, 16, 32, 64):
            raise UsageError("Refcount width must be a power of two and may not exceed 64 bits")
        if self.is_v2 and self.refcount_bits != 16:
            raise UsageError(
                "Different refcount widths than 16 bits require compatibility level 1.1 or above "
                "(use version=v3 or greater)"
            )
        if self.data_file_raw and self.backing_file is not None:
            raise UsageError("Backing file and data-file-raw cannot be used at the same time")
        if self.is_v2 and self.data_file_name is not None:
            raise UsageError(_needs_v3("External data files are only supported"))
        if self.data_file_raw and self.data_file_name is None:
            raise UsageError("data-file-raw requires data-file")
        if self.is_v2 and self.zstd:
            raise UsageError(_needs_v3("Non-zlib compression type is only supported"))

    def _check_clusters(self) -> None:
        if self.extended_l2 and self.is_v2:
            raise UsageError(_needs_v3("Extended L2 entries are only supported"))
        size = self.cluster_size
        if size & (size - 1) or not 1 << CLUSTER_BITS_MIN <= size <= 1 << CLUSTER_BITS_MAX:
            raise UsageError("Cluster size must be a power of two between 512 and 2048k")
        if self.extended_l2 and size < 1 << EXTENDED_L2_CLUSTER_BITS_MIN:
            raise UsageError("Extended L2 entries are only supported with cluster sizes of at least 16384 bytes")

    def check_limits(self) -> "Plan":
        """Refuse what the format cannot hold; call it after `check`, and after the nodes have been opened.

        Raises:
            UsageError: with QEMU's text.

        Returns: where everything comes to be.
        """
        if self.size < 0:
            raise UsageError("Could not resize image: Image size cannot be negative")
        if self.size > SIZE_MAX:
            raise UsageError(f"Could not resize image: offset({self.size}) exceeds maximum({SIZE_MAX})")
        plan = Plan.of(self)
        if plan.header.l1_entries * 8 > L1_BYTES_MAX:
            raise UsageError("Could not resize image: Failed to grow the L1 table: File too large")
        if plan.header.refcount_table_clusters * self.cluster_size > REFCOUNT_TABLE_BYTES_MAX:
            raise UsageError("Could not resize image: Failed to grow the refcount table: File too large")
        self._check_header_room(plan.header)
        return plan

    def _check_header_room(self, header: Header) -> None:
        length = len((self.backing_file or "").encode("utf-8", "surrogateescape"))
        what = f"Could not assign backing file '{self.backing_file}' with format '{self.backing_format or '(null)'}'"
        if length > BACKING_NAME_MAX:
            raise UsageError(f"{what}: Invalid argument")
        try:
            lay_out(header, Span(SECTOR, 0))
        except UsageError:
            if self.backing_file is None:
                raise
            raise UsageError(f"{what}: No space left on device") from None

    @property
    def has_l2_tables(self) -> bool:
        """Whether L2 tables are written now: a raw data file is only reachable through them."""
        return self.preallocation != PreallocMode.OFF or self.data_file_raw

    def _features(self) -> int:
        bits = Incompatible(0)
        if self.data_file_name is not None:
            bits |= Incompatible.DATA_FILE
        if self.zstd:
            bits |= Incompatible.COMPRESSION_TYPE
        if self.extended_l2:
            bits |= Incompatible.EXTENDED_L2
        return int(bits)

    def header(self) -> Header:
        """The header, without the places of tables."""
        extensions = []
        if self.backing_format is not None:
            extensions.append(Extension(EXT_BACKING_FORMAT, self.backing_format.encode()))
        if self.data_file_name is not None:
            extensions.append(Extension(EXT_DATA_FILE, self.data_file_name.encode("utf-8", "surrogateescape")))
        return Header(
            version=2 if self.is_v2 else 3,
            header_bytes=V2_BYTES if self.is_v2 else WRITTEN_V3_BYTES,
            cluster_bits=self.cluster_size.bit_length() - 1,
            size=self.size,
            incompatible=self._features(),
            compatible=int(Compatible.LAZY_REFCOUNTS) if self.lazy_refcounts else 0,
            autoclear=int(Autoclear.DATA_FILE_RAW) if self.data_file_raw else 0,
            refcount_order=self.refcount_bits.bit_length() - 1,
            compression_type=ZSTD if self.zstd else ZLIB,
            backing_file=self.backing_file or None,
            crypt_method=self.crypt_method,
            extensions=tuple(extensions),
        )


def _needs_v3(what: str) -> str:
    return f"{what} with compatibility level 1.1 and above (use version=v3 or greater)"


class Plan(Struct, frozen=True, kw_only=True):
    """Where everything comes to be; the counts are in clusters."""

    header: Header
    refcount_blocks: int
    l2_tables: int
    l2_at: int
    data_clusters: int
    data_at: int
    clusters: int

    @classmethod
    def of(cls, image: NewImage) -> "Plan":
        """Find room for all tables; refcount blocks count themselves, so their number is found by iteration."""
        header = image.header()
        size = header.cluster_size
        l1_entries = _ceil(image.size, header.l2_span)
        l1_clusters = _ceil(l1_entries * 8, size)
        l2_tables = l1_entries if image.has_l2_tables else 0
        is_inside = image.has_l2_tables and image.data_file_name is None
        data_clusters = _ceil(image.size, size) if is_inside else 0
        crypt_clusters = _ceil(image.encryption_bytes, size)
        fixed = 1 + l1_clusters + crypt_clusters + l2_tables + data_clusters
        blocks = table = 1
        while True:
            clusters = fixed + blocks + table
            blocks_needed = _ceil(clusters, header.refcounts_per_block)
            table_needed = _ceil(blocks_needed * 8, size)
            if (blocks_needed, table_needed) == (blocks, table):
                break
            blocks, table = blocks_needed, table_needed
        l1_at = (1 + table + blocks) * size
        crypt_at = l1_at + l1_clusters * size
        l2_at = crypt_at + crypt_clusters * size
        if image.encryption_bytes:
            place = LuksExtension(HostAt(crypt_at), image.encryption_bytes)
            header = header.with_extension(EXT_LUKS, place.encode())
        return cls(
            header=replace(
                header,
                refcount_table_at=HostAt(size),
                refcount_table_clusters=table,
                l1_at=HostAt(l1_at if l1_entries else 0),
                l1_entries=l1_entries,
            ),
            refcount_blocks=blocks,
            l2_tables=l2_tables,
            l2_at=l2_at,
            data_clusters=data_clusters,
            data_at=l2_at + l2_tables * size,
            clusters=clusters,
        )


def _ceil(count: int, unit: int) -> int:
    return -(-count // unit)


async def create_image(file: Child, data_file: Child | None, image: NewImage, *, encryption: bytes = b"") -> Header:
    """Make `file` hold the new, empty image; what it held before is gone.

    A crash in between leaves a file that does not open as qcow2. The data file keeps its content, and gets the length
    of the disk.

    Args:
        file: a node on which the caller may write and resize.
        data_file: the same for an external data file, given exactly if `image.data_file_name` is.
        image: checked already by `check`.
        encryption: the LUKS header, `image.encryption_bytes` long.

    Raises:
        UsageError: what the format cannot hold; nothing was written.
        IoFailure: a write failed; the file does not open as qcow2.

    Returns: what the new image's header says.

    Checkpoint: no. Waits: writes of all tables, with preallocation of all data.
    """
    plan = image.check_limits()
    assert len(encryption) == image.encryption_bytes
    length = plan.clusters * image.cluster_size
    if not file.length and length <= SMALL_BYTES_MAX and data_file is None and not plan.data_clusters:
        first = [(at, b"".join(pieces)) for at, pieces in _tables(plan, image, encryption)]
        return await write_new_header(file, plan.header, length=length, first=first)
    await _empty(file, length)
    for at, pieces in _tables(plan, image, encryption):
        await _write_all(file, at, pieces)
    if data_file is not None:
        grown = Span.between(min(data_file.length, image.size), image.size)
        if data_file.length != image.size:
            await data_file.resize(image.size)
        await _preallocate(data_file, grown, image.preallocation)
        await data_file.flush()
    else:
        await _preallocate(file, Span(plan.data_at, plan.data_clusters * image.cluster_size), image.preallocation)
    return await write_new_header(file, plan.header)


def _tables(plan: Plan, image: NewImage, encryption: bytes) -> Iterator[tuple[int, Iterator[bytes]]]:
    """All that the header refers to and that is not zero: where it begins, and its pieces in a row."""
    yield image.cluster_size, _refcount_table(plan)
    yield (1 + plan.header.refcount_table_clusters) * image.cluster_size, _refcount_blocks(plan)
    if plan.header.luks is not None:
        yield plan.header.luks.at, iter((encryption,))
    if plan.l2_tables:
        yield plan.header.l1_at, iter((_l1_table(plan),))
        yield plan.l2_at, _l2_tables(plan, image)


async def _empty(file: Child, length: int) -> None:
    """Make the first `length` bytes of the file zeroes, and first of all not a qcow2 image any more."""
    if file.length:
        await file.write(0, bytes(min(SECTOR, file.length)))
        await file.flush()
    try:
        if file.length:
            await file.resize(0)
        await file.resize(length)
    except (UsageError, IoFailure):  # a device, or a window of a file: the length cannot change
        if file.length < length:
            raise
        await file.zero(Span(0, length))


async def _preallocate(file: Child, span: Span, mode: PreallocMode) -> None:
    if mode == PreallocMode.FALLOC and span:
        await file.zero(span, mode=ZeroMode.KEEP)
    elif mode == PreallocMode.FULL:
        for piece in span.split(WRITE_BYTES):
            await file.write(piece.at, zeroes(piece.length))


async def _write_all(file: Child, at: int, pieces: Iterator[bytes]) -> None:
    """Write the pieces in a row, joined to writes of about WRITE_BYTES."""
    pending: list[bytes] = []
    length = 0
    for piece in pieces:
        pending.append(piece)
        length += len(piece)
        if length >= WRITE_BYTES:
            await file.write(at, b"".join(pending))
            at += length
            pending, length = [], 0
    if pending:
        await file.write(at, b"".join(pending))


def _refcount_table(plan: Plan) -> Iterator[bytes]:
    size = plan.header.cluster_size
    first = (1 + plan.header.refcount_table_clusters) * size
    yield encode_table(array("Q", range(first, first + plan.refcount_blocks * size, size)))


def _refcount_blocks(plan: Plan) -> Iterator[bytes]:
    width, per_block = plan.header.refcount_bits, plan.header.refcounts_per_block
    one = refcount_array(width, 1)
    one[0] = 1
    whole, rest = divmod(plan.clusters, per_block)
    full = encode_refcounts(one * per_block, width) if whole else b""
    for _ in range(whole):
        yield full
    if rest:
        # A block of many narrow counts has a million times more places than a small image fills.
        in_bytes = -(-rest // 8) * 8
        used = encode_refcounts(one * rest + refcount_array(width, in_bytes - rest), width)
        yield used.ljust(plan.header.cluster_size, b"\0")


def _l1_table(plan: Plan) -> bytes:
    size = plan.header.cluster_size
    first = plan.l2_at | COPIED
    return encode_table(array("Q", range(first, first + plan.l2_tables * size, size)))


def _l2_tables(plan: Plan, image: NewImage) -> Iterator[bytes]:
    """Every guest cluster at its place in the data area; in an external file, at its own offset.

    Subclusters stay unallocated, as QEMU leaves them, but for raw data files: what is in them is the disk.
    """
    size, entries = plan.header.cluster_size, plan.header.l2_entries
    clusters = _ceil(image.size, size)
    data_at = plan.data_at if image.data_file_name is None else 0
    # What was never enciphered is no zeroes, whatever it is.
    zero = ZERO if image.crypt_method != CRYPT_NONE and not (image.is_v2 or image.extended_l2) else 0
    allocated = 0xFFFF_FFFF if image.data_file_raw else 0
    for first in range(0, clusters, entries):
        count = min(entries, clusters - first)
        start = data_at + first * size | COPIED | zero
        places = array("Q", range(start, start + count * size, size))
        if image.extended_l2:
            table = array("Q", bytes(16 * entries))
            table[0 : 2 * count : 2] = places
            table[1 : 2 * count : 2] = array("Q", [allocated]) * count
        else:
            table = places + array("Q", bytes(8 * (entries - count)))
        yield encode_table(table)
