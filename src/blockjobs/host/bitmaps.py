"""Dirty bitmaps of nodes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

from blockjobs.block.node import Node
from blockjobs.block.node_bitmap import BlockDirtyBitmap, bitmap_at
from blockjobs.host.nodes import Nodes

if TYPE_CHECKING:
    from blockjobs.block.info import BlockDirtyInfo

T = TypeVar("T")


class Bitmaps(Nodes):
    """The part of `Host` that lists and changes dirty bitmaps."""

    def bitmaps(self, node: Node) -> "list[BlockDirtyInfo]":
        """The dirty bitmaps of a node, the newest first; those of jobs have no name."""
        from blockjobs.block.info import dirty_infos

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
        from blockjobs.block import bitmaps

        wanted = bitmaps.BlockDirtyBitmapAdd(
            node=node.name, name=name, granularity=granularity, persistent=persistent, disabled=not enabled
        )
        await bitmaps.add_bitmap(self.graph, wanted)

    async def remove_bitmap(self, node: Node, name: str) -> None:
        """Take a bitmap away, from the image too.

        Raises:
            UsageError: there is none, or it is busy or readonly.
            IoFailure: it could not be taken out of the image; it stays.
        """
        from blockjobs.block import bitmaps

        await bitmaps.remove_bitmap(*bitmap_at(self.graph, node.name, name))

    def clear_bitmap(self, node: Node, name: str) -> None:
        """Make a bitmap clean.

        Raises:
            UsageError: there is none, or it may not be changed.
        """
        from blockjobs.block import bitmaps

        bitmaps.clear_bitmap(bitmap_at(self.graph, node.name, name)[1])

    async def enable_bitmap(self, node: Node, name: str, enabled: bool) -> None:
        """Let a bitmap record, or not any more.

        Raises:
            UsageError: there is none, or it may not be used.
        """
        from blockjobs.block import bitmaps

        await bitmaps.enable_bitmap(*bitmap_at(self.graph, node.name, name), enabled)

    async def merge_bitmaps(self, node: Node, target: str, sources: Sequence[tuple[Node, str]]) -> None:
        """Mark in a bitmap all that other bitmaps, of nodes of the same length, have marked.

        Raises:
            UsageError: in QEMU's words; the target is as before.
        """
        from blockjobs.block import bitmaps

        named = [BlockDirtyBitmap(node=owner.name, name=name) for owner, name in sources]
        await bitmaps.merge_bitmaps(
            self.graph, bitmaps.BlockDirtyBitmapMerge(node=node.name, target=target, bitmaps=[*named])
        )
