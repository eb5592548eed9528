"""Carries groups to their end: runs the hooks that the machine asks for, one at a time and under the control lock.

A settlement runs in a task of the engine's, the body's that is over or one made for it, so a client that goes away
cannot stop it half way.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Final, assert_never

from blockjobs.lifecycle.context import JobContext
from blockjobs.lifecycle.control import Control
from blockjobs.lifecycle.effect import AwaitBody, CallHook, Hook
from blockjobs.lifecycle.job import Job
from blockjobs.lifecycle.runner import Runner
from blockjobs.lifecycle.spec import Group
from blockjobs.lifecycle.stimulus import HookDone, Returned, Stimulus
from blockjobs.lifecycle.verdict import verdict

_LOG: Final = logging.getLogger(__name__)


class Settler:
    """The engine's half that waits; one settlement per group at most, because every step is due exactly once."""

    def __init__(
        self,
        *,
        control: Control,
        runners: Mapping[str, Runner],
        feed: Callable[[Stimulus], None],
        spawn: Callable[..., asyncio.Task[None]],
    ) -> None:
        self._control, self._runners, self._feed, self._spawn = control, runners, feed, spawn
        self._due: dict[int, CallHook | AwaitBody] = {}

    def note(self, group: Group, step: CallHook | AwaitBody) -> None:
        """The machine says what must be done next for this group."""
        assert group.number not in self._due, (group, step)
        self._due[group.number] = step

    async def retire(self, runner: Runner) -> None:
        """Tell the machine that a body is over, and do what follows. Checkpoint: no. Waits: for the lock and hooks."""
        async with self._control:
            self._deliver(runner)
            if asyncio.current_task() is runner.body:
                await self._steps(runner.spec.group)
            else:
                await self.settle(runner.spec.group)

    async def settle(self, group: Group) -> None:
        """Do what is due for a group until nothing is.

        The caller holds the lock and keeps it: if it is cancelled, it waits for the settlement first.

        Checkpoint: no. Waits: for hooks, and in an aborting group for bodies.
        """
        if group.number not in self._due:
            return
        task = self._spawn(self._steps(group), name=f"settle {group.number}")
        cancelled: asyncio.CancelledError | None = None
        with self._control.lent_to(task):
            while not task.done():
                try:
                    await asyncio.wait((task,))
                except asyncio.CancelledError as error:
                    cancelled = error
        if cancelled:
            raise cancelled
        task.result()

    def _deliver(self, runner: Runner) -> None:
        # A settler that waited for this body may have been faster than the body's own task.
        if not runner.delivered:
            runner.delivered = True
            self._feed(Returned(runner.life.key, runner.failure))

    async def _steps(self, group: Group) -> None:
        while (step := self._due.pop(group.number, None)) is not None:
            runner = self._runners[step.job]
            match step:
                case AwaitBody():
                    await runner.until_done()
                    self._deliver(runner)
                case CallHook(hook=hook):
                    call = _call(runner, hook)
                    failure = None if call is None else await verdict(runner, call)
                    if failure and hook is not Hook.PREPARE:
                        _LOG.error("%s of job '%s' must not fail: %s", hook, step.job, failure.text)
                    self._feed(HookDone(step.job, hook, failure))
                case _:
                    assert_never(step)


def _call(runner: Runner, hook: Hook) -> Coroutine[Any, Any, None] | None:
    """A hook on its way; none if the type has nothing to do in it, which most types say of most hooks."""
    if getattr(type(runner.job), hook) is getattr(Job, hook):
        return None
    ctx = JobContext(runner)
    match hook:
        case Hook.PREPARE:
            return runner.job.prepare(ctx)
        case Hook.COMMIT:
            return runner.job.commit(ctx)
        case Hook.ABORT:
            return runner.job.abort(ctx)
        case Hook.CLEAN:
            return runner.job.clean(ctx)
        case _:
            assert_never(hook)
