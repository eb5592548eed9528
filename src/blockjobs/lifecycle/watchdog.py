"""Finds bodies that never come to a checkpoint: they can be neither paused nor cancelled."""

import logging
from collections.abc import Callable, Iterable
from typing import Final

from blockjobs.base.clock import Clock
from blockjobs.lifecycle.runner import Runner
from blockjobs.lifecycle.signal import Signal

CHECKPOINT_SILENCE_S_MAX: Final = 5
"""A batch takes 50 ms by construction, so this is a hundred of them; a slow network may need one."""

_LOG: Final = logging.getLogger(__name__)


class Watchdog:
    """Reports each silence once, and sleeps for good while every body rests, so that virtual time can stand still."""

    def __init__(self, clock: Clock, runners: Callable[[], Iterable[Runner]]) -> None:
        self._clock, self._runners = clock, runners
        self._look = Signal()

    def look(self) -> None:
        """Some body may have become busy."""
        self._look.notify()

    async def watch(self) -> None:
        """Log silent jobs until cancelled. Checkpoint: no. Waits: for time and for busy bodies."""
        while True:
            watched = {runner: runner.checkpoints for runner in self._runners() if _is_worth_watching(runner)}
            if not watched:
                await self._look.wait()
                continue
            await self._clock.sleep_until(self._clock.now_ns() + CHECKPOINT_SILENCE_S_MAX * 10**9)
            for runner, checkpoints in watched.items():
                if runner.checkpoints == checkpoints and _is_worth_watching(runner):
                    runner.silence_reported_at = checkpoints
                    _LOG.warning(
                        "job '%s' has not come to a checkpoint for %d s", runner.life.key, CHECKPOINT_SILENCE_S_MAX
                    )


def _is_worth_watching(runner: Runner) -> bool:
    at_work = runner.life.started and not (runner.body_done or runner.at_rest or runner.is_interruptible)
    return at_work and runner.silence_reported_at != runner.checkpoints
