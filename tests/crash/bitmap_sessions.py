"""A guest that uses a disk with persistent bitmaps in several sessions, and what its bitmaps must then say.

In session n the bitmap `b<n>` is added: it must cover whatever differs from what the disk showed then. `all` does not
record; at the end of every session what a bitmap in memory has recorded is merged into it, so it must cover whatever
differs from the very beginning. That holds in every state that a crash may leave, unless the bitmap is inconsistent.
"""

import random
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from dataclasses import dataclass, field

from replay import SECTOR, Guest, opened
from workload import Setup, Workload

from blockjobs.base.errors import IoFailure
from blockjobs.base.span import Span
from blockjobs.block.bitmap import DirtyBitmap
from blockjobs.block.bitmaps import (
    BlockDirtyBitmapAdd,
    BlockDirtyBitmapMerge,
    add_bitmap,
    bitmap_at,
    merge_bitmaps,
    remove_bitmap,
)
from blockjobs.block.medium import Medium
from blockjobs.block.node import Node

SESSIONS = 4
Opener = Callable[..., AbstractAsyncContextManager[Node]]
STEPS = 8


@dataclass(slots=True)
class Sessions:
    """What the bitmaps are about.

    Attributes:
        references: by name of the bitmap, what the disk showed when it began.
        open: opens the disk anew.
        takes_errors: go on after a failed request, as guests do.
        removals: names by the place of the log where the removal was acknowledged.
        found_valid: how many bitmaps of crash states were believed, and found_broken how many were not.
    """

    guest: Guest
    setup: Setup
    seed: int
    references: dict[str, bytes] = field(default_factory=dict)
    removals: dict[str, int] = field(default_factory=dict)
    takes_errors: bool = False
    open: Opener = opened
    found_valid: int = 0
    found_broken: int = 0

    async def run(self, media: Mapping[str, Medium]) -> None:
        """All sessions, one after the other."""
        for number in range(SESSIONS):
            async with self.open(media, self.setup.options, read_only=False) as node:
                await self.session(node, number)

    async def session(self, node: Node, number: int) -> None:
        """Add bitmaps, write, take an old bitmap away, merge."""
        chance = random.Random(f"{self.seed} {number}")
        workload = Workload(self.guest, node, self.setup, chance)
        if number == 0:
            await self._add(node, "all", enabled=False)
        await self._add(node, f"b{number}")
        await self._add(node, "memory", persistent=False)
        await self._write(workload)
        if number >= 2:
            await self._remove(node, f"b{number - 2}")
        await self._write(workload)
        wanted = BlockDirtyBitmapMerge(node="image", target="all", bitmaps=["memory"])
        with suppress(IoFailure) if self.takes_errors else nullcontext():
            await merge_bitmaps(node.graph, wanted)
            return
        # What could not be merged must not be believed either.
        await remove_bitmap(*bitmap_at(node.graph, "image", "all"))

    async def _write(self, workload: Workload) -> None:
        if not self.takes_errors:
            await workload.run(STEPS)
            return
        for _ in range(STEPS):
            with suppress(IoFailure):
                await workload.step()

    async def _remove(self, node: Node, name: str) -> None:
        with suppress(IoFailure) if self.takes_errors else nullcontext():
            await remove_bitmap(*bitmap_at(node.graph, "image", name))
            self.removals[name] = self.guest.log.mark("removed")

    async def _add(self, node: Node, name: str, *, persistent: bool = True, enabled: bool = True) -> None:
        wanted = BlockDirtyBitmapAdd(
            node="image", name=name, granularity=512, persistent=persistent, disabled=not enabled
        )
        await add_bitmap(node.graph, wanted)
        self.references[name] = await node.read(0, node.length)

    async def lies(self, media: Mapping[str, Medium], until: int) -> str:
        """What bitmaps that say they are good conceal, in a state of the disks; empty if nothing."""
        async with self.open(media, self.setup.options, read_only=True) as node:
            content = await node.read(0, node.length)
            for bitmap in node.bitmaps:
                assert bitmap.name is not None
                if self.removals.get(bitmap.name, until) < until:
                    return f"bitmap '{bitmap.name}' is back"
                if bitmap.inconsistent:
                    self.found_broken += 1
                    continue
                self.found_valid += 1
                if concealed := clean_but_changed(bitmap.map, content, self.references[bitmap.name]):
                    return f"bitmap '{bitmap.name}' conceals changes of sectors {concealed[:9]}"
        return ""


def clean_but_changed(map: DirtyBitmap, content: bytes, reference: bytes) -> list[int]:
    """Sectors that differ from the reference and are not dirty."""
    if content == reference:
        return []
    return [
        at // SECTOR
        for at in range(0, len(content), SECTOR)
        if content[at : at + SECTOR] != reference[at : at + SECTOR] and not map.any(Span(at, SECTOR))
    ]
