"""How the time of a whole run is shared out among its pieces, so that on a slow machine the last ones have theirs."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

LEAST, MOST = 0.6, 4.0
"""No piece can be done much faster than at the least pace: each figure needs some runs; nor gains from a higher one."""


class Piece(NamedTuple):
    """A part of a run.

    Args:
        name: to tell it by.
        about_s: seconds that it took on the slowest machine that we have met.
        reserved: whether its time is kept for it, and not given to those before.
    """

    name: str
    about_s: float
    reserved: bool = False


class Clock:
    """What took how long, and how fast to go on; what has no place is left out, and noted."""

    def __init__(self, limit_s: float, pieces: Sequence[Piece], now: Callable[[], float] = time.monotonic) -> None:
        """See the class.

        Args:
            limit_s: seconds for all pieces; infinite for as long as it takes.
            pieces: in the order in which they will come.
            now: the clock, in seconds.
        """
        self._now = now
        self._began_s = now()
        self._limit_s = limit_s
        self._ahead = list(pieces)
        self.took_s: dict[str, float] = {}
        self.left_out: list[str] = []
        self.failed: list[str] = []

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[float | None]:
        """Do the piece in the block, at the pace given: 2 is for twice the runs; infinite is for all that are wanted.

        The pace is None if the piece has to be left out, so that those behind it which are reserved have a place.
        """
        [piece] = [each for each in self._ahead if each.name == name]
        self._ahead.remove(piece)
        if (pace := self._pace(piece)) is None:
            self.left_out.append(name)
            yield None
            return
        began_s = self._now()
        yield pace
        self.took_s[name] = self._now() - began_s

    def _pace(self, piece: Piece) -> float | None:
        if math.isinf(self._limit_s):
            return math.inf
        left_s = self._limit_s - (self._now() - self._began_s)
        kept_s = 0.0 if piece.reserved else sum(each.about_s for each in self._ahead if each.reserved)
        if left_s < LEAST * (piece.about_s + kept_s):
            return None
        wanted_s = piece.about_s + sum(each.about_s for each in self._ahead)
        return max(LEAST, min(MOST, left_s / wanted_s))

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {took_s:.0f} s" for name, took_s in self.took_s.items())
        missing = f"; for want of time without {', '.join(self.left_out)}" if self.left_out else ""
        failures = f"; FAILED: {', '.join(self.failed)}" if self.failed else ""
        return f"{self._now() - self._began_s:.0f} s: {parts}{missing}{failures}"
