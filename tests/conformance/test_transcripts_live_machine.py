"""The recordings of what only a machine has hold against the installed QEMU with an empty machine."""

from __future__ import annotations

import shutil

import player
import pytest
import scenario

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.xdist_group("transcripts of machines"),
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="no qemu-system-x86_64"),
]

PROGRAM = player.MACHINE
NAMES = [name for name in scenario.names() if scenario.load(name).program.startswith("qemu-system")]


def test_there_are_some() -> None:
    assert len(NAMES) >= 4


@pytest.mark.parametrize("name", NAMES)
def test_the_recording_holds_against_qemu(name, replays):
    assert replays.outcome(name).differences() == []
