"""The life cycle as a pure function: stimuli in, effects out. No clock, no I/O, no `await` (ADR 0001).

`feed` is called in the loop thread only, so asyncio itself is the lock: between two calls every promise holds, and no
caller can see a job half way through a change.
"""

import copy
from collections.abc import Mapping
from types import MappingProxyType
from typing import assert_never

from blockjobs.base.errors import JobNotFound, ParameterError, UsageError, VerbRefused
from blockjobs.lifecycle.effect import (
    Announce,
    AwaitBody,
    CallHook,
    Effect,
    Forget,
    Hook,
    Interrupt,
    Launch,
    Milestone,
    StatusChanged,
    Wake,
)
from blockjobs.lifecycle.error_policy import IoStatus
from blockjobs.lifecycle.failure import CANCELED, Failure
from blockjobs.lifecycle.life import CancelMode, GroupLife, Life, Phase
from blockjobs.lifecycle.status import ALLOWED, NEXT, JobStatus, JobVerb
from blockjobs.lifecycle.stimulus import (
    BecameReady,
    Cancel,
    Change,
    Complete,
    Create,
    Discard,
    Dismiss,
    ErrorStopped,
    Finalize,
    HookDone,
    Parked,
    Pause,
    QuiesceBegin,
    QuiesceEnd,
    Resume,
    Returned,
    SetSpeed,
    Start,
    Stimulus,
)


class Machine:
    """All live jobs and groups of a host, and the only code that changes them.

    A refused stimulus raises before anything is changed. Stimuli that only the engine sends (parking, returning,
    hooks done) are asserted: a wrong one is a bug of ours, not a user's.
    """

    def __init__(self) -> None:
        self._lives: dict[str, Life] = {}
        self._groups: dict[int, GroupLife] = {}
        self._out: list[Effect] = []

    @property
    def lives(self) -> Mapping[str, Life]:
        """Jobs that are not yet forgotten, by key, oldest first. Read only."""
        return MappingProxyType(self._lives)

    @property
    def groups(self) -> Mapping[int, GroupLife]:
        """Groups that are not yet settled, by number. Read only."""
        return MappingProxyType(self._groups)

    def snapshot(self) -> tuple[dict[str, Life], dict[int, GroupLife]]:
        """A deep copy of everything, for tests and recovery to compare."""
        return copy.deepcopy((self._lives, self._groups))

    def life(self, key: str) -> Life:
        """The record of a job.

        Raises:
            JobNotFound: no such job, or it was dismissed.
        """
        try:
            return self._lives[key]
        except KeyError:
            raise JobNotFound(key) from None

    def check(self, key: str, verb: JobVerb) -> Life:
        """The record of a job whose status allows `verb` (spec/lifecycle.md §2).

        Raises:
            JobNotFound: no such job.
            VerbRefused: the status does not allow the verb.
        """
        life = self.life(key)
        if life.status not in ALLOWED[verb]:
            raise VerbRefused(key, life.status, verb)
        return life

    def check_complete(self, key: str) -> Life:
        """The record of a job that `complete` would be accepted for.

        Raises:
            JobNotFound: no such job.
            VerbRefused: it is not ready.
            UsageError: it is being cancelled.
        """
        life = self.check(key, JobVerb.COMPLETE)
        if life.cancel is not CancelMode.NONE:
            raise UsageError(f"The active block job '{key}' cannot be completed")
        return life

    def feed(self, stimulus: Stimulus) -> list[Effect]:
        """Take in one stimulus and say what is to be done about it, in order.

        Raises:
            UsageError: the stimulus was a user's and is refused with QEMU's text; nothing has changed.
        """
        out: list[Effect] = []
        self._out = out
        match stimulus:
            case Create():
                self._create(stimulus)
            case Discard(job=key):
                self._discard(self.life(key))
            case Start(job=key):
                self._start(self.life(key))
            case Returned(job=key, failure=failure):
                self._returned(self._lives[key], failure)
            case HookDone(job=key, hook=hook, failure=failure):
                self._hook_done(self._lives[key], hook, failure)
            case Parked(job=key):
                self._parked(self._lives[key])
            case BecameReady(job=key):
                self._became_ready(self._lives[key])
            case ErrorStopped(job=key, io_status=io_status):
                self._error_stopped(self._lives[key], io_status)
            case QuiesceBegin(job=key):
                self._quiesce_begin(self._lives[key])
            case QuiesceEnd(job=key):
                self._quiesce_end(self._lives[key])
            case _:
                self._verb(stimulus)
        return out

    def _verb(self, stimulus: Pause | Resume | Cancel | SetSpeed | Change | Complete | Finalize | Dismiss) -> None:
        match stimulus:
            case Pause(job=key):
                self._pause(key)
            case Resume(job=key):
                self._resume(key)
            case Cancel(job=key, force=force):
                self._cancel(key, force=force)
            case SetSpeed(job=key, bytes_per_s=bytes_per_s):
                self._set_speed(key, bytes_per_s)
            case Change(job=key):
                self.check(key, JobVerb.CHANGE)
            case Complete(job=key):
                self._complete(key)
            case Finalize(job=key):
                self._prepare(self._settleable(self.check(key, JobVerb.FINALIZE), JobVerb.FINALIZE))
            case Dismiss(job=key):
                life = self.check(key, JobVerb.DISMISS)
                self._to(life, JobStatus.NULL)
                self._forget(life)
            case _:
                assert_never(stimulus)

    # Beginnings

    def _create(self, wanted: Create) -> None:
        assert wanted.job not in self._lives, wanted.job
        group = self._groups.get(wanted.group) or GroupLife(wanted.group)
        if group.phase is not Phase.WORKING or any(life.status is JobStatus.PENDING for life in group.members):
            raise UsageError(f"Job '{wanted.job}' cannot join a group that is ending")
        life = Life(
            key=wanted.job,
            group=wanted.group,
            auto_finalize=wanted.auto_finalize,
            auto_dismiss=wanted.auto_dismiss,
            speed_bytes_per_s=wanted.speed_bytes_per_s,
        )
        self._groups[wanted.group] = group
        self._lives[life.key] = life
        group.members.insert(0, life)
        self._to(life, JobStatus.CREATED)

    def _discard(self, life: Life) -> None:
        group = self._startable(life)
        group.members.remove(life)
        self._to(life, JobStatus.NULL)
        self._forget(life)
        if not group.members:
            del self._groups[group.number]
        else:
            self._advance(group)

    def _start(self, life: Life) -> None:
        self._startable(life)
        life.started = True
        self._to(life, JobStatus.RUNNING)
        if life.should_park:
            # The first pause point is before any work, so a job born inside a drained section shows a pair at once.
            self._to(life, JobStatus.PAUSED)
        self._out.append(Launch(life.key))

    def _startable(self, life: Life) -> GroupLife:
        group = self._groups[life.group] if life.status is JobStatus.CREATED else None
        if group is None or group.phase is not Phase.WORKING:
            raise UsageError(f"Job '{life.key}' in state '{life.status}' cannot be started")
        return group

    # Pausing: a count of holders, of which the user is at most one (spec/lifecycle.md §4)

    def _pause(self, key: str) -> None:
        life = self.check(key, JobVerb.PAUSE)
        if life.user_paused:
            raise UsageError("Job is already paused")
        life.user_paused = True
        self._out.append(Wake(key))

    def _resume(self, key: str) -> None:
        life = self.life(key)
        if not life.user_paused:
            raise UsageError("Can't resume a job that was not paused")
        self.check(key, JobVerb.RESUME)
        self._drop_user_pause(life)
        self._release(life)

    def _quiesce_begin(self, life: Life) -> None:
        life.drains += 1
        self._out.append(Wake(life.key))

    def _quiesce_end(self, life: Life) -> None:
        assert life.drains > 0, life
        life.drains -= 1
        self._release(life)

    def _parked(self, life: Life) -> None:
        assert life.should_park and not life.returned, life
        self._to(life, JobStatus.STANDBY if life.status is JobStatus.READY else JobStatus.PAUSED)

    def _error_stopped(self, life: Life, io_status: IoStatus) -> None:
        assert life.started and not life.returned and not life.is_stopping, life
        life.user_paused = True
        if life.io_status is IoStatus.OK:
            life.io_status = io_status
        self._out.append(Wake(life.key))

    def _drop_user_pause(self, life: Life) -> None:
        life.user_paused = False
        life.io_status = IoStatus.OK

    def _release(self, life: Life) -> None:
        """Let the body go on if nothing holds it, unless its group aborts: then it goes on when its turn comes."""
        group = self._groups.get(life.group)
        if group and group.phase is Phase.WORKING:
            self._unpark(life)

    def _unpark(self, life: Life) -> None:
        if life.should_park:
            return
        if life.is_parked:
            self._to(life, JobStatus.READY if life.status is JobStatus.STANDBY else JobStatus.RUNNING)
        self._out.append(Wake(life.key))

    # Cancelling and completing (spec/lifecycle.md §5)

    def _cancel(self, key: str, *, force: bool) -> None:
        life = self.check(key, JobVerb.CANCEL)
        group = self._groups[life.group]
        if group.phase in (Phase.PREPARING, Phase.COMMITTING):
            raise VerbRefused(key, life.status, JobVerb.CANCEL)
        if life.is_ready and not force:
            self._drop_user_pause(life)
            if life.cancel is CancelMode.NONE:
                life.cancel = CancelMode.SOFT
            self._release(life)
            return
        self._stop(life)
        if group.phase is Phase.ABORTING:
            return
        if not life.started or life.returned:
            self._abort(group)
        else:
            self._release(life)

    def _stop(self, life: Life) -> None:
        """Force-cancel, but leave a parked body parked: in a group its return to running waits for its turn."""
        self._drop_user_pause(life)
        if life.cancel is not CancelMode.FORCED:
            life.cancel = CancelMode.FORCED
            if life.started and not life.returned:
                self._out.append(Interrupt(life.key))

    def _complete(self, key: str) -> None:
        life = self.check_complete(key)
        life.completion_requested = True
        self._out.append(Wake(key))

    def _set_speed(self, key: str, bytes_per_s: int) -> None:
        life = self.check(key, JobVerb.SET_SPEED)
        if bytes_per_s < 0:
            raise ParameterError.expects("speed", "a non-negative value")
        life.speed_bytes_per_s = bytes_per_s
        self._out.append(Wake(key))

    def _became_ready(self, life: Life) -> None:
        assert life.status is JobStatus.RUNNING and not life.is_stopping, life
        self._to(life, JobStatus.READY)
        self._out.append(Announce(life.key, Milestone.READY))

    # The end: groups settle together (spec/lifecycle.md §6)

    def _returned(self, life: Life, failure: Failure | None) -> None:
        assert life.started and not life.returned and not life.is_parked, life
        group = self._groups[life.group]
        life.returned = True
        life.failure = failure or (CANCELED if life.is_stopping else None)
        if group.phase is Phase.ABORTING:
            if group.due == AwaitBody(life.key):
                self._abort_turn(group)
        elif life.failure:
            self._to(life, JobStatus.ABORTING)
            self._abort(group)
        else:
            self._to(life, JobStatus.WAITING)
            self._advance(group)

    def _advance(self, group: GroupLife) -> None:
        """Once every member is past its body, all become pending; without a manual member, settle at once."""
        if any(life.status is not JobStatus.WAITING for life in group.members):
            return
        for life in group.members:
            self._to(life, JobStatus.PENDING)
            if not life.auto_finalize:
                self._out.append(Announce(life.key, Milestone.PENDING))
        if all(life.auto_finalize for life in group.members):
            self._prepare(group)

    def _settleable(self, life: Life, verb: JobVerb) -> GroupLife:
        group = self._groups[life.group]
        if group.phase is not Phase.WORKING:
            raise VerbRefused(life.key, life.status, verb)
        return group

    def _prepare(self, group: GroupLife) -> None:
        group.phase = Phase.PREPARING
        self._call(group, Hook.PREPARE)

    def _abort(self, group: GroupLife) -> None:
        """Cancel every member that has no failure of its own and walk the list from its head."""
        group.phase, group.cursor = Phase.ABORTING, 0
        for life in group.members:
            if life.failure is None:
                self._stop(life)
                if life.started and not life.returned and not life.is_parked:
                    self._out.append(Wake(life.key))
        self._abort_turn(group)

    def _abort_turn(self, group: GroupLife) -> None:
        life = group.members[group.cursor]
        if life.started and not life.returned:
            group.due = AwaitBody(life.key)
            self._out.append(group.due)
            self._unpark(life)
            return
        life.failure = life.failure or CANCELED
        self._to(life, JobStatus.ABORTING)
        self._call(group, Hook.ABORT)

    def _hook_done(self, life: Life, hook: Hook, failure: Failure | None) -> None:
        group = self._groups[life.group]
        assert group.due == CallHook(life.key, hook), (group.due, life.key, hook)
        group.due = None
        match hook:
            case Hook.PREPARE:
                self._prepared(group, life, failure)
            case Hook.COMMIT | Hook.ABORT:
                self._call(group, Hook.CLEAN)
            case Hook.CLEAN:
                self._conclude(life)
                self._next_turn(group)
            case _:
                assert_never(hook)

    def _prepared(self, group: GroupLife, life: Life, failure: Failure | None) -> None:
        if failure is not None:
            life.failure = failure
            self._to(life, JobStatus.ABORTING)
            self._abort(group)
            return
        group.cursor += 1
        if group.cursor == len(group.members):
            group.phase, group.cursor = Phase.COMMITTING, 0
        self._call(group, Hook.PREPARE if group.phase is Phase.PREPARING else Hook.COMMIT)

    def _next_turn(self, group: GroupLife) -> None:
        group.cursor += 1
        if group.cursor == len(group.members):
            group.phase = Phase.SETTLED
            del self._groups[group.number]
        elif group.phase is Phase.COMMITTING:
            self._call(group, Hook.COMMIT)
        else:
            self._abort_turn(group)

    def _conclude(self, life: Life) -> None:
        """Only a finished `clean` concludes a job; one that never started is announced and kept by nobody."""
        if life.started:
            milestone = Milestone.CANCELLED if life.is_stopping else Milestone.COMPLETED
            self._out.append(Announce(life.key, milestone))
        self._to(life, JobStatus.CONCLUDED)
        if life.auto_dismiss or not life.started:
            self._to(life, JobStatus.NULL)
            self._forget(life)

    # The four primitives

    def _to(self, life: Life, status: JobStatus) -> None:
        assert status in NEXT[life.status], (life.key, life.status, status)
        if status is not life.status:
            life.status = status
            self._out.append(StatusChanged(life.key, status))

    def _call(self, group: GroupLife, hook: Hook) -> None:
        group.due = CallHook(group.members[group.cursor].key, hook)
        self._out.append(group.due)

    def _forget(self, life: Life) -> None:
        del self._lives[life.key]
        self._out.append(Forget(life.key))
