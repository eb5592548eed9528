from blockjobs.base.units import KiB, MiB
from blockjobs.export.budget import CEILINGS, Budget


def test_large_requests_leave_room_for_smaller_ones() -> None:
    budget = Budget()
    assert budget.take(31 * MiB, known=True)
    assert not budget.take(16 * MiB, known=True)
    assert budget.take(4 * MiB, known=True)
    while budget.take(256 * KiB, known=True):
        pass
    assert budget.used <= CEILINGS[0].used_bytes_max and budget.is_spent is (budget.used >= CEILINGS[0].used_bytes_max)


def test_a_request_of_any_size_is_granted_when_nothing_else_is() -> None:
    budget = Budget()
    assert budget.take(32 * MiB, known=True)
    budget.give(32 * MiB)
    assert budget.used == 0


def test_waiters_are_served_in_order_and_nobody_overtakes_his_own_kind() -> None:
    budget, served = Budget(), []
    assert budget.take(32 * MiB, known=True)
    budget.wait(20 * MiB, lambda: served.append("first"), known=True)
    budget.wait(8 * MiB, lambda: served.append("second"), known=True)
    assert budget.is_contended and not budget.take(5 * MiB, known=True)
    budget.give(32 * MiB)
    assert served == ["first", "second"] and not budget.is_contended and budget.used == 28 * MiB


def test_whoever_leaves_is_not_served() -> None:
    budget, served = Budget(), []

    def first() -> None:
        served.append("first")

    assert budget.take(32 * MiB, known=True)
    budget.wait(20 * MiB, first, known=True)
    budget.wait(8 * MiB, lambda: served.append("second"), known=True)
    budget.leave(first)
    budget.give(32 * MiB)
    assert served == ["second"]


def test_a_large_request_gets_its_turn_among_many_ordinary_ones() -> None:
    budget, served = Budget(), []
    for _ in range(4):
        assert budget.take(4 * MiB, known=True)
    budget.wait(32 * MiB, lambda: served.append("large"), known=True)
    budget.give(4 * MiB)
    assert budget.take(4 * MiB, known=True), "for a while ordinary requests go on"
    budget.favour_large()
    assert not budget.take(4 * MiB, known=True)
    budget.wait(4 * MiB, lambda: served.append("ordinary"), known=True)
    for _ in range(4):
        budget.give(4 * MiB)
    assert served == ["large", "ordinary"]


def test_large_requests_that_never_end_do_not_keep_ordinary_ones_out() -> None:
    budget, served = Budget(), []
    assert budget.take(32 * MiB, known=True) and budget.take(4 * MiB, known=True)
    for _ in range(3):
        budget.wait(32 * MiB, lambda: served.append("large"), known=True)
    budget.wait(4 * MiB, lambda: served.append("ordinary"), known=True)
    budget.favour_large()
    budget.give(4 * MiB)
    assert served == []
    budget.give(32 * MiB)
    assert served == ["large", "ordinary"]


def test_bytes_beyond_the_budget_are_counted_and_given_back() -> None:
    budget = Budget()
    budget.charge(50 * MiB)
    assert budget.is_spent and not budget.take(1, known=True)
    served = []
    budget.wait(1, lambda: served.append("one"), known=True)
    budget.charge(-50 * MiB)
    assert served == ["one"] and budget.used == 1


def test_newcomers_leave_room_for_those_who_have_worked_well() -> None:
    budget, served = Budget(), []
    while budget.take(1 * MiB, known=False):
        pass
    budget.wait(1 * MiB, lambda: served.append("newcomer"), known=False)
    assert budget.has_room(1 * MiB, known=True) and budget.take(1 * MiB, known=True)
    assert budget.take(4096, known=False) and not budget.has_room(256 * KiB * 4, known=False)
    budget.give(3 * MiB)
    assert served == ["newcomer"]


def test_newcomers_leave_room_beside_a_large_request_too() -> None:
    budget = Budget()
    assert budget.take(32 * MiB, known=False)
    while budget.take(1 * MiB, known=False) or budget.take(64 * KiB, known=False):
        pass
    assert budget.take(1 * MiB, known=True) and budget.take(256 * KiB, known=True)
