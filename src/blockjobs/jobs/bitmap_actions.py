"""The dirty-bitmap actions of `transaction` (spec/jobs.md §8): done while preparing, undone if another action fails."""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from blockjobs.base.errors import BlockjobsError
from blockjobs.block.bitmaps import (
    BlockDirtyBitmapAdd,
    BlockDirtyBitmapMerge,
    add_bitmap,
    clear_bitmap,
    enable_bitmap,
    merge_bitmaps,
    remove_bitmap,
)
from blockjobs.block.node import Node
from blockjobs.block.node_bitmap import BlockDirtyBitmap, NodeBitmap, bitmap_at
from blockjobs.jobs.transaction import Action, Prepared, actions

if TYPE_CHECKING:
    from blockjobs.jobs.block_job import JobHost
    from blockjobs.lifecycle.spec import Group

log = logging.getLogger(__name__)


class _Done(Prepared):
    """A change that was made while preparing; nothing writes before the transaction ends, so it can be reversed."""

    def __init__(self, undo: Callable[[], object]) -> None:
        self._undo = undo

    async def commit(self) -> None:
        """See `Prepared`: it is done."""

    async def abort(self) -> None:
        self._undo()


class _Removal(Prepared):
    """Takes effect at the end: until then the name is taken and nobody may use the bitmap."""

    def __init__(self, node: Node, bitmap: NodeBitmap) -> None:
        self._node, self._bitmap = node, bitmap
        bitmap.busy = True

    async def commit(self) -> None:
        self._bitmap.busy = False
        try:
            await remove_bitmap(self._node, self._bitmap)
        except BlockjobsError as error:
            # It goes from the image when that is stored; until then nobody believes it after a crash.
            log.warning("bitmap '%s' is still in the image of node '%s': %s", self._bitmap.name, self._node.name, error)
            self._node.detach_bitmap(self._bitmap)

    async def abort(self) -> None:
        self._bitmap.busy = False


@actions.add
class BitmapAddAction(Action, frozen=True, kw_only=True, tag="block-dirty-bitmap-add"):
    """Gives a node a bitmap."""

    data: BlockDirtyBitmapAdd

    async def prepare(self, host: "JobHost", group: "Group | None") -> Prepared:
        """See `Action`."""
        node, bitmap = await add_bitmap(host.graph, self.data)
        return _Done(lambda: node.detach_bitmap(bitmap))


@actions.add
class BitmapRemoveAction(Action, frozen=True, kw_only=True, tag="block-dirty-bitmap-remove"):
    """Takes a bitmap away, for good."""

    data: BlockDirtyBitmap

    async def prepare(self, host: "JobHost", group: "Group | None") -> Prepared:
        """See `Action`."""
        node, bitmap = bitmap_at(host.graph, self.data.node, self.data.name)
        bitmap.check(may_be_broken=True)
        return _Removal(node, bitmap)


@actions.add
class BitmapClearAction(Action, frozen=True, kw_only=True, tag="block-dirty-bitmap-clear"):
    """Makes a bitmap clean."""

    data: BlockDirtyBitmap

    async def prepare(self, host: "JobHost", group: "Group | None") -> Prepared:
        """See `Action`."""
        _, bitmap = bitmap_at(host.graph, self.data.node, self.data.name)
        before = clear_bitmap(bitmap)
        return _Done(lambda: setattr(bitmap, "map", before))


@actions.add
class BitmapEnableAction(Action, frozen=True, kw_only=True, tag="block-dirty-bitmap-enable"):
    """Lets a bitmap record."""

    data: BlockDirtyBitmap

    async def prepare(self, host: "JobHost", group: "Group | None") -> Prepared:
        """See `Action`."""
        return await _enabled(host, self.data, True)


@actions.add
class BitmapDisableAction(Action, frozen=True, kw_only=True, tag="block-dirty-bitmap-disable"):
    """Stops a bitmap's recording."""

    data: BlockDirtyBitmap

    async def prepare(self, host: "JobHost", group: "Group | None") -> Prepared:
        """See `Action`."""
        return await _enabled(host, self.data, False)


async def _enabled(host: "JobHost", place: BlockDirtyBitmap, enabled: bool) -> Prepared:
    node, bitmap = bitmap_at(host.graph, place.node, place.name)
    before = await enable_bitmap(node, bitmap, enabled)
    return _Done(lambda: setattr(bitmap, "enabled", before))


@actions.add
class BitmapMergeAction(Action, frozen=True, kw_only=True, tag="block-dirty-bitmap-merge"):
    """Joins bitmaps."""

    data: BlockDirtyBitmapMerge

    async def prepare(self, host: "JobHost", group: "Group | None") -> Prepared:
        """See `Action`."""
        target, before = await merge_bitmaps(host.graph, self.data)
        return _Done(lambda: setattr(target, "map", before))
