"""Dirty bitmaps of nodes."""

from collections.abc import Sequence
from typing import TypeVar

from blockjobs.block import bitmaps
from blockjobs.block.bitmaps import BlockDirtyBitmapAdd, BlockDirtyBitmapMerge
from blockjobs.block.info import BlockDirtyInfo, dirty_infos
from blockjobs.block.node import Node
from blockjobs.block.node_bitmap import BlockDirtyBitmap, bitmap_at
from blockjobs.host.core import Core

T = TypeVar("T")


class Bitmaps(Core):
    """The part of `Host` that lists and changes dirty bitmaps."""

    def bitmaps(self, node: Node) -> list[BlockDirtyInfo]:
        """The dirty bitmaps of a node, the newest first; those of jobs have no name."""
        return dirty_infos(node)

    async def add_bitmap(
        self,
        node: Node,
        name: str,
        *,
        granularity: int | None = None,
        persistent: bool = False,
        enabled: bool = True,
    ) -> None:
        """Give a node a clean bitmap, which records what is written from now on.

        Args:
            granularity: bytes a bit, a power of two; by default the node's cluster size, within 4 KiB to 64 KiB.
            persistent: it is stored with the image when that is closed.
            enabled: it records.

        Raises:
            UsageError: in QEMU's words; the node is as before.
        """
        wanted = BlockDirtyBitmapAdd(
            node=node.name, name=name, granularity=granularity, persistent=persistent, disabled=not enabled
        )
        await bitmaps.add_bitmap(self.graph, wanted)

    async def remove_bitmap(self, node: Node, name: str) -> None:
        """Take a bitmap away, from the image too.

        Raises:
            UsageError: there is none, or it is busy or readonly.
            IoFailure: it could not be taken out of the image; it stays.
        """
        await bitmaps.remove_bitmap(*bitmap_at(self.graph, node.name, name))

    def clear_bitmap(self, node: Node, name: str) -> None:
        """Make a bitmap clean.

        Raises:
            UsageError: there is none, or it may not be changed.
        """
        bitmaps.clear_bitmap(bitmap_at(self.graph, node.name, name)[1])

    async def enable_bitmap(self, node: Node, name: str, enabled: bool) -> None:
        """Let a bitmap record, or not any more.

        Raises:
            UsageError: there is none, or it may not be used.
        """
        await bitmaps.enable_bitmap(*bitmap_at(self.graph, node.name, name), enabled)

    async def merge_bitmaps(self, node: Node, target: str, sources: Sequence[tuple[Node, str]]) -> None:
        """Mark in a bitmap all that other bitmaps, of nodes of the same length, have marked.

        Raises:
            UsageError: in QEMU's words; the target is as before.
        """
        named = [BlockDirtyBitmap(node=owner.name, name=name) for owner, name in sources]
        await bitmaps.merge_bitmaps(self.graph, BlockDirtyBitmapMerge(node=node.name, target=target, bitmaps=[*named]))
