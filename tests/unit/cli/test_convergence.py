"""Whether a mirror catches up: estimates and advice from its progress alone."""

import pytest

from blockjobs.base.errors import UsageError
from blockjobs.cli.convergence import PATIENCE_S, STALL_S_MAX, Advice, Convergence, Goal, parse_goal

MIB = 1 << 20


def mirror(*, disk: int, copied_per_s: int, dirtied_per_s: int, seconds: int) -> Convergence:
    """A mirror of `disk` bytes after so many seconds, sampled each second."""
    view = Convergence(0.0)
    for second in range(seconds + 1):
        total = disk + dirtied_per_s * second
        view.take(min(copied_per_s * second, total), total, float(second))
    return view


@pytest.mark.parametrize(
    ("text", "goal"),
    [
        ("passes=3", Goal(passes=3)),
        ("deadline=90", Goal(deadline_s=90)),
        ("deadline=1.5m", Goal(deadline_s=90)),
        ("deadline=2h", Goal(deadline_s=7200)),
    ],
)
def test_goals_are_read(text: str, goal: Goal) -> None:
    assert parse_goal(text) == goal


@pytest.mark.parametrize(
    "text", ["", "passes", "passes=0", "passes=x", "deadline=", "deadline=-1", "deadline=nan", "x=1"]
)
def test_other_goals_are_refused_by_name(text: str) -> None:
    with pytest.raises(UsageError, match=r"--converge: .* is neither passes=N nor deadline=TIME"):
        parse_goal(text)


def test_a_mirror_faster_than_its_guest_tells_when_it_will_be_ready() -> None:
    view = mirror(disk=100 * MIB, copied_per_s=20 * MIB, dirtied_per_s=10 * MIB, seconds=5)
    assert view.remaining_bytes == 50 * MIB
    assert view.ready_in_s == pytest.approx(5.0)


def test_a_mirror_slower_than_its_guest_is_never_ready() -> None:
    view = mirror(disk=100 * MIB, copied_per_s=10 * MIB, dirtied_per_s=20 * MIB, seconds=5)
    assert view.ready_in_s is None


def test_a_mirror_with_nothing_left_is_ready_now() -> None:
    assert mirror(disk=10 * MIB, copied_per_s=10 * MIB, dirtied_per_s=0, seconds=3).ready_in_s == 0.0


def test_passes_count_what_was_dirty_at_their_beginning() -> None:
    # 10 s for the first pass, then 5 s for the 50 MiB dirtied meanwhile, then 2.5 s ...
    assert mirror(disk=100 * MIB, copied_per_s=10 * MIB, dirtied_per_s=5 * MIB, seconds=9).passes == 0
    assert mirror(disk=100 * MIB, copied_per_s=10 * MIB, dirtied_per_s=5 * MIB, seconds=10).passes == 1
    assert mirror(disk=100 * MIB, copied_per_s=10 * MIB, dirtied_per_s=5 * MIB, seconds=15).passes == 2


def test_after_so_many_passes_the_guest_must_wait_and_it_is_given_up_if_that_does_not_help() -> None:
    view, goal, seen = Convergence(0.0), Goal(passes=2), []
    for second in range(1000):
        view.take(second * MIB, (2 * second + 10) * MIB, float(second))
        advice = view.advice(goal, float(second))
        if advice is not Advice.WAIT:
            seen.append((advice, view.passes, second))
            if advice is Advice.GIVE_UP:
                break
            view.switched(float(second))
    switched = seen[0][2]
    assert seen == [(Advice.SWITCH, 2, switched), (Advice.GIVE_UP, 2, switched + PATIENCE_S + 2)]


def test_a_mirror_is_not_given_up_while_less_and_less_is_left() -> None:
    # When writes wait for the copy, each is copied: `current` soon passes what was the total at the switch.
    view, goal = Convergence(0.0), Goal(passes=1)
    view.take(0, 100 * MIB, 0.0)
    view.take(100 * MIB, 200 * MIB, 1.0)
    assert view.advice(goal, 1.0) is Advice.SWITCH
    view.switched(1.0)
    for second in range(2, 100):
        guest = 500 * MIB * second
        view.take(100 * MIB + guest + second * MIB, 200 * MIB + guest, float(second))
        assert view.advice(goal, float(second)) is Advice.WAIT


def test_a_mirror_that_copies_nothing_now_is_idle_but_for_its_limit() -> None:
    view = Convergence(0.0)
    view.take(5, 10, 1.0)
    assert not view.is_idle(5.0) and view.is_idle(5.1)
    assert not view.is_idle(20.0, limit_bytes_per_s=MIB) and view.is_idle(21.1, limit_bytes_per_s=MIB)


def test_a_deadline_holds_twice() -> None:
    view, goal = Convergence(0.0), Goal(deadline_s=10)
    assert view.advice(goal, 10.0) is Advice.WAIT
    assert view.advice(goal, 10.1) is Advice.SWITCH
    view.switched(10.1)
    assert view.advice(goal, 20.0) is Advice.WAIT
    assert view.advice(goal, 20.2) is Advice.GIVE_UP


def test_a_mirror_that_stands_still_is_noticed_but_not_one_that_has_caught_up() -> None:
    stuck, ready = Convergence(0.0), Convergence(0.0)
    stuck.take(5, 10, 0.0)
    for view, current in ((stuck, 5), (ready, 10)):
        view.take(current, 10, STALL_S_MAX + 1)
        assert view.is_stalled(STALL_S_MAX + 1.5) is (view is stuck)
