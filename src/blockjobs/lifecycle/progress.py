"""How far a job is, in whatever unit its type counts (bytes for block jobs). Not journaled: it is only a view."""


class Progress:
    """A meter whose `current` never goes back (spec/jobs.md §0, Progress)."""

    __slots__ = ("_current", "_total")

    def __init__(self) -> None:
        self._current = 0
        self._total = 0

    @property
    def current(self) -> int:
        """Work done."""
        return self._current

    @property
    def total(self) -> int:
        """Work done and left, as far as known; it may grow and shrink."""
        return self._total

    def advance(self, amount: int) -> None:
        """Count `amount` as done. `total` stays: set it with `set_remaining` or `grow`.

        Raises:
            ValueError: `amount` is negative; nothing changed.
        """
        self._current += _counted(amount)

    def set_remaining(self, amount: int) -> None:
        """Say how much is left from here on.

        Raises:
            ValueError: `amount` is negative; nothing changed.
        """
        self._total = self._current + _counted(amount)

    def grow(self, amount: int) -> None:
        """Add to what is left.

        Raises:
            ValueError: `amount` is negative; nothing changed.
        """
        self._total += _counted(amount)


def _counted(amount: int) -> int:
    if amount < 0:
        raise ValueError(f"progress cannot count {amount}")
    return amount
