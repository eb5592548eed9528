"""Finds bodies that never come to a checkpoint: they can be neither paused nor cancelled."""

import logging
from typing import Final

from blockjobs.base.clock import Clock
from blockjobs.lifecycle.runner import Runner
from blockjobs.lifecycle.signal import Signal

CHECKPOINT_SILENCE_S_MAX: Final = 5
"""A batch takes 50 ms by construction, so this is a hundred of them; a slow network may need one."""

_LOG: Final = logging.getLogger(__name__)


class Watchdog:
    """Reports each silence once, and sleeps for good while every body rests, so that virtual time can stand still."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._busy: set[Runner] = set()
        self._look = Signal()

    def look(self, runner: Runner) -> None:
        """The body has gone to work. Costs the same however many jobs there are."""
        self._busy.add(runner)
        self._look.notify()

    def forget(self, runner: Runner) -> None:
        """The job is gone."""
        self._busy.discard(runner)

    async def watch(self) -> None:
        """Log silent jobs until cancelled. Checkpoint: no. Waits: for time and for busy bodies."""
        while True:
            self._busy = {runner for runner in self._busy if _is_at_work(runner)}
            watched = {runner: runner.checkpoints for runner in self._busy if not _is_reported(runner)}
            if not watched:
                await self._look.wait()
                continue
            await self._clock.sleep_until(self._clock.now_ns() + CHECKPOINT_SILENCE_S_MAX * 10**9)
            for runner, checkpoints in watched.items():
                if runner.checkpoints == checkpoints and _is_at_work(runner):
                    runner.silence_reported_at = checkpoints
                    _LOG.warning(
                        "job '%s' has not come to a checkpoint for %d s", runner.life.key, CHECKPOINT_SILENCE_S_MAX
                    )


def _is_at_work(runner: Runner) -> bool:
    return runner.life.started and not (runner.body_done or runner.at_rest or runner.is_interruptible)


def _is_reported(runner: Runner) -> bool:
    return runner.silence_reported_at == runner.checkpoints
