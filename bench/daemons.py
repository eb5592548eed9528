"""A storage daemon under measurement: ours or QEMU's, driven by the same blocking QMP dialogue."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from pairs import Took
from processes import ENVIRONMENT

OURS = (sys.executable, "-m", "blockjobs.daemon")
PEER = ("qemu-storage-daemon",)
NO_FLUSH = {"cache": {"no-flush": True}}
"""Options of a node whose flushes are dropped, as nobody asks for any where QEMU's jobs end."""
GREETINGS_MAX, GREETING_S_MAX, PATIENCE_S = 5, 5.0, 0.1
ANSWER_S_MAX = 180.0
"""Longer than any job here; a daemon that says nothing at all ends its suite, and not the whole run."""
_lasting: dict[tuple[str, ...], "Daemon"] = {}


def is_peer(program: tuple[str, ...]) -> bool:
    """Whether a command line starts QEMU's daemon, perhaps under something that counts."""
    return program[-1] == PEER[-1]


@contextlib.contextmanager
def lasting() -> Iterator[None]:
    """Ours and the peer's live on between the runs within, as storage daemons do: starts have a benchmark of their own.

    After one run of each, neither has anything left to load; `pairs.measure` does not count the first turn.
    """
    if _lasting:
        yield
        return
    try:
        with contextlib.ExitStack() as stack:
            for program in (OURS, PEER):
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="blockjobs-bench-"))
                _lasting[program] = stack.enter_context(Daemon(program, Path(folder)))
            yield
    finally:
        _lasting.clear()


@contextlib.contextmanager
def idle(program: tuple[str, ...], folder: Path) -> Iterator["Daemon"]:
    """A daemon without jobs and nodes, for one run: one that lasts, or else a new one.

    Args:
        program: its command line; one that does not last, as it counts or is traced, is started.
        folder: where a new one has its socket.
    """
    if (daemon := _lasting.get(program)) is None:
        with Daemon(program, folder) as daemon:
            yield daemon
        return
    yield daemon
    daemon.tidy()


def packet_of(commands: Iterable[tuple[str, dict[str, Any]]]) -> bytes:
    """Commands in one packet; underscores in argument names become dashes."""
    packet = ""
    for command, arguments in commands:
        named = {key.replace("_", "-"): each for key, each in arguments.items()}
        packet += json.dumps({"execute": command, "arguments": named})
    return packet.encode()


class Daemon:
    """One process with one monitor; use it as a context manager."""

    def __init__(self, program: tuple[str, ...], folder: Path, *, quiet: bool = False, at_once: bool = False) -> None:
        """See the class; `quiet` throws its warnings away, `at_once` connects as soon as its socket is there."""
        self.program, self._at_once = program, at_once
        self._path = folder / "bench-qmp.sock"
        self._path.unlink(missing_ok=True)
        chardev = f"socket,id=qmp,path={self._path},server=on,wait=off"
        stderr = subprocess.DEVNULL if quiet else None
        command = [*program, "--chardev", chardev, "--monitor", "chardev=qmp"]
        self._process = subprocess.Popen(command, cwd=folder, stderr=stderr, env=ENVIRONMENT)

    def __enter__(self) -> "Daemon":
        for _ in range(GREETINGS_MAX):
            self._connect()
            try:
                self._lines.readline()
                self.ask("qmp_capabilities")
                break
            except (TimeoutError, ConnectionError):
                # QEMU's may greet whoever comes at once twice, and forget what it was asked between, or hang up.
                self._lines.close()
                self._socket.close()
        else:
            self._process.kill()
            raise TimeoutError(f"no answer at {self._path}")
        self._socket.settimeout(ANSWER_S_MAX)
        self._settle()
        return self

    def _connect(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        while not self._at_once and not self._path.exists() and self._process.poll() is None:
            time.sleep(0.002)
        if not self._at_once:
            # QEMU's may greet a client that comes too early twice, and then lose some of what it says.
            time.sleep(PATIENCE_S)
        for _ in range(5000):
            try:
                self._socket.connect(str(self._path))
                break
            except (FileNotFoundError, ConnectionRefusedError):
                time.sleep(0.002)
        self._socket.settimeout(GREETING_S_MAX)
        self._lines = self._socket.makefile("rb", buffering=1 << 20)
        self._events: list[dict[str, Any]] = []
        self._opened: list[str] = []

    def _settle(self) -> None:
        """Wait until it rests: what it still loads belongs to its start, which has a benchmark of its own."""
        before_s = -1.0
        for _ in range(100):
            used_s = self.cpu_s()
            if used_s == before_s:
                return
            before_s = used_s
            time.sleep(0.05)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.ask("quit")
            self._process.wait(timeout=30)
        self._process.kill()
        self._lines.close()
        self._socket.close()

    def ask(self, command: str, **arguments: Any) -> Any:
        """Execute a command; underscores in argument names become dashes."""
        self.send(packet_of([(command, arguments)]))
        while True:
            answer = json.loads(self._lines.readline())
            if "event" in answer:
                self._events.append(answer)
            elif "error" in answer:
                raise RuntimeError(f"{command} of {self.program[-1]}: {answer['error']['desc']}")
            elif "QMP" not in answer:  # now and then QEMU's greets whoever comes at once twice
                return answer["return"]

    def send(self, packet: bytes) -> None:
        """Send commands in one packet; their answers are still to be read."""
        self._socket.sendall(packet)

    def exchange(self, command: str) -> None:
        """Execute a command without arguments; its answer is read, but not looked into."""
        self._socket.sendall(b'{"execute": "%s"}' % command.encode())
        while not self._lines.readline().startswith(b'{"return"'):
            pass

    def tidy(self) -> None:
        """Wait until the last job is gone, and drop all nodes, those above first."""
        while self.ask("query-jobs"):
            time.sleep(0.002)
        for name in reversed(self._opened):
            self.ask("blockdev-del", node_name=name)
        self._opened.clear()
        self.forget_events()

    def forget_events(self) -> None:
        """Drop the events that came and were not waited for."""
        self._events.clear()

    def wait(self, event: str) -> dict[str, Any]:
        """Wait for an event by name."""
        while True:
            for number, each in enumerate(self._events):
                if each["event"] == event:
                    del self._events[: number + 1]
                    return each["data"]
            self._events.append(json.loads(self._lines.readline()))

    def wait_for_lines(self, part: bytes, count: int = 1) -> None:
        """Wait for so many lines that have these bytes in them, and drop all up to the last; the client parses none."""
        while count > 0:
            line = self._lines.readline()
            if line.startswith(b'{"error"'):
                raise RuntimeError(line.decode())
            count -= part in line

    def open(self, node: str, driver: str, path: Path, **options: Any) -> None:
        """blockdev-add of a file in a format."""
        child = {"driver": "file", "filename": str(path)}
        self.ask("blockdev-add", driver=driver, node_name=node, file=child, **options)
        self._opened.append(node)

    def cpu_s(self) -> float:
        """Seconds that the process has used of all processors so far."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        user_ticks, system_ticks = fields[11:13]
        return (int(user_ticks) + int(system_ticks)) / os.sysconf("SC_CLK_TCK")

    def memory_kib(self, line: str = "VmRSS") -> int:
        """Resident memory in KiB: now, or the most so far (`VmHWM`)."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(status.partition(f"{line}:")[2].split()[0])

    def timed_job(
        self, command: str, *, until: str = "BLOCK_JOB_COMPLETED", completes: bool = False, **arguments: Any
    ) -> Took:
        """From the command to BLOCK_JOB_COMPLETED, or another event; a job that `completes` is told to when ready."""
        began_s, cpu_then_s = time.perf_counter(), self.cpu_s()
        self.ask(command, **arguments)
        if completes:
            self.ask("job-complete", id=self.wait("BLOCK_JOB_READY")["device"])
        outcome = self.wait(until)
        took_s = time.perf_counter() - began_s
        took = Took(took_s, self.cpu_s() - cpu_then_s, took_s)
        if "error" in outcome:
            raise RuntimeError(outcome["error"])
        return took
