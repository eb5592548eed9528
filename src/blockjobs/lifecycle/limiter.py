"""The rate limit: after each request, sleep until the bytes already sent are due (design §1.6, point 9).

Pure arithmetic on the readings of a clock; the waiting is `Runner.rest`'s. Everything is in whole byte-nanoseconds, so
that no rounding can add up: 0.2 % is the budget and all of it is left to the timers.
"""

from typing import Final

_NS_PER_S: Final = 10**9
CREDIT_NS: Final = 50_000_000
"""A sleeper that wakes late may catch up by this much, or timer slack would slow every job: 1 % of five seconds."""


class Limiter:
    """Keeps the debt of bytes sent ahead of time. 0 bytes per second means unlimited."""

    __slots__ = ("_as_of_ns", "_bytes_per_s", "_debt")

    def __init__(self, bytes_per_s: int, now_ns: int) -> None:
        self._bytes_per_s = bytes_per_s
        self._debt = 0
        self._as_of_ns = now_ns

    def set_speed(self, bytes_per_s: int, now_ns: int) -> None:
        """Change the rate. What is owed is due at the earlier time of both rates: a batch sent at a high rate must not
        hold the job up for a minute at a low one.
        """
        if self._bytes_per_s:
            self._catch_up(now_ns)
            if self._debt > 0:
                self._debt = min(self._debt, self._debt * bytes_per_s // self._bytes_per_s)
        self._as_of_ns = now_ns
        self._bytes_per_s = bytes_per_s
        if not bytes_per_s:
            self._debt = 0

    def charge(self, cost_bytes: int, now_ns: int) -> None:
        """Count bytes about to be sent, or, if negative, such as were counted and not sent."""
        if self._bytes_per_s and cost_bytes:
            self._catch_up(now_ns)
            self._debt += cost_bytes * _NS_PER_S

    def due_ns(self, now_ns: int) -> int:
        """When the bytes sent so far are due: the next request may go then. Not after `now_ns` if it may go now."""
        if not self._bytes_per_s:
            return now_ns
        self._catch_up(now_ns)
        return now_ns + max(0, -(-self._debt // self._bytes_per_s))

    def forfeit(self, now_ns: int) -> None:
        """Drop the credit of an idle time: a pause must not be made up for by a burst."""
        if self._bytes_per_s:
            self._catch_up(now_ns)
            self._debt = max(self._debt, 0)

    def _catch_up(self, now_ns: int) -> None:
        paid = self._debt - (now_ns - self._as_of_ns) * self._bytes_per_s
        self._debt = max(paid, -CREDIT_NS * self._bytes_per_s)
        self._as_of_ns = now_ns
