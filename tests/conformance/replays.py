"""Plays scenarios ahead of the tests that ask for them, two at a time: a scenario mostly waits."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from images import ImageStore
from oracle import Outcome, play
from scenario import load

if TYPE_CHECKING:
    from player import Program

WORKERS = 2


class Replays:
    """The outcomes of scenarios against one program."""

    def __init__(self, program: Program, names: list[str]) -> None:
        self._store = ImageStore()
        self._pool = ThreadPoolExecutor(WORKERS)
        self._outcomes: dict[str, Future[Outcome]] = {
            name: self._pool.submit(play, load(name), program, self._store) for name in names
        }

    def outcome(self, name: str) -> Outcome:
        """Wait for a scenario's run to end; what `play` raised is raised here."""
        return self._outcomes[name].result()

    def close(self) -> None:
        """Drop what has not started, wait for what has."""
        self._pool.shutdown(cancel_futures=True)
        self._store.close()
