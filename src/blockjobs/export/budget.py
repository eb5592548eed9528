"""A bound on the memory that clients' requests take, whatever the clients do (spec/durability.md §3)."""

from collections import deque
from collections.abc import Callable
from typing import Final

from blockjobs.base.units import KiB, MiB

CEILINGS: Final = ((256 * KiB, 40 * MiB), (4 * MiB, 38 * MiB), (32 * MiB, 33 * MiB))
"""(request size, how far such requests may fill the budget). Large ones leave room for smaller ones, so that a client
that sends half of a huge write, or never reads a huge answer, stops neither small nor ordinary requests."""


class Budget:
    """Bytes of payload in memory: of writes from their first byte on, of reads until the client has taken them."""

    def __init__(self) -> None:
        self.used = 0
        self._favours_large = False
        self._queues: list[deque[tuple[int, Callable[[], None]]]] = [deque() for _ in CEILINGS]

    @property
    def is_contended(self) -> bool:
        """Whether somebody waits."""
        return any(self._queues)

    @property
    def is_spent(self) -> bool:
        """Whether even small requests must wait."""
        return self.used >= CEILINGS[0][1]

    def take(self, length: int) -> bool:
        """Take `length` bytes if there is room and nobody of the same size waits; returns whether it was done."""
        index = _class_of(length)
        if self._queues[index] or not self._has_room(index, length) or (index == 1 and self._favours_large):
            return False
        self.used += length
        return True

    def wait(self, length: int, granted: Callable[[], None]) -> None:
        """Queue for `length` bytes; `granted` is called once they are taken."""
        self._queues[_class_of(length)].append((length, granted))

    def favour_large(self) -> None:
        """Large requests have waited long enough: let ordinary ones queue until the large ones have had their turn."""
        self._favours_large = bool(self._queues[-1])

    def leave(self, granted: Callable[[], None]) -> None:
        """Give up waiting."""
        for queue in self._queues:
            for entry in list(queue):
                if entry[1] == granted:
                    queue.remove(entry)
        self._grant()

    def give(self, length: int) -> None:
        """Give bytes back; whoever waits for them goes on before this returns."""
        self.used -= length
        assert self.used >= 0, self.used
        self._grant()

    def charge(self, length: int) -> None:
        """Count bytes that are in memory already, room or not; negative gives back."""
        self.used += length
        if length < 0:
            self._grant()

    def _grant(self) -> None:
        for index, queue in reversed(list(enumerate(self._queues))):
            if index == 1:
                self._favours_large = self._favours_large and bool(self._queues[-1])
                if self._favours_large:
                    continue
            while queue and self._has_room(index, queue[0][0]):
                length, granted = queue.popleft()
                self.used += length
                granted()

    def _has_room(self, index: int, length: int) -> bool:
        return self.used == 0 or self.used + length <= CEILINGS[index][1]


def _class_of(length: int) -> int:
    return next(index for index, (size, _) in enumerate(CEILINGS) if length <= size)
