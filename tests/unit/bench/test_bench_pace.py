import math

import pytest
from pace import LEAST, MOST, Clock, Piece
from pairs import Took, measure


class Hands:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def run(clock: Clock, hands: Hands, name: str, takes_s: float) -> float | None:
    with clock.timed(name) as pace:
        if pace is not None:
            hands.now_s += takes_s
    return pace


PIECES = (
    Piece("first", 60),
    Piece("second", 40),
    Piece("in memory", 20, reserved=True),
    Piece("growth", 40, reserved=True),
)


def test_pace_is_the_time_left_by_the_time_that_all_ahead_take() -> None:
    hands = Hands()
    clock = Clock(160, PIECES, hands)
    assert run(clock, hands, "first", 60) == 1
    assert run(clock, hands, "second", 10) == 1
    assert run(clock, hands, "in memory", 10) == pytest.approx(90 / 60)
    assert run(clock, hands, "growth", 1) == pytest.approx(80 / 40)
    assert clock.took_s == {"first": 60, "second": 10, "in memory": 10, "growth": 1}
    assert clock.left_out == []


def test_a_slow_first_piece_slows_those_behind_it_down_alike() -> None:
    hands = Hands()
    clock = Clock(160, PIECES, hands)
    run(clock, hands, "first", 85)
    assert run(clock, hands, "second", 30) == pytest.approx(0.75)
    assert run(clock, hands, "in memory", 15) == pytest.approx(0.75)
    assert run(clock, hands, "growth", 30) == pytest.approx(0.75)


def test_what_is_reserved_has_its_time_though_those_before_take_too_long() -> None:
    hands = Hands()
    clock = Clock(160, PIECES, hands)
    run(clock, hands, "first", 120)
    assert run(clock, hands, "second", 40) is None, "40 s are left, and 36 of them are kept"
    assert run(clock, hands, "in memory", 12) == pytest.approx(40 / 60)
    assert run(clock, hands, "growth", 24) == pytest.approx(28 / 40)
    assert clock.left_out == ["second"]
    assert str(clock).endswith("; for want of time without second")


def test_what_has_no_place_at_all_is_left_out() -> None:
    hands = Hands()
    clock = Clock(160, PIECES, hands)
    run(clock, hands, "first", 160)
    assert [run(clock, hands, name, 1) for name in ("second", "in memory", "growth")] == [None, None, None]


def test_pace_has_bounds() -> None:
    hands = Hands()
    assert run(Clock(10_000, PIECES[:1], hands), hands, "first", 1) == MOST
    assert run(Clock(LEAST * 60, PIECES[:1], hands), hands, "first", 1) == LEAST


def test_without_a_limit_there_is_no_end_to_the_pace() -> None:
    hands = Hands()
    clock = Clock(math.inf, PIECES, hands)
    assert [run(clock, hands, each.name, 1e6) for each in PIECES] == [math.inf] * 4


def pairs_within(budget_s: float, run_s: float, runs: int = 7) -> int:
    hands = Hands()

    def once() -> Took:
        hands.now_s += run_s
        return Took(run_s, run_s, run_s)

    def peer() -> Took:
        return once()

    found = measure("", once, peer, runs=runs, budget_s=budget_s, now=hands)
    assert len(found.ours) == len(found.peer)
    return len(found.ours)


@pytest.mark.parametrize(
    ("budget_s", "run_s", "pairs"),
    [
        (math.inf, 100, 7),
        (3, 0.1, 7),  # a turn of 0.2 s is not counted, and seven are
        (3, 0.5, 3),  # as many as begin within the time, and three at least
        (4.4, 0.5, 4),
        (3, 1, 3),  # the first turn counts
        (3, 4, 2),  # long runs hardly differ
        (0, 0.1, 3),
    ],
)
def test_pairs_within_a_budget(budget_s: float, run_s: float, pairs: int) -> None:
    assert pairs_within(budget_s, run_s) == pairs


def test_no_more_pairs_than_wanted() -> None:
    assert pairs_within(0, 20, runs=1) == 1
