"""Looking for a client's next request before the loop goes to sleep, as long as it pays.

To wake a thread that sleeps costs more than to answer a short request. A client that sends one request after another
sends the next a moment after it has its answer: looking for it meanwhile is cheaper for everybody than sleeping. With
a client that thinks longer, the looks are in vain; they get rare then.
"""

from collections.abc import Callable
from typing import Final

LOOKS_MAX: Final = 24
"""Each takes about two microseconds: as long as it takes to wake a client that does little with an answer."""
SKIPS_MAX: Final = 512
"""In the worst case one answer in so many is followed by looks in vain."""


class Patience:
    """Of one connection.

    Args:
        receipts_max: so often the client may send, before others get their turn.
        looks_max: so often it is looked for each of them.
    """

    def __init__(self, receipts_max: int, looks_max: int = LOOKS_MAX) -> None:
        self._receipts_max, self._looks_max = receipts_max, looks_max
        self._skips = self._skips_left = 0

    def stay(self, take: Callable[[], bool]) -> bool:
        """Look for the client's next requests here, as long as they come quickly.

        Args:
            take: receives from a socket that does not block, and answers; says whether to look for more.

        Returns:
            Whether there may be more, but others have to have their turn before.
        """
        if self._skips_left:
            self._skips_left -= 1
            return False
        looks, left, goes_on = self._looks_max, self._receipts_max, True
        while looks and left and goes_on:
            try:
                goes_on = take()
            except BlockingIOError:
                looks -= 1
                continue
            except OSError:  # the loop will find out, too
                return False
            looks = self._looks_max
            left -= 1
        if left < self._receipts_max:
            self._skips = 0
        elif not looks:
            self._skips = self._skips_left = min(2 * self._skips + 1, SKIPS_MAX)
        return not left
