"""Snapshots of two disks in one transaction while a guest writes to both, with QEMU's daemon and ours.

The guest writes number n to the first disk and, when that is acknowledged, to the second. So at any one instant the
first disk holds the writes up to some n, and the second those up to n or n - 1; and a layer never changes later.
"""

from __future__ import annotations

import random
import struct
import threading
import time
from typing import TYPE_CHECKING, Any

import disks
import player
import pytest
from nbd_guest import NbdConnection

from blockjobs.wire.nbd import Command

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.qemu

MIB = 1 << 20
LENGTH = 2 * MIB
BLOCK = 4096
STAMP = struct.Struct(">Q")
GENERATIONS = 5


class Guest:
    """Writes numbered blocks to both disks, until told to stop.

    Attributes:
        places: where write n went, on both disks.
        acknowledged: the last write that both disks have acknowledged.
    """

    def __init__(self, directory: Path) -> None:
        self._disks = [NbdConnection(directory / "n.sock", name) for name in "ab"]
        self._chance = random.Random(5)
        self._over = threading.Event()
        self.places = [0]
        self.acknowledged = 0
        self.errors: list[int] = []
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Guest:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()
        for disk in self._disks:
            disk.close()

    def _run(self) -> None:
        while not self._over.is_set():
            self.places.append(self._chance.randrange(LENGTH // BLOCK) * BLOCK)
            number = len(self.places) - 1
            for disk in self._disks:
                error = disk.ask(Command.WRITE, self.places[number], BLOCK, block(number))
                self.errors += [error] if error else []
            self.acknowledged = number

    def shown_after(self, number: int) -> bytes:
        """What a disk shows after the writes up to `number`."""
        content = bytearray(LENGTH)
        for each in range(1, number + 1):
            content[self.places[each] : self.places[each] + BLOCK] = block(each)
        return bytes(content)


def block(number: int) -> bytes:
    return STAMP.pack(number) * (BLOCK // STAMP.size)


def latest_in(content: bytes) -> int:
    return max(STAMP.unpack_from(content, at)[0] for at in range(0, LENGTH, BLOCK))


@pytest.mark.parametrize("program", player.PROGRAMS, ids=lambda program: program.name)
def test_one_instant_for_both_disks(program: player.Program, tmp_path: Path) -> None:
    for name in "ab":
        disks.make(tmp_path, f"{name}.0", size=str(LENGTH))
    with player.Daemon(program, tmp_path) as daemon:

        def ask(command: str, **arguments: Any) -> None:
            named = {name.replace("_", "-"): value for name, value in arguments.items()}
            assert daemon.qmp.ask({"execute": command, "arguments": named})[0] == {"return": {}}

        ask("nbd-server-start", addr={"type": "unix", "data": {"path": "n.sock"}})
        for name in "ab":
            ask("blockdev-add", driver="qcow2", node_name=f"{name}0", file={"driver": "file", "filename": f"{name}.0"})
            ask("block-export-add", type="nbd", id=name, node_name=f"{name}0", name=name, writable=True)
        bounds = []
        with Guest(tmp_path) as guest:
            for generation in range(1, GENERATIONS):
                time.sleep(0.15)
                before = guest.acknowledged
                ask("transaction", actions=[snapshot(name, generation) for name in "ab"])
                bounds.append((before, len(guest.places)))
            time.sleep(0.1)
        assert not guest.errors
    judge(tmp_path, guest, [*bounds, (guest.acknowledged, guest.acknowledged)])


def snapshot(name: str, generation: int) -> dict[str, Any]:
    data = {
        "node-name": f"{name}{generation - 1}",
        "snapshot-file": f"{name}.{generation}",
        "snapshot-node-name": f"{name}{generation}",
    }
    return {"type": "blockdev-snapshot-sync", "data": data}


def judge(directory: Path, guest: Guest, bounds: list[tuple[int, int]]) -> None:
    for generation, (least, most) in enumerate(bounds):
        latest = []
        for name in "ab":
            disks.run("qemu-img", "check", "-q", f"{name}.{generation}", cwd=directory)
            disks.run("qemu-img", "convert", "-O", "raw", f"{name}.{generation}", "view.raw", cwd=directory)
            content = (directory / "view.raw").read_bytes()
            latest.append(latest_in(content))
            assert content == guest.shown_after(latest[-1]), (name, generation)
        assert least <= latest[0] <= most, (generation, latest, least, most)
        assert latest[1] in (latest[0], latest[0] - 1), (generation, latest)
    assert bounds[0][0] < bounds[-1][0]
