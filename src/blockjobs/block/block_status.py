"""What a run of a node reads as, and which node of its chain provides it."""

from typing import TYPE_CHECKING

from blockjobs.base.span import Span
from blockjobs.block.driver import FormatDriver, ProtocolDriver
from blockjobs.block.extents import Extent, join_extents
from blockjobs.block.medium import HOLES_SOUGHT_BYTES_MIN, is_mostly_holes
from blockjobs.block.vocabulary import Kind, Segment

if TYPE_CHECKING:
    from blockjobs.block.node import Node


async def block_status(node: "Node", span: Span, *, base: "Node | None" = None) -> list[Extent]:
    """Ask a chain about a run.

    Args:
        node: the top of the chain.
        span: inside the node.
        base: where to stop: this node and what is below it count as absent (depth 0).

    Returns:
        Extents in order without gaps, neighbours joined. What lies past the end of a shorter backing node is ZERO
        of that backing node's depth, as it hides whatever lies further below.

    Raises:
        IoFailure, ImageCorrupt: tables could not be read.
    Waits: metadata reads. Checkpoint: no.
    """
    return join_extents(await _extents(node, span, base, 1))


async def _extents(node: "Node", span: Span, base: "Node | None", depth: int) -> list[Extent]:
    if node is base or not span:
        return [Extent(span.at, span.length, Kind.ZERO, 0)]
    storage = node.storage
    driver = storage.driver
    found: list[Extent] = []
    for segment in await node.status(span):
        here = Span(segment.at, segment.length)
        match segment.kind:
            case Kind.ZERO:
                found.append(Extent(here.at, here.length, Kind.ZERO, depth))
            case Kind.BACKING:
                found.extend(await _backing_extents(storage, here, base, depth))
            case Kind.DATA if isinstance(driver, FormatDriver) and _may_be_hole(storage, driver, segment):
                child = storage.children[segment.child]
                below = await child.status(Span(segment.child_at, segment.length))
                shift = segment.at - segment.child_at
                found.extend(
                    Extent(part.at + shift, part.length, part.kind if part.kind is Kind.ZERO else Kind.DATA, depth)
                    for part in below
                )
            case _:
                found.append(Extent(here.at, here.length, Kind.DATA, depth))
    return found


def _may_be_hole(storage: "Node", driver: FormatDriver, segment: Segment) -> bool:
    """Whether the child must be asked: the format says data, but the file below may have none there."""
    if driver.encipherment is not None:
        return False
    if driver.shows_holes or segment.length < HOLES_SOUGHT_BYTES_MIN:
        return driver.shows_holes
    below = storage.children[segment.child].storage
    medium = below.driver.medium if isinstance(below.driver, ProtocolDriver) else None
    return medium is not None and segment.child_at + segment.length <= below.length and is_mostly_holes(medium)


async def _backing_extents(storage: "Node", span: Span, base: "Node | None", depth: int) -> list[Extent]:
    backing = storage.children.get("backing")
    if backing is None or storage is base:
        return [Extent(span.at, span.length, Kind.ZERO, 0)]
    inside = span.intersect(Span(0, backing.length))
    found = await _extents(backing, inside, base, depth + 1) if inside else []
    beyond = span.length - inside.length
    if beyond:
        found.append(Extent(span.end - beyond, beyond, Kind.ZERO, 0 if backing is base else depth + 1))
    return found
