"""The daemon as a process: how it starts, serves several monitors and ends."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import disks
import player
import pytest

pytestmark = pytest.mark.qemu


def wait_ended(pid):
    def is_alive():
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except FileNotFoundError:
            return False

    deadline = time.monotonic() + 10
    while is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_alive(), f"process {pid} is still there"


def start_slow_backup(qmp, *, speed=1 << 20):
    for name in ("src", "dst"):
        node = {"driver": "qcow2", "node-name": name, "file": {"driver": "file", "filename": name}}
        assert qmp.ask({"execute": "blockdev-add", "arguments": node})[0] == {"return": {}}
    job = {"job-id": "job0", "device": "src", "target": "dst", "sync": "full", "speed": speed}
    assert qmp.ask({"execute": "blockdev-backup", "arguments": job})[0] == {"return": {}}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_it_cleanly(program, tmp_path, number):
    process = player.launch(program, tmp_path)
    assert (tmp_path / "qmp.sock").exists()
    process.send_signal(number)
    assert process.wait(10) == 0
    assert not (tmp_path / "qmp.sock").exists()
    assert not (tmp_path / "daemon.pid").exists()


def test_a_signal_during_a_backup_cancels_it_and_leaves_sound_images(program, tmp_path):
    source, target = disks.make_full(tmp_path, "src"), disks.make(tmp_path, "dst")
    before = disks.digest(source)
    with player.Daemon(program, tmp_path) as daemon:
        start_slow_backup(daemon.qmp)
        daemon.process.terminate()
        while (event := daemon.qmp.hear(wait_s=10)) is not None and event["event"] != "BLOCK_JOB_CANCELLED":
            pass
        assert event is not None
    assert daemon.process.returncode == 0
    assert disks.digest(source) == before
    assert disks.check_exit_code(target) == 0


def test_quit_replies_then_ends(program, tmp_path):
    with player.Daemon(program, tmp_path) as daemon:
        assert daemon.qmp.ask({"execute": "quit", "id": 1})[0] == {"return": {}, "id": 1}
        assert daemon.process.wait(10) == 0
    assert not (tmp_path / "qmp.sock").exists()


def test_who_is_asked_to_stop_again_and_again_ends_cleanly(program, tmp_path):
    process = player.launch(program, tmp_path)
    while process.poll() is None:
        process.terminate()
        time.sleep(0.0002)
    assert process.returncode == 0


def test_the_pidfile_names_the_process(program, tmp_path):
    process = player.launch(program, tmp_path)
    assert int((tmp_path / "daemon.pid").read_text()) == process.pid
    process.terminate()
    assert process.wait(10) == 0


def test_daemonize_returns_when_it_serves(program, tmp_path):
    words = [*program.words, "--daemonize", *player.MONITOR_WORDS]
    started = subprocess.run(words, cwd=tmp_path, capture_output=True, timeout=20, check=False)
    assert started.returncode == 0, started.stderr
    pid = int((tmp_path / "daemon.pid").read_text())
    assert os.getsid(pid) != os.getsid(0), "it stayed in our session"
    qmp = player.QmpSocket(tmp_path / "qmp.sock")
    qmp.negotiate()
    assert qmp.ask({"execute": "quit"})[0] == {"return": {}}
    qmp.close()
    wait_ended(pid)
    assert not (tmp_path / "daemon.pid").exists()


def test_daemonize_that_fails_says_so(program, tmp_path):
    words = [*program.words, "--daemonize", "--blockdev", "driver=file,node-name=f,filename=missing"]
    started = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=20, check=False)
    assert started.returncode == 1
    assert "Could not open 'missing': No such file or directory" in started.stderr


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--blockdev", "driver=file,node-name=f,filename=missing"], "'missing': No such file or directory"),
        (["--blockdev", "driver=nonsense,node-name=f"], "nonsense"),
        (["--blockdev", "driver=raw,node-name=r,file=later"], "later"),
        (["--monitor", "chardev=nobody"], "nobody"),
        (["--object", "nonsense,id=o"], "nonsense"),
        (["--nonsense"], "nonsense"),
    ],
)
def test_a_wrong_option_is_one_clear_error(program, tmp_path, words, complaint):
    done = subprocess.run(
        [*program.words, *words], cwd=tmp_path, capture_output=True, text=True, timeout=20, check=False
    )
    assert done.returncode == 1
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr


def test_options_build_the_graph_in_order(program, tmp_path):
    disks.make_full(tmp_path, "src")
    words = [
        *("--object", "throttle-group,id=g,limits.bps-total=1048576"),
        *("--blockdev", "driver=file,node-name=f,filename=src"),
        *("--blockdev", '{"driver": "qcow2", "node-name": "q", "file": "f"}'),
        *("--blockdev", "throttle,node-name=t,throttle-group=g,file=q"),
    ]
    with player.Daemon(program, tmp_path, *words) as daemon:
        reply, _ = daemon.qmp.ask({"execute": "query-named-block-nodes"})
        assert [(node["node-name"], node["drv"]) for node in reply["return"]] == [
            ("t", "throttle"),
            ("q", "qcow2"),
            ("f", "file"),
        ]


def test_two_monitors_share_the_jobs(program, tmp_path):
    disks.make_full(tmp_path, "src")
    disks.make(tmp_path, "dst")
    second = ["--chardev", "socket,id=d,path=second.sock,server=on,wait=off", "--monitor", "chardev=d"]
    with player.Daemon(program, tmp_path, *second) as daemon:
        other = player.QmpSocket(tmp_path / "second.sock")
        other.negotiate()
        start_slow_backup(daemon.qmp)
        reply, seen = other.ask({"execute": "job-pause", "arguments": {"id": "job0"}, "id": "mine"})
        assert reply == {"return": {}, "id": "mine"}
        assert [event["data"]["status"] for event in seen][:2] == ["created", "running"]
        while "paused" not in [event["data"].get("status") for event in seen[4:]]:
            event = other.hear(wait_s=10)
            assert event is not None
            seen.append(event)
        assert daemon.qmp.ask({"execute": "query-jobs"})[0]["return"][0]["status"] == "paused"
        other.close()
        reply, events = daemon.qmp.ask({"execute": "job-cancel", "arguments": {"id": "job0"}})
        assert reply == {"return": {}}
        while not any(event["event"] == "BLOCK_JOB_CANCELLED" for event in events):
            event = daemon.qmp.hear(wait_s=10)
            assert event is not None
            events.append(event)


def test_a_client_that_comes_back_negotiates_again(program, tmp_path):
    with player.Daemon(program, tmp_path) as daemon:
        daemon.qmp.close()
        again = player.QmpSocket(tmp_path / "qmp.sock")
        assert "QMP" in (again.hear(wait_s=10) or {})
        reply, _ = again.ask({"execute": "query-jobs"})
        assert reply["error"]["class"] == "CommandNotFound"
        assert again.ask({"execute": "qmp_capabilities"})[0] == {"return": {}}
        assert again.ask({"execute": "query-jobs"})[0] == {"return": []}
        again.close()


def test_killed_during_a_backup(program, tmp_path):
    source = disks.make_full(tmp_path, "src")
    before = disks.digest(source)
    for moment_s in (0.05, 0.2, 0.45):
        target = disks.make(tmp_path, "dst")
        process = player.launch(program, tmp_path)
        qmp = player.QmpSocket(tmp_path / "qmp.sock")
        qmp.negotiate()
        start_slow_backup(qmp, speed=8 << 20)
        time.sleep(moment_s)
        process.kill()
        assert process.wait(10) == -signal.SIGKILL
        qmp.close()
        assert disks.digest(source) == before
        assert disks.check_exit_code(target) in (0, disks.CHECK_LEAKS_ONLY)
        for left_behind in ("qmp.sock", "daemon.pid"):
            (tmp_path / left_behind).unlink()
