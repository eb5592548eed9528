"""A bound on the memory that clients' requests take, whatever the clients do (spec/durability.md §3)."""

from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple

from blockjobs.base.units import KiB, MiB


class Ceiling(NamedTuple):
    """How far requests of a size may fill the budget.

    Attributes:
        request_bytes_max: the longest of such requests.
        used_bytes_max: for clients that have moved bytes promptly so far.
        newcomers_bytes_max: for the others.
    """

    request_bytes_max: int
    used_bytes_max: int
    newcomers_bytes_max: int


CEILINGS: Final = (
    Ceiling(256 * KiB, 40 * MiB, 37 * MiB),
    Ceiling(4 * MiB, 38 * MiB, 35 * MiB),
    Ceiling(32 * MiB, 33 * MiB, 33 * MiB),
)
"""Large requests leave room for smaller ones, so that a client that sends half of a huge write, or never reads a huge
answer, stops neither small nor ordinary requests; and clients that nobody knows yet leave room for those that have
worked well, so that however many of them stand still, the others go on."""
_ORDINARY: Final = 1
_LARGE: Final = len(CEILINGS) - 1


class _Queue(NamedTuple):
    size: int
    request_bytes_max: int
    used_bytes_max: int
    waiting: deque[tuple[int, Callable[[], None]]]


class Budget:
    """Bytes of payload in memory: of writes from their first byte on, of reads until the client has taken them."""

    def __init__(self) -> None:
        self.used = 0
        self._favours_large = False
        self._known, self._new = [], []
        for size, (request_bytes_max, used_bytes_max, newcomers_bytes_max) in enumerate(CEILINGS):
            self._known.append(_Queue(size, request_bytes_max, used_bytes_max, deque()))
            self._new.append(_Queue(size, request_bytes_max, newcomers_bytes_max, deque()))
        self._queues = [
            queue for size in reversed(range(len(CEILINGS))) for queue in (self._known[size], self._new[size])
        ]

    @property
    def is_contended(self) -> bool:
        """Whether somebody waits."""
        return any(queue.waiting for queue in self._queues)

    @property
    def is_spent(self) -> bool:
        """Whether even small requests must wait."""
        return self.used >= CEILINGS[0].used_bytes_max

    def has_room(self, length: int, *, known: bool) -> bool:
        """Whether a request of `length` bytes need not wait."""
        for queue in self._known if known else self._new:
            if length <= queue.request_bytes_max:
                if queue.waiting or (self._favours_large and queue.size == _ORDINARY):
                    return False
                return self.used == 0 or self.used + length <= queue.used_bytes_max
        raise AssertionError(f"a request of {length} bytes")

    def take(self, length: int, *, known: bool) -> bool:
        """Take `length` bytes if there is room and nobody of the same kind waits; returns whether it was done.

        Args:
            length: bytes.
            known: the client has moved bytes promptly so far.
        """
        if not self.has_room(length, known=known):
            return False
        self.used += length
        return True

    def wait(self, length: int, granted: Callable[[], None], *, known: bool) -> None:
        """Queue for `length` bytes; `granted` is called once they are taken."""
        self._queue(length, known).waiting.append((length, granted))

    def favour_large(self) -> None:
        """Large requests have waited long enough: let ordinary ones queue until a large one has had its turn."""
        self._favours_large = self._do_large_wait

    def leave(self, granted: Callable[[], None]) -> None:
        """Give up waiting."""
        for queue in self._queues:
            for entry in list(queue.waiting):
                if entry[1] == granted:
                    queue.waiting.remove(entry)
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
        self._favours_large = self._favours_large and self._do_large_wait
        for queue in self._queues:
            while queue.waiting and not self._is_held_back(queue) and self._fits(queue, queue.waiting[0][0]):
                length, granted = queue.waiting.popleft()
                self.used += length
                self._favours_large = self._favours_large and queue.size != _LARGE
                granted()

    @property
    def _do_large_wait(self) -> bool:
        return bool(self._known[_LARGE].waiting or self._new[_LARGE].waiting)

    def _is_held_back(self, queue: _Queue) -> bool:
        return queue.size == _ORDINARY and self._favours_large

    def _fits(self, queue: _Queue, length: int) -> bool:
        return self.used == 0 or self.used + length <= queue.used_bytes_max

    def _queue(self, length: int, known: bool) -> _Queue:
        queues = self._known if known else self._new
        return next(queue for queue in queues if length <= queue.request_bytes_max)
