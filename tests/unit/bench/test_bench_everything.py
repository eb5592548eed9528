import argparse
import math
from pathlib import Path

import pytest
from everything import GROWTH_S, SPARE_S, SUITES, Task, figures, tasks
from pace import Clock
from publication import Occasion
from rows import Row

OPTIONS = argparse.Namespace(only=None, quick=False, thorough=False)


def test_what_is_in_memory_comes_behind_and_has_its_time_kept() -> None:
    found = tasks([None, Path("/memory")], OPTIONS)
    assert [each.suite for each in found[: len(SUITES)]] == list(SUITES)
    assert {each.name for each in found if each.piece.reserved} == {
        f"{name} on /memory" for name in ("control", "backup", "mirror", "commit", "stream", "convert")
    }
    some = tasks([None, Path("/memory")], argparse.Namespace(only=["mirror", "nbd"]))
    assert [each.name for each in some] == ["nbd", "mirror", "mirror on /memory"]


def test_ten_minutes_are_nearly_enough_for_all_of_it_on_a_slow_machine() -> None:
    found = tasks([None, Path("/memory")], OPTIONS)
    wanted_s = sum(each.piece.about_s for each in found) + GROWTH_S
    assert (600 - SPARE_S) / wanted_s > 0.9, "the pace at the start"


def test_a_suite_that_fails_takes_no_other_with_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def rows(task: Task, pace: float, sources: Path, options: argparse.Namespace):
        assert pace == math.inf
        yield Row(task.name, "QSD", "", "", (1.0,))
        if task.name == "nbd":
            raise RuntimeError("the daemon is gone")

    monkeypatch.setattr(Task, "rows", rows)
    ahead = tasks([tmp_path], argparse.Namespace(only=["mirror", "nbd"]))
    clock = Clock(math.inf, [each.piece for each in ahead])
    found = list(figures(ahead, Occasion("2026-11-27", "here"), clock, OPTIONS))
    assert [each.row.operation for each in found] == ["nbd", "mirror"]
    assert clock.failed == ["nbd"]
    assert str(clock).endswith("; FAILED: nbd")
    assert list(tmp_path.iterdir()) == []
