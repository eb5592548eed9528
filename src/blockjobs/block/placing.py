"""Host space for the bytes of a copy: found on the way down the target's graph, shown only when the bytes are there."""

from collections.abc import Awaitable
from contextlib import AsyncExitStack
from functools import reduce
from itertools import chain, groupby
from operator import attrgetter, or_
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

from blockjobs.base.span import Span
from blockjobs.block.columns import Columnar
from blockjobs.block.divisible import Divisible
from blockjobs.block.driver import FormatDriver, ProtocolDriver
from blockjobs.block.encipherment import Encipherment
from blockjobs.block.medium import Medium
from blockjobs.block.vocabulary import Placement, Reservation, Watch

if TYPE_CHECKING:
    from blockjobs.block.node import Node


UNREACHABLE: Final[tuple[Medium | None, int]] = (None, 1)


def medium_of(node: "Node") -> tuple[Medium | None, int]:
    """The medium that plain calls may use in place of a node, if any, and what they must be multiples of."""
    driver = node.driver
    if not isinstance(driver, ProtocolDriver) or driver.medium is None:
        return UNREACHABLE
    return driver.medium, driver.limits.request_align


def fits(driver: ProtocolDriver, at: int, length: int) -> bool:
    """Whether the run needs no padding for direct I/O."""
    return (at | length) % driver.limits.request_align == 0


def _takes_pieces(driver: FormatDriver) -> bool:
    """Whether plain bytes of many runs may go below a format at once."""
    return driver.encipherment is None and (isinstance(driver, Columnar) or driver.shows_holes)


_CHILD: Final = attrgetter("child")
_Result = TypeVar("_Result")


class Placed(NamedTuple):
    """Where bytes of the target go."""

    at: int
    length: int
    medium: Medium
    medium_at: int


class Landing(NamedTuple):
    """Where many pieces go: from `medium_at` on, one after another, or as far from each other as on the node."""

    medium: Medium
    medium_at: int
    in_a_row: bool


class Placing:
    """Host space for one batch, reserved in the formats on the way down and not yet visible.

    Use it as a context: leaving without `publish` gives the space back.

    Attributes:
        has_searched: whoever copies has left out stored zeroes, so that nodes need not detect them.
    """

    def __init__(self, *, has_searched: bool = False) -> None:
        self.has_searched = has_searched
        self.placed: list[Placed] = []
        self._reservations: list[tuple[FormatDriver, Reservation]] = []
        self._changing: list[tuple[Node, list[Span]]] = []
        self._tickets = AsyncExitStack()

    async def reserve(self, node: "Node", spans: list[Span]) -> bool:
        """Find a place for every span, holding the nodes' tickets from now on.

        Args:
            node: the target.
            spans: ascending; whole allocation units of the target, or up to its end.

        Returns:
            False if plain steps cannot write there; nothing is held then.

        Raises:
            IoFailure: no space or tables unreadable; nothing is held then.
        Waits: for earlier requests on the same bytes, and metadata I/O. Checkpoint: no.
        """
        return await self._all_or_nothing(self._descend(node, spans))

    async def reserve_in(self, node: "Node", driver: FormatDriver, spans: list[Span]) -> bool:
        """As `reserve`, for a format whose tickets the caller holds, and who changes nothing that the node shows."""
        return await self._all_or_nothing(self._descend_format(node, driver, spans))

    async def reserve_pieces(self, node: "Node", at: list[int], length: list[int]) -> Landing | None:
        """As `reserve`, for many runs of a node that has none of them, described by columns.

        Returns:
            None if it is not that simple: nothing is held then.
        """
        return await self._all_or_nothing(self._descend_pieces(node, at, length))

    async def reserve_pieces_in(
        self, node: "Node", driver: FormatDriver, at: list[int], length: list[int]
    ) -> Landing | None:
        """As `reserve_pieces`, for a format as in `reserve_in`."""
        return await self._all_or_nothing(self._descend_format_pieces(node, driver, at, length))

    async def _descend_pieces(self, node: "Node", at: list[int], length: list[int]) -> Landing | None:
        node = node.route(Watch.WRITE)
        driver, hull = node.driver, Span.between(at[0], at[-1] + length[-1])
        if isinstance(driver, ProtocolDriver):
            medium = self._medium_for(node, reduce(or_, chain(at, length)))
            node.tally.reached(hull.end)
            return None if medium is None else Landing(medium, hull.at, False)
        if not isinstance(driver, FormatDriver) or not _takes_pieces(driver) or not self._may_pass(node):
            return None
        node.tally.reached(hull.end)
        await self._tickets.enter_async_context(node.tracker.exclusive(hull.widen(driver.write_align)))
        return await self._descend_format_pieces(node, driver, at, length)

    async def _descend_format_pieces(
        self, node: "Node", driver: FormatDriver, at: list[int], length: list[int]
    ) -> Landing | None:
        """The same below a format, whose ticket is held."""
        if not _takes_pieces(driver):
            return None
        hull = Span.between(at[0], at[-1] + length[-1])
        reservation = await (
            driver.reserve_in_one(at, length) if isinstance(driver, Columnar) else driver.reserve(hull)
        )
        if reservation is None:
            return None
        self._reservations.append((driver, reservation))
        [(_, total, child, child_at)] = reservation.placements
        in_a_row = isinstance(driver, Columnar) and not driver.keeps_places
        below = node.children[child].route(Watch.WRITE)
        # Of a raw node each place is (child_at - hull.at) further on.
        places = reduce(or_, length) if in_a_row else reduce(or_, chain(at, length)) | hull.at
        medium = self._medium_for(below, child_at | places)
        if medium is None:
            return None
        below.tally.reached(child_at + total)
        return Landing(medium, child_at, in_a_row)

    def _may_pass(self, node: "Node") -> bool:
        """Whether the node has no part of its own in a write."""
        return not node.bitmaps and (self.has_searched or not node.detects_zeroes)

    def _medium_for(self, node: "Node", places: int) -> Medium | None:
        """Where plain calls may write in place of `node`; `places`: all positions and lengths, or-ed."""
        medium, align = medium_of(node)
        return medium if self._may_pass(node) and places % align == 0 else None

    async def _all_or_nothing(self, descent: Awaitable[_Result]) -> _Result:
        try:
            fits = await descent
        except BaseException:
            await self.release()
            raise
        if not fits:
            await self.release()
        return fits

    @property
    def is_divisible(self) -> bool:
        """Whether `publish` can make a part visible."""
        return all(
            isinstance(driver, Divisible) and driver.is_divisible(reservation)
            for driver, reservation in self._reservations
        )

    async def publish(self, first_bytes: int | None = None) -> None:
        """Make it visible after the bytes are in place, inner formats first, and let go of the tickets.

        Args:
            first_bytes: only so many bytes, counted over the spans in their order, are in place: the space of the
                others is given back. Whole allocation units of the target, and only if `is_divisible`.

        Raises:
            IoFailure, ImageCorrupt: metadata could not be written; what was not published is given back.
        """
        if first_bytes is not None:
            await self._shorten(first_bytes)
        try:
            while self._reservations:
                driver, reservation = self._reservations.pop()
                await driver.publish(reservation)
        finally:
            await self.release()

    async def _shorten(self, first_bytes: int) -> None:
        """Keep of each driver's reservations, which are in the order of the bytes, only the first bytes."""
        kept: list[tuple[FormatDriver, Reservation]] = []
        left: dict[FormatDriver, int] = {}
        for driver, reservation in self._reservations:
            wanted = left.get(driver, first_bytes)
            held = sum(placement.length for placement in reservation.placements)
            left[driver] = wanted - min(wanted, held)
            if wanted:
                kept.append((driver, reservation))
            else:
                await driver.release(reservation)
            if 0 < wanted < held:
                assert isinstance(driver, Divisible)
                await driver.shorten(reservation, wanted)
        self._reservations = kept

    async def release(self) -> None:
        """Give back what is not published, and the tickets. Harmless after `publish`. Never raises."""
        while self._reservations:
            driver, reservation = self._reservations.pop()
            await driver.release(reservation)
        while self._changing:
            node, spans = self._changing.pop()
            for span in spans:
                node.record(span)
        await self._tickets.aclose()

    async def _descend(self, node: "Node", spans: list[Span]) -> bool:
        """`reserve` for the part of the graph from `node` on."""
        node = node.route(Watch.WRITE)
        driver = node.driver
        if node.detects_zeroes and not self.has_searched:
            return False
        if node.bitmaps:
            self._changing.append((node, spans))
        node.tally.reached(spans[-1].end)
        if isinstance(driver, ProtocolDriver):
            return self._land(driver, spans)
        if not isinstance(driver, FormatDriver):
            return False
        hull = Span.between(spans[0].at, spans[-1].end).widen(driver.write_align)
        await self._tickets.enter_async_context(node.tracker.exclusive(hull))
        return await self._descend_format(node, driver, spans)

    async def _descend_format(self, node: "Node", driver: FormatDriver, spans: list[Span]) -> bool:
        """The same below a format, whose ticket is held."""
        reservations = await driver.reserve_many(spans)
        self._reservations.extend((driver, reservation) for reservation in reservations)
        if any(reservation.fills for reservation in reservations):
            return False
        for reservation in reservations:
            for name, group in groupby(reservation.placements, key=_CHILD):
                if not await self._place(node.children[name], list(group), driver.encipherment):
                    return False
        return True

    async def _place(self, child: "Node", placements: list[Placement], encipherment: Encipherment | None) -> bool:
        """Go on with placements in a child."""
        below = child.route(Watch.WRITE)
        medium, align = medium_of(below)
        if medium is None or (below.detects_zeroes and not self.has_searched) or below.bitmaps:
            if encipherment is not None:
                return False
            for placement in placements:
                if not await self._place_below(child, placement):
                    return False
            return True
        if encipherment is None:
            self.placed.extend([Placed(at, length, medium, child_at) for at, length, _, child_at in placements])
        else:
            align = max(align, encipherment.unit)
            for at, length, _, child_at in placements:
                self.placed.append(Placed(at, length, encipherment.placed(at, child_at).over(medium), child_at))
        below.tally.reached(max([child_at + length for _, length, _, child_at in placements]))
        return align == 1 or not any((child_at | length) % align for _, length, _, child_at in placements)

    async def _place_below(self, child: "Node", placement: Placement) -> bool:
        at, length, _, child_at = placement
        first = len(self.placed)
        if not await self._descend(child, [Span(child_at, length)]):
            return False
        self.placed[first:] = [place._replace(at=place.at + at - child_at) for place in self.placed[first:]]
        return True

    def _land(self, driver: ProtocolDriver, spans: list[Span]) -> bool:
        if driver.medium is None or not all(fits(driver, span.at, span.length) for span in spans):
            return False
        self.placed.extend(Placed(span.at, span.length, driver.medium, span.at) for span in spans)
        return True
