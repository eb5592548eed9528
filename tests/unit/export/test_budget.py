from blockjobs.base.units import KiB, MiB
from blockjobs.export.budget import CEILINGS, Budget


def test_large_requests_leave_room_for_smaller_ones() -> None:
    budget = Budget()
    assert budget.take(31 * MiB)
    assert not budget.take(16 * MiB)
    assert budget.take(4 * MiB)
    while budget.take(256 * KiB):
        pass
    assert budget.used <= CEILINGS[0][1] and budget.is_spent is (budget.used >= CEILINGS[0][1])


def test_a_request_of_any_size_is_granted_when_nothing_else_is() -> None:
    budget = Budget()
    assert budget.take(32 * MiB)
    budget.give(32 * MiB)
    assert budget.used == 0


def test_waiters_are_served_in_order_and_nobody_overtakes_his_own_kind() -> None:
    budget, served = Budget(), []
    assert budget.take(32 * MiB)
    budget.wait(20 * MiB, lambda: served.append("first"))
    budget.wait(8 * MiB, lambda: served.append("second"))
    assert budget.is_contended and not budget.take(5 * MiB)
    budget.give(32 * MiB)
    assert served == ["first", "second"] and not budget.is_contended and budget.used == 28 * MiB


def test_whoever_leaves_is_not_served() -> None:
    budget, served = Budget(), []

    def first() -> None:
        served.append("first")

    assert budget.take(32 * MiB)
    budget.wait(20 * MiB, first)
    budget.wait(8 * MiB, lambda: served.append("second"))
    budget.leave(first)
    budget.give(32 * MiB)
    assert served == ["second"]


def test_a_large_request_gets_its_turn_among_many_ordinary_ones() -> None:
    budget, served = Budget(), []
    for _ in range(4):
        assert budget.take(4 * MiB)
    budget.wait(32 * MiB, lambda: served.append("large"))
    budget.give(4 * MiB)
    assert budget.take(4 * MiB), "for a while ordinary requests go on"
    budget.favour_large()
    assert not budget.take(4 * MiB)
    budget.wait(4 * MiB, lambda: served.append("ordinary"))
    for _ in range(4):
        budget.give(4 * MiB)
    assert served == ["large", "ordinary"]


def test_bytes_beyond_the_budget_are_counted_and_given_back() -> None:
    budget = Budget()
    budget.charge(50 * MiB)
    assert budget.is_spent and not budget.take(1)
    served = []
    budget.wait(1, lambda: served.append("one"))
    budget.charge(-50 * MiB)
    assert served == ["one"] and budget.used == 1
