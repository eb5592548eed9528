"""The comparison notices what it must and forgives only what it says it forgives."""

from __future__ import annotations

import pytest
from compare import Comparison, event_differences
from scenario import Recorded, Step


def status(job, *statuses):
    return [{"event": "JOB_STATUS_CHANGE", "data": {"id": job, "status": one}, "timestamp": {}} for one in statuses]


def event(name, job, **facts):
    return {"event": name, "data": {"device": job, "type": "backup", **facts}, "timestamp": {"seconds": 7}}


def events_differ(recorded, heard, *, grouped=False):
    steps = [Step(0, request={"execute": "x"}, events=[Recorded(index, one) for index, one in enumerate(recorded)])]
    return list(event_differences(steps, [heard], Comparison(), grouped=grouped))


def replies_differ(recorded, heard, volatile=frozenset()):
    return list(Comparison(volatile).differences(recorded, heard, "1.<"))


@pytest.mark.parametrize(
    ("recorded", "heard"),
    [
        ({"return": {}}, {"error": {"class": "GenericError", "desc": "no"}}),
        ({"return": [1, 2]}, {"return": [2, 1]}),
        ({"return": [1]}, {"return": [1, 2]}),
        ({"return": True}, {"return": 1}),
        ({"return": {"a": 1}}, {"return": {}}),
        ({"return": {}}, {"return": {"invented": 1}}),
        ({"error": {"desc": "Node '#block1' is busy"}}, {"error": {"desc": "Node '#block2' is used"}}),
        ({"file": 'json:{"driver": "raw"}'}, {"file": 'json:{"driver": "file"}'}),
    ],
)
def test_replies_that_differ(recorded, heard):
    assert replies_differ(recorded, heard)


@pytest.mark.parametrize(
    ("recorded", "heard"),
    [
        ({"return": [{"node-name": "#block17"}]}, {"return": [{"node-name": "#block23"}]}),
        ({"error": {"desc": "Node '#block1' is busy"}}, {"error": {"desc": "Node '#block2' is busy"}}),
        ({"file": 'json:{"a": 1, "b": 2}'}, {"file": 'json:{"b": 2, "a": 1}'}),
        ({"actual-size": 4096, "date-sec": 1}, {"actual-size": 8192, "date-sec": 2}),
        ({"return": {}}, {"return": {"active": True}}),
    ],
)
def test_replies_that_count_as_equal(recorded, heard):
    assert replies_differ(recorded, heard) == []


def test_only_the_volatile_path_is_forgiven():
    recorded, heard = {"return": [{"offset": 0, "len": 9}]}, {"return": [{"offset": 5, "len": 8}]}
    assert replies_differ(recorded, heard, frozenset({"1.<.return[0].offset"})) == [
        "1.<.return[0].len: recorded 9, heard 8"
    ]


def test_requests_use_the_names_of_this_run():
    comparison = Comparison()
    assert not list(comparison.differences({"node-name": "#block17"}, {"node-name": "#block23"}, "1.<"))
    assert comparison.translate({"arguments": {"file": "#block17"}}) == {"arguments": {"file": "#block23"}}


def test_a_missing_an_added_and_a_swapped_event_are_noticed():
    recorded = status("j", "waiting", "pending")
    for heard in (recorded[:1], [*recorded, *status("j", "null")], recorded[::-1], status("k", "waiting", "pending")):
        assert events_differ(recorded, heard)


def test_what_an_event_says_is_compared():
    recorded, heard = (event("BLOCK_JOB_COMPLETED", "j", offset=offset) for offset in (1, 2))
    assert events_differ([recorded], [heard]) == ["event BLOCK_JOB_COMPLETED.data.offset: recorded 1, heard 2"]


def test_repeated_drain_pairs_fold_but_the_first_counts():
    once = status("j", "created", "running", "paused", "running")
    assert events_differ(once, once + status("j", "paused", "running")) == []
    assert events_differ(once, status("j", "created", "running"))


def test_the_order_of_two_jobs_counts_only_where_they_settle_together():
    one, other = status("a", "concluded"), status("b", "concluded")
    assert events_differ(one + other, other + one) == []
    assert events_differ(one + other, other + one, grouped=True)
