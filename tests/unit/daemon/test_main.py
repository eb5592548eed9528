"""The daemon as a process: what it prints and how it exits, beside what the end-to-end tests cover."""

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from blockjobs import __version__

DAEMON = [sys.executable, "-m", "blockjobs.daemon"]
STDIO = ["--chardev", "stdio,id=s", "--monitor", "s"]
QUIT = b'{"execute":"qmp_capabilities"}{"execute":"quit"}'


def start(*words: str, given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*DAEMON, *words], input=given, capture_output=True, timeout=30, check=False)


def test_standard_output_may_be_a_file(tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as out:
        done = subprocess.run([*DAEMON, *STDIO], input=QUIT, stdout=out, timeout=30, check=False)
    greeting, *replies = map(json.loads, (tmp_path / "out").read_bytes().splitlines())
    assert done.returncode == 0
    assert greeting["QMP"]["version"]["package"] == f"blockjobs {__version__}"
    assert replies == [{"return": {}}, {"return": {}}]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--chardev", "foo,id=c"], "--chardev foo,id=c: 'foo' is not a valid char driver name"),
        (["--chardev", "stdio"], "--chardev stdio: chardev: no id specified"),
        (
            ["--chardev", "stdio,id=a", "--chardev", "stdio,id=b"],
            "--chardev stdio,id=b: cannot use stdio by multiple character devices",
        ),
        (
            ["--chardev", "socket,id=c,path=no/x,server=on"],
            "--chardev socket,id=c,path=no/x,server=on: Failed to bind socket to no/x: No such file or directory",
        ),
        (
            ["--chardev", "socket,id=c,path=no"],
            "--chardev socket,id=c,path=no: Failed to connect to 'no': No such file or directory",
        ),
        (["--monitor", "chardev=zz"], '--monitor chardev=zz: chardev "zz" not found'),
        (["--pidfile", "no/p"], "cannot create PID file: Could not create 'no/p': No such file or directory"),
        (["--blockdev", "driver=qcow2"], "--blockdev driver=qcow2: Parameter 'file' is missing"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_1(words: list[str], text: str) -> None:
    done = start(*words)
    assert done.stderr.decode() == f"blockjobs-storage-daemon: {text}\n"
    assert done.returncode == 1


def test_help_and_version_are_answered_before_anything_else() -> None:
    assert start("--blockdev", "nonsense", "--version").stdout.startswith(b"blockjobs-storage-daemon version ")
    assert start("--help").stdout.startswith(b"Usage: blockjobs-storage-daemon")


def talk(connection: socket.socket) -> list[Any]:
    """Negotiate and quit; returns what the daemon said."""
    with connection, connection.makefile("rb") as lines:
        connection.settimeout(30)
        greeting = json.loads(lines.readline())
        connection.sendall(QUIT)
        return [next(iter(greeting)), *map(json.loads, lines)]


def test_a_monitor_on_tcp(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as finder:
        port = finder.getsockname()[1]
    chardev = f"socket,id=c,host=127.0.0.1,port={port},server=on,wait=off"
    pidfile = tmp_path / "pid"
    words = [*DAEMON, "--chardev", chardev, "--monitor", "c", "--pidfile", str(pidfile)]
    with subprocess.Popen(words) as daemon:
        while not pidfile.exists():
            assert daemon.poll() is None
        assert talk(socket.create_connection(("127.0.0.1", port))) == ["QMP", {"return": {}}, {"return": {}}]
        assert daemon.wait(timeout=30) == 0


def test_a_monitor_that_connects_out(tmp_path: Path) -> None:
    path = tmp_path / "client.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(30)
        words = [*DAEMON, "--chardev", f"socket,id=c,path={path}", "--monitor", "c"]
        with subprocess.Popen(words) as daemon:
            connection, _ = listener.accept()
            assert talk(connection) == ["QMP", {"return": {}}, {"return": {}}]
            assert daemon.wait(timeout=30) == 0
