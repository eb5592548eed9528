"""Starts a storage daemon and drives its QMP socket."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

START_S_MAX = 15.0
STOP_S_MAX = 10.0
STDERR = "stderr.txt"
CHARDEV_WORDS = (
    *("--chardev", "socket,id=c,path=qmp.sock,server=on,wait=off"),
    *("--pidfile", "daemon.pid"),
)
MONITOR_WORDS = (*CHARDEV_WORDS, "--monitor", "chardev=c")


class Silence(Exception):
    """The daemon did not say what it should have, or hung up."""


class GreetedTwice(Exception):
    """QEMU may greet a client again while it starts, and then has forgotten the negotiation."""


@dataclass(frozen=True, slots=True)
class Program:
    """A storage daemon by name and the words that start it."""

    name: str
    words: tuple[str, ...]
    monitor: tuple[str, ...] = ("--monitor", "chardev=c")


QEMU = Program("qemu-storage-daemon", ("qemu-storage-daemon",))
MACHINE = Program(
    "qemu-system-x86_64",
    ("qemu-system-x86_64", "-M", "none", "-nodefaults", "-display", "none", "-S"),
    ("-mon", "chardev=c,mode=control"),
)
"""A QEMU with a machine that has nothing: it knows the commands that only machines have."""
OURS = Program("blockjobs-storage-daemon", (sys.executable, "-m", "blockjobs.daemon"))

PROGRAMS = [QEMU, OURS]


class QmpSocket:
    """One QMP connection, spoken by hand so that nothing is added, dropped or reordered."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._connect(path)
        self._buffer = b""
        self._lines: deque[bytes] = deque()

    def _connect(self, path: Path) -> None:
        # Between a daemon's bind() and its listen() the socket is there and refuses. A machine's comes later still.
        deadline = time.monotonic() + START_S_MAX
        while True:
            try:
                self._socket.connect(str(path))
            except (ConnectionRefusedError, FileNotFoundError):
                if time.monotonic() > deadline:
                    self._socket.close()
                    raise
                time.sleep(0.005)
            else:
                return

    def send(self, message: dict[str, Any]) -> None:
        """Send one request."""
        self.send_bytes(json.dumps(message).encode() + b"\n")

    def send_bytes(self, content: bytes) -> None:
        """Send anything, a request or not."""
        with contextlib.suppress(BrokenPipeError):  # a daemon that left is noticed when we listen
            self._socket.sendall(content)

    def hear(self, *, wait_s: float) -> dict[str, Any] | None:
        """Return the next message, or None after `wait_s` seconds of silence.

        Raises:
            Silence: the daemon hung up.
        """
        deadline = time.monotonic() + wait_s
        while not self._lines:
            if not select.select([self._socket], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return None
            received = self._socket.recv(1 << 20)
            if not received:
                raise Silence("the daemon hung up")
            *complete, self._buffer = (self._buffer + received).split(b"\n")
            self._lines.extend(complete)
        message: dict[str, Any] = json.loads(self._lines.popleft())
        return message

    def ask(self, request: dict[str, Any], *, wait_s: float = 10.0) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Send a request; return its reply and the events that came before it."""
        self.send(request)
        events: list[dict[str, Any]] = []
        while (message := self.hear(wait_s=wait_s)) is not None:
            if "event" not in message:
                return message, events
            events.append(message)
        raise Silence(f"no reply to {request['execute']} within {wait_s} s")

    def negotiate(self) -> None:
        """Take the greeting and leave negotiation mode."""
        greeting = self.hear(wait_s=START_S_MAX)
        assert greeting is not None and "QMP" in greeting, f"no greeting but {greeting}"
        reply, _ = self.ask({"execute": "qmp_capabilities"})
        if "QMP" in reply:
            raise GreetedTwice(reply)
        assert reply == {"return": {}}, reply

    def close(self) -> None:
        """Hang up."""
        self._socket.close()


def launch(program: Program, directory: Path, *words: str) -> subprocess.Popen[bytes]:
    """Start a daemon in a directory, with a monitor on `qmp.sock`, and wait until it serves.

    It serves when it has written its pidfile, the last thing it does. The socket is there earlier, but a client that
    connects then can be greeted twice by QEMU and lose its negotiation.

    Args:
        program: the daemon to start.
        directory: its working directory; `daemon.pid` and STDERR are put there.
        words: further options, processed before the monitor's.

    Raises:
        Silence: the daemon ended, or wrote no pidfile in time.
    """
    with open(directory / STDERR, "wb") as stderr:
        process = subprocess.Popen(
            [*program.words, *words, *CHARDEV_WORDS, *program.monitor],
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=stderr,
            stderr=stderr,
        )
    pidfile, deadline = directory / "daemon.pid", time.monotonic() + START_S_MAX
    while not (pidfile.exists() and pidfile.read_bytes().endswith(b"\n")):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            said = (directory / STDERR).read_text(errors="replace")
            raise Silence(f"the daemon did not start: exit code {process.wait()}, stderr: {said}")
        time.sleep(0.003)
    return process


class Daemon:
    """A storage daemon running in a directory with one negotiated monitor; stopped and waited for on exit."""

    def __init__(self, program: Program, directory: Path, *words: str) -> None:
        self._directory = directory
        try:
            self._start(program, words)
        except (GreetedTwice, Silence, ConnectionError):
            # QEMU's now and then greets its first client twice, forgets what it was asked, or hangs up.
            if program is OURS:
                raise
            self._start(program, words)

    def _start(self, program: Program, words: tuple[str, ...]) -> None:
        (self._directory / "daemon.pid").unlink(missing_ok=True)
        self.process = launch(program, self._directory, *words)
        self.qmp = QmpSocket(self._directory / "qmp.sock")
        try:
            self.qmp.negotiate()
        except BaseException:
            self.qmp.close()
            self.process.kill()
            self.process.wait()
            raise

    @property
    def stderr(self) -> str:
        """What the daemon printed so far."""
        return (self._directory / STDERR).read_text(errors="replace")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.qmp.close()
        self.process.terminate()
        try:
            self.process.wait(STOP_S_MAX)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
