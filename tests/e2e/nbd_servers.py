"""NBD servers of the real world for the end-to-end tests: qemu-nbd as a process that can be killed and stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from pathlib import Path

START_S_MAX = 15.0


class QemuNbd:
    """`with QemuNbd(directory, "disk.raw") as server:` one image as an export named `disk` on a unix socket."""

    def __init__(self, directory: Path, image: str, *, fmt: str = "raw", words: tuple[str, ...] = ()) -> None:
        self.directory = directory
        self.socket = directory / f"{image}.sock"
        self._words = [
            *("qemu-nbd", "--persistent", "--shared=8", "--discard=unmap", "--format", fmt),
            *("--socket", str(self.socket), "--export-name=disk", *words, image),
        ]
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        self.socket.unlink(missing_ok=True)
        self.process = subprocess.Popen(self._words, cwd=self.directory, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + START_S_MAX
        while not self.socket.exists():
            assert self.process.poll() is None and time.monotonic() < deadline, "qemu-nbd did not start"
            time.sleep(0.01)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def end(self) -> None:
        """Let it write what it has in memory."""
        assert self.process is not None
        self.process.terminate()
        assert self.process.wait(START_S_MAX) == 0
        self.process = None

    def stop(self) -> None:
        assert self.process is not None
        os.kill(self.process.pid, signal.SIGSTOP)

    def options(self, name: str, **more: object) -> dict[str, object]:
        """Arguments of blockdev-add; `more` in Python's spelling."""
        named = {member.replace("_", "-"): value for member, value in more.items()}
        server = {"type": "unix", "path": str(self.socket)}
        return {"driver": "nbd", "node-name": name, "server": server, "export": "disk", **named}
