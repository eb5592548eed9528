"""A real QEMU whose disks are our exports: its memory and its disks go back together."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from typing import TYPE_CHECKING, Any

import boot_sector
import disks
import player
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="no qemu-system-x86_64"),
]
LENGTH = 8 << 20
COUNTER_AT = 0x7C88
"""Where the guest's boot sector counts its writes."""
GUEST = """#!/bin/sh
exec qemu-system-x86_64 -accel tcg -m 16 -nodefaults -display none -serial file:serial.txt \\
    -qmp unix:guest.sock,server=on,wait=off -pidfile guest.pid \\
    -blockdev driver=nbd,node-name=d,export=disk,server.type=unix,server.path=nbd.sock -device ide-hd,drive=d \\
    -blockdev driver=nbd,node-name=e,export=more,server.type=unix,server.path=nbd.sock -device ide-hd,drive=e "$@"
"""

WORDS = (
    *("--blockdev", "driver=qcow2,node-name=disk,file.driver=file,file.filename=disk.qcow2"),
    *("--blockdev", "driver=qcow2,node-name=more,file.driver=file,file.filename=more.qcow2"),
    *("--nbd-server", "addr.type=unix,addr.path=nbd.sock"),
    *("--export", "type=nbd,id=x,node-name=disk,name=disk,writable=on"),
    *("--export", "type=nbd,id=y,node-name=more,name=more,writable=on"),
    *("--object", "machine-state,id=vm0,type=qemu,qmp=guest.sock,restart=./guest.sh -incoming defer"),
)


class World:
    """A daemon with two disks, and a guest that boots from the first."""

    def __init__(self, folder: Path, daemon: player.Daemon) -> None:
        self.folder, self.daemon = folder, daemon
        self.guests: list[subprocess.Popen[bytes]] = []

    def start_guest(self, *words: str) -> None:
        self.guests.append(subprocess.Popen(["./guest.sh", *words], cwd=self.folder))
        deadline = time.monotonic() + 20
        while not (self.folder / "guest.sock").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def ask_guest(self, name: str, **arguments: Any) -> Any:
        qmp = player.QmpSocket(self.folder / "guest.sock")
        qmp.negotiate()
        reply, _ = qmp.ask({"execute": name, "arguments": arguments})
        qmp.close()
        return reply["return"]

    def counter(self) -> int:
        """How many sectors the guest's memory says that it has written."""
        said = self.ask_guest("human-monitor-command", **{"command-line": f"xp /1dw {COUNTER_AT:#x}"})
        return int(said.split(":")[1])

    def wait_for_counter(self, least: int) -> int:
        deadline = time.monotonic() + 40
        while (found := self.counter()) < least:
            assert time.monotonic() < deadline, found
            time.sleep(0.05)
        return found

    def run_job(self, name: str, **arguments: Any) -> str | None:
        """Run a snapshot job to its end and return its error."""
        self.start_job(name, **arguments)
        return self.end_of_job()

    def start_job(self, name: str, **arguments: Any) -> None:
        command = {"execute": name, "arguments": {"job-id": "j", **arguments}}
        reply, _ = self.daemon.qmp.ask(command, wait_s=40)
        assert reply == {"return": {}}, reply

    def end_of_job(self) -> str | None:
        deadline = time.monotonic() + 50
        while True:
            [job] = self.daemon.qmp.ask({"execute": "query-jobs"})[0]["return"]
            if job["status"] == "concluded":
                break
            assert time.monotonic() < deadline, job
            time.sleep(0.05)
        self.daemon.qmp.ask({"execute": "job-dismiss", "arguments": {"id": "j"}})
        error: str | None = job.get("error")
        return error

    def snapshots(self) -> list[list[str]]:
        """The names of the snapshots of each disk."""
        asked = {"execute": "query-named-block-nodes", "arguments": {"flat": True}}
        nodes = self.daemon.qmp.ask(asked)[0]["return"]
        return [
            [each["name"] for each in node["image"].get("snapshots", [])] for node in nodes if node["drv"] == "qcow2"
        ]

    def save(self, tag: str) -> str | None:
        return self.run_job("snapshot-save", tag=tag, vmstate="disk", devices=["disk", "more"])

    def load(self, tag: str) -> str | None:
        return self.run_job("snapshot-load", tag=tag, vmstate="disk", devices=["disk", "more"])


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    (tmp_path / "disk.raw").write_bytes(boot_sector.boot_sector().ljust(LENGTH, b"\0"))
    disks.run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "disk.raw", "disk.qcow2", cwd=tmp_path)
    disks.run("qemu-img", "create", "-q", "-f", "qcow2", "more.qcow2", "1M", cwd=tmp_path)
    (tmp_path / "guest.sh").write_text(GUEST)
    (tmp_path / "guest.sh").chmod(0o755)
    with player.Daemon(player.OURS, tmp_path, *WORDS) as daemon:
        found = World(tmp_path, daemon)
        try:
            yield found
        finally:
            for guest in found.guests:
                guest.kill()
                guest.wait(10)
            subprocess.run(["pkill", "-9", "-F", "guest.pid"], cwd=tmp_path, check=False, capture_output=True)


def test_memory_and_disks_go_back_together(world: World) -> None:
    world.start_guest()
    world.wait_for_counter(200)
    assert world.save("first") is None
    saved = world.counter()
    assert world.ask_guest("query-status")["running"] is True
    later = world.wait_for_counter(saved + 2000)
    assert world.load("first") is None
    assert world.ask_guest("query-status")["running"] is True
    back = world.counter()
    assert 200 <= back < later, (saved, back, later)
    world.wait_for_counter(back + 300)
    assert "F" not in (world.folder / "serial.txt").read_text()
    world.ask_guest("stop")
    last = world.counter()
    world.daemon.qmp.ask({"execute": "block-export-del", "arguments": {"id": "x", "mode": "hard"}}, wait_s=10)
    world.daemon.qmp.ask({"execute": "quit"})
    world.daemon.process.wait(10)
    disks.run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", "disk.qcow2", "after.raw", cwd=world.folder)
    numbers = boot_sector.numbers_on((world.folder / "after.raw").read_bytes())
    assert None not in numbers
    # No write of the time that was taken back is there.
    assert last - 1 <= max(number for number in numbers if number) <= last
    assert disks.check_exit_code(world.folder / "disk.qcow2") == 0


def test_a_guest_that_is_gone_before_a_save(world: World) -> None:
    world.start_guest()
    world.wait_for_counter(100)
    assert world.save("good") is None
    os.kill(int((world.folder / "guest.pid").read_text()), signal.SIGKILL)
    world.guests[0].wait(10)
    error = world.save("bad")
    assert error is not None
    assert "There is no machine at 'guest.sock'" in error
    assert world.snapshots() == [["good"], ["good"]]
    # One that waits for its state takes it.
    (world.folder / "guest.sock").unlink()
    world.start_guest("-incoming", "defer")
    assert world.load("good") is None
    world.wait_for_counter(200)


def test_a_guest_killed_in_the_middle_of_a_save(world: World) -> None:
    # Bytes that are all different make a state that takes a while.
    (world.folder / "fill.bin").write_bytes(os.urandom(192 << 20))
    filled = GUEST.replace("-m 16", "-m 256 -device loader,file=fill.bin,addr=0x2000000,force-raw=on")
    (world.folder / "guest.sh").write_text(filled)
    world.start_guest()
    world.wait_for_counter(100)
    image = world.folder / "disk.qcow2"
    before = image.stat().st_size
    world.start_job("snapshot-save", tag="half", vmstate="disk", devices=["disk", "more"])
    deadline = time.monotonic() + 20
    while image.stat().st_size < before + (16 << 20):
        assert time.monotonic() < deadline
    os.kill(int((world.folder / "guest.pid").read_text()), signal.SIGKILL)
    assert world.end_of_job() == "The machine at 'guest.sock' has gone away"
    world.guests[0].wait(10)
    assert world.snapshots() == [[], []]
    # The disks are as they were: a guest boots, and can be saved whole.
    (world.folder / "guest.sock").unlink()
    world.start_guest()
    world.wait_for_counter(100)
    assert world.save("whole") is None
    assert world.snapshots() == [["whole"], ["whole"]]
    assert "F" not in (world.folder / "serial.txt").read_text()
    world.ask_guest("quit")
    world.guests[1].wait(10)
    world.daemon.qmp.ask({"execute": "quit"})
    world.daemon.process.wait(10)
    assert disks.check_exit_code(image) == 0  # nothing of the half state is left


def test_a_state_of_something_else_is_refused_and_the_guest_runs_again(world: World) -> None:
    world.daemon.qmp.ask({"execute": "object-del", "arguments": {"id": "vm0"}})
    assert world.save("no machine") is None
    options = {"qom-type": "machine-state", "id": "vm0", "type": "qemu", "qmp": "guest.sock",
               "restart": "./guest.sh -incoming defer"}  # fmt: skip
    assert world.daemon.qmp.ask({"execute": "object-add", "arguments": options})[0] == {"return": {}}
    world.start_guest()
    before = world.wait_for_counter(100)
    error = world.load("no machine")
    assert error is not None
    assert "did not move its state" in error or "gone away" in error, error
    assert world.ask_guest("query-status")["running"] is True
    assert world.wait_for_counter(before + 100) >= before
    assert "F" not in (world.folder / "serial.txt").read_text()


PLAIN = (
    *(
        "qemu-system-x86_64",
        "-accel",
        "tcg",
        "-m",
        "16",
        "-nodefaults",
        "-display",
        "none",
        "-serial",
        "file:plain.txt",
    ),
    *("-qmp", "unix:guest.sock,server=on,wait=off"),
    *("-blockdev", "driver=qcow2,node-name=d,file.driver=file,file.filename=disk.qcow2", "-device", "ide-hd,drive=d"),
    *("-blockdev", "driver=qcow2,node-name=e,file.driver=file,file.filename=more.qcow2", "-device", "ide-hd,drive=e"),
)
"""The same machine on the images themselves, without us."""


def test_qemu_alone_loads_what_we_saved_and_we_what_it_saved(world: World) -> None:
    world.start_guest()
    world.wait_for_counter(200)
    assert world.save("ours") is None
    saved = world.counter()
    world.ask_guest("quit")
    world.guests[0].wait(10)
    world.daemon.qmp.ask({"execute": "quit"})
    world.daemon.process.wait(10)
    (world.folder / "guest.sock").unlink(missing_ok=True)
    world.guests.append(subprocess.Popen([*PLAIN, "-loadvm", "ours", "-S"], cwd=world.folder))
    while not (world.folder / "guest.sock").exists():
        assert world.guests[1].poll() is None
        time.sleep(0.05)
    assert 200 <= world.counter() <= saved
    world.ask_guest("cont")
    world.wait_for_counter(saved + 200)
    said = world.ask_guest("human-monitor-command", **{"command-line": "savevm theirs"})
    assert said == ""
    between = world.counter()
    world.ask_guest("quit")
    world.guests[1].wait(10)
    (world.folder / "guest.sock").unlink(missing_ok=True)
    (world.folder / "daemon.pid").unlink(missing_ok=True)
    with player.Daemon(player.OURS, world.folder, *WORDS) as daemon:
        again = World(world.folder, daemon)
        try:
            again.start_guest("-incoming", "defer")
            assert again.load("theirs") is None
            assert saved < again.counter() <= between + 5000
            again.wait_for_counter(between + 100)
        finally:
            for guest in again.guests:
                guest.kill()
                guest.wait(10)
    assert "F" not in (world.folder / "serial.txt").read_text()
