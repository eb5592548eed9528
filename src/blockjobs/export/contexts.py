"""Block status as NBD tells it: what each context of an export says about a run (spec/block-layer.md §7)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from blockjobs.base.span import Span
from blockjobs.base.units import GiB, MiB
from blockjobs.block.bitmap import DirtyBitmap
from blockjobs.block.extents import Extent, join_extents
from blockjobs.block.node import Node
from blockjobs.block.node_bitmap import NodeBitmap
from blockjobs.block.vocabulary import Kind
from blockjobs.wire.nbd import BASE_ALLOCATION, QEMU_ALLOCATION_DEPTH, QEMU_DIRTY_BITMAP, Allocation
from blockjobs.wire.nbd_options import MetaContext
from blockjobs.wire.nbd_requests import Extent as WireExtent

EXTENTS_MAX: Final = 8192
"""In one answer; the client asks again for the rest."""
LOOK_BYTES_MIN: Final = 64 * MiB
LOOK_BYTES_MAX: Final = 64 * GiB
FEW_EXTENTS: Final = 256
"""A look that found no more than this lets the next one cover four times as much."""
DEPTH_ID: Final = 1
BITMAP_ID: Final = 2


@dataclass(frozen=True, slots=True)
class Contexts:
    """What an export can tell, besides the bytes.

    Attributes:
        depth: whether it offers `qemu:allocation-depth`.
        bitmaps: the exported ones, in the order given.
    """

    depth: bool
    bitmaps: tuple[NodeBitmap, ...]

    @property
    def all(self) -> list[MetaContext]:
        """Every context with the number that replies use."""
        found = [MetaContext(0, BASE_ALLOCATION)]
        if self.depth:
            found.append(MetaContext(DEPTH_ID, QEMU_ALLOCATION_DEPTH))
        for index, bitmap in enumerate(self.bitmaps):
            found.append(MetaContext(BITMAP_ID + index, f"{QEMU_DIRTY_BITMAP}{bitmap.name}"))
        return found

    def listed(self, queries: Sequence[str]) -> list[MetaContext]:
        """Those that LIST_META_CONTEXT asks for: all without a query; `qemu:` means all in that name space."""
        if not queries:
            return self.all
        return [each for each in self.all if any(_lists(query, each.name) for query in queries)]

    def chosen(self, queries: Sequence[str]) -> list[MetaContext]:
        """Those that SET_META_CONTEXT chooses, by their whole names."""
        return [each for each in self.all if each.name in queries]


def _lists(query: str, name: str) -> bool:
    return name == query or (query.endswith(":") and name.startswith(query))


async def status(
    node: Node, span: Span, contexts: Iterable[int], bitmaps: Sequence[NodeBitmap], *, single: bool
) -> list[tuple[int, list[WireExtent]]]:
    """What the contexts say about a run that is inside the node.

    Args:
        node: what is exported.
        span: not empty.
        contexts: their numbers.
        bitmaps: of the export.
        single: only the first extent of each is wanted.

    Returns:
        For each context its extents from the start of `span` on, joined; at most `EXTENTS_MAX`, so that they may end
        early. None reaches past the end of `span`.

    Raises:
        IoFailure, ImageCorrupt: metadata could not be read.
    Waits: metadata reads. Checkpoint: no.
    """
    wanted = list(contexts)
    extents = await _look(node, span, single) if any(context < BITMAP_ID for context in wanted) else []
    answers = []
    for context in wanted:
        if context == 0:
            found = _joined((each.length, _allocation(each)) for each in extents)
        elif context == DEPTH_ID:
            found = _joined((each.length, each.depth) for each in extents)
        else:
            found = _dirty(bitmaps[context - BITMAP_ID].map, span)
        answers.append((context, found[: 1 if single else EXTENTS_MAX]))
    return answers


async def _look(node: Node, span: Span, single: bool) -> list[Extent]:
    """Block status in pieces that do not hold up the loop for long."""
    found: list[Extent] = []
    at, look_bytes = span.at, LOOK_BYTES_MIN
    while at < span.end and len(found) < EXTENTS_MAX:
        look = Span(at, min(look_bytes, span.end - at))
        fresh = await node.block_status(look)
        found = join_extents([*found[-1:], *fresh]) if single else found[:-1] + join_extents([*found[-1:], *fresh])
        if single and len(found) > 1:
            return found[:1]
        at = look.end
        look_bytes = min(look_bytes * 4, LOOK_BYTES_MAX) if len(fresh) <= FEW_EXTENTS else LOOK_BYTES_MIN
    return found


def _allocation(extent: Extent) -> Allocation:
    return Allocation.HOLE | Allocation.ZERO if extent.kind is Kind.ZERO else Allocation(0)


def _dirty(bitmap: DirtyBitmap, span: Span) -> list[WireExtent]:
    found: list[WireExtent] = []
    at = span.at
    for run in bitmap.runs(span):
        inside = run.intersect(span)
        if inside.at > at:
            found.append(WireExtent(inside.at - at, 0))
        found.append(WireExtent(inside.length, 1))
        at = inside.end
        if len(found) >= EXTENTS_MAX:
            return found
    if at < span.end:
        found.append(WireExtent(span.end - at, 0))
    return found


def _joined(runs: Iterable[tuple[int, int]]) -> list[WireExtent]:
    found: list[WireExtent] = []
    for length, flags in runs:
        if found and found[-1].flags == flags:
            found[-1] = WireExtent(found[-1].length + length, flags)
        else:
            found.append(WireExtent(length, int(flags)))
    return found
