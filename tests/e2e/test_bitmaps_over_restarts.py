"""Incremental backups by a bitmap that outlives the daemon, qcow2 and raw; after a kill nobody believes it."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import disks
import player
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.qemu

JOB_S_MAX = 20.0


def ask(daemon: player.Daemon, command: str, **arguments: Any) -> Any:
    plain = {name.replace("_", "-"): value for name, value in arguments.items()}
    reply = daemon.qmp.ask({"execute": command, "arguments": plain})[0]
    assert "return" in reply, (command, reply)
    return reply["return"]


@contextmanager
def serving(directory: Path, kind: str) -> Iterator[player.Daemon]:
    """Our daemon with the disk as `d`, exported to everybody who writes."""
    with player.Daemon(player.OURS, directory) as daemon:
        more = {"bitmap-file": "disk.bitmaps"} if kind == "raw" else {}
        ask(daemon, "blockdev-add", driver=kind, node_name="d", file={"driver": "file", "filename": "disk"}, **more)
        ask(daemon, "nbd-server-start", addr={"type": "unix", "data": {"path": "nbd"}})
        ask(daemon, "block-export-add", type="nbd", id="e", node_name="d", writable=True, name="e")
        yield daemon


def write(directory: Path, *commands: str) -> None:
    words = [word for command in commands for word in ("-c", command)]
    disks.run("qemu-io", "-f", "raw", *words, "nbd+unix:///e?socket=nbd", cwd=directory)


def bitmaps(daemon: player.Daemon) -> dict[str, Any]:
    node = next(each for each in ask(daemon, "query-named-block-nodes", flat=True) if each["node-name"] == "d")
    return {each["name"]: each for each in node.get("dirty-bitmaps", [])}


def wait(daemon: player.Daemon) -> None:
    deadline = time.monotonic() + JOB_S_MAX
    while ask(daemon, "query-jobs"):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("kind", ["qcow2", "raw"])
def test_increments_over_restarts_add_up(kind: str, tmp_path: Path) -> None:
    disks.make(tmp_path, "disk", fmt=kind)
    disks.make(tmp_path, "full.raw", fmt="raw")
    with serving(tmp_path, kind) as daemon:
        write(tmp_path, "write -P 1 0 1M", "write -P 2 5M 200k")
        ask(daemon, "blockdev-add", driver="raw", node_name="t", file={"driver": "file", "filename": "full.raw"})
        actions = [
            {"type": "block-dirty-bitmap-add", "data": {"node": "d", "name": "b", "persistent": True}},
            {"type": "blockdev-backup", "data": {"job-id": "j", "device": "d", "target": "t", "sync": "full"}},
        ]
        ask(daemon, "transaction", actions=actions)
        wait(daemon)
        write(tmp_path, "write -P 3 1M 64k")
    base, base_format = "full.raw", "raw"
    for number in range(3):
        name = f"inc{number}.qcow2"
        disks.run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", base_format, name, cwd=tmp_path)
        with serving(tmp_path, kind) as daemon:
            assert not bitmaps(daemon)["b"].get("inconsistent")
            write(tmp_path, f"write -P {10 + number} {2 + number}M 100k", "write -z 0 64k", "discard 5M 64k")
            node = {"driver": "qcow2", "node_name": "t", "file": {"driver": "file", "filename": name}}
            ask(daemon, "blockdev-add", **node)
            ask(daemon, "blockdev-backup", job_id="j", device="d", target="t", sync="incremental", bitmap="b")
            wait(daemon)
            assert bitmaps(daemon)["b"]["count"] == 0
        base, base_format = name, "qcow2"
        assert disks.same_content(tmp_path, "disk", kind, name, "qcow2")
    if kind == "qcow2":
        assert disks.check_exit_code(tmp_path / "disk") == 0


@pytest.mark.parametrize("kind", ["qcow2", "raw"])
def test_after_a_kill_the_bitmap_is_inconsistent(kind: str, tmp_path: Path) -> None:
    disks.make(tmp_path, "disk", fmt=kind)
    with serving(tmp_path, kind) as daemon:
        ask(daemon, "block-dirty-bitmap-add", node="d", name="b", persistent=True)
    with serving(tmp_path, kind) as daemon:
        # Killed before anything was written, the bitmap is still right.
        daemon.process.kill()
        daemon.process.wait()
    with serving(tmp_path, kind) as daemon:
        assert not bitmaps(daemon)["b"].get("inconsistent")
        write(tmp_path, "write -P 4 3M 64k")
        daemon.process.kill()
        daemon.process.wait()
    with serving(tmp_path, kind) as daemon:
        assert bitmaps(daemon)["b"]["inconsistent"]
        ask(daemon, "block-dirty-bitmap-remove", node="d", name="b")
    with serving(tmp_path, kind) as daemon:
        assert bitmaps(daemon) == {}
    if kind == "qcow2":
        assert disks.check_exit_code(tmp_path / "disk") == 0
