"""The nbd driver against qemu-nbd: copies both ways, TLS, servers that die, come back, or stand still."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Any

import disks
import player
import pytest
from nbd_servers import QemuNbd

from blockjobs.block.objects import AnyObjectOptions, add_object
from blockjobs.host import Host
from blockjobs.schema.command import convert
from blockjobs.testing.certificates import Authority

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.qemu


def ask(daemon: player.Daemon, command: str, **arguments: Any) -> Any:
    named = {name.replace("_", "-"): value for name, value in arguments.items()}
    reply, _ = daemon.qmp.ask({"execute": command, "arguments": named})
    assert "return" in reply, reply
    return reply["return"]


def add(daemon: player.Daemon, options: dict[str, Any]) -> None:
    reply, _ = daemon.qmp.ask({"execute": "blockdev-add", "arguments": options})
    assert reply == {"return": {}}, reply


def refusal(daemon: player.Daemon, options: dict[str, Any]) -> str:
    reply, _ = daemon.qmp.ask({"execute": "blockdev-add", "arguments": options})
    return str(reply["error"]["desc"])


def file_node(name: str, filename: str, fmt: str = "raw") -> dict[str, Any]:
    return {"driver": fmt, "node-name": name, "file": {"driver": "file", "filename": filename}}


def wait_for(daemon: player.Daemon, event: str, *, wait_s: float = 20.0) -> dict[str, Any]:
    deadline = time.monotonic() + wait_s
    while (heard := daemon.qmp.hear(wait_s=max(0.0, deadline - time.monotonic()))) is not None:
        if heard.get("event") == event:
            return dict(heard["data"])
    raise AssertionError(f"no {event} within {wait_s} s")


def back_up(daemon: player.Daemon, **more: Any) -> None:
    ask(daemon, "blockdev-backup", job_id="job0", device="source", target="target", sync="full", **more)


def start(daemon: player.Daemon, node: str = "target", **more: Any) -> None:
    """A slow backup, under way."""
    back_up(daemon, speed=8 << 20, **more)
    time.sleep(0.3)
    assert ask(daemon, "query-block-jobs")[0]["status"] == "running"


@pytest.mark.parametrize("source_fmt", ["raw", "qcow2"])
@pytest.mark.parametrize("target_fmt", ["raw", "qcow2"])
def test_copies_both_ways(program: player.Program, tmp_path: Path, source_fmt: str, target_fmt: str) -> None:
    disks.make_full(tmp_path, "source", fmt=source_fmt)
    for name in ("over", "back"):
        disks.make(tmp_path, name, fmt=target_fmt)
    with QemuNbd(tmp_path, "over", fmt=target_fmt) as server, player.Daemon(program, tmp_path) as daemon:
        add(daemon, file_node("source", "source", source_fmt))
        add(daemon, server.options("target", discard="unmap"))
        back_up(daemon)
        assert wait_for(daemon, "BLOCK_JOB_COMPLETED").get("error") is None
        ask(daemon, "blockdev-del", node_name="source")
        ask(daemon, "blockdev-del", node_name="target")
        add(daemon, server.options("source", read_only=True))
        add(daemon, file_node("target", "back", target_fmt))
        back_up(daemon)
        assert wait_for(daemon, "BLOCK_JOB_COMPLETED").get("error") is None
        ask(daemon, "quit")
        server.end()
    for name in ("over", "back"):
        assert disks.same_content(tmp_path, "source", source_fmt, name, target_fmt)
        assert target_fmt == "raw" or disks.check_exit_code(tmp_path / name) == 0


def tls(directory: Path, program: str = "client") -> dict[str, Any]:
    return {"qom-type": "tls-creds-x509", "id": "tls0", "dir": str(directory), "endpoint": program}


def test_tls(program: player.Program, tmp_path: Path) -> None:
    authority = Authority()
    server_files = authority.issue(tmp_path / "server", "server")
    known = authority.issue(tmp_path / "client", "client")
    bare = authority.introduce(tmp_path / "bare")
    disks.make_full(tmp_path, "source", fmt="raw")
    disks.make(tmp_path, "over", fmt="raw")
    words = ("--object", f"tls-creds-x509,id=t,dir={server_files},endpoint=server", "--tls-creds", "t")
    with QemuNbd(tmp_path, "over", words=words) as server, player.Daemon(program, tmp_path) as daemon:
        ask(daemon, "object-add", **tls(known))
        ask(daemon, "object-add", **tls(bare) | {"id": "bare"})
        clear = "TLS negotiation required before option 7 (go)"
        assert refusal(daemon, server.options("n")) == clear
        assert refusal(daemon, server.options("n", tls_creds="tls0")) == "No hostname for certificate validation"
        wrong = refusal(daemon, server.options("n", tls_creds="tls0", tls_hostname="elsewhere"))
        assert "hostname" in wrong.lower(), wrong
        denied = refusal(daemon, server.options("n", tls_creds="bare", tls_hostname="localhost"))
        assert denied and "\n" not in denied
        add(daemon, file_node("source", "source"))
        add(daemon, server.options("target", tls_creds="tls0", tls_hostname="localhost"))
        back_up(daemon)
        assert wait_for(daemon, "BLOCK_JOB_COMPLETED").get("error") is None
        ask(daemon, "quit")
    assert disks.same_content(tmp_path, "source", "raw", "over", "raw")


def test_tls_in_an_embedding_program(tmp_path: Path) -> None:
    """On asyncio's own event loop, whose TLS is not that of the daemon's loop."""
    authority = Authority()
    server_files = authority.issue(tmp_path / "server", "server")
    disks.make(tmp_path, "over", fmt="raw")
    disks.make_full(tmp_path, "source", fmt="raw")
    words = ("--object", f"tls-creds-x509,id=t,dir={server_files},endpoint=server", "--tls-creds", "t")

    async def program(server: QemuNbd) -> None:
        async with Host() as host:
            options = convert(tls(authority.issue(tmp_path / "client", "client")), AnyObjectOptions)
            add_object(host.objects, options, host.clock)
            source = await host.blockdev_add(file_node("source", "source") | {"read-only": True})
            more = {"tls_creds": "tls0", "tls_hostname": "localhost"}
            target = await host.blockdev_add(server.options("target", **more))
            job = await host.backup(source, target)
            assert (await job.outcome()).error is None

    with QemuNbd(tmp_path, "over", words=words) as server, contextlib.chdir(tmp_path):
        asyncio.run(program(server))
    assert disks.same_content(tmp_path, "source", "raw", "over", "raw")


def test_a_server_without_tls_is_refused(program: player.Program, tmp_path: Path) -> None:
    known = Authority().issue(tmp_path / "client", "client")
    disks.make(tmp_path, "over", fmt="raw")
    with QemuNbd(tmp_path, "over") as server, player.Daemon(program, tmp_path) as daemon:
        ask(daemon, "object-add", **tls(known))
        text = refusal(daemon, server.options("n", tls_creds="tls0", tls_hostname="localhost"))
        assert text == "Denied by server for option 5 (starttls)"


@pytest.mark.parametrize("dies", ["target", "source"])
def test_a_server_that_is_killed_and_started_again(program: player.Program, tmp_path: Path, dies: str) -> None:
    disks.make_full(tmp_path, "source", fmt="raw", mib=32)
    disks.make(tmp_path, "over", fmt="raw", size="32M")
    over, source = QemuNbd(tmp_path, "over"), QemuNbd(tmp_path, "source")
    with over, source, player.Daemon(program, tmp_path) as daemon:
        add(daemon, source.options("source", reconnect_delay=30))
        add(daemon, over.options("target", reconnect_delay=30))
        start(daemon)
        server = over if dies == "target" else source
        server.kill()
        time.sleep(1)
        assert ask(daemon, "query-block-jobs")[0]["status"] == "running"
        server.start()
        ask(daemon, "block-job-set-speed", device="job0", speed=0)
        assert wait_for(daemon, "BLOCK_JOB_COMPLETED").get("error") is None
        ask(daemon, "quit")
    assert disks.same_content(tmp_path, "source", "raw", "over", "raw")


def test_without_reconnecting_a_job_fails_when_its_server_dies(program: player.Program, tmp_path: Path) -> None:
    disks.make_full(tmp_path, "source", fmt="raw", mib=32)
    disks.make(tmp_path, "over", fmt="raw", size="32M")
    with QemuNbd(tmp_path, "over") as server, player.Daemon(program, tmp_path) as daemon:
        add(daemon, file_node("source", "source"))
        add(daemon, server.options("target"))
        start(daemon)
        server.kill()
        assert wait_for(daemon, "BLOCK_JOB_COMPLETED")["error"] == "Input/output error"
        ask(daemon, "quit")


@pytest.mark.parametrize("state", ["stopped", "gone"])
def test_a_forced_cancel_does_not_wait_for_the_target(tmp_path: Path, state: str) -> None:
    """A server that is stopped but connected holds QEMU's jobs up; ours let go."""
    disks.make_full(tmp_path, "source", fmt="raw", mib=32)
    disks.make(tmp_path, "over", fmt="raw", size="32M")
    with QemuNbd(tmp_path, "over") as server, player.Daemon(player.OURS, tmp_path) as daemon:
        add(daemon, file_node("source", "source"))
        add(daemon, server.options("target", reconnect_delay=1000))
        start(daemon)
        server.stop() if state == "stopped" else server.kill()
        time.sleep(0.5)
        began = time.monotonic()
        ask(daemon, "block-job-cancel", device="job0", force=True)
        wait_for(daemon, "BLOCK_JOB_CANCELLED")
        assert time.monotonic() - began < 5  # a second, and a loaded machine
        ask(daemon, "blockdev-del", node_name="target")
        assert time.monotonic() - began < 10
        ask(daemon, "quit")
        assert daemon.process.wait(10) == 0


def test_quitting_does_not_wait_for_a_server_that_stands_still(tmp_path: Path) -> None:
    disks.make_full(tmp_path, "source", fmt="raw", mib=32)
    disks.make(tmp_path, "over", fmt="raw", size="32M")
    with QemuNbd(tmp_path, "over") as server, player.Daemon(player.OURS, tmp_path) as daemon:
        add(daemon, file_node("source", "source"))
        add(daemon, server.options("target", reconnect_delay=1000))
        start(daemon)
        server.stop()
        time.sleep(0.5)
        ask(daemon, "quit")
        assert daemon.process.wait(10) == 0


@pytest.mark.parametrize("name", ["nbd+unix:///disk?socket={}", "nbd:unix:{}:exportname=disk"])
def test_drive_commands_take_an_export_that_is_there(tmp_path: Path, name: str) -> None:
    """How virtual machines' disks are moved to another host: a mirror into an export over there, then the pivot."""
    disks.make_full(tmp_path, "source", fmt="raw")
    for each in ("over", "moved"):
        disks.make(tmp_path, each, fmt="raw")
    over, moved = QemuNbd(tmp_path, "over"), QemuNbd(tmp_path, "moved")
    with over, moved, player.Daemon(player.OURS, tmp_path) as daemon:
        add(daemon, file_node("source", "source"))
        words = {"device": "source", "sync": "full", "format": "raw"}
        copy = words | {"job_id": "job0", "target": name.format(over.socket), "mode": "existing"}
        ask(daemon, "drive-backup", **copy)
        assert wait_for(daemon, "BLOCK_JOB_COMPLETED").get("error") is None
        mirror = words | {"job_id": "job1", "target": name.format(moved.socket), "mode": "existing"}
        ask(daemon, "drive-mirror", **mirror)
        wait_for(daemon, "BLOCK_JOB_READY")
        ask(daemon, "block-job-complete", device="job1")
        assert wait_for(daemon, "BLOCK_JOB_COMPLETED").get("error") is None
        made = words | {"job-id": "job2", "target": name.format(over.socket)}
        reply, _ = daemon.qmp.ask({"execute": "drive-backup", "arguments": made})
        assert "an export must be there already" in reply["error"]["desc"]
        ask(daemon, "quit")
    for each in ("over", "moved"):
        assert disks.same_content(tmp_path, "source", "raw", each, "raw")
