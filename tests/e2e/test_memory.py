"""The daemon's memory does not grow with the disk: a preallocated terabyte, and bitmaps over it."""

import subprocess
from pathlib import Path

import player
import pytest

pytestmark = pytest.mark.qemu

TiB = 1 << 40
PEAK_MIB_MAX = 128


def make(path: Path, *options: str) -> None:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *options, str(path), str(TiB)], check=True)


def ask(daemon: player.Daemon, command: str, **arguments: object) -> object:
    named = {name.replace("_", "-"): value for name, value in arguments.items()}
    answer = daemon.qmp.ask({"execute": command, "arguments": named}, wait_s=100)[0]
    assert "return" in answer, answer
    return answer["return"]


def add(daemon: player.Daemon, name: str) -> None:
    ask(daemon, "blockdev-add", driver="qcow2", node_name=name, file={"driver": "file", "filename": name})


def wait_for(daemon: player.Daemon, event: str) -> None:
    while (heard := daemon.qmp.hear(wait_s=100)) is not None and heard["event"] != event:
        pass
    assert heard is not None


def peak_mib(daemon: player.Daemon) -> int:
    status = Path(f"/proc/{daemon.process.pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) >> 10


def copied(daemon: player.Daemon) -> None:
    ask(daemon, "blockdev-backup", job_id="job", device="full", target="empty", sync="full")
    wait_for(daemon, "BLOCK_JOB_COMPLETED")


def mirrored(daemon: player.Daemon) -> None:
    ask(daemon, "blockdev-mirror", job_id="job", device="full", target="empty", sync="full")
    wait_for(daemon, "BLOCK_JOB_READY")
    ask(daemon, "block-job-cancel", device="job")
    wait_for(daemon, "BLOCK_JOB_COMPLETED")


def tracked(daemon: player.Daemon) -> None:
    for name in ("one", "two"):
        ask(daemon, "block-dirty-bitmap-add", node="full", name=name, granularity=65536, persistent=True)
    ask(daemon, "block-dirty-bitmap-merge", node="full", target="one", bitmaps=["two"])
    ask(daemon, "query-named-block-nodes")
    ask(daemon, "blockdev-del", node_name="full")
    add(daemon, "full")


def kept(daemon: player.Daemon) -> None:
    ask(daemon, "blockdev-snapshot-internal-sync", device="full", name="kept")
    ask(daemon, "blockdev-snapshot-delete-internal-sync", device="full", name="kept")


def test_a_preallocated_terabyte(tmp_path: Path) -> None:
    make(tmp_path / "full", "-o", "preallocation=metadata")
    make(tmp_path / "empty")
    # Each image that is open has caches of its own, of up to 36 MiB: what the copies have filled ends with a daemon.
    for works in ((copied, mirrored, tracked), (kept,)):
        with player.Daemon(player.OURS, tmp_path) as daemon:
            for name in ("full", "empty"):
                add(daemon, name)
            for work in works:
                work(daemon)
                assert 20 < peak_mib(daemon) <= PEAK_MIB_MAX, work
