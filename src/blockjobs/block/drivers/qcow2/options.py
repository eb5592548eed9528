"""The options of a qcow2 node, and what they come to for one image (spec/block-layer.md §2)."""

from enum import StrEnum
from typing import Annotated, Final

from msgspec import UNSET, UnsetType

from blockjobs.base.errors import ParameterError, UsageError
from blockjobs.base.units import MiB
from blockjobs.block.drivers.qcow2.image import Tuning
from blockjobs.block.options import BlockRef, BlockRefOrNull, NodeOptions
from blockjobs.schema.types import Options, qapi
from blockjobs.wire.qcow2 import CRYPT_LUKS, CRYPT_NONE, Header

L2_CACHE_BYTES: Final = 32 * MiB
"""Maps 256 GiB with 64 KiB clusters: QEMU's default too."""
REFCOUNT_CACHE_BYTES: Final = 4 * MiB
"""Counts 128 GiB with 64 KiB clusters and 16 bits. QEMU keeps 256 KiB; scanning for free space wants more."""
REFCOUNT_CACHE_TABLES_MIN: Final = 4
METADATA_CACHE_BYTES_MAX: Final = 64 * MiB
"""Options may ask for more; an image never takes it (spec/durability.md §2)."""
CLEAN_INTERVAL_S: Final = 600
"""QEMU's default too."""
_CLEAN_INTERVAL_S_MAX: Final = (1 << 32) - 1
_CACHE_ENTRIES_MAX: Final = (1 << 31) - 1


class Qcow2OverlapCheckMode(StrEnum):
    """How much is checked before a write, lest it overwrites metadata: `cached` at least, whatever is asked for."""

    NONE = "none"
    CONSTANT = "constant"
    CACHED = "cached"
    ALL = "all"


class Qcow2OverlapCheckFlags(Options, frozen=True, kw_only=True):
    """Single structures for those checks, on top of a template.

    All of them are always guarded, except for the L2 tables of snapshots (`inactive_l2`), which is asked for.
    """

    template: Qcow2OverlapCheckMode | None = None
    main_header: bool | None = None
    active_l1: bool | None = None
    active_l2: bool | None = None
    refcount_table: bool | None = None
    refcount_block: bool | None = None
    snapshot_table: bool | None = None
    inactive_l1: bool | None = None
    inactive_l2: bool | None = None
    bitmap_directory: bool | None = None


class QCryptoBlockOptionsQCow(Options, frozen=True, kw_only=True, tag_field="format", tag="aes"):
    """The old encryption: AES, with the secret itself as its key. A wrong secret shows nonsense; nothing tells."""

    key_secret: str | None = None


class QCryptoBlockOptionsLUKS(Options, frozen=True, kw_only=True, tag_field="format", tag="luks"):
    """LUKS inside qcow2."""

    key_secret: str | None = None


class Qcow2Options(NodeOptions, frozen=True, kw_only=True, tag="qcow2"):
    """An image with its own map of clusters.

    `lazy_refcounts` allows counts to be late, which they never are. Overlap checks are always made as `cached` says;
    with `all`, or `inactive-l2`, nothing is written over the L2 tables of snapshots either. Tables are cached whole, so
    that the size of cache entries only has to make sense.
    """

    file: BlockRef
    backing: BlockRefOrNull | UnsetType = UNSET
    data_file: BlockRef | None = None
    lazy_refcounts: bool | None = None
    pass_discard_request: bool | None = None
    pass_discard_snapshot: bool | None = None
    pass_discard_other: bool | None = None
    discard_no_unref: bool | None = None
    overlap_check: Annotated[Qcow2OverlapCheckFlags | Qcow2OverlapCheckMode, qapi("Qcow2OverlapChecks")] | None = None
    cache_size: int | None = None
    l2_cache_size: int | None = None
    l2_cache_entry_size: int | None = None
    refcount_cache_size: int | None = None
    cache_clean_interval: int | None = None
    encrypt: QCryptoBlockOptionsQCow | QCryptoBlockOptionsLUKS | None = None


TUNABLE: Final = frozenset(
    {
        *("lazy-refcounts", "pass-discard-request", "pass-discard-snapshot", "pass-discard-other", "overlap-check"),
        "discard-no-unref",
        *("cache-size", "l2-cache-size", "l2-cache-entry-size", "refcount-cache-size", "cache-clean-interval"),
        "encrypt",
    }
)
"""What a reopen may change, as far as `tuning_of` allows."""


def tuning_of(options: Qcow2Options, header: Header, *, unmap: bool = True) -> Tuning:
    """Check the options against the image, in QEMU's words.

    Args:
        unmap: what `pass-discard-request` is if nothing is said.

    Raises:
        UsageError: they contradict each other or the image.
    """
    for name, value in (
        ("cache-size", options.cache_size),
        ("l2-cache-size", options.l2_cache_size),
        ("l2-cache-entry-size", options.l2_cache_entry_size),
        ("refcount-cache-size", options.refcount_cache_size),
    ):
        if value is not None and value < 0:
            raise ParameterError.expects(name, "a non-negative number below 2^64")
    _check_crypt(options, header)
    l2_bytes, refcount_bytes = _cache_sizes(options, header)
    entry = options.l2_cache_entry_size
    if entry is not None and (entry & (entry - 1) or not 512 <= entry <= header.cluster_size):
        raise UsageError(
            f"L2 cache entry size must be a power of two between 512 and the cluster size ({header.cluster_size})"
        )
    if options.cache_clean_interval is not None and not 0 <= options.cache_clean_interval <= _CLEAN_INTERVAL_S_MAX:
        raise UsageError("Cache clean interval too big")
    if options.lazy_refcounts and header.version < 3:
        raise UsageError("Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level")
    if options.discard_no_unref and header.version < 3:
        raise UsageError("discard-no-unref needs a qcow2 image with at least qemu 1.1 compatibility level")
    if options.discard_no_unref and header.is_data_file_raw:
        raise UsageError("discard-no-unref cannot be used with data-file-raw: such a file has no clusters to keep")
    return Tuning(
        l2_cache_bytes=min(l2_bytes, METADATA_CACHE_BYTES_MAX // 2),
        refcount_cache_bytes=min(refcount_bytes, METADATA_CACHE_BYTES_MAX // 2),
        # Without discard=unmap the node asks for nothing that frees space; but version 2 has no other zeroes.
        discard_requests=unmap if options.pass_discard_request is None else options.pass_discard_request,
        discard_others=bool(options.pass_discard_other),
        discard_snapshots=options.pass_discard_snapshot is not False,
        discards_keep_clusters=bool(options.discard_no_unref),
        clean_interval_s=CLEAN_INTERVAL_S if options.cache_clean_interval is None else options.cache_clean_interval,
        guards_inactive_l2=_guards_inactive_l2(options.overlap_check),
    )


def _guards_inactive_l2(checks: Qcow2OverlapCheckFlags | Qcow2OverlapCheckMode | None) -> bool:
    """Whether L2 tables of snapshots are to be guarded: a flag of its own goes before the template."""
    if isinstance(checks, Qcow2OverlapCheckFlags):
        if checks.inactive_l2 is not None:
            return checks.inactive_l2
        checks = checks.template
    return checks is Qcow2OverlapCheckMode.ALL


def _check_crypt(options: Qcow2Options, header: Header) -> None:
    if options.encrypt is None:
        return
    wanted = "luks" if isinstance(options.encrypt, QCryptoBlockOptionsLUKS) else "aes"
    if header.crypt_method == CRYPT_NONE:
        raise UsageError(f"No encryption in image header, but options specified format '{wanted}'")
    found = "luks" if header.crypt_method == CRYPT_LUKS else "aes"
    if found != wanted:
        raise UsageError(f"Header reported '{found}' encryption format but options specify '{wanted}'")


def _cache_sizes(options: Qcow2Options, header: Header) -> tuple[int, int]:
    """Bytes for L2 tables and refcount blocks."""
    both, l2_bytes, refcount_bytes = options.cache_size, options.l2_cache_size, options.refcount_cache_size
    least = REFCOUNT_CACHE_TABLES_MIN * header.cluster_size
    if both is not None:
        if l2_bytes is not None and refcount_bytes is not None:
            raise UsageError("cache-size, l2-cache-size and refcount-cache-size may not be set at the same time")
        if l2_bytes is not None and l2_bytes > both:
            raise UsageError("l2-cache-size may not exceed cache-size")
        if refcount_bytes is not None and refcount_bytes > both:
            raise UsageError("refcount-cache-size may not exceed cache-size")
        if l2_bytes is not None:
            refcount_bytes = both - l2_bytes
        elif refcount_bytes is not None:
            l2_bytes = both - refcount_bytes
            if l2_bytes // (options.l2_cache_entry_size or header.cluster_size) > _CACHE_ENTRIES_MAX:
                raise UsageError("L2 cache size too big")
        else:
            l2_bytes = max(0, both - least)
            refcount_bytes = both - l2_bytes
            # The L2 tables need no more than all of them, in QEMU, and what is over goes to the refcounts.
            if (
                both - min(l2_bytes, header.l1_entries * header.cluster_size)
            ) // header.cluster_size > _CACHE_ENTRIES_MAX:
                raise UsageError("Refcount cache size too big")
    l2_bytes = L2_CACHE_BYTES if l2_bytes is None else l2_bytes
    refcount_bytes = REFCOUNT_CACHE_BYTES if refcount_bytes is None else refcount_bytes
    if refcount_bytes // header.cluster_size > _CACHE_ENTRIES_MAX:
        raise UsageError("Refcount cache size too big")
    return max(l2_bytes, 2 * header.cluster_size), max(refcount_bytes, least)
