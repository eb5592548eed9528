"""Typed publish and subscribe: how events reach monitors and waiters, in order and at once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Sink = Callable[[object], None]


class Bus:
    """Delivers each event synchronously to every sink, in the order of publication.

    Delivery is synchronous because the order of events and replies on one QMP connection is contract
    (spec/lifecycle.md §7); a sink therefore only queues and never waits.
    """

    def __init__(self) -> None:
        self._sinks: list[Sink] = []

    def publish(self, event: object) -> None:
        """Hand `event` to all sinks present now."""
        for sink in tuple(self._sinks):
            sink(event)

    @contextmanager
    def listening(self, sink: Sink) -> Iterator[None]:
        """Deliver to `sink` inside the block."""
        self._sinks.append(sink)
        try:
            yield
        finally:
            self._sinks.remove(sink)
