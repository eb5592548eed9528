"""What `query-named-block-nodes` tells about a node (spec/block-layer.md §5)."""

from enum import StrEnum
from typing import Annotated

import msgspec
from msgspec import field

from blockjobs.block.chain import below_implicit
from blockjobs.block.driver import FilterDriver, FormatDriver
from blockjobs.block.filenames import full_backing_filename
from blockjobs.block.luks.names import (
    QCryptoCipherAlgorithm,
    QCryptoCipherMode,
    QCryptoHashAlgorithm,
    QCryptoIVGenAlgorithm,
)
from blockjobs.block.node import Node
from blockjobs.block.node_bitmap import NodeBitmap
from blockjobs.block.options import DetectZeroes
from blockjobs.block.sparse import allocated_size
from blockjobs.block.users import Edge
from blockjobs.block.write_threshold import write_threshold
from blockjobs.schema.types import Record, qapi


class BlockdevCacheInfo(Record, kw_only=True, frozen=True):
    """How the host's page cache is used."""

    writeback: bool
    direct: bool
    no_flush: bool


class SnapshotInfo(Record, kw_only=True, frozen=True):
    """A snapshot inside an image."""

    id: str
    name: str
    vm_state_size: int
    date_sec: int
    date_nsec: int
    vm_clock_sec: int
    vm_clock_nsec: int
    icount: int | None = None


class Qcow2BitmapInfoFlags(StrEnum):
    """Flags of a bitmap stored in an image."""

    IN_USE = "in-use"
    AUTO = "auto"


class Qcow2BitmapInfo(Record, kw_only=True, frozen=True):
    """A bitmap stored in an image."""

    name: str
    granularity: int
    flags: list[Qcow2BitmapInfoFlags]


class Qcow2CompressionType(StrEnum):
    """How clusters are compressed."""

    ZLIB = "zlib"
    ZSTD = "zstd"


class QCryptoBlockInfoLUKSSlot(Record, kw_only=True, frozen=True):
    """A key slot."""

    active: bool
    iters: int | None = None
    stripes: int | None = None
    key_offset: int


class QCryptoBlockInfoLUKS(Record, kw_only=True, frozen=True):
    """A LUKS header."""

    cipher_alg: QCryptoCipherAlgorithm
    cipher_mode: QCryptoCipherMode
    ivgen_alg: QCryptoIVGenAlgorithm
    ivgen_hash_alg: QCryptoHashAlgorithm | None = None
    hash_alg: QCryptoHashAlgorithm
    payload_offset: int
    master_key_iters: int
    uuid: str
    slots: list[QCryptoBlockInfoLUKSSlot]


class ImageInfoSpecificLUKSWrapper(Record, kw_only=True, frozen=True, tag_field="type", tag="luks"):
    """The luks variant of `ImageInfoSpecific`."""

    data: QCryptoBlockInfoLUKS


class Qcow2EncryptionLuks(QCryptoBlockInfoLUKS, kw_only=True, frozen=True, tag_field="format", tag="luks"):
    """The encryption of a qcow2 image."""


class Qcow2EncryptionAes(Record, kw_only=True, frozen=True, tag_field="format", tag="aes"):
    """The old encryption, of which there is nothing to say."""


class ImageInfoSpecificQCow2(Record, kw_only=True, frozen=True):
    """What only qcow2 images have."""

    compat: str
    data_file: str | None = None
    data_file_raw: bool | None = None
    extended_l2: bool | None = None
    lazy_refcounts: bool | None = None
    corrupt: bool | None = None
    refcount_bits: int
    encrypt: Annotated[Qcow2EncryptionLuks | Qcow2EncryptionAes, qapi("ImageInfoSpecificQCow2Encryption")] | None = None
    bitmaps: list[Qcow2BitmapInfo] | None = None
    compression_type: Qcow2CompressionType


class ImageInfoSpecificQCow2Wrapper(Record, kw_only=True, frozen=True, tag_field="type", tag="qcow2"):
    """The qcow2 variant of `ImageInfoSpecific`."""

    data: ImageInfoSpecificQCow2


class ImageInfo(Record, kw_only=True, frozen=True):
    """An image as its headers describe it."""

    filename: str
    format: str
    dirty_flag: bool | None = None
    actual_size: int | None = None
    virtual_size: int
    cluster_size: int | None = None
    encrypted: bool | None = None
    compressed: bool | None = None
    backing_filename: str | None = None
    full_backing_filename: str | None = None
    backing_filename_format: str | None = None
    snapshots: list[SnapshotInfo] | None = None
    backing_image: "ImageInfo | None" = None
    format_specific: (
        Annotated[ImageInfoSpecificQCow2Wrapper | ImageInfoSpecificLUKSWrapper, qapi("ImageInfoSpecific")] | None
    ) = None


class BlockDirtyInfo(Record, kw_only=True, frozen=True):
    """A dirty bitmap of a node."""

    name: str | None = None
    count: int
    granularity: int
    recording: bool
    busy: bool
    persistent: bool
    inconsistent: bool | None = None


class BlockdevChild(Record, kw_only=True, frozen=True):
    """A node below another."""

    child: str
    node_name: str


class BlockDeviceInfo(Record, kw_only=True, frozen=True):
    """A node. The limits are those of a virtual device and always 0; throttle nodes have theirs in their group."""

    file: str
    node_name: str | None = None
    ro: bool
    drv: str
    backing_file: str | None = field(default=None, name="backing_file")
    backing_file_depth: int = field(name="backing_file_depth")
    children: list[BlockdevChild]
    encrypted: bool
    active: bool
    detect_zeroes: DetectZeroes = field(name="detect_zeroes")
    bps: int
    bps_rd: int = field(name="bps_rd")
    bps_wr: int = field(name="bps_wr")
    iops: int
    iops_rd: int = field(name="iops_rd")
    iops_wr: int = field(name="iops_wr")
    image: ImageInfo
    cache: BlockdevCacheInfo
    write_threshold: int = field(name="write_threshold")
    dirty_bitmaps: list[BlockDirtyInfo] | None = None


def describe(node: Node, *, flat: bool) -> BlockDeviceInfo:
    """Describe a node, its dirty bitmaps apart. `kept_info.node_info` does it only if something has changed."""
    filename = node.filename
    chain = _chain_below(node)
    backing = None if isinstance(node.driver, FilterDriver) else node.children.get("backing")
    settings = node.settings
    return BlockDeviceInfo(
        file=filename,
        node_name=node.name,
        ro=node.read_only,
        drv=node.driver_name,
        backing_file=None if backing is None else below_implicit(backing).filename,
        backing_file_depth=0 if flat else len(chain),
        children=[BlockdevChild(child=name, node_name=child.name) for name, child in node.children.items()],
        encrypted=bool(node.driver.info().get("encrypted")),
        active=settings.is_active,
        detect_zeroes=settings.detect_zeroes,
        bps=0,
        bps_rd=0,
        bps_wr=0,
        iops=0,
        iops_rd=0,
        iops_wr=0,
        image=_with_backing(node, chain, flat=flat),
        cache=BlockdevCacheInfo(writeback=True, direct=settings.direct, no_flush=settings.no_flush),
        write_threshold=write_threshold(node),
    )


def dirty_infos(node: Node) -> list[BlockDirtyInfo]:
    """Describe the bitmaps of a node, the newest first; those of jobs and filters have no name."""
    unnamed = [*node.driver.kept_maps(None)]
    for parent in node.parents:
        if isinstance(parent, Edge) and parent.parent.is_open:
            unnamed += parent.parent.driver.kept_maps(parent.name)
    if not (unnamed or node.bitmaps):
        return []
    kept = [NodeBitmap(map=each, enabled=False) for each in unnamed]
    frozen = [each for each in node.bitmaps if each.successor is not None]
    kept += [NodeBitmap(map=each.successor, enabled=each.enabled) for each in frozen if each.successor is not None]
    return [_dirty_info(bitmap) for bitmap in [*kept, *reversed(node.bitmaps)]]


def _dirty_info(bitmap: NodeBitmap) -> BlockDirtyInfo:
    return BlockDirtyInfo(
        name=bitmap.name,
        count=bitmap.map.count_bytes(),
        granularity=bitmap.map.granularity,
        recording=bitmap.recording,
        busy=bitmap.busy,
        persistent=bitmap.persistent,
        inconsistent=True if bitmap.inconsistent else None,
    )


def _with_backing(node: Node, chain: list[Node], *, flat: bool) -> ImageInfo:
    below: ImageInfo | None = None
    if not flat:
        for backing in reversed(chain):
            below = image_info(backing, backing_image=below)
    return image_info(node, backing_image=below)


def image_info(node: Node, *, backing_image: ImageInfo | None = None) -> ImageInfo:
    """What the image of one node says about itself."""
    members = {**_passed_up(node), **node.driver.info(), "actual-size": allocated_size(node)}
    members |= {"filename": node.filename, "format": node.driver_name, "virtual-size": node.length}
    if isinstance(node.driver, FormatDriver):
        for implied in node.driver.implied_children():
            if implied.name == "backing":
                members["backing-filename"] = _as_json(implied.filename)
                members["full-backing-filename"] = _as_json(full_backing_filename(node, implied.filename))
                if implied.format is not None:
                    members["backing-filename-format"] = implied.format
    info = msgspec.convert({name: value for name, value in members.items() if value is not None}, ImageInfo)
    return msgspec.structs.replace(info, backing_image=backing_image)


def _as_json(name: str) -> str:
    """A name from a header, which may hold any bytes, as text that JSON can carry."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _passed_up(node: Node) -> dict[str, object]:
    """What filters and raw repeat of the node below them."""
    driver = node.driver
    if isinstance(driver, FilterDriver):
        below = node.children[driver.filtered]
    elif node.driver_name == "raw":
        below = node.children["file"]
    else:
        return {}
    told = {**_passed_up(below), **below.driver.info()}
    return {name: told[name] for name in ("cluster-size", "dirty-flag") if name in told}


def _chain_below(node: Node) -> list[Node]:
    """What a node shows where it has nothing of its own: the nodes below filters, backing images; nearest first."""
    chain: list[Node] = []
    while (below := _next_below(node)) is not None:
        node = below_implicit(below)
        chain.append(node)
    return chain


def _next_below(node: Node) -> Node | None:
    if isinstance(node.driver, FilterDriver):
        return node.children[node.driver.filtered]
    return node.children.get("backing")
