"""Any order of stimuli, legal or not, keeps the promises of the life cycle (design §4.3).

The tables here are a second copy, typed by hand from spec/lifecycle.md §2: a slip in one is caught by the other.
"""

import random
from collections.abc import Callable

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from blockjobs.base.errors import UsageError, VerbRefused
from blockjobs.lifecycle.effect import Announce, AwaitBody, CallHook, Effect, Forget, Hook, Milestone, StatusChanged
from blockjobs.lifecycle.error_policy import IoStatus
from blockjobs.lifecycle.failure import Failure
from blockjobs.lifecycle.life import Phase
from blockjobs.lifecycle.machine import Machine
from blockjobs.lifecycle.status import JobStatus, JobVerb
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
    from_json,
    to_json,
)

NEXT_TYPED_BY_HAND = {
    "undefined": "created",
    "created": "running aborting null",
    "running": "paused ready waiting aborting",
    "paused": "running",
    "ready": "standby waiting aborting",
    "standby": "ready",
    "waiting": "pending aborting",
    "pending": "aborting concluded",
    "aborting": "concluded",  # aborting again is legal, but silent
    "concluded": "null",
    "null": "",
}
ALLOWED_TYPED_BY_HAND = {
    "cancel": "created running paused ready standby waiting pending",
    "pause": "created running paused ready standby",
    "resume": "created running paused ready standby",
    "set-speed": "created running paused ready standby",
    "change": "created running paused ready standby",
    "complete": "ready standby",
    "finalize": "pending",
    "dismiss": "concluded",
}
NEXT = {start: frozenset(ends.split()) for start, ends in NEXT_TYPED_BY_HAND.items()}
ALLOWED = {verb: frozenset(statuses.split()) for verb, statuses in ALLOWED_TYPED_BY_HAND.items()}

VERBS: dict[JobVerb, Callable[[str], Stimulus]] = {
    JobVerb.CANCEL: Cancel,
    JobVerb.PAUSE: Pause,
    JobVerb.RESUME: Resume,
    JobVerb.SET_SPEED: lambda key: SetSpeed(key, 1000),
    JobVerb.CHANGE: Change,
    JobVerb.COMPLETE: Complete,
    JobVerb.FINALIZE: Finalize,
    JobVerb.DISMISS: Dismiss,
}
VERB_OF = {
    Cancel: "cancel",
    Pause: "pause",
    Resume: "resume",
    SetSpeed: "set-speed",
    Change: "change",
    Complete: "complete",
    Finalize: "finalize",
    Dismiss: "dismiss",
}
EIO = Failure("Input/output error", 5)
JOBS = ("a", "b", "c", "d")


def fingerprint(machine: Machine) -> list[object]:
    """Everything the machine knows, quickly."""
    lives: list[object] = [
        (
            life.key, life.status, life.started, life.returned, life.user_paused, life.drains, life.cancel,
            life.completion_requested, life.io_status, life.failure, life.speed_bytes_per_s, life.group,
        )
        for life in machine.lives.values()
    ]  # fmt: skip
    for group in machine.groups.values():
        lives += [group.number, group.phase, group.cursor, group.due, len(group.members)]
    return lives


class Watched:
    """A machine, an observer that believes only effects, and the log of accepted stimuli."""

    def __init__(self) -> None:
        self.machine = Machine()
        self.log: list[bytes] = []
        self.status: dict[str, str] = {}
        self.group: dict[str, int] = {}
        self.manual: dict[str, bool] = {}
        self.holders: dict[str, int] = {}
        self.user_holds: set[str] = set()
        self.started: set[str] = set()
        self.hooks: dict[int, list[tuple[str, str]]] = {}
        self.prepared: dict[int, int] = {}
        self.announced: set[tuple[str, Milestone]] = set()
        self.concluded = 0

    def take(self, stimulus: Stimulus) -> bool:
        before = fingerprint(self.machine)
        key = stimulus.job
        was, verb = self.status.get(key, "null"), VERB_OF.get(type(stimulus))
        try:
            effects = self.machine.feed(stimulus)
        except UsageError as refusal:
            assert fingerprint(self.machine) == before, "a refusal changes nothing"
            if isinstance(refusal, VerbRefused):
                settling = was in ("pending", "waiting") and self._phase(key) is not Phase.WORKING
                assert verb is not None
                assert was not in ALLOWED[verb] or settling, (was, verb)
            return False
        assert verb is None or was in ALLOWED[verb], (was, verb)
        self.log.append(to_json(stimulus))
        self._count_holders(stimulus)
        if isinstance(stimulus, Create):
            self._born(stimulus)
        for effect in effects:
            self._observe(effect)
        self._check_pauses()
        return True

    def _phase(self, key: str) -> Phase:
        return self.machine.groups[self.machine.lives[key].group].phase

    def _born(self, stimulus: Create) -> None:
        key = stimulus.job
        self.status[key], self.group[key] = "undefined", stimulus.group
        self.manual[key], self.holders[key] = not stimulus.auto_finalize, 0
        self.user_holds.discard(key)
        self.started.discard(key)
        self.announced = {(job, milestone) for job, milestone in self.announced if job != key}

    def _count_holders(self, stimulus: Stimulus) -> None:
        match stimulus:
            case Pause(job=key) | ErrorStopped(job=key):
                self.user_holds.add(key)
            case Resume(job=key):
                self.user_holds.discard(key)
            case QuiesceBegin(job=key):
                self.holders[key] += 1
            case QuiesceEnd(job=key):
                self.holders[key] -= 1
            case Start(job=key):
                self.started.add(key)

    def _check_pauses(self) -> None:
        for life in self.machine.lives.values():
            if life.is_stopping or life.cancel == "soft":
                assert not life.user_paused or life.key in self.user_holds
                self.user_holds.discard(life.key) if not life.user_paused else None
            held_by_user = life.key in self.user_holds
            assert life.pause_count == held_by_user + self.holders[life.key] + (life.key not in self.started)
            assert not life.is_parked or life.pause_count or life.is_stopping

    def _observe(self, effect: Effect) -> None:
        match effect:
            case StatusChanged(job=key, status=status):
                assert status in NEXT[self.status[key]], (key, self.status[key], status)
                self.status[key] = status
                if status is JobStatus.CONCLUDED:
                    assert self.hooks[self.group[key]][-1] == (key, "clean")
                    assert key not in self.started or self._has_ended(key)
                    self.concluded += 1
            case CallHook(job=key, hook=hook):
                self._called(key, hook)
            case AwaitBody(job=key):
                assert key in self.started
                assert not self.machine.lives[key].is_parked
            case Announce(job=key, milestone=milestone):
                self._announced(key, milestone)
            case Forget(job=key):
                assert self.status[key] == "null"

    def _has_ended(self, key: str) -> bool:
        return (key, Milestone.COMPLETED) in self.announced or (key, Milestone.CANCELLED) in self.announced

    def _announced(self, key: str, milestone: Milestone) -> None:
        assert key in self.started
        assert (key, milestone) not in self.announced, "a milestone is passed once"
        assert not self._has_ended(key), "completed or cancelled, and last"
        self.announced.add((key, milestone))
        match milestone:
            case Milestone.READY:
                assert self.status[key] == "ready"
            case Milestone.PENDING:
                assert self.status[key] == "pending"
                assert self.manual[key]
            case Milestone.COMPLETED | Milestone.CANCELLED:
                assert self.status[key] in ("pending", "aborting")
                assert self.hooks[self.group[key]][-1] == (key, "clean")

    def _called(self, key: str, hook: Hook) -> None:
        group = self.group[key]
        past = self.hooks.setdefault(group, [])
        names = {name for _, name in past}
        own = [name for who, name in past if who == key]
        members = [life.key for life in self.machine.groups[group].members]
        match hook:
            case Hook.PREPARE:
                assert names <= {"prepare"}
                assert members[len(past)] == key, "newest first"
            case Hook.COMMIT:
                assert own == ["prepare"]
                assert "abort" not in names, "one fate per group"
                assert [who for who, name in past if name == "prepare"] == members, "all prepared before any commits"
            case Hook.ABORT:
                assert own in ([], ["prepare"])
                assert "commit" not in names, "one fate per group"
                cleaned = [who for who, name in past if name == "clean"]
                assert members[len(cleaned)] == key, "list order"
            case Hook.CLEAN:
                assert own[-1] in ("commit", "abort")
                assert past[-1][0] == key, "each job's whole tail before the next job's"
        past.append((key, str(hook)))

    # What the engine may do now

    def engine_moves(self) -> list[Stimulus]:
        moves: list[Stimulus] = []
        for life in self.machine.lives.values():
            key = life.key
            if life.started and not life.returned and not life.is_parked:
                moves += [Returned(key), Returned(key, EIO)]
                if life.should_park:
                    moves.append(Parked(key))
                if not life.is_stopping:
                    moves.append(ErrorStopped(key, IoStatus.FAILED))
                    if life.status is JobStatus.RUNNING:
                        moves.append(BecameReady(key))
            if life.drains:
                moves.append(QuiesceEnd(key))
        return moves + self.hook_moves()

    def hook_moves(self) -> list[Stimulus]:
        moves: list[Stimulus] = []
        for group in self.machine.groups.values():
            if isinstance(group.due, CallHook):
                moves.append(HookDone(group.due.job, group.due.hook))
                if group.due.hook is Hook.PREPARE:
                    moves.append(HookDone(group.due.job, group.due.hook, EIO))
        return moves

    def run_out(self) -> None:
        """Cancel everything; it must all end, whatever happened before."""
        for _ in range(200):
            if not self.machine.lives:
                break
            for key, life in tuple(self.machine.lives.items()):
                if key not in self.machine.lives:
                    continue
                if life.status is JobStatus.CONCLUDED:
                    self.take(Dismiss(key))
                elif not life.is_stopping:
                    self.take(Cancel(key))
                if life.started and not life.returned and not life.is_parked:
                    self.take(Returned(key))
            for move in self.hook_moves()[:1]:
                self.take(move)
        assert not self.machine.lives
        assert not self.machine.groups

    def replays(self) -> None:
        """The log alone, through JSON, gives the same state."""
        again = Machine()
        for line in self.log:
            again.feed(from_json(line))
        assert fingerprint(again) == fingerprint(self.machine)


def create(watched: Watched, key: str, group: int, *, auto_finalize: bool, auto_dismiss: bool) -> None:
    if key not in watched.machine.lives:
        watched.take(Create(key, group=group, auto_finalize=auto_finalize, auto_dismiss=auto_dismiss))


def random_history(chance: random.Random, steps: int) -> Watched:
    watched, draw, groups = Watched(), chance.random, 0
    for _ in range(steps):
        keys = tuple(watched.machine.lives)
        kind = draw()
        if not keys or (kind < 0.12 and len(keys) < len(JOBS)):
            number = watched.machine.lives[keys[-1]].group if keys and draw() < 0.6 else 0
            if number not in watched.machine.groups:
                groups += 1
                number = groups
            key = next(key for key in JOBS if key not in keys)
            create(watched, key, number, auto_finalize=draw() < 0.7, auto_dismiss=draw() < 0.7)
            continue
        key = keys[int(draw() * len(keys))]
        if kind < 0.6 and (moves := watched.engine_moves()):
            watched.take(moves[int(draw() * len(moves))])
        elif kind < 0.72:
            watched.take(Start(key))
        elif kind < 0.74:
            watched.take(Discard(key))
        elif kind < 0.80:
            watched.take(QuiesceBegin(key))
        elif kind < 0.83:
            watched.take(Cancel(key, force=False))
        else:
            verb = tuple(JobVerb)[int(draw() * len(JobVerb))]
            watched.take(VERBS[verb](key))
    return watched


def test_twenty_thousand_random_histories() -> None:
    chance = random.Random(20_000)
    milestones: set[Milestone] = set()
    concluded = 0
    for number in range(20_000):
        watched = random_history(chance, 18)
        if number % 10 == 0:
            watched.replays()
        watched.run_out()
        milestones |= {milestone for _, milestone in watched.announced}
        concluded += watched.concluded
    assert milestones == set(Milestone)
    assert concluded > 20_000, "the walk gets somewhere"


class MachineWalk(RuleBasedStateMachine):
    """The same promises, with hypothesis choosing and shrinking."""

    def __init__(self) -> None:
        super().__init__()
        self.watched = Watched()

    @rule(key=st.sampled_from(JOBS), group=st.integers(1, 3), auto_finalize=st.booleans(), auto_dismiss=st.booleans())
    def create(self, key: str, group: int, auto_finalize: bool, auto_dismiss: bool) -> None:
        # A settled group's number is never used again, as in the engine.
        number = group + 10 * sum(1 for hooks in self.watched.hooks if hooks % 10 == group)
        create(self.watched, key, number, auto_finalize=auto_finalize, auto_dismiss=auto_dismiss)

    @precondition(lambda self: self.watched.machine.lives)
    @rule(choice=st.data(), verb=st.sampled_from(JobVerb))
    def user_verb(self, choice: st.DataObject, verb: JobVerb) -> None:
        self.watched.take(VERBS[verb](self.any_job(choice)))

    @precondition(lambda self: self.watched.machine.lives)
    @rule(choice=st.data(), what=st.sampled_from([Start, Discard, QuiesceBegin, lambda key: Cancel(key, force=False)]))
    def owner(self, choice: st.DataObject, what: Callable[[str], Stimulus]) -> None:
        self.watched.take(what(self.any_job(choice)))

    @precondition(lambda self: self.watched.engine_moves())
    @rule(choice=st.data())
    def engine(self, choice: st.DataObject) -> None:
        self.watched.take(choice.draw(st.sampled_from(self.watched.engine_moves())))

    @invariant()
    def one_fate_per_group(self) -> None:
        for hooks in self.watched.hooks.values():
            assert {"commit", "abort"} - {name for _, name in hooks}

    def any_job(self, choice: st.DataObject) -> str:
        return choice.draw(st.sampled_from(sorted(self.watched.machine.lives)))

    def teardown(self) -> None:
        self.watched.replays()
        self.watched.run_out()


TestMachineWalk = MachineWalk.TestCase
TestMachineWalk.settings = settings(
    max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
