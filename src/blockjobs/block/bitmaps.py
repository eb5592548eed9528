"""What users do with the named dirty bitmaps of nodes (spec/jobs.md §8).

Everything here is synchronous or refuses before it changes anything, so that transactions can undo it.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Annotated, Final

from blockjobs.base.errors import UsageError
from blockjobs.base.units import KiB
from blockjobs.block.bitmap import DirtyBitmap
from blockjobs.block.bitmap_store import MAP_BYTES_MAX
from blockjobs.block.graph import Graph
from blockjobs.block.node import Node
from blockjobs.block.node_bitmap import BlockDirtyBitmap, NodeBitmap, bitmap_at, find_bitmap
from blockjobs.schema.types import Options, UInt32, qapi

NAME_BYTES_MAX: Final = 1023
GRANULARITY_MIN: Final = 512
GRANULARITY_DEFAULT: Final = 64 * KiB
_GRANULARITY_DEFAULT_MIN: Final = 4 * KiB


class BlockDirtyBitmapAdd(Options, frozen=True, kw_only=True):
    """A new bitmap; `granularity` is in bytes."""

    node: str
    name: str
    granularity: UInt32 | None = None
    persistent: bool | None = None
    disabled: bool | None = None


BlockDirtyBitmapOrStr = Annotated[str | BlockDirtyBitmap, qapi("BlockDirtyBitmapOrStr")]
"""A bitmap of another node, or one of the node at hand by its name."""


class BlockDirtyBitmapMerge(Options, frozen=True, kw_only=True):
    """Bitmaps to be joined into `target`, which is a bitmap of `node`."""

    node: str
    target: str
    bitmaps: list[BlockDirtyBitmapOrStr]


def default_granularity(node: Node) -> int:
    """Bytes per bit if the user does not say: the node's cluster size within 4 KiB to 64 KiB, 64 KiB without one."""
    below = node.storage
    while below.driver_name == "raw":
        below = below.children["file"].storage
    size = below.cluster_size
    return GRANULARITY_DEFAULT if size is None else min(max(size, _GRANULARITY_DEFAULT_MIN), GRANULARITY_DEFAULT)


async def add_bitmap(graph: Graph, wanted: BlockDirtyBitmapAdd) -> tuple[Node, NodeBitmap]:
    """Give a node a clean bitmap.

    Raises:
        UsageError: in QEMU's words; the node is as before.
    Waits: nothing yet. Checkpoint: no.
    """
    node = graph.find(wanted.node)
    name, granularity = wanted.name, wanted.granularity
    if not name:
        raise UsageError("Bitmap name cannot be empty")
    if granularity is None:
        granularity = default_granularity(node)
    elif granularity < GRANULARITY_MIN or granularity & (granularity - 1):
        raise UsageError("Granularity must be power of 2 and at least 512")
    if len(name.encode("utf-8", "surrogatepass")) > NAME_BYTES_MAX:
        raise UsageError(f"Bitmap name too long: {name}")
    if find_bitmap(node.bitmaps, name) is not None:
        raise UsageError(f"Bitmap already exists: {name}")
    if wanted.persistent:
        _check_storable(node, name, granularity)
    if node.length // granularity > MAP_BYTES_MAX * 8:
        raise UsageError(f"Bitmap '{name}' would take more than {MAP_BYTES_MAX} bytes: use a larger granularity")
    bitmap = NodeBitmap(
        map=DirtyBitmap(node.length, granularity),
        name=name,
        enabled=not wanted.disabled,
        persistent=bool(wanted.persistent),
    )
    node.attach_bitmap(bitmap)
    return node, bitmap


def _check_storable(node: Node, name: str, granularity: int) -> None:
    store = node.driver.bitmap_store
    if store is None:
        raise UsageError(f"Can't store persistent bitmaps to {node.name}: Operation not supported")
    try:
        store.check_new(name, length=node.length, granularity=granularity)
    except UsageError as error:
        raise UsageError(f"Can't make bitmap '{name}' persistent in '{node.name}': {error}") from error


async def begin_use(node: Node, bitmap: NodeBitmap) -> None:
    """Before a stored bitmap is changed other than by writes to the node: a crash must not leave the old one believed.

    Raises:
        IoFailure: it could not be noted; the bitmap must not be changed.
    Waits: a write and a flush, the first time. Checkpoint: no.
    """
    if bitmap.persistent and node.driver.bitmap_store is not None and not node.read_only:
        await node.driver.bitmap_store.begin_use()


async def remove_bitmap(node: Node, bitmap: NodeBitmap) -> None:
    """Take a bitmap away; a persistent one goes from the image first.

    Raises:
        UsageError: it is busy or readonly; it stays.
        IoFailure: it could not be taken out of the image; it stays.
    Waits: I/O for a persistent one. Checkpoint: no.
    """
    bitmap.check(may_be_broken=True)
    if bitmap.persistent and node.driver.bitmap_store is not None:
        await node.driver.bitmap_store.remove(bitmap.name or "")
    node.detach_bitmap(bitmap)


def clear_bitmap(bitmap: NodeBitmap) -> DirtyBitmap:
    """Make everything clean; returns what there was, which may be put back as `bitmap.map`.

    Raises:
        UsageError: it is busy, readonly or inconsistent.
    """
    bitmap.check()
    before, bitmap.map = bitmap.map, DirtyBitmap(bitmap.map.length, bitmap.map.granularity)
    return before


async def enable_bitmap(node: Node, bitmap: NodeBitmap, enabled: bool) -> bool:
    """Begin or stop to record changes; returns whether it did so before. A persistent one remembers it.

    Raises:
        UsageError: it is busy or inconsistent.
        IoFailure: its image could not be marked; nothing changed.
    Waits: as `begin_use`. Checkpoint: no.
    """
    bitmap.check(may_be_readonly=True)
    if enabled and not bitmap.enabled:
        await begin_use(node, bitmap)
    before, bitmap.enabled = bitmap.enabled, enabled
    return before


async def merge_bitmaps(graph: Graph, wanted: BlockDirtyBitmapMerge) -> tuple[NodeBitmap, DirtyBitmap]:
    """Mark in the target what any of the others has marked; returns the target and what it held before.

    Raises:
        UsageError: a bitmap is unknown, may not be used, or has another length; nothing changed.
        IoFailure: the target's image could not be marked; nothing changed.
    Waits: as `begin_use`. Checkpoint: no.
    """
    node, target = bitmap_at(graph, wanted.node, wanted.target)
    _joined(graph, wanted, target)  # all refusals come before the image is touched
    await begin_use(node, target)
    before, target.map = target.map, _joined(graph, wanted, target)
    return target, before


def _joined(graph: Graph, wanted: BlockDirtyBitmapMerge, target: NodeBitmap) -> DirtyBitmap:
    joined = target.map.copy()
    for source in _sources(graph, wanted.node, wanted.bitmaps):
        target.check()
        source.check(may_be_readonly=True)
        if source.map.length != joined.length:
            raise UsageError(
                f"Bitmaps are of different sizes (destination size is {joined.length}, source size is "
                f"{source.map.length}) and can't be merged"
            )
        joined.merge(source.map)
    target.check()
    return joined


def _sources(graph: Graph, node: str, wanted: Sequence[str | BlockDirtyBitmap]) -> Iterator[NodeBitmap]:
    for each in wanted:
        place = each if isinstance(each, BlockDirtyBitmap) else BlockDirtyBitmap(node=node, name=each)
        yield bitmap_at(graph, place.node, place.name)[1]


def bitmap_sha256(bitmap: NodeBitmap) -> str:
    """Checksum of the content, for tests: over the bits, least significant first, in whole words of 64."""
    return hashlib.sha256(bitmap.map.packed(align=8)).hexdigest()
