"""A real QEMU boots a guest from our export, and does not notice that its disk is moved while it writes."""

from __future__ import annotations

import shutil
import subprocess
import threading
from typing import TYPE_CHECKING

import boot_sector
import disks
import player
import pytest

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="no qemu-system-x86_64"),
]
LENGTH = 32 << 20


class Machine:
    """A guest without a disk of its own; `dots` counts what it says."""

    def __init__(self, folder: Path) -> None:
        drive = "driver=nbd,node-name=d,export=disk,server.type=unix,server.path=nbd.sock"
        self._process = subprocess.Popen(
            [
                *("qemu-system-x86_64", "-accel", "tcg", "-m", "32", "-nodefaults", "-display", "none"),
                *("-serial", "stdio", "-blockdev", drive, "-device", "ide-hd,drive=d,write-cache=on"),
            ],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.said = b""
        self._news = threading.Condition()
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.terminate()
        self._process.wait(10)
        self._thread.join()
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._process.stdout.close()
        self._process.stderr.close()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        while said := self._process.stdout.read1(4096):
            with self._news:
                self.said += said
                self._news.notify_all()
        with self._news:
            self.said += b"!"  # the machine is gone
            self._news.notify_all()

    def wait_for_dots(self, more: int) -> None:
        """Until the guest has written and verified 64 sectors so many times more."""
        with self._news:
            wanted = self.said.count(b".") + more
            done = self._news.wait_for(
                lambda: self.said.count(b".") >= wanted or b"F" in self.said or b"!" in self.said, timeout=40
            )
            assert done, f"the guest is stuck: {self.said!r}"
            assert self.said.strip(b".") == b"B", self.said


def wait_for_event(daemon: player.Daemon, name: str) -> None:
    while True:
        message = daemon.qmp.hear(wait_s=30)
        assert message is not None, f"no {name}"
        if message.get("event") == name:
            assert "error" not in message["data"], message
            return


@pytest.mark.parametrize("mode", ["background", "write-blocking"])
def test_a_guest_boots_from_our_export_and_is_moved_to_another_image(tmp_path: Path, mode: str) -> None:
    (tmp_path / "raw").write_bytes(boot_sector.boot_sector().ljust(LENGTH, b"\0"))
    disks.run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "raw", "old.qcow2", cwd=tmp_path)
    disks.make(tmp_path, "new.qcow2", size=str(LENGTH))
    words = [
        *("--blockdev", "driver=qcow2,node-name=old,file.driver=file,file.filename=old.qcow2"),
        *("--blockdev", "driver=qcow2,node-name=new,file.driver=file,file.filename=new.qcow2"),
        *("--nbd-server", "addr.type=unix,addr.path=nbd.sock"),
        *("--export", "nbd,id=e,node-name=old,name=disk,writable=on"),
    ]
    with player.Daemon(player.OURS, tmp_path, *words) as daemon:
        with Machine(tmp_path) as machine:
            machine.wait_for_dots(2)
            job = {"job-id": "j", "device": "old", "target": "new", "sync": "full", "copy-mode": mode}
            assert daemon.qmp.ask({"execute": "blockdev-mirror", "arguments": job})[0] == {"return": {}}
            wait_for_event(daemon, "BLOCK_JOB_READY")
            machine.wait_for_dots(3)
            daemon.qmp.send({"execute": "job-complete", "arguments": {"id": "j"}})
            wait_for_event(daemon, "BLOCK_JOB_COMPLETED")
            machine.wait_for_dots(3)
            dots = machine.said.count(b".")
        daemon.process.terminate()
        daemon.process.wait(10)
    disks.run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", "new.qcow2", "shown", cwd=tmp_path)
    numbers = boot_sector.numbers_on((tmp_path / "shown").read_bytes())
    assert None not in numbers
    newest = max(number for number in numbers if number is not None)
    assert newest >= 64 * dots
    lowest = max(1, newest - boot_sector.SECTORS + 1)
    assert sorted(number for number in numbers if number)[-(newest - lowest + 1) :] == list(range(lowest, newest + 1))
    for image in ("old.qcow2", "new.qcow2"):
        assert disks.check_exit_code(tmp_path / image) == 0
