"""Starts a storage daemon and drives its QMP socket."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import subprocess
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

START_S_MAX = 15.0
STOP_S_MAX = 10.0
MONITOR_WORDS = (
    *("--chardev", "socket,id=c,path=qmp.sock,server=on,wait=off"),
    *("--monitor", "chardev=c"),
    *("--pidfile", "daemon.pid"),
)


class Silence(Exception):
    """The daemon did not say what it should have, or hung up."""


@dataclass(frozen=True, slots=True)
class Program:
    """A storage daemon by name and the words that start it."""

    name: str
    words: tuple[str, ...]


class QmpSocket:
    """One QMP connection, spoken by hand so that nothing is added, dropped or reordered."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._buffer = b""
        self._lines: deque[bytes] = deque()

    def send(self, message: dict[str, Any]) -> None:
        """Send one request."""
        with contextlib.suppress(BrokenPipeError):  # a daemon that left is noticed when we listen
            self._socket.sendall(json.dumps(message).encode() + b"\n")

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

    def close(self) -> None:
        """Hang up."""
        self._socket.close()


def wait_until_started(process: subprocess.Popen[bytes], pidfile: Path) -> None:
    """Wait for the pidfile, the last thing a daemon does before it serves.

    The socket is there earlier, but a client that connects then can be greeted twice by QEMU and lose its negotiation.

    Raises:
        Silence: the daemon ended, or wrote no pidfile in time.
    """
    deadline = time.monotonic() + START_S_MAX
    while not (pidfile.exists() and pidfile.read_bytes().endswith(b"\n")):
        if process.poll() is not None or time.monotonic() > deadline:
            raise Silence(f"the daemon did not start: exit code {process.poll()}")
        time.sleep(0.003)


class Daemon:
    """A storage daemon running in a directory with one negotiated monitor; stopped and waited for on exit."""

    def __init__(self, program: Program, directory: Path) -> None:
        self._directory = directory
        with open(directory / "stderr.txt", "wb") as stderr:
            self.process = subprocess.Popen(
                [*program.words, *MONITOR_WORDS],
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
            )
        try:
            wait_until_started(self.process, directory / "daemon.pid")
            self.qmp = QmpSocket(directory / "qmp.sock")
        except (Silence, OSError) as error:
            self.process.kill()
            self.process.wait()
            raise Silence(f"{error}; stderr: {self.stderr}") from error
        greeting = self.qmp.hear(wait_s=START_S_MAX)
        assert greeting is not None and "QMP" in greeting, f"no greeting but {greeting}"
        reply, _ = self.qmp.ask({"execute": "qmp_capabilities"})
        assert reply == {"return": {}}, reply

    @property
    def stderr(self) -> str:
        """What the daemon printed so far."""
        return (self._directory / "stderr.txt").read_text(errors="replace")

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
