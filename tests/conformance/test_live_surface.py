"""What happens over time, not only what is replied, in QEMU's storage daemon and in ours: the same."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, Any

import player
import pytest

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.qemu

PROGRAMS = pytest.mark.parametrize("program", player.PROGRAMS, ids=lambda program: program.name)


def ask(daemon: player.Daemon, command: str, **arguments: Any) -> Any:
    request = {"execute": command, "arguments": {name.replace("_", "-"): arguments[name] for name in arguments}}
    reply, _ = daemon.qmp.ask(request)
    assert "return" in reply, reply
    return reply["return"]


def nbd_client(directory: Path, *commands: str) -> None:
    words = [word for command in commands for word in ("-c", command)]
    url = "nbd+unix:///q?socket=nbd.sock"
    subprocess.run(["qemu-io", "-f", "raw", *words, url], cwd=directory, check=True, capture_output=True, timeout=30)


def export(daemon: player.Daemon, directory: Path) -> None:
    """Let clients write to a new qcow2 image of 4 MiB, node `q` above node `f`."""
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "a.qcow2", "4M"], cwd=directory, check=True)
    file = {"driver": "file", "node-name": "f", "filename": "a.qcow2"}
    ask(daemon, "blockdev-add", driver="qcow2", node_name="q", discard="unmap", file=file)
    ask(daemon, "nbd-server-start", addr={"type": "unix", "data": {"path": "nbd.sock"}})
    ask(daemon, "block-export-add", type="nbd", id="e", node_name="q", writable=True)


@PROGRAMS
def test_a_write_past_the_threshold_is_told_once(program: player.Program, tmp_path: Path) -> None:
    heard = []
    with player.Daemon(program, tmp_path) as daemon:
        export(daemon, tmp_path)
        for node, threshold, commands in (
            ("q", 65536, ["write 0 65536", "discard 0 65536", "read 1M 65536"]),
            (None, 0, ["write 1000 65536", "write 512k 65536"]),
            ("q", 65536, ["write -z 256k 65536"]),
            ("q", 65536, ["discard 128k 65536"]),
            ("f", 1 << 19, ["write 1M 1M"]),
            ("f", 1 << 19, []),
            ("f", 0, ["write 2M 65536"]),
        ):
            if node is not None:
                ask(daemon, "block-set-write-threshold", node_name=node, write_threshold=threshold)
            nbd_client(tmp_path, *commands, "flush")
            _, events = daemon.qmp.ask({"execute": "query-jobs"})
            shown = {
                each["node-name"]: each["write_threshold"] for each in ask(daemon, "query-named-block-nodes", flat=True)
            }
            told = [event["data"] for event in events if event["event"] == "BLOCK_WRITE_THRESHOLD"]
            exceeded = [each.pop("amount-exceeded") for each in told]
            heard.append((told, [each > 0 for each in exceeded], shown))
    q = {"node-name": "q", "write-threshold": 65536}
    assert heard == [
        ([], [], {"q": 65536, "f": 0}),
        *[([q], [True], {"q": 0, "f": 0})] * 2,
        ([q], [True], {"q": 0, "f": 0}),
        ([{"node-name": "f", "write-threshold": 1 << 19}], [True], {"q": 0, "f": 0}),
        ([], [], {"q": 0, "f": 1 << 19}),
        ([], [], {"q": 0, "f": 0}),
    ]
