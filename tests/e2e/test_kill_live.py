"""kill -9 of the daemon under a writing guest, in the middle of every type of job (spec/durability.md §1, §4).

Whatever the moment: the image that the guest was writing to has no errors but leaks, shows every flushed write, and
no foreign byte. While a job moves the guest to another image, that holds for one of the two.
"""

from __future__ import annotations

import os
import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import disks
import player
import pytest
from nbd_guest import NbdGuest

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(600)]
SEEDS = int(os.environ.get("BLOCKJOBS_KILL_SEEDS", "2"))
MIB = 1 << 20
LENGTH = 24 * MIB
LONGEST_S = 0.7
"""The job is killed at a random moment of so many seconds: all of them are over before that on a quiet machine."""


@dataclass(frozen=True, slots=True)
class Story:
    """A job under kill.

    Attributes:
        start: the commands that begin it.
        moves_to: the image that the guest may be writing to afterwards.
        completes: it is to be completed when it is ready.
    """

    start: list[dict[str, Any]]
    moves_to: str | None = None
    completes: bool = False


def job(command: str, **arguments: Any) -> dict[str, Any]:
    named = {name.replace("_", "-"): value for name, value in arguments.items()}
    return {"execute": command, "arguments": {"job-id": "j", "device": "top", "speed": 40 * MIB, **named}}


BITMAP = {"execute": "block-dirty-bitmap-add", "arguments": {"node": "top", "name": "b", "persistent": True}}
NEW_FILE = {"driver": "file", "node-name": "new-file", "filename": "new.qcow2"}
NEW_IMAGE = {"driver": "qcow2", "file": "new-file", "size": LENGTH, "preallocation": "full"}
STORIES = {
    "create": Story(
        [
            {"execute": "blockdev-add", "arguments": NEW_FILE},
            {"execute": "blockdev-create", "arguments": {"job-id": "j", "options": NEW_IMAGE}},
        ]
    ),
    "backup": Story([job("blockdev-backup", target="t", sync="full")]),
    "backup-bitmap": Story([BITMAP, job("blockdev-backup", target="t", sync="full", bitmap="b", bitmap_mode="always")]),
    "mirror": Story([job("blockdev-mirror", target="t", sync="full")], "t.qcow2", completes=True),
    "mirror-blocking": Story(
        [job("blockdev-mirror", target="t", sync="full", copy_mode="write-blocking")], "t.qcow2", completes=True
    ),
    "stream": Story([job("block-stream")]),
    "stream-base": Story([job("block-stream", base_node="base")]),
    "commit": Story([job("block-commit", top_node="mid", base_node="base")]),
    "commit-active": Story([job("block-commit", base_node="base")], "base.qcow2", completes=True),
}


def make_images(folder: Path, rng: random.Random) -> bytes:
    """A chain of three and an empty target; returns what the top shows."""
    for name, below in (("base", None), ("mid", "base"), ("top", "mid")):
        backing = ("-b", f"{below}.qcow2", "-F", "qcow2") if below else ()
        size = () if below else (str(LENGTH),)
        disks.run("qemu-img", "create", "-q", "-f", "qcow2", *backing, f"{name}.qcow2", *size, cwd=folder)
        runs = [(rng.randrange(0, LENGTH - MIB), rng.randrange(4096, MIB), rng.randrange(1, 200)) for _ in range(8)]
        words = [word for at, length, pattern in runs for word in ("-c", f"write -P {pattern} {at} {length}")]
        disks.run("qemu-io", "-f", "qcow2", *words, f"{name}.qcow2", cwd=folder)
    disks.make(folder, "t.qcow2", size=str(LENGTH))
    return content_of(folder, "top.qcow2")


def content_of(folder: Path, name: str) -> bytes:
    disks.run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", name, "shown.raw", cwd=folder)
    return (folder / "shown.raw").read_bytes()


def magic_of(image: Path) -> bytes:
    """What a file says it is; nothing if it is empty."""
    return image.read_bytes()[:4].strip(b"\0")


def words_for(program: player.Program) -> list[str]:
    def image(name: str, *more: str) -> str:
        return ",".join(
            (f"driver=qcow2,node-name={name},discard=unmap,file.driver=file", f"file.filename={name}.qcow2", *more)
        )

    nodes = [image("base"), image("mid", "backing=base"), image("top", "backing=mid"), image("t")]
    export = "nbd,id=e,node-name=top,name=disk,writable=on"
    server = "addr.type=unix,addr.path=nbd.sock"
    return [*(word for node in nodes for word in ("--blockdev", node)), "--nbd-server", server, "--export", export]


def run_until(daemon: player.Daemon, story: Story, deadline: float) -> bool:
    """Steer the job until the moment of death; returns whether it was seen to have ended well."""
    ended = False
    while (left_s := deadline - time.monotonic()) > 0:
        message = daemon.qmp.hear(wait_s=left_s)
        if message is None:
            continue
        assert "error" not in message, message
        told = message.get("data", {})
        assert "error" not in told, message
        if message.get("event") == "BLOCK_JOB_READY" and story.completes:
            daemon.qmp.send({"execute": "job-complete", "arguments": {"id": "j"}})
        ended = ended or message.get("event") == "BLOCK_JOB_COMPLETED"
    return ended


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("name", STORIES)
def test_a_guest_loses_nothing_it_has_flushed(tmp_path: Path, name: str, seed: int) -> None:
    rng, story = random.Random(f"{name} {seed}"), STORIES[name]
    start = make_images(tmp_path, rng)
    (tmp_path / "new.qcow2").touch()
    with player.Daemon(player.OURS, tmp_path, *words_for(player.OURS)) as daemon:
        guest = NbdGuest(tmp_path / "nbd.sock", "disk", start, seed, area=4 * MIB, pace_s=0.002)
        with guest:
            guest.wait_for_writes(10)
            for request in story.start:
                reply, _ = daemon.qmp.ask(request)
                assert reply == {"return": {}}, reply
            ended = run_until(daemon, story, time.monotonic() + rng.random() * LONGEST_S)
            daemon.process.kill()
            daemon.process.wait()
    assert not guest.errors
    if magic_of(tmp_path / "new.qcow2"):
        assert disks.check_exit_code(tmp_path / "new.qcow2") in (0, 3), "a half-made image looks like a whole one"
    candidates = ["top.qcow2"]
    if story.moves_to:
        candidates = [story.moves_to] if ended else [*candidates, story.moves_to]
    told = {}
    for candidate in candidates:
        code = disks.check_exit_code(tmp_path / candidate)
        told[candidate] = guest.faults(content_of(tmp_path, candidate)) if code in (0, 3) else [f"check says {code}"]
    assert [] in told.values(), {candidate: faults[:5] for candidate, faults in told.items()}
    for image in ("base", "mid", "top", "t"):
        assert disks.check_exit_code(tmp_path / f"{image}.qcow2") in (0, 3), image
