"""Our storage daemon behaves as the recordings of QEMU's do, except where `data/later.toml` says it cannot yet."""

from __future__ import annotations

import tomllib

import player
import pytest
import scenario

pytestmark = [pytest.mark.qemu, pytest.mark.xdist_group("transcripts")]

PROGRAM = player.OURS
LATER = tomllib.loads((scenario.TRANSCRIPTS.parent / "later.toml").read_text())


def test_later_names_only_scenarios_and_lines_that_exist():
    for name, entry in LATER.items():
        assert entry["needs"], name
        assert entry["from"] in {step.at for step in scenario.load(name).steps}, name


@pytest.mark.parametrize("name", [name for name in scenario.names() if name not in LATER])
def test_we_behave_as_recorded(name, replays):
    assert replays.outcome(name).differences() == []


@pytest.mark.parametrize("name", sorted(LATER))
def test_we_behave_as_recorded_until_a_later_feature(name, replays):
    outcome = replays.outcome(name)
    assert outcome.differences(before=LATER[name]["from"]) == []
    assert outcome.differences(), f"{name} passes to its end: remove it from later.toml"
