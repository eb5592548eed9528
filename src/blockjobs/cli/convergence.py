"""Whether a mirror will catch up with the guest that writes to its source, and what to do if it will not.

A mirror's progress says it all: `current` grows with every byte copied, `total` with every byte that a guest makes
dirty again, so their difference is what is left. A *pass* is over when all that was dirty at its beginning is copied.
"""

from collections import deque
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from blockjobs.base.errors import UsageError

WINDOW_S: Final = 5.0
"""Rates come from the last seconds, as the progress bar's do."""
STALL_S_MAX: Final = 60.0
"""A mirror that copies nothing for so long while something is dirty hangs: its storage does not answer."""
IDLE_S_MAX: Final = 4.0
"""A mirror without a limit that copied nothing for so long is not slow: its storage does not answer now."""
CHUNK_BYTES: Final = 16 << 20
"""What a mirror under a limit copies at once, and then waits."""
PATIENCE_S: Final = 10.0
"""When writes wait for the copy, what is left shrinks all the time; if not for so long, something else is wrong."""
_UNITS_S: Final = {"s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True, slots=True)
class Goal:
    """How long a mirror may run after its guest; one of the two is set.

    Attributes:
        passes: so many passes.
        deadline_s: so many seconds.
    """

    passes: int | None = None
    deadline_s: float | None = None


def parse_goal(text: str) -> Goal:
    """Read `passes=3` or `deadline=10m`.

    Raises:
        UsageError: it is neither.
    """
    name, _, value = text.partition("=")
    if name == "passes" and value.isdecimal() and int(value) > 0:
        return Goal(passes=int(value))
    number, unit = (value[:-1], value[-1:]) if value[-1:] in _UNITS_S else (value, "s")
    try:
        seconds = float(number) * _UNITS_S[unit]
    except ValueError:
        seconds = 0.0
    if name == "deadline" and 0 < seconds < float("inf"):
        return Goal(deadline_s=seconds)
    raise UsageError(f"--converge: '{text}' is neither passes=N nor deadline=TIME (such as 90s, 10m or 2h)")


class Advice(Enum):
    """What to do about a mirror now."""

    WAIT = auto()
    SWITCH = auto()
    """Let the guest's writes wait for the copy (write-blocking): then it catches up for sure."""
    GIVE_UP = auto()
    """Even that did not help in time."""


class Convergence:
    """What the samples of one mirror's progress tell.

    Attributes:
        passes: completed ones, until writes wait for the copy: from then on each write counts as copied too.
        remaining_bytes: still to be copied.
    """

    def __init__(self, now_s: float) -> None:
        self.passes = 0
        self.remaining_bytes = 0
        self._samples: deque[tuple[float, int, int]] = deque()
        self._began_s = self._moved_s = now_s
        self._pass_ends_at: int | None = None
        self._current = -1
        self._switched_s: float | None = None
        self._least: tuple[float, int] | None = None

    def take(self, current: int, total: int, now_s: float) -> None:
        """Note the progress at `now_s`."""
        if current != self._current or total <= current:
            self._moved_s = now_s
        self._current, self.remaining_bytes = current, max(0, total - current)
        if self._pass_ends_at is None:
            self._pass_ends_at = total or None
        elif self._switched_s is not None:
            if self._least is None or self.remaining_bytes < self._least[1]:
                self._least = (now_s, self.remaining_bytes)
        elif current >= self._pass_ends_at:
            self.passes += 1
            self._pass_ends_at = total
        self._samples.append((now_s, current, total))
        while len(self._samples) > 2 and self._samples[0][0] < now_s - WINDOW_S:
            self._samples.popleft()

    @property
    def copied_bytes_per_s(self) -> float:
        """How fast the mirror copies."""
        return self._rate(1)

    @property
    def dirtied_bytes_per_s(self) -> float:
        """How fast the guest makes more to copy; meaningful after the first pass began."""
        return self._rate(2)

    @property
    def ready_in_s(self) -> float | None:
        """Seconds until nothing is left at the present rates; None if that never comes."""
        if not self.remaining_bytes:
            return 0.0
        gain = self.copied_bytes_per_s - self.dirtied_bytes_per_s
        return self.remaining_bytes / gain if gain > 0 else None

    def is_stalled(self, now_s: float) -> bool:
        """Whether nothing has moved for longer than working storage ever takes."""
        return now_s - self._moved_s > STALL_S_MAX

    def is_idle(self, now_s: float, *, limit_bytes_per_s: int = 0) -> bool:
        """Whether nothing moves now, though the limit would let it: no time to let guests wait for the copy."""
        waits_s = CHUNK_BYTES / limit_bytes_per_s if limit_bytes_per_s else 0.0
        return now_s - self._moved_s > IDLE_S_MAX + waits_s

    def switched(self, now_s: float) -> None:
        """The guest's writes wait for the copy from now on."""
        self._switched_s = now_s

    def advice(self, goal: Goal, now_s: float) -> Advice:
        """What to do about a mirror that is not ready yet.

        The guest gets the whole of the goal; after the switch the mirror gets the same time once more, or as long as
        less and less is left.
        """
        since_s = self._began_s if self._switched_s is None else self._switched_s
        late = goal.deadline_s is not None and now_s - since_s > goal.deadline_s
        if goal.passes is not None and self._switched_s is None:
            late = self.passes >= goal.passes
        elif goal.passes is not None:
            late = now_s - max(since_s, self._least[0] if self._least else 0.0) > PATIENCE_S
        if not late:
            return Advice.WAIT
        return Advice.SWITCH if self._switched_s is None else Advice.GIVE_UP

    def _rate(self, column: int) -> float:
        if len(self._samples) < 2:
            return 0.0
        first, last = self._samples[0], self._samples[-1]
        return (last[column] - first[column]) / (last[0] - first[0]) if last[0] > first[0] else 0.0
