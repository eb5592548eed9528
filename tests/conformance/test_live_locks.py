"""Two daemons and one image: whoever holds it and whoever asks, ours or QEMU's, the answers are those of two QEMUs."""

from __future__ import annotations

import itertools
import subprocess
from typing import TYPE_CHECKING, Any

import player
import pytest

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.qemu

FILE = {"driver": "file", "filename": "a.qcow2"}
WAYS: dict[str, dict[str, Any]] = {
    "writes": {"driver": "qcow2", "file": FILE},
    "reads": {"driver": "qcow2", "file": FILE, "read-only": True},
    "reads by force": {"driver": "qcow2", "file": FILE, "read-only": True, "force-share": True},
    "knows the bytes": {"driver": "raw", "file": FILE},
    "takes no locks": {"driver": "qcow2", "file": {**FILE, "locking": "off"}},
}


@pytest.fixture(scope="module")
def as_two_qemus(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Any]:
    return _answers(player.QEMU, player.QEMU, tmp_path_factory.mktemp("reference"))


@pytest.mark.parametrize(
    ("holder", "asker"), [(player.QEMU, player.OURS), (player.OURS, player.QEMU), (player.OURS, player.OURS)]
)
def test_locks_mean_the_same_to_both(
    holder: player.Program, asker: player.Program, as_two_qemus: dict[tuple[str, str], Any], tmp_path: Path
) -> None:
    assert _answers(holder, asker, tmp_path) == as_two_qemus


def _answers(holder: player.Program, asker: player.Program, directory: Path) -> dict[tuple[str, str], Any]:
    """What the asker hears for each way to open the image while the holder has it open in each way."""
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "a.qcow2", "1M"], cwd=directory, check=True)
    places = [directory / name for name in ("holder", "asker")]
    for place in places:
        place.mkdir()
        (place / "a.qcow2").symlink_to(directory / "a.qcow2")
    answers = {}
    with player.Daemon(holder, places[0]) as one, player.Daemon(asker, places[1]) as other:
        for held, asked in itertools.product(WAYS, WAYS):
            _ask(one, "blockdev-add", **{"node-name": "n", **WAYS[held]})
            answers[held, asked] = _ask(other, "blockdev-add", **{"node-name": "n", **WAYS[asked]})
            for daemon in (other, one):
                _ask(daemon, "blockdev-del", **{"node-name": "n"})
    assert "error" in answers["writes", "writes"]
    return answers


def _ask(daemon: player.Daemon, command: str, **arguments: Any) -> dict[str, Any]:
    return daemon.qmp.ask({"execute": command, "arguments": arguments})[0]
