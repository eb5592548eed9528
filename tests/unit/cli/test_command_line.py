"""Mistakes on the command line: one line that says what to do, never a traceback, and the right exit code."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from blockjobs.cli.main import main


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["create"], "FILE is missing (see blockjobs create --help)"),
        (["create", "a.qcow2"], "SIZE is missing"),
        (["create", "a.qcow2", "10X"], "SIZE: '10X' is not a size"),
        (["create", "a.qcow2", "--", "-5"], "SIZE: '-5' is not a size"),
        (["create", "a.qcow2", "1G", "extra"], "'extra' is one argument too many"),
        (["create", "a.qcow2", "1G", "--nope"], "unknown option '--nope'"),
        (["create", "a.qcow2", "1G", "-f"], "-f needs a value"),
        (["create", "a.qcow2", "1G", "-f", "vmdk"], '-f. Choose from: "qcow2", "raw"'),
        (["create", "a.qcow2", "1G", "-o", "cluster=1"], "have no option 'cluster'"),
        (["create", "a.raw", "1G", "-b", "b", "-F", "raw"], "raw images cannot have a backing file"),
        (["create", "a.qcow2", "1G", "-b", "b.qcow2"], "add -F qcow2 or -F raw"),
        (["create", "no/such/folder/a.qcow2", "1G"], "there is no folder"),
        (["backup", "missing.qcow2", "b.qcow2"], "Could not open 'missing.qcow2': No such file or directory"),
        (["backup", "missing.qcow2"], "TARGET is missing"),
        (["backup", "a", "b", "--speed", "fast"], "--speed: 'fast' is not a size"),
        (["info"], "FILE is missing"),
        (["nonsense"], "there is no command 'nonsense'"),
        (["serve", "--qmp", "x"], "IMAGES is missing"),
        (["jobs"], "--connect is missing: name a QMP socket"),
        (["jobs", "--connect", "missing.sock"], "Could not connect to 'missing.sock': No such file or directory"),
        (["pause", "--connect", "missing.sock"], "JOB is missing"),
        (["jobs", "--connect", "localhost:port"], "'localhost:port' is neither the path of a socket nor host:port"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], text: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BLOCKJOBS_CONNECT", raising=False)
    assert main(words) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("blockjobs: ")
    assert shown.err.count("\n") == 1
    assert text in shown.err
    assert not list(tmp_path.iterdir()), "nothing is left behind"


@pytest.mark.parametrize("command", ["info", "map", "check"])
@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("b.img", b"QFI\xfb" + bytes(600), "-f raw or -f qcow2"),
        ("c.qcow2", b"hello", "if it is raw, say so"),
        ("none", None, "'none': No such file"),
    ],
)
def test_images_that_are_none(command, name, content, text, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert main([command, name]) == 1
    assert text in capsys.readouterr().err


@pytest.mark.parametrize("words", [["compare"], ["compare", "a", "b"], ["compare", "--nope"]])
def test_compare_never_says_different_when_it_could_not_compare(words, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_help_names_every_command(capsys) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    images = ("backup", "bitmap", "check", "compare", "create", "info", "map")
    live = ("commit", "mirror", "nbd", "serve", "stream")
    jobs = ("cancel", "complete", "dismiss", "finalize", "jobs", "pause", "resume", "speed", "watch")
    for command in (*images, *live, *jobs):
        assert f" {command} " in shown
        assert main([command, "--help"]) == 0


def test_help_loads_nothing_heavy() -> None:
    script = (
        "import sys; from blockjobs.cli.main import main; main(['--help']); "
        "sys.exit(' '.join(name for name in ('blockjobs.host', 'msgspec', 'bitarray', 'isal', 'uvloop', 'asyncio') "
        "if name in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_host_loads_no_library_for_certificates() -> None:
    script = "import sys, blockjobs.host; sys.exit('cryptography' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_a_bug_is_one_line_too(monkeypatch, capsys) -> None:
    monkeypatch.setattr("blockjobs.cli.look.info", lambda *args, **more: 1 / 0)
    monkeypatch.delenv("BLOCKJOBS_TRACEBACK", raising=False)
    assert main(["info", "x"]) == 1
    shown = capsys.readouterr().err
    assert "ZeroDivisionError" in shown
    assert shown.count("\n") == 1
    monkeypatch.setenv("BLOCKJOBS_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        main(["info", "x"])


def test_all_output_is_out_before_the_process_ends(tmp_path: Path) -> None:
    image, command = str(tmp_path / "a.qcow2"), [sys.executable, "-m", "blockjobs"]
    assert subprocess.run([*command, "create", image, "1M", "-q"], check=False).returncode == 0
    done = subprocess.run([*command, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "Show progress until a job" in done.stdout and done.stdout.endswith("╯\n")
    done = subprocess.run([*command, "info", "--json", image], capture_output=True, text=True, check=False)
    assert json.loads(done.stdout)["virtual-size"] == 1 << 20
    done = subprocess.run([*command, "info", str(tmp_path / "none")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1


def test_a_full_disk_under_the_output_is_one_line(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "blockjobs", "--help"], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert done.returncode == 1
    assert done.stderr.decode() == "blockjobs: No space left on device\n"


def test_a_server_that_says_nothing(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("blockjobs.cli.remote.CONNECT_S_MAX", 0.1)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind("s.sock")
        silent.listen()
        assert main(["jobs", "--connect", "s.sock"]) == 1
    assert "does not answer" in capsys.readouterr().err
