"""Steering a mirror from the outside: does it catch up, and what happens when it is ready."""

import time
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any, Final

from blockjobs.base.errors import UsageError
from blockjobs.cli.convergence import IDLE_S_MAX, STALL_S_MAX, Advice, Convergence, Goal
from blockjobs.monitor.client import Commander, QmpError

_RUNS: Final = ("running", "ready")


class Ending(StrEnum):
    """What to do with a mirror that is ready."""

    COPY = "copy"
    """End it: the target is a copy as of that moment."""
    PIVOT = "pivot"
    """Let everybody who uses the source use the target from then on."""
    STAY = "stay"
    """Keep the target in step until somebody ends the job."""


class Mirroring:
    """One mirror job, looked at again and again.

    Attributes:
        ready: it has been ready.
    """

    def __init__(
        self,
        client: Commander,
        job: str,
        *,
        ending: Ending,
        goal: Goal | None,
        say: Callable[[str], None],
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """See the class.

        Args:
            client: carries the commands out.
            job: the mirror's id.
            ending: what to do once it is ready.
            goal: how long it may take to catch up; None for any time.
            say: tells the user of a decision, in one line.
            now_s: the clock.
        """
        self._client, self._job, self._ending, self._goal = client, job, ending, goal
        self._say, self._now_s = say, now_s
        self._convergence = Convergence(now_s())
        self.ready = False

    def ends_softly(self) -> bool:
        """Whether the target is worth keeping if the user stops now: then the job ends with both sides alike."""
        return self.ready and self._ending is Ending.STAY

    @property
    def keeps_target(self) -> bool:
        """Whether the target may be complete, or in use in place of the source."""
        return self.ready and self._ending in (Ending.STAY, Ending.PIVOT)

    async def look(self, job: dict[str, Any]) -> Mapping[str, Any]:
        """Take in what `query-jobs` says of the job and act on it; returns what a view shows besides.

        Raises:
            UsageError: it does not catch up, and nothing more can be done; the job still runs.
            WireError: the server went away.
        """
        now_s, progress = self._now_s(), self._convergence
        progress.take(job["current-progress"], job["total-progress"], now_s)
        if job["status"] == "ready" and not self.ready:
            self.ready = True
            await self._end()
        elif job["status"] in _RUNS and not (self.ready and self._ending is Ending.STAY):
            await self._keep_goal(now_s, job)
        return {
            "remaining": progress.remaining_bytes,
            "passes": progress.passes,
            "ready-in": 0.0 if self.ready else progress.ready_in_s,
        }

    async def _end(self) -> None:
        match self._ending:
            case Ending.COPY:
                await self._client.execute("block-job-cancel", device=self._job, force=False)
            case Ending.PIVOT:
                await self._client.execute("job-complete", id=self._job)
            case Ending.STAY:
                self._say("in step: the target follows the source until Ctrl-C, and stays as it is then")

    async def _keep_goal(self, now_s: float, job: Mapping[str, Any]) -> None:
        if self._goal is None:
            return
        progress, limit = self._convergence, job.get("block-job", {}).get("speed", 0)
        if progress.is_stalled(now_s):
            raise UsageError(f"nothing was copied for {STALL_S_MAX:.0f} seconds: the storage does not answer")
        advice = progress.advice(self._goal, now_s)
        if advice is Advice.WAIT:
            return
        if progress.is_idle(now_s, limit_bytes_per_s=limit):
            # Guests whose writes waited for this copy would stand still with it.
            raise UsageError(f"nothing was copied for {IDLE_S_MAX:.0f} seconds: the storage does not answer")
        if advice is Advice.GIVE_UP:
            raise UsageError(self._why_late())
        await self._switch(now_s)

    def _why_late(self) -> str:
        progress = self._convergence
        if progress.ready_in_s is None:
            return f"the mirror does not catch up, {self._rates()}"
        left = f"{progress.remaining_bytes / 2**20:.0f} MiB are left"
        return f"the mirror is not ready in time: {left}, {progress.ready_in_s:.0f} seconds more at the present speed"

    async def _switch(self, now_s: float) -> None:
        try:
            await self._client.execute("block-job-change", id=self._job, type="mirror", copy_mode="write-blocking")
        except QmpError as error:
            advice = "start it with --copy-mode write-blocking"
            raise UsageError(f"the mirror does not catch up, {self._rates()}: {advice} ({error})") from error
        self._convergence.switched(now_s)
        self._say(f"not catching up, {self._rates()}: writes wait for the copy from now on")

    def _rates(self) -> str:
        copied, dirtied = (
            f"{rate / 2**20:.1f} MiB/s"
            for rate in (self._convergence.copied_bytes_per_s, self._convergence.dirtied_bytes_per_s)
        )
        return f"it copies {copied} and {dirtied} are written"
