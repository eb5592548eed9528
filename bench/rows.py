"""A line of the table of ratios: what was done, what each side took, and how they compare pair by pair."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from bounds import Bound
from pairs import Pairs


@dataclass(frozen=True)
class Row:
    """One comparison. A ratio of 2 means twice the peer's speed.

    Args:
        operation: what both did, e.g. "backup qcow2 to qcow2, scattered".
        peer: the program compared with.
        ours: our median with its unit, e.g. "0.24 s".
        theirs: the peer's.
        ratios: pair by pair, as a user sees both; at least one.
        lazy: the same if ours does not wait for the disk either, where the peer does not.
        durable: the same if both do, where that differs.
        at_least: the ratio that must hold, if one was promised.
        aim: the ratio hoped for.
        limit: what the machine itself takes for the bytes (cp, dd, memcpy), with its unit.
        counts: figures that no neighbour disturbs: calls, hops, system calls.
        folder: where the images were, if that is not the usual place.
    """

    operation: str
    peer: str
    ours: str
    theirs: str
    ratios: tuple[float, ...]
    lazy: tuple[float, ...] = ()
    durable: tuple[float, ...] = ()
    at_least: float | None = None
    aim: float | None = None
    limit: str = ""
    counts: str = ""
    folder: str = ""

    @property
    def described(self) -> str:
        """The operation, and where."""
        return f"{self.operation}, on {self.folder}" if self.folder else self.operation

    @property
    def median(self) -> float:
        """The middle of the ratios."""
        return statistics.median(self.ratios)


def of_pairs(
    pairs: Pairs,
    peer: str,
    *,
    at_least: float | None = None,
    aim: float | None = None,
    limit: str = "",
    bound: Bound | None = None,
) -> Row:
    """The row of a measured pair of runs."""
    each = list(zip(pairs.ours, pairs.peer, strict=True))
    ours_s, theirs_s = (statistics.median(took.wall_s for took in side) for side in (pairs.ours, pairs.peer))
    if bound is not None:
        limit = "; ".join(filter(None, (limit, bound.shown(theirs_s))))
    return Row(
        operation=pairs.name,
        peer=peer,
        ours=f"{ours_s:.3f} s",
        theirs=f"{theirs_s:.3f} s",
        ratios=tuple(theirs.wall_s / ours.wall_s for ours, theirs in each),
        lazy=tuple(theirs.lazy_s / ours.lazy_s for ours, theirs in each if ours.lazy_s and theirs.lazy_s),
        durable=tuple(theirs.durable_s / ours.durable_s for ours, theirs in each),
        at_least=at_least,
        aim=aim,
        limit=limit,
    )


def show(found: Iterable[Row]) -> None:
    """Print a line for each row, as it comes."""
    for each in found:
        ratios = f"{each.median:.2f} ({min(each.ratios):.2f} to {max(each.ratios):.2f})"
        lazily = f"neither waits {statistics.median(each.lazy):.2f}" if each.lazy else ""
        durably = f"both durable {statistics.median(each.durable):.2f}" if each.durable else ""
        ends = (ratios, lazily, durably, each.limit, each.counts)
        print(
            f"{each.operation:40s} {each.ours:28s} {each.peer} {each.theirs:28s} {'  '.join(filter(None, ends))}",
            flush=True,
        )
