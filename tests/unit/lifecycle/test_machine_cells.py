"""Every cell of the two tables, each reached by construction."""

from collections.abc import Iterable

import pytest

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
from blockjobs.lifecycle.failure import Failure
from blockjobs.lifecycle.life import CancelMode
from blockjobs.lifecycle.machine import Machine
from blockjobs.lifecycle.status import ALLOWED, NEXT, REACHABLE, JobStatus, JobVerb
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

S = JobStatus
EIO = Failure("Input/output error", 5)
CLEANED = [HookDone("j", Hook.PREPARE), HookDone("j", Hook.COMMIT), HookDone("j", Hook.CLEAN)]
WAY_TO: dict[JobStatus, list[Stimulus]] = {
    S.CREATED: [],
    S.RUNNING: [Start("j")],
    S.PAUSED: [Start("j"), Pause("j"), Parked("j")],
    S.READY: [Start("j"), BecameReady("j")],
    S.STANDBY: [Start("j"), BecameReady("j"), Pause("j"), Parked("j")],
    S.WAITING: [Create("k", group=1), Start("j"), Start("k"), Returned("j")],
    S.PENDING: [Start("j"), Returned("j")],
    S.ABORTING: [Start("j"), Returned("j", EIO)],
    S.CONCLUDED: [Start("j"), Returned("j"), Finalize("j"), *CLEANED],
    S.NULL: [Start("j"), Returned("j"), Finalize("j"), *CLEANED, Dismiss("j")],
}
VERBS: dict[JobVerb, Stimulus] = {
    JobVerb.CANCEL: Cancel("j"),
    JobVerb.PAUSE: Pause("j"),
    JobVerb.RESUME: Resume("j"),
    JobVerb.SET_SPEED: SetSpeed("j", 5),
    JobVerb.CHANGE: Change("j"),
    JobVerb.COMPLETE: Complete("j"),
    JobVerb.FINALIZE: Finalize("j"),
    JobVerb.DISMISS: Dismiss("j"),
}
# spec/lifecycle.md §2, row by row, typed again.
YES = {
    JobVerb.CANCEL: "YYYYYYY...",
    JobVerb.PAUSE: "YYYYY.....",
    JobVerb.RESUME: "YYYYY.....",
    JobVerb.SET_SPEED: "YYYYY.....",
    JobVerb.CHANGE: "YYYYY.....",
    JobVerb.COMPLETE: "...YY.....",
    JobVerb.FINALIZE: "......Y...",
    JobVerb.DISMISS: "........Y.",
}
COLUMNS = [S.CREATED, S.RUNNING, S.PAUSED, S.READY, S.STANDBY, S.WAITING, S.PENDING, S.ABORTING, S.CONCLUDED, S.NULL]


def machine_in(status: JobStatus) -> Machine:
    machine = Machine()
    machine.feed(Create("j", group=1, auto_finalize=False, auto_dismiss=False))
    for stimulus in WAY_TO[status]:
        machine.feed(stimulus)
    if status is not S.NULL:
        assert machine.life("j").status is status
    return machine


def feed_all(machine: Machine, stimuli: Iterable[Stimulus]) -> list[Effect]:
    return [effect for stimulus in stimuli for effect in machine.feed(stimulus)]


@pytest.mark.parametrize("verb", JobVerb)
@pytest.mark.parametrize("status", JobStatus)
def test_every_cell_of_the_verb_table(status: JobStatus, verb: JobVerb) -> None:
    if status is S.UNDEFINED:
        # Nobody can name a job before it is created.
        with pytest.raises(JobNotFound):
            Machine().feed(VERBS[verb])
        return
    allowed = YES[verb][COLUMNS.index(status)] == "Y"
    assert (status in ALLOWED[verb]) is allowed
    machine = machine_in(status)
    before = machine.snapshot()
    if status is S.NULL:
        with pytest.raises(JobNotFound, match="Job not found"):
            machine.feed(VERBS[verb])
    elif verb is JobVerb.RESUME and status not in (S.PAUSED, S.STANDBY):
        with pytest.raises(UsageError, match="Can't resume a job that was not paused"):
            machine.feed(VERBS[verb])
    elif verb is JobVerb.PAUSE and status in (S.PAUSED, S.STANDBY):
        with pytest.raises(UsageError, match="Job is already paused"):
            machine.feed(VERBS[verb])
    elif allowed:
        machine.feed(VERBS[verb])
        return
    else:
        with pytest.raises(VerbRefused) as refusal:
            machine.feed(VERBS[verb])
        assert str(refusal.value) == f"Job 'j' in state '{status}' cannot accept command verb '{verb}'"
    assert machine.snapshot() == before


@pytest.mark.parametrize("status", [S.CREATED, S.RUNNING, S.READY])
def test_resume_is_allowed_once_paused(status: JobStatus) -> None:
    machine = machine_in(status)
    machine.feed(Pause("j"))
    machine.feed(Resume("j"))
    assert not machine.life("j").user_paused


@pytest.mark.parametrize("status", [S.WAITING, S.PENDING, S.ABORTING, S.CONCLUDED])
def test_resume_meets_the_table_after_the_pause_check(status: JobStatus) -> None:
    machine = Machine()
    machine.feed(Create("j", group=1, auto_finalize=False, auto_dismiss=False))
    machine.feed(Start("j"))
    machine.feed(Pause("j"))  # after the body's last pause point
    feed_all(machine, [step for step in WAY_TO[status] if step != Start("j")])
    with pytest.raises(VerbRefused, match=f"Job 'j' in state '{status}' cannot accept command verb 'resume'"):
        machine.feed(Resume("j"))


LEGAL = {
    S.UNDEFINED: {S.CREATED},
    S.CREATED: {S.RUNNING, S.ABORTING, S.NULL},
    S.RUNNING: {S.PAUSED, S.READY, S.WAITING, S.ABORTING},
    S.PAUSED: {S.RUNNING},
    S.READY: {S.STANDBY, S.WAITING, S.ABORTING},
    S.STANDBY: {S.READY},
    S.WAITING: {S.PENDING, S.ABORTING},
    S.PENDING: {S.ABORTING, S.CONCLUDED},
    S.ABORTING: {S.ABORTING, S.CONCLUDED},
    S.CONCLUDED: {S.NULL},
    S.NULL: set(),
}


def test_the_transition_table_is_the_specification() -> None:
    assert dict(NEXT) == LEGAL


def test_tables_are_read_only() -> None:
    with pytest.raises(TypeError):
        NEXT[S.NULL] = frozenset({S.CREATED})


def test_reachability_is_the_closure_of_the_table() -> None:
    assert REACHABLE[S.WAITING] == {S.PENDING, S.ABORTING, S.CONCLUDED, S.NULL}
    assert S.READY in REACHABLE[S.PAUSED]
    assert REACHABLE[S.NULL] == set()


def test_a_lone_job_from_birth_to_oblivion() -> None:
    machine = Machine()
    story = [Create("j", group=1), Start("j"), BecameReady("j"), Complete("j"), Returned("j"), *CLEANED]
    assert feed_all(machine, story) == [
        StatusChanged("j", S.CREATED),
        StatusChanged("j", S.RUNNING),
        Launch("j"),
        StatusChanged("j", S.READY),
        Announce("j", Milestone.READY),
        Wake("j"),
        StatusChanged("j", S.WAITING),
        StatusChanged("j", S.PENDING),
        CallHook("j", Hook.PREPARE),
        CallHook("j", Hook.COMMIT),
        CallHook("j", Hook.CLEAN),
        Announce("j", Milestone.COMPLETED),
        StatusChanged("j", S.CONCLUDED),
        StatusChanged("j", S.NULL),
        Forget("j"),
    ]
    assert not machine.lives
    assert not machine.groups


def test_concluded_only_when_clean_is_done() -> None:
    machine = machine_in(S.PENDING)
    machine.feed(Finalize("j"))
    for hook in (Hook.PREPARE, Hook.COMMIT):
        machine.feed(HookDone("j", hook))
        assert machine.life("j").status is S.PENDING
    machine.feed(HookDone("j", Hook.CLEAN))
    assert machine.life("j").status is S.CONCLUDED


def test_start_in_a_drained_section_parks_before_any_work() -> None:
    machine = machine_in(S.CREATED)
    machine.feed(QuiesceBegin("j"))
    assert machine.feed(Start("j")) == [StatusChanged("j", S.RUNNING), StatusChanged("j", S.PAUSED), Launch("j")]
    assert machine.feed(QuiesceEnd("j")) == [StatusChanged("j", S.RUNNING), Wake("j")]


def test_a_refused_start_leaves_no_trace() -> None:
    machine = machine_in(S.CREATED)
    assert machine.feed(Discard("j")) == [StatusChanged("j", S.NULL), Forget("j")]
    assert not machine.groups


def test_discarding_the_last_straggler_lets_the_group_go_on() -> None:
    machine = Machine()
    feed_all(machine, [Create("a", group=1), Create("b", group=1), Start("a"), Returned("a")])
    assert machine.feed(Discard("b"))[-1] == CallHook("a", Hook.PREPARE)


def test_an_unstarted_job_is_cancelled_without_announcement_and_always_dismissed() -> None:
    machine = machine_in(S.CREATED)
    assert feed_all(machine, [Cancel("j"), HookDone("j", Hook.ABORT), HookDone("j", Hook.CLEAN)]) == [
        StatusChanged("j", S.ABORTING),
        CallHook("j", Hook.ABORT),
        CallHook("j", Hook.CLEAN),
        StatusChanged("j", S.CONCLUDED),
        StatusChanged("j", S.NULL),
        Forget("j"),
    ]


@pytest.mark.parametrize("status", [S.RUNNING, S.CONCLUDED, S.ABORTING])
def test_only_created_jobs_start_or_are_discarded(status: JobStatus) -> None:
    machine = machine_in(status)
    for stimulus in (Start("j"), Discard("j")):
        with pytest.raises(UsageError, match=f"Job 'j' in state '{status}' cannot be started"):
            machine.feed(stimulus)


def test_pause_holders_are_counted() -> None:
    machine = machine_in(S.RUNNING)
    feed_all(machine, [QuiesceBegin("j"), QuiesceBegin("j"), Pause("j")])
    assert machine.life("j").pause_count == 3
    assert machine.feed(Parked("j")) == [StatusChanged("j", S.PAUSED)]
    assert machine.feed(Resume("j")) == []
    assert machine.feed(QuiesceEnd("j")) == []
    assert machine.feed(QuiesceEnd("j")) == [StatusChanged("j", S.RUNNING), Wake("j")]


def test_a_drain_around_a_user_pause_shows_nothing() -> None:
    machine = machine_in(S.PAUSED)
    assert feed_all(machine, [QuiesceBegin("j"), QuiesceEnd("j")]) == [Wake("j")]


def test_cancel_of_a_paused_job_passes_running() -> None:
    machine = machine_in(S.PAUSED)
    assert machine.feed(Cancel("j")) == [Interrupt("j"), StatusChanged("j", S.RUNNING), Wake("j")]
    assert machine.feed(Returned("j")) == [StatusChanged("j", S.ABORTING), CallHook("j", Hook.ABORT)]
    assert machine.life("j").failure == Failure("Operation canceled", 125)


def test_a_forced_cancel_passes_a_drain_too() -> None:
    machine = machine_in(S.READY)
    feed_all(machine, [QuiesceBegin("j"), Parked("j")])
    assert StatusChanged("j", S.READY) in machine.feed(Cancel("j"))
    assert machine.life("j").drains == 1


def test_soft_cancel_is_soft_only_in_ready_and_standby() -> None:
    for status in (S.RUNNING, S.PAUSED):
        machine = machine_in(status)
        machine.feed(Cancel("j", force=False))
        assert machine.life("j").cancel is CancelMode.FORCED
    for status in (S.READY, S.STANDBY):
        machine = machine_in(status)
        machine.feed(Cancel("j", force=False))
        assert machine.life("j").cancel is CancelMode.SOFT
        assert machine.life("j").status is S.READY
    machine = machine_in(S.PENDING)
    assert StatusChanged("j", S.ABORTING) in machine.feed(Cancel("j", force=False))


def test_a_soft_cancel_never_downgrades_and_a_forced_one_upgrades() -> None:
    machine = machine_in(S.READY)
    feed_all(machine, [Cancel("j", force=False), Cancel("j"), Cancel("j", force=False)])
    assert machine.life("j").cancel is CancelMode.FORCED


def test_a_softly_cancelled_job_ends_well_but_cannot_be_completed() -> None:
    machine = machine_in(S.READY)
    machine.feed(Cancel("j", force=False))
    with pytest.raises(UsageError, match="The active block job 'j' cannot be completed"):
        machine.feed(Complete("j"))
    assert StatusChanged("j", S.PENDING) in machine.feed(Returned("j"))


def test_the_bodys_own_error_survives_a_cancel() -> None:
    machine = machine_in(S.RUNNING)
    feed_all(machine, [Cancel("j"), Returned("j", EIO), HookDone("j", Hook.ABORT)])
    assert Announce("j", Milestone.CANCELLED) in machine.feed(HookDone("j", Hook.CLEAN))
    assert machine.life("j").failure == EIO


def test_complete_may_be_repeated() -> None:
    machine = machine_in(S.STANDBY)
    assert feed_all(machine, [Complete("j"), Complete("j")]) == [Wake("j"), Wake("j")]
    assert machine.life("j").status is S.STANDBY


def test_speed_is_checked_after_the_verb() -> None:
    with pytest.raises(ParameterError, match="Parameter 'speed' expects a non-negative value"):
        machine_in(S.RUNNING).feed(SetSpeed("j", -1))
    with pytest.raises(VerbRefused):
        machine_in(S.PENDING).feed(SetSpeed("j", -1))


def test_the_first_error_names_the_io_status_until_resumed() -> None:
    machine = machine_in(S.RUNNING)
    feed_all(machine, [ErrorStopped("j", IoStatus.NOSPACE), ErrorStopped("j", IoStatus.FAILED)])
    life = machine.life("j")
    assert (life.io_status, life.pause_count) == (IoStatus.NOSPACE, 1)
    machine.feed(Parked("j"))
    assert machine.feed(Resume("j")) == [StatusChanged("j", S.RUNNING), Wake("j")]
    assert life.io_status is IoStatus.OK


def test_no_job_joins_a_group_that_is_ending() -> None:
    for status in (S.PENDING, S.ABORTING):
        with pytest.raises(UsageError, match="cannot join a group that is ending"):
            machine_in(status).feed(Create("late", group=1))


def test_settling_groups_refuse_verbs_that_come_too_late() -> None:
    machine = machine_in(S.PENDING)
    machine.feed(Finalize("j"))
    for verb in (Cancel("j"), Finalize("j")):
        with pytest.raises(VerbRefused):
            machine.feed(verb)


def group_of_two(**flags: bool) -> Machine:
    """Job b is newer than job a."""
    machine = Machine()
    feed_all(machine, [Create("a", group=7, **flags), Create("b", group=7, **flags), Start("a"), Start("b")])
    return machine


def statuses(effects: list[Effect]) -> list[str]:
    return [f"{effect.job} {effect.status}" for effect in effects if isinstance(effect, StatusChanged)]


def test_groups_are_prepared_then_settled_newest_first() -> None:
    machine = group_of_two()
    assert statuses(machine.feed(Returned("b"))) == ["b waiting"]
    assert machine.feed(Returned("a")) == [
        StatusChanged("a", S.WAITING),
        StatusChanged("b", S.PENDING),
        StatusChanged("a", S.PENDING),
        CallHook("b", Hook.PREPARE),
    ]
    done = [HookDone(job, hook) for job, hook in (("b", Hook.PREPARE), ("a", Hook.PREPARE), ("b", Hook.COMMIT))]
    assert feed_all(machine, done) == [
        CallHook("a", Hook.PREPARE),
        CallHook("b", Hook.COMMIT),
        CallHook("b", Hook.CLEAN),
    ]
    assert statuses(machine.feed(HookDone("b", Hook.CLEAN))) == ["b concluded", "b null"]


def test_the_older_jobs_failure_settles_the_newer_first() -> None:
    machine = group_of_two()
    effects = machine.feed(Returned("a", EIO))
    assert effects == [StatusChanged("a", S.ABORTING), Interrupt("b"), Wake("b"), AwaitBody("b"), Wake("b")]
    assert statuses(machine.feed(Returned("b"))) == ["b aborting"]
    effects = feed_all(machine, [HookDone("b", Hook.ABORT), HookDone("b", Hook.CLEAN)])
    assert Announce("b", Milestone.CANCELLED) in effects
    assert effects[-1] == CallHook("a", Hook.ABORT)
    effects = feed_all(machine, [HookDone("a", Hook.ABORT), HookDone("a", Hook.CLEAN)])
    assert Announce("a", Milestone.COMPLETED) in effects


def test_a_paused_sibling_runs_only_when_its_turn_comes() -> None:
    machine = group_of_two()
    feed_all(machine, [Pause("a"), Parked("a"), Cancel("b")])
    assert statuses(machine.feed(Returned("b"))) == ["b aborting"]
    assert statuses(machine.feed(HookDone("b", Hook.ABORT))) == []
    effects = machine.feed(HookDone("b", Hook.CLEAN))
    assert statuses(effects) == ["b concluded", "b null", "a running"]
    assert AwaitBody("a") in effects


def test_a_body_that_ends_before_its_turn_changes_status_only_then() -> None:
    machine = group_of_two()
    machine.feed(Returned("b", EIO))
    assert machine.feed(Returned("a", EIO)) == []
    feed_all(machine, [HookDone("b", Hook.ABORT)])
    assert statuses(machine.feed(HookDone("b", Hook.CLEAN))) == ["b concluded", "b null", "a aborting"]


def test_cancelling_a_waiting_job_aborts_in_list_order() -> None:
    machine = group_of_two()
    machine.feed(Returned("b"))
    effects = machine.feed(Cancel("b"))
    assert statuses(effects) == ["b aborting"]
    assert machine.life("a").is_stopping


def test_a_failing_prepare_aborts_those_already_prepared() -> None:
    machine = group_of_two(auto_finalize=False)
    feed_all(machine, [Returned("b"), Returned("a"), Finalize("a"), HookDone("b", Hook.PREPARE)])
    effects = machine.feed(HookDone("a", Hook.PREPARE, EIO))
    assert effects == [
        StatusChanged("a", S.ABORTING),
        StatusChanged("b", S.ABORTING),
        CallHook("b", Hook.ABORT),
    ]


def test_pending_is_announced_for_manual_members_only() -> None:
    machine = Machine()
    feed_all(machine, [Create("a", group=1, auto_finalize=False), Create("b", group=1), Start("a"), Start("b")])
    feed_all(machine, [Returned("a")])
    assert machine.feed(Returned("b")) == [
        StatusChanged("b", S.WAITING),
        StatusChanged("b", S.PENDING),
        StatusChanged("a", S.PENDING),
        Announce("a", Milestone.PENDING),
    ]
    assert machine.feed(Finalize("b")) == [CallHook("b", Hook.PREPARE)]
