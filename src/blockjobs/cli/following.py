"""Following a job that runs in this process: progress, errors that stop it, signals, and how it ended."""

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from blockjobs.base.errors import UsageError
from blockjobs.cli.progress import JsonView, View

if TYPE_CHECKING:
    from blockjobs.lifecycle.handle import JobHandle
    from blockjobs.lifecycle.history import Outcome

REFRESH_S: Final = 0.1


class Faults:
    """Which file made trouble last, and whether the job waits because of it."""

    def __init__(self, source: str, target: str) -> None:
        self.where = source
        self._files = {"read": source, "write": target}
        self._is_waiting = False

    def note(self, event: object) -> None:
        """A sink for the bus."""
        from blockjobs.jobs.events import BlockJobError

        if not isinstance(event, BlockJobError):
            return
        self.where = self._files[event.operation]
        if event.action == "stop" and not self._is_waiting:
            self._is_waiting = True
            print(
                f"\nblockjobs: waiting, because '{self.where}' failed: remove the cause (make room), "
                f"then `kill -CONT {os.getpid()}`, or give up with Ctrl-C",
                file=sys.stderr,
                flush=True,
            )

    def resume(self, job: "JobHandle") -> None:
        """Let a job that an error has stopped try again."""
        self._is_waiting = False
        if job.life.user_paused:
            job.resume()


async def follow(
    job: "JobHandle",
    view: View,
    faults: Faults,
    *,
    steer: "Callable[[JobHandle], Coroutine[Any, Any, None]] | None" = None,
) -> "Outcome":
    """Show progress until the end; `kill -CONT` resumes a job that an error has stopped.

    Args:
        job: what to follow.
        view: where progress is shown.
        faults: told to resume.
        steer: runs beside the job until that has ended, such as to complete it once it is ready.

    Raises:
        UsageError: from `steer`; the job has been cancelled then.
        CancelledError: a signal came; the job has been cancelled.
    """
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGCONT, faults.resume, job)
    try:
        async with asyncio.TaskGroup() as group:
            beside = [group.create_task(_tick(job, view))]
            if steer is not None:
                beside.append(group.create_task(steer(job)))
            outcome = await job.outcome()
            for task in beside:
                task.cancel()
    except BaseExceptionGroup as errors:
        await _give_up(job)
        raise errors.exceptions[0] from None
    except asyncio.CancelledError:
        await _give_up(job)
        if isinstance(view, JsonView):
            view.done(as_dict(await job.outcome()))
        raise
    finally:
        loop.remove_signal_handler(signal.SIGCONT)
    return outcome


async def _tick(job: "JobHandle", view: View) -> None:
    while True:
        view.show(job.status, job.progress.current, job.progress.total)
        await asyncio.sleep(REFRESH_S)


async def _give_up(job: "JobHandle") -> None:
    with suppress(UsageError):  # it may have ended a moment ago
        await job.cancel(force=True)


def as_dict(outcome: "Outcome") -> dict[str, Any]:
    """How a job ended, as views and programs read it."""
    return {
        "id": outcome.id,
        "type": outcome.type,
        "status": outcome.status,
        "fate": outcome.fate,
        "error": outcome.error,
        "current": outcome.current,
        "total": outcome.total,
        "seconds": (outcome.ended_ns - (outcome.started_ns or outcome.created_ns)) / 1e9,
    }
