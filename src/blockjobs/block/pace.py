"""How much a copy looks at, and moves, at a time."""

from typing import Final

from blockjobs.base.units import GiB, KiB, MiB

BATCH_BYTES_MIN: Final = 64 * KiB
BATCH_BYTES_MAX: Final = 64 * MiB
BATCH_BYTES_FIRST: Final = 16 * MiB
"""Before anything is known of the storage; even at 100 MiB/s a pause takes effect in a third of a second."""
BATCH_NS_MAX: Final = 30_000_000
"""What a batch should take: guests may have to wait for one, and a pause for two, even below 100 ms on a busy disk."""
LATE_NS: Final = 2 * BATCH_NS_MAX
"""A job's batch that takes longer ends early: its progress is to move, and whoever waits for its bytes to go on."""
REACH_BYTES_MAX: Final = 4 * GiB
"""How far one look goes when there is little to copy."""
RUNS_MAX: Final = 4096
"""Runs per batch: bounds its metadata work, above all with tiny clusters."""


class Pace:
    """Learns from the batches of one copy.

    Attributes:
        batch_bytes: what to transfer at once.
        reach_bytes: how much to look at for that.
    """

    def __init__(self, unit: int = BATCH_BYTES_MIN) -> None:
        """Begin with the size for unknown storage, or with one `unit` of the copy, in bytes, if that is longer."""
        self.batch_bytes = self.reach_bytes = max(BATCH_BYTES_FIRST, unit)

    def learn(self, moved_bytes: int, took_ns: int) -> None:
        """Aim the next batch at BATCH_NS_MAX, given what this one took."""
        if not moved_bytes or (2 * moved_bytes < self.batch_bytes and took_ns < BATCH_NS_MAX):
            return  # too small to tell: mostly overhead
        fitting = moved_bytes * BATCH_NS_MAX // took_ns if took_ns else BATCH_BYTES_MAX
        self.batch_bytes = max(BATCH_BYTES_MIN, min(BATCH_BYTES_MAX, (self.batch_bytes + fitting) // 2))

    def found(self, looked_at: int, moved_bytes: int, moved_max: int) -> None:
        """A look at so many bytes found so many to transfer, at most `moved_max`: the next goes as far as needed."""
        wanted = looked_at * moved_max // moved_bytes * 9 // 8 if moved_bytes else 8 * looked_at
        self.reach_bytes = max(BATCH_BYTES_MIN, min(wanted, 8 * max(self.reach_bytes, looked_at), REACH_BYTES_MAX))
