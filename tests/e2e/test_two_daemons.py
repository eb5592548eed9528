"""A backup from a node of one daemon to an export of another, ours and QEMU's on either side; one of them is killed.

Whatever happens, the image behind the export is sound (leaks allowed), and the source untouched. Once our daemon has
said COMPLETED, everything is on disk on the other side, and killing that changes nothing.
"""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, Any

import disks
import player
import pytest

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.qemu

MIB = 16
PAIRS = [(client, holder) for client in player.PROGRAMS for holder in player.PROGRAMS]
PAIRS = [pair for pair in PAIRS if player.OURS in pair]
IDS = [f"{client.name.split('-')[0]}-to-{holder.name.split('-')[0]}" for client, holder in PAIRS]
both = pytest.mark.parametrize(("client", "holder"), PAIRS, ids=IDS)


def ask(daemon: player.Daemon, command: str, **arguments: Any) -> Any:
    reply, _ = daemon.qmp.ask({"execute": command, "arguments": arguments})
    assert "return" in reply, reply
    return reply["return"]


def add(daemon: player.Daemon, **options: Any) -> None:
    ask(daemon, "blockdev-add", **{name.replace("_", "-"): value for name, value in options.items()})


class Pair:
    """The daemon with the source, and the one with the export, each in a folder of its own."""

    def __init__(self, directory: Path, client: player.Program, holder: player.Program) -> None:
        self.here, self.there = directory / "here", directory / "there"
        for folder in (self.here, self.there):
            folder.mkdir()
        disks.make_full(self.here, "source", mib=MIB)
        disks.make(self.there, "target", size=f"{MIB}M")
        self.before = disks.digest(self.here / "source")
        self.client, self.holder = player.Daemon(client, self.here), player.Daemon(holder, self.there)

    def __enter__(self) -> Pair:
        address = {"type": "unix", "data": {"path": str(self.there / "nbd.sock")}}
        add(self.holder, driver="qcow2", node_name="target", file={"driver": "file", "filename": "target"})
        ask(self.holder, "nbd-server-start", addr=address)
        export = {"type": "nbd", "id": "e", "node-name": "target", "name": "disk", "writable": True}
        ask(self.holder, "block-export-add", **export)
        add(self.client, driver="qcow2", node_name="source", file={"driver": "file", "filename": "source"})
        server = {"type": "unix", "path": str(self.there / "nbd.sock")}
        add(self.client, driver="nbd", node_name="target", server=server, export="disk")
        return self

    def __exit__(self, *details: Any) -> None:
        for daemon in (self.client, self.holder):
            daemon.qmp.close()
            daemon.process.kill()
            daemon.process.wait()

    def start(self, **more: Any) -> None:
        job = {"job-id": "job0", "device": "source", "target": "target", "sync": "full", **more}
        ask(self.client, "blockdev-backup", **job)

    def completed(self) -> dict[str, Any]:
        deadline = time.monotonic() + 20
        while (event := self.client.qmp.hear(wait_s=max(0.0, deadline - time.monotonic()))) is not None:
            if event.get("event") == "BLOCK_JOB_COMPLETED":
                return dict(event["data"])
        raise AssertionError("the backup did not end")

    def judge(self) -> None:
        """After the daemons are gone."""
        assert disks.digest(self.here / "source") == self.before
        assert disks.check_exit_code(self.there / "target") in (0, disks.CHECK_LEAKS_ONLY)

    def is_same(self) -> bool:
        return disks.same_content(self.here, "source", "qcow2", str(self.there / "target"), "qcow2")


@both
def test_it_arrives(tmp_path: Path, client: player.Program, holder: player.Program) -> None:
    with Pair(tmp_path, client, holder) as pair:
        pair.start()
        assert pair.completed().get("error") is None
        for daemon in (pair.client, pair.holder):
            ask(daemon, "quit")
            assert daemon.process.wait(10) == 0
    pair.judge()
    assert pair.is_same()
    assert disks.check_exit_code(pair.there / "target") == 0


@pytest.mark.parametrize("holder", player.PROGRAMS, ids=lambda program: program.name)
def test_completed_means_durable_on_the_other_side(tmp_path: Path, holder: player.Program) -> None:
    with Pair(tmp_path, player.OURS, holder) as pair:
        pair.start()
        assert pair.completed().get("error") is None
        pair.holder.process.kill()
        pair.holder.process.wait()
    pair.judge()
    assert pair.is_same()


@both
@pytest.mark.parametrize("victim", ["client", "holder"])
def test_one_is_killed_at_any_moment(
    tmp_path: Path, client: player.Program, holder: player.Program, victim: str
) -> None:
    chance = random.Random(f"{client.name} {holder.name} {victim}")
    for attempt in range(2):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        with Pair(folder, client, holder) as pair:
            pair.start(speed=32 << 20)
            time.sleep(chance.uniform(0.0, 0.5))
            daemon = pair.client if victim == "client" else pair.holder
            daemon.process.kill()
            daemon.process.wait()
            if victim == "holder":
                assert pair.completed().get("error") in (None, "Input/output error")
                ask(pair.client, "quit")
                assert pair.client.process.wait(10) == 0
        pair.judge()
