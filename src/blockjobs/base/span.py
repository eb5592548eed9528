"""Runs of bytes: the one currency between planners, trackers and drivers."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple


class Span(NamedTuple):
    """A run of bytes starting at `at`; `length` may be 0. A copy of scattered clusters makes some for each of them."""

    at: int
    length: int

    @classmethod
    def between(cls, start: int, end: int) -> "Span":
        """The run from `start` up to, not including, `end`."""
        assert 0 <= start <= end, (start, end)
        return cls(start, end - start)

    @property
    def end(self) -> int:
        """The first byte after the run."""
        return self.at + self.length

    def __bool__(self) -> bool:
        return self.length > 0

    def overlaps(self, other: "Span") -> bool:
        """Whether at least one byte is in both."""
        return self.at < other.end and other.at < self.end

    def contains(self, other: "Span") -> bool:
        """Whether every byte of `other` is in this run."""
        return self.at <= other.at and other.end <= self.end

    def intersect(self, other: "Span") -> "Span":
        """The bytes in both; empty (at this run's start or the other's) when they are apart."""
        start = max(self.at, other.at)
        return Span(start, max(0, min(self.end, other.end) - start))

    def widen(self, align: int) -> "Span":
        """The smallest run with both ends at multiples of `align` that holds this one."""
        start = self.at // align * align
        return Span(start, -(-self.end // align) * align - start)

    def narrow(self, align: int) -> "Span":
        """The largest run with both ends at multiples of `align` inside this one; possibly empty."""
        start = -(-self.at // align) * align
        return Span(start, max(0, self.end // align * align - start))

    def is_aligned(self, align: int) -> bool:
        """Whether both ends are multiples of `align`."""
        return self.at % align == 0 and self.length % align == 0

    def split(self, size: int) -> Iterator["Span"]:
        """Cut into pieces that end at multiples of `size`, in order."""
        at = self.at
        while at < self.end:
            cut = min((at // size + 1) * size, self.end)
            yield Span(at, cut - at)
            at = cut

    def shifted(self, by: int) -> "Span":
        """The same length, `by` bytes further on."""
        return Span(self.at + by, self.length)


def coalesce(spans: Iterable[Span]) -> list[Span]:
    """Sort `spans` and join those that touch or overlap; empty ones vanish."""
    joined: list[Span] = []
    end = -1
    for span in sorted(spans):
        at, length = span
        if not length:
            continue
        if at > end:
            joined.append(span)
            end = at + length
        elif at + length > end:
            end = at + length
            first = joined[-1].at
            joined[-1] = Span(first, end - first)
    return joined


def subtract(span: Span, holes: Iterable[Span]) -> list[Span]:
    """The parts of `span` that are in none of `holes`, in order."""
    return without([span], coalesce(holes)) if span else []


def without(spans: list[Span], holes: list[Span]) -> list[Span]:
    """The parts of `spans` that are in none of `holes`; both ascending and disjoint; `subtract` for many at once."""
    if not holes:
        return spans
    left: list[Span] = []
    index, count = 0, len(holes)
    for span in spans:
        at, length = span
        end = at + length
        while index < count and (hole := holes[index]).at < end:
            hole_at, hole_length = hole
            if hole_at > at:
                left.append(Span(at, hole_at - at))
            at = max(at, hole_at + hole_length)
            if at > end:
                break  # it may reach into the next span too
            index += 1
        if at < end:
            left.append(span if at == span.at else Span(at, end - at))
    return left
