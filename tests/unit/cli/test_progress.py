"""Progress as people and programs see it."""

import io
import json

from blockjobs.cli.progress import JsonView, Meter, PlainView, format_seconds, summary


def test_meter_uses_the_last_seconds_only() -> None:
    meter = Meter()
    for second in range(20):
        meter.take(second * 10 if second < 10 else 100 + (second - 10) * 100, 2000, float(second))
    assert meter.rate_bytes_per_s == 100
    assert meter.percent == 50
    assert meter.eta_s == 10


def test_meter_without_movement_knows_no_end() -> None:
    meter = Meter()
    assert meter.eta_s is None
    meter.take(0, 0, 1.0)
    assert meter.percent == 0
    assert format_seconds(meter.eta_s) == "-:--"


def test_seconds() -> None:
    assert format_seconds(59.6) == "1:00"
    assert format_seconds(3723) == "1:02:03"


def test_plain_lines_show_changes_of_status_at_once() -> None:
    stream = io.StringIO()
    with PlainView("backup", stream) as view:
        view.show("running", 0, 1 << 30)
        view.show("running", 1 << 20, 1 << 30)
        view.show("paused", 1 << 20, 1 << 30)
        view.done({"current": 1 << 30, "seconds": 2.0, "error": None})
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[0].endswith("running")
    assert lines[1].endswith("paused")
    assert lines[2] == "backup: done, 1 GiB in 2.0 s, 512 MiB/s"


def test_json_lines_are_json() -> None:
    stream = io.StringIO()
    with JsonView("a", stream) as view:
        view.show("running", 1, 2)
        view.done({"id": "a", "current": 2, "error": "No space left on device"})
    progress, outcome = map(json.loads, stream.getvalue().splitlines())
    assert progress == {"event": "progress", "id": "a", "status": "running", "current": 1, "total": 2}
    assert outcome["error"] == "No space left on device"


def test_summary_of_a_failure_names_it() -> None:
    assert summary({"current": 0, "error": "Input/output error"}) == "failed: Input/output error"
    assert summary({"current": 0, "error": "cancelled", "fate": "cancelled"}) == "cancelled"
    assert summary({"current": 1 << 20, "error": None}) == "done, 1 MiB"
