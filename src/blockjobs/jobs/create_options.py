"""What `blockdev-create` can be told, by driver (spec/jobs.md §5)."""

from enum import StrEnum
from typing import TYPE_CHECKING, Final, TypeAlias, TypeVar

import msgspec

from blockjobs.block.drivers.file_create import PreallocMode
from blockjobs.block.luks.names import (
    QCryptoCipherAlgorithm,
    QCryptoCipherMode,
    QCryptoHashAlgorithm,
    QCryptoIVGenAlgorithm,
)
from blockjobs.block.options import BlockRef
from blockjobs.schema.types import Options, Size
from blockjobs.schema.union import OpenUnion

T = TypeVar("T", bound=Options)


class CreateOptions(Options, frozen=True, kw_only=True, tag_field="driver"):
    """Nothing is common to all drivers but the driver itself."""


create_options: Final = OpenUnion("BlockdevCreateOptions", base=CreateOptions)

if TYPE_CHECKING:
    BlockdevCreateOptions: TypeAlias = CreateOptions
else:
    BlockdevCreateOptions = create_options.type


class BlockdevQcow2Version(StrEnum):
    """The version of the format: compat 0.10 and 1.1."""

    V2 = "v2"
    V3 = "v3"


class Qcow2CompressionType(StrEnum):
    """How compressed clusters are compressed."""

    ZLIB = "zlib"
    ZSTD = "zstd"


class QCryptoBlockCreateOptionsQcow(Options, frozen=True, kw_only=True, tag_field="format", tag="qcow"):
    """The old encryption of qcow2, for programs that know no other: AES-128 in CBC mode.

    The passphrase itself is the key, of which 16 bytes count; a wrong one shows nonsense, and nothing tells.

    Attributes:
        key_secret: id of the secret with the passphrase.
    """

    key_secret: str | None = None


class QCryptoBlockCreateOptionsLuks(Options, frozen=True, kw_only=True, tag_field="format", tag="luks"):
    """LUKS inside a new image.

    Attributes:
        key_secret: id of the secret with the passphrase.
        iter_time: how long it is to take, in ms, to turn a passphrase into a key.
    """

    key_secret: str | None = None
    cipher_alg: QCryptoCipherAlgorithm | None = None
    cipher_mode: QCryptoCipherMode | None = None
    ivgen_alg: QCryptoIVGenAlgorithm | None = None
    ivgen_hash_alg: QCryptoHashAlgorithm | None = None
    hash_alg: QCryptoHashAlgorithm | None = None
    iter_time: int | None = None


@create_options.add
class FileCreateOptions(CreateOptions, frozen=True, kw_only=True, tag="file"):
    """A file of the host."""

    filename: str
    size: Size
    preallocation: PreallocMode | None = None
    nocow: bool | None = None
    extent_size_hint: Size | None = None


@create_options.add
class LuksCreateOptions(CreateOptions, frozen=True, kw_only=True, tag="luks"):
    """An enciphered disk in a node that is there already, or opened for it; see `QCryptoBlockCreateOptionsLuks`."""

    file: BlockRef
    size: Size
    key_secret: str | None = None
    cipher_alg: QCryptoCipherAlgorithm | None = None
    cipher_mode: QCryptoCipherMode | None = None
    ivgen_alg: QCryptoIVGenAlgorithm | None = None
    ivgen_hash_alg: QCryptoHashAlgorithm | None = None
    hash_alg: QCryptoHashAlgorithm | None = None
    iter_time: int | None = None
    preallocation: PreallocMode | None = None


@create_options.add
class Qcow2CreateOptions(CreateOptions, frozen=True, kw_only=True, tag="qcow2"):
    """An image in a node that exists already, or is opened for it."""

    file: BlockRef
    data_file: BlockRef | None = None
    data_file_raw: bool | None = None
    extended_l2: bool | None = None
    size: Size
    version: BlockdevQcow2Version | None = None
    backing_file: str | None = None
    backing_fmt: str | None = None
    encrypt: QCryptoBlockCreateOptionsQcow | QCryptoBlockCreateOptionsLuks | None = None
    cluster_size: Size | None = None
    preallocation: PreallocMode | None = None
    lazy_refcounts: bool | None = None
    refcount_bits: int | None = None
    compression_type: Qcow2CompressionType | None = None


NOT_CREATABLE: Final = (
    "blkdebug",
    "blklogwrites",
    "blkreplay",
    "blkverify",
    "bochs",
    "cloop",
    "compress",
    "copy-before-write",
    "copy-on-read",
    "dmg",
    "snapshot-access",
    "ftp",
    "ftps",
    "host_cdrom",
    "host_device",
    "http",
    "https",
    "iscsi",
    "nbd",
    "null-aio",
    "null-co",
    "nvme",
    "preallocate",
    "quorum",
    "raw",
    "replication",
    "throttle",
    "vvfat",
)
"""Drivers that exist but make nothing: known here, so that the answer is a refusal and not a spelling error."""

FORMATS_OF_OTHERS: Final = frozenset({"parallels", "qcow", "qed", "vdi", "vhdx", "vmdk", "vpc"})
"""Formats that a header may name although nothing here reads them."""


def empty_variant(driver: str, base: type[T]) -> type[T]:
    """Options of a driver that has none in a union over all drivers."""
    name = f"{base.__name__}_{driver}"
    variant = msgspec.defstruct(name, [], bases=(base,), tag=driver, tag_field="driver", frozen=True, kw_only=True)
    assert issubclass(variant, base)
    return variant


for _driver in NOT_CREATABLE:
    create_options.add(empty_variant(_driver, CreateOptions))
