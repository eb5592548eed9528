"""What a chain of images is made of, in columns: each image's own pieces, in the gaps of those above it."""

from functools import reduce
from itertools import chain
from operator import itemgetter, or_
from typing import TYPE_CHECKING, Final, NamedTuple

from blockjobs.base.errors import IoFailure
from blockjobs.base.span import Span, subtract
from blockjobs.block.columns import ZERO_AT, Columnar
from blockjobs.block.driver import FormatDriver, ProtocolDriver
from blockjobs.block.medium import HOLES_SOUGHT_BYTES_MIN, is_mostly_holes
from blockjobs.block.pieces import Pieces
from blockjobs.block.placing import medium_of
from blockjobs.block.plan import RunKind
from blockjobs.block.vocabulary import Watch

if TYPE_CHECKING:
    from blockjobs.block.node import Node

_AT: Final = itemgetter(0)


class _Look(NamedTuple):
    """What is looked for.

    Attributes:
        unit: holes of files are left out in whole units of the node, in bytes.
        enough_bytes: nobody need look behind the run with which there is more to copy than this.
        base: what it and the nodes below it provide is not looked for.
    """

    unit: int
    enough_bytes: int
    base: "Node | None"


async def trace_pieces(
    node: "Node", span: Span, unit: int, enough_bytes: int, base: "Node | None" = None
) -> Pieces | None:
    """As `plan.trace`, through all backing nodes, where all keep plain bytes in files.

    Args:
        unit: holes of the files are left out in whole units of the node, in bytes.
        enough_bytes: it need not look behind the run with which there is more to copy than this.
        base: as for `plan.trace`; the images above it have no zeroes of their own then.

    Returns:
        None if it is not like that; whoever asked asks `trace` then.

    Raises:
        IoFailure, ImageCorrupt: metadata could not be read.
    Waits: metadata reads. Checkpoint: no.
    """
    found = await _trace(node, span, _Look(unit, enough_bytes, base))
    if found is None:
        return None
    pieces, align = found
    return None if reduce(or_, chain(*pieces.columns), 0) % align else pieces


async def _trace(node: "Node", span: Span, look: _Look) -> tuple[Pieces, int] | None:
    """Pieces, and what plain calls must be multiples of; None if it is not that simple."""
    node = node.route(Watch.READ)
    driver = node.driver
    if isinstance(driver, ProtocolDriver):
        return await _file(node, driver, span, look)
    if not isinstance(driver, FormatDriver) or driver.encipherment is not None:
        return None
    if driver.shows_holes:
        return await _raw(node, driver, span, look)
    if not isinstance(driver, Columnar):
        return None
    medium, align = medium_of(node.children[driver.columns_in])
    if medium is None:
        return None
    backing = node.children.get("backing")
    if backing is None and look.base is not None:
        return None
    columns = await driver.pieces(span, has_zeroes=look.base is None)
    if columns is None:
        return None
    own = Pieces(medium, *columns, RunKind.ZERO if look.base is None else RunKind.ABSENT)
    longest = max([length for _, length, place, _ in own.rows if place != ZERO_AT], default=0)
    seeks = longest >= HOLES_SOUGHT_BYTES_MIN and is_mostly_holes(medium)
    if backing is None:
        return (await _without_holes(node, own, HOLES_SOUGHT_BYTES_MIN, look) if seeks else own), align
    if seeks:
        return None  # what may be a hole hides what is below
    if look.base is not None and backing.storage is look.base.storage:
        return own, align
    if look.base is not None and backing.length < span.end:
        return None  # zeroes behind the end are not the base's
    inside = span.intersect(Span(0, backing.length))
    below = await _trace(backing, inside, look._replace(enough_bytes=span.length)) if inside else (own.with_rows(()), 1)
    if below is None:
        return None
    return _over(own, below[0], span), max(align, below[1])


def _over(own: Pieces, below: Pieces, span: Span) -> Pieces:
    """An image's own pieces, and in their gaps those from below."""
    seen = below.within(subtract(span, own.spans()))
    rows = sorted([*(row for row in own.rows if row[2] != ZERO_AT), *seen.rows], key=_AT)
    return own.with_rows(rows)


async def _file(node: "Node", driver: ProtocolDriver, span: Span, look: _Look) -> tuple[Pieces, int] | None:
    medium, align = medium_of(node)
    if medium is None or look.base is not None:
        return None
    inside = span.intersect(Span(0, driver.length))
    pieces = Pieces(medium, [inside.at], [inside.length], [inside.at])
    return await _without_holes(node, pieces, 1, look), align


async def _raw(node: "Node", driver: FormatDriver, span: Span, look: _Look) -> tuple[Pieces, int] | None:
    medium, align = medium_of(node.children["file"])
    if medium is None or look.base is not None:
        return None
    [(at, length, _, _, child_at, _)] = await driver.resolve(span)
    return await _without_holes(node, Pieces(medium, [at], [length], [child_at]), 1, look), align


async def _without_holes(node: "Node", pieces: Pieces, length_min: int, look: _Look) -> Pieces:
    try:
        return await node.graph.offload.run(pieces.without_holes, length_min, look.unit, look.enough_bytes)
    except OSError as error:
        raise IoFailure.wrap(error, f"status of node '{node.name}'") from error
