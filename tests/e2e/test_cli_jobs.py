"""Steering the jobs of a server, ours and the real qemu-storage-daemon, and serving images to people."""

from __future__ import annotations

import json
import signal

import disks
import player
import pytest
import tool

pytestmark = pytest.mark.qemu
SOCKET = ("--connect", "qmp.sock")


def open_disks(daemon, folder):
    """Open `src`, full, and `dst`, empty, each under its own name."""
    disks.make_full(folder, "src")
    disks.make(folder, "dst")
    for name in ("src", "dst"):
        node = {"driver": "qcow2", "node-name": name, "file": {"driver": "file", "filename": name}}
        assert daemon.qmp.ask({"execute": "blockdev-add", "arguments": node})[0] == {"return": {}}


def start_job(daemon, command, **options):
    """Start `job0` from `src` to `dst`, and hang up."""
    job = {"job-id": "job0", "device": "src", "target": "dst", "sync": "full", **options}
    assert daemon.qmp.ask({"execute": command, "arguments": job})[0] == {"return": {}}
    daemon.qmp.close()


def wait_for_status(status, folder):
    """Ask the command until `job0` is in `status`."""
    for _ in range(200):
        if tool.quick("jobs", "--json", *SOCKET, cwd=folder).json[0]["status"] == status:
            return
    pytest.fail(f"job0 never became {status}")


@pytest.fixture
def busy(program, tmp_path):
    """A daemon with the throttled backup `job0` of 16 MiB under way, and nobody connected to it."""
    with player.Daemon(program, tmp_path) as daemon:
        open_disks(daemon, tmp_path)
        start_job(daemon, "blockdev-backup", speed=1 << 20)
        yield tmp_path


def test_a_job_that_waits_for_its_user_is_finalized_and_dismissed(program, tmp_path):
    with player.Daemon(program, tmp_path) as daemon:
        open_disks(daemon, tmp_path)
        start_job(daemon, "blockdev-backup", **{"auto-finalize": False, "auto-dismiss": False})
        wait_for_status("pending", tmp_path)
        assert "cannot accept command verb 'dismiss'" in tool.refused("dismiss", "job0", *SOCKET, cwd=tmp_path)
        tool.quick("finalize", "job0", *SOCKET, cwd=tmp_path)
        wait_for_status("concluded", tmp_path)
        assert "cannot accept command verb 'finalize'" in tool.refused("finalize", "job0", *SOCKET, cwd=tmp_path)
        tool.quick("dismiss", "job0", *SOCKET, cwd=tmp_path)
        assert tool.quick("jobs", *SOCKET, cwd=tmp_path).out == "no jobs\n"


def test_a_ready_mirror_of_a_real_server_is_completed(tmp_path):
    with player.Daemon(player.QEMU, tmp_path) as daemon:
        open_disks(daemon, tmp_path)
        start_job(daemon, "blockdev-mirror", **{"auto-dismiss": False})
        wait_for_status("ready", tmp_path)
        tool.quick("complete", "job0", *SOCKET, cwd=tmp_path)
        wait_for_status("concluded", tmp_path)


def test_a_job_is_listed_paused_sped_up_and_watched_to_its_end(busy):
    header, job = tool.blockjobs("jobs", *SOCKET, cwd=busy).out.splitlines()
    assert header.startswith("ID")
    assert job.split()[:3] == ["job0", "backup", "running"]
    assert "1 MiB/s" in job
    assert tool.quick("pause", "job0", *SOCKET, cwd=busy).out.startswith("job0: ")
    assert "currently paused" in tool.refused("cancel", "job0", *SOCKET, cwd=busy)
    assert "'job0'" in tool.refused("pause", "job0", *SOCKET, cwd=busy)
    found = tool.quick("jobs", "--json", *SOCKET, cwd=busy).json
    assert (found[0]["status"], found[0]["block-job"]["paused"]) == ("paused", True)
    tool.quick("resume", "job0", *SOCKET, cwd=busy)
    assert tool.quick("speed", "job0", "4M", "--json", *SOCKET, cwd=busy).json["block-job"]["speed"] == 4 << 20
    *progress, outcome = tool.quick("watch", "--json", *SOCKET, cwd=busy).json_lines
    assert progress[0]["id"] == "job0"
    assert (outcome["fate"], outcome["error"], outcome["current"]) == ("completed", None, outcome["total"])
    assert tool.quick("jobs", *SOCKET, cwd=busy).out == "no jobs\n"
    assert tool.quick("watch", *SOCKET, cwd=busy).out == "no jobs\n"


def test_a_cancelled_job_is_a_failure_to_whoever_waits_for_it(busy):
    assert "state 'running' cannot accept command verb 'complete'" in tool.refused(
        "complete", "job0", *SOCKET, cwd=busy
    )
    error = tool.refused("dismiss", "nobody", *SOCKET, cwd=busy)
    assert error == "blockjobs: job 'nobody': Job not found: the server has only 'job0'\n"
    assert "There is no job 'nobody'" in tool.refused("watch", "nobody", *SOCKET, cwd=busy)
    tool.quick("pause", "job0", *SOCKET, cwd=busy)
    tool.quick("cancel", "job0", "--force", *SOCKET, cwd=busy)
    assert tool.quick("jobs", *SOCKET, cwd=busy).out == "no jobs\n"


def test_watch_reports_failures_and_can_be_left(busy):
    watching = tool.start("watch", "job0", "--json", *SOCKET, cwd=busy)
    assert watching.stdout is not None
    assert json.loads(watching.stdout.readline())["id"] == "job0"
    watching.send_signal(signal.SIGINT)
    watching.communicate(timeout=10)
    assert watching.returncode == 130
    assert "job0" in tool.quick("jobs", *SOCKET, cwd=busy).out


def test_images_are_served_to_people(tmp_path):
    for name in ("disk.qcow2", "copy.qcow2"):
        disks.make_full(tmp_path, name)
    server = tool.start("serve", "disk.qcow2", "copy.qcow2", "--qmp", "s.sock", cwd=tmp_path)
    try:
        tool.wait_for(tmp_path / "s.sock", server)
        assert (tmp_path / "s.sock").stat().st_mode & 0o777 == 0o600
        qmp = player.QmpSocket(tmp_path / "s.sock")
        qmp.negotiate()
        nodes = qmp.ask({"execute": "query-named-block-nodes"})[0]["return"]
        assert {"disk", "copy"} <= {node["node-name"] for node in nodes}
        job = {"job-id": "job0", "device": "disk", "target": "copy", "sync": "full", "speed": 1 << 20}
        assert qmp.ask({"execute": "blockdev-backup", "arguments": job})[0] == {"return": {}}
        watching = tool.start("watch", "--connect", "s.sock", cwd=tmp_path)
        assert watching.stderr is not None
        assert watching.stderr.readline().startswith("job0: ")
        assert tool.quick("jobs", "--connect", "s.sock", cwd=tmp_path).out.count("job0") == 1
        qmp.close()
    finally:
        server.send_signal(signal.SIGTERM)
        out, err = server.communicate(timeout=10)
    assert server.returncode == 0, err
    assert "node 'disk': disk.qcow2 (qcow2, 16 MiB)" in out
    assert "blockjobs watch --connect s.sock" in out
    watching.communicate(timeout=10)
    assert watching.returncode == 1
    assert not (tmp_path / "s.sock").exists()
    assert disks.check_exit_code(tmp_path / "copy.qcow2") == 0


def test_serving_fails_with_a_reason(tmp_path):
    disks.make(tmp_path, "a.qcow2")
    assert "'b.qcow2'" in tool.refused("serve", "a.qcow2", "b.qcow2", "--qmp", "s.sock", cwd=tmp_path)
    assert "no/s.sock" in tool.refused("serve", "a.qcow2", "--qmp", "no/s.sock", cwd=tmp_path)
    assert not (tmp_path / "s.sock").exists()
