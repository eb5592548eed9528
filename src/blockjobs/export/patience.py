"""Whether it pays to look for a client's next request before the loop goes to sleep.

To wake a thread that sleeps costs more than to answer a short request. A client that sends one request after another
sends the next a moment after it has its answer: looking for it meanwhile is cheaper for everybody than sleeping. With
a client that thinks longer, the looks are in vain; they get rare then.
"""

from typing import Final

LOOKS_MAX: Final = 24
"""Each takes about two microseconds."""
SKIPS_MAX: Final = 512
"""In the worst case one answer in so many is followed by looks in vain."""


class Patience:
    """Of one connection."""

    def __init__(self) -> None:
        self._skips = self._skips_left = 0

    def looks(self) -> int:
        """How often to look behind the answer that was just given."""
        if self._skips_left:
            self._skips_left -= 1
            return 0
        return LOOKS_MAX

    def found(self) -> None:
        """It did pay."""
        self._skips = self._skips_left = 0

    def missed(self) -> None:
        """It was in vain."""
        self._skips = self._skips_left = min(2 * self._skips + 1, SKIPS_MAX)
