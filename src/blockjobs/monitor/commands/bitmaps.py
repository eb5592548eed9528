"""Commands on the dirty bitmaps of nodes (spec/jobs.md §8)."""

from typing import TYPE_CHECKING

from blockjobs.block.bitmaps import (
    BlockDirtyBitmapAdd,
    BlockDirtyBitmapMerge,
    BlockDirtyBitmapOrStr,
    add_bitmap,
    bitmap_sha256,
    clear_bitmap,
    enable_bitmap,
    merge_bitmaps,
    remove_bitmap,
)
from blockjobs.block.node_bitmap import bitmap_at
from blockjobs.jobs import bitmap_actions  # noqa: F401  importing it registers them
from blockjobs.schema.command import qmp
from blockjobs.schema.types import Record

if TYPE_CHECKING:
    from blockjobs.host import Host


class BlockDirtyBitmapSha256(Record, frozen=True, kw_only=True):
    """Checksum of a bitmap's content."""

    sha256: str


@qmp.command(since="2.4")
async def block_dirty_bitmap_add(host: "Host", options: BlockDirtyBitmapAdd) -> None:
    """Give a node a dirty bitmap, which records what is written to the node from now on.

    Args:
        options: the node, the new bitmap's name, and what it is to be like.
    """
    await add_bitmap(host.graph, options)


@qmp.command(since="2.4")
async def block_dirty_bitmap_remove(host: "Host", *, node: str, name: str) -> None:
    """Take a bitmap away; a persistent one goes from the image too.

    Args:
        node: the node.
        name: the bitmap.
    """
    await remove_bitmap(*bitmap_at(host.graph, node, name))


@qmp.command(since="2.4")
async def block_dirty_bitmap_clear(host: "Host", *, node: str, name: str) -> None:
    """Make a bitmap clean.

    Args:
        node: the node.
        name: the bitmap.
    """
    clear_bitmap(bitmap_at(host.graph, node, name)[1])


@qmp.command(since="4.0")
async def block_dirty_bitmap_enable(host: "Host", *, node: str, name: str) -> None:
    """Let a bitmap record changes.

    Args:
        node: the node.
        name: the bitmap.
    """
    await enable_bitmap(*bitmap_at(host.graph, node, name), True)


@qmp.command(since="4.0")
async def block_dirty_bitmap_disable(host: "Host", *, node: str, name: str) -> None:
    """Let a bitmap stay as it is, whatever is written.

    Args:
        node: the node.
        name: the bitmap.
    """
    await enable_bitmap(*bitmap_at(host.graph, node, name), False)


@qmp.command(since="4.0")
async def block_dirty_bitmap_merge(
    host: "Host", *, node: str, target: str, bitmaps: list[BlockDirtyBitmapOrStr]
) -> None:
    """Mark in a bitmap all that other bitmaps have marked.

    Args:
        node: the node of the target.
        target: the bitmap that is changed.
        bitmaps: the others, of the same node by name, or of any node of the same length.
    """
    await merge_bitmaps(host.graph, BlockDirtyBitmapMerge(node=node, target=target, bitmaps=bitmaps))


@qmp.command(since="2.10")
async def x_debug_block_dirty_bitmap_sha256(host: "Host", *, node: str, name: str) -> BlockDirtyBitmapSha256:
    """Tell a checksum of a bitmap's content.

    Args:
        node: the node.
        name: the bitmap.
    """
    return BlockDirtyBitmapSha256(sha256=bitmap_sha256(bitmap_at(host.graph, node, name)[1]))
