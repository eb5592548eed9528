"""`blockjobs backup` as a process: right copies, clean ends, and nothing that only looks complete."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import resource
import signal
import subprocess
import time

import disks
import pytest
import tool

pytestmark = pytest.mark.qemu


def names(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize(
    ("source", "target", "words"),
    [
        ("raw", "t.qcow2", []),
        ("qcow2", "t.raw", ["--speed", "1G"]),
        ("qcow2", "t.qcow2", ["-o", "cluster_size=4K", "--json"]),
        ("qcow2", "t", ["-O", "qcow2", "--compress", "zlib", "--level", "fast"]),
        ("raw", "t.qcow2", ["--compress", "zstd", "--level", "best"]),
    ],
)
def test_copies_are_exact_and_sound(tmp_path, source, target, words):
    disks.make_full(tmp_path, "s", fmt=source).chmod(0o600)
    before = disks.digest(tmp_path / "s")
    done = tool.blockjobs("backup", "s", target, "-f", source, *words, cwd=tmp_path)
    fmt = "raw" if target.endswith("raw") else "qcow2"
    assert disks.same_content(tmp_path, "s", source, target, fmt)
    assert disks.digest(tmp_path / "s") == before
    assert names(tmp_path) == ["s", target]
    assert (tmp_path / target).stat().st_mode & 0o777 == 0o600
    if fmt == "qcow2":
        assert disks.check_exit_code(tmp_path / target) == 0
    else:
        assert (tmp_path / target).stat().st_blocks * 512 < 12 * disks.MIB, "it is not sparse"
    if "--compress" in words:
        assert disks.compressed_clusters(tmp_path / target) > 0
        info = json.loads(disks.run("qemu-img", "info", "--output=json", target, cwd=tmp_path))
        assert info["format-specific"]["data"]["compression-type"] == words[words.index("--compress") + 1]
    if "--json" in words:
        *_, outcome = done.json_lines
        assert outcome["event"] == "outcome"
        assert (outcome["fate"], outcome["error"], outcome["current"]) == ("completed", None, outcome["total"])
        assert done.err == ""
    else:
        assert "done, 16 MiB" in done.err
        assert done.out == ""


def test_a_chain_is_copied_whole_or_by_its_top(tmp_path):
    disks.make_full(tmp_path, "base.qcow2")
    disks.run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2", cwd=tmp_path)
    disks.run("qemu-io", "-c", "write -P 9 1M 100k", "-c", "write -z 4M 1M", "top.qcow2", cwd=tmp_path)
    tool.quick("backup", "top.qcow2", "full.qcow2", cwd=tmp_path)
    tool.quick("backup", "top.qcow2", "only.qcow2", "--sync", "top", cwd=tmp_path)
    for copy in ("full.qcow2", "only.qcow2"):
        assert disks.same_content(tmp_path, "top.qcow2", "qcow2", copy, "qcow2")
        assert disks.check_exit_code(tmp_path / copy) == 0
    info = json.loads(disks.run("qemu-img", "info", "--output=json", "only.qcow2", cwd=tmp_path))
    assert (info["backing-filename"], info["backing-filename-format"]) == ("base.qcow2", "qcow2")
    assert (tmp_path / "only.qcow2").stat().st_blocks < (tmp_path / "full.qcow2").stat().st_blocks / 4
    refusal = tool.refused("backup", "top.qcow2", "t.raw", "--sync", "top", cwd=tmp_path)
    assert "--sync top needs a qcow2 target" in refusal


def test_what_would_destroy_something_is_refused(tmp_path):
    disks.make_full(tmp_path, "base.qcow2", mib=4)
    disks.run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2", cwd=tmp_path)
    (tmp_path / "soft.qcow2").symlink_to("top.qcow2")
    os.link(tmp_path / "top.qcow2", tmp_path / "hard.qcow2")
    digests = {name: disks.digest(tmp_path / name) for name in names(tmp_path)}
    assert "'base.qcow2' exists" in tool.refused("backup", "top.qcow2", "base.qcow2", cwd=tmp_path)
    for target in ("top.qcow2", "soft.qcow2", "hard.qcow2", "base.qcow2"):
        error = tool.refused("backup", "top.qcow2", target, "--force", cwd=tmp_path)
        assert f"'{target}' is the source itself, or a file that it is based on" in error
    assert "needs a qcow2 target" in tool.refused("backup", "top.qcow2", "t.raw", "--compress", "zstd", cwd=tmp_path)
    assert digests == {name: disks.digest(tmp_path / name) for name in names(tmp_path)}


def start_slow(directory, *words):
    """A backup that would take ten seconds, seen to be under way."""
    process = tool.start("backup", "s.qcow2", "t.qcow2", "--speed", "1M", "--json", *words, cwd=directory)
    assert process.stdout is not None
    while json.loads(process.stdout.readline())["current"] == 0:
        pass
    return process


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=lambda value: getattr(value, "name", None)
)
def test_a_signal_cancels_and_leaves_nothing(tmp_path, number, code):
    disks.make_full(tmp_path, "s.qcow2")
    process = start_slow(tmp_path)
    assert names(tmp_path) == ["s.qcow2", "t.qcow2.partial"]
    process.send_signal(number)
    out, err = process.communicate(timeout=10)
    assert process.returncode == code, err
    assert json.loads(out.splitlines()[-1])["fate"] == "cancelled"
    assert err == ""
    assert names(tmp_path) == ["s.qcow2"]


def test_on_a_terminal_there_is_a_bar_and_ctrl_c_works(tmp_path):
    disks.make_full(tmp_path, "s.qcow2")
    words = [*tool.WORDS, "backup", "s.qcow2", "t.qcow2", "--speed", "1M"]
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.execve(words[0], words, tool.environment())
    shown = b""
    while b"ETA 0:" not in shown:
        shown += os.read(terminal, 4096)
    os.write(terminal, b"\x03")
    with contextlib.suppress(OSError):  # EIO: nobody has the other end open any more
        while received := os.read(terminal, 4096):
            shown += received
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
    assert b"blockjobs: cancelled, 't.qcow2' was not made" in shown
    assert names(tmp_path) == ["s.qcow2"]


def test_keep_partial_keeps_a_sound_partial_image(tmp_path):
    disks.make_full(tmp_path, "s.qcow2")
    process = start_slow(tmp_path, "--keep-partial")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 130
    assert "t.qcow2.partial" in err
    assert names(tmp_path) == ["s.qcow2", "t.qcow2.partial"]
    (tmp_path / "t.qcow2.partial").rename(tmp_path / "kept")
    assert disks.check_exit_code(tmp_path / "kept") == 0


def test_killed_it_leaves_a_partial_file_that_the_next_run_replaces(tmp_path):
    disks.make_full(tmp_path, "s.qcow2")
    process = start_slow(tmp_path)
    error = tool.refused("backup", "s.qcow2", "t.qcow2", cwd=tmp_path)
    assert "t.qcow2.partial' cannot be replaced, another program may be using it" in error
    process.kill()
    process.communicate()
    assert names(tmp_path) == ["s.qcow2", "t.qcow2.partial"]
    tool.quick("backup", "s.qcow2", "t.qcow2", cwd=tmp_path)
    assert names(tmp_path) == ["s.qcow2", "t.qcow2"]
    assert disks.same_content(tmp_path, "s.qcow2", "qcow2", "t.qcow2", "qcow2")


def test_force_keeps_the_old_image_until_the_new_one_is_complete(tmp_path):
    disks.make_full(tmp_path, "s.qcow2")
    before = disks.digest(disks.make(tmp_path, "t.qcow2", size="1M"))
    process = start_slow(tmp_path, "--force")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert disks.digest(tmp_path / "t.qcow2") == before
    tool.quick("backup", "s.qcow2", "t.qcow2", "--force", cwd=tmp_path)
    assert disks.same_content(tmp_path, "s.qcow2", "qcow2", "t.qcow2", "qcow2")


def test_the_speed_limit_holds(tmp_path):
    disks.make_full(tmp_path, "s.qcow2")
    began_s = time.monotonic()
    tool.quick("backup", "s.qcow2", "t.raw", "--speed", "4M", cwd=tmp_path)
    assert time.monotonic() - began_s > 1.5, "8 MiB of data at 4 MiB/s"


def limit_file_size():
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 * disks.MIB, 4 * disks.MIB))


def test_a_target_without_room_fails_or_waits(tmp_path):
    disks.make_full(tmp_path, "s.qcow2")
    words = [*tool.WORDS, "backup", "s.qcow2", "t.qcow2"]
    done = subprocess.run(
        words,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=limit_file_size,
        timeout=20,
        env=tool.environment(),
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("blockjobs: backup of 's.qcow2' failed:")
    assert "t.qcow2" in last
    assert "File too large" in last
    assert names(tmp_path) == ["s.qcow2"]
    words += ["--on-target-error", "stop"]
    with subprocess.Popen(
        words, cwd=tmp_path, stderr=subprocess.PIPE, text=True, preexec_fn=limit_file_size, env=tool.environment()
    ) as process:
        assert process.stderr is not None
        while "kill -CONT" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGCONT)
        while "kill -CONT" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=10)
    assert process.returncode == 130
    assert names(tmp_path) == ["s.qcow2"]


def test_a_source_that_cannot_be_read_is_named(tmp_path):
    image = disks.make_full(tmp_path, "s.qcow2", mib=4)
    content = bytearray(image.read_bytes())
    l1_at = int.from_bytes(content[40:48], "big")
    content[l1_at : l1_at + 8] = ((1 << 63) + 0x7FFF0001).to_bytes(8, "big")
    image.write_bytes(content)
    done = tool.blockjobs("backup", "s.qcow2", "t.qcow2", cwd=tmp_path, code=1)
    assert done.err.splitlines()[-1].startswith("blockjobs: backup of 's.qcow2' failed: 's.qcow2': ")
    assert names(tmp_path) == ["s.qcow2"]
