"""A QEMU that does not do as it should, played by a few lines: snapshots end with an error, and soon."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from blockjobs.base.buffers import Buffer
from blockjobs.base.clock import SystemClock
from blockjobs.base.errors import UsageError
from blockjobs.monitor import qemu_machine
from blockjobs.monitor.qemu_machine import QemuMachine

MEMORY = {"base-memory": 1 << 20, "plugged-memory": 0}


class Qemu:
    """Answers QMP. What is not in `answers` gets `{}`, what is there as None gets no answer at all."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {
            "query-status": {"status": "paused"},
            "query-memory-size-summary": MEMORY,
            "query-migrate": {"status": "active"},
        }
        self.asked: list[str] = []
        self.sends: Callable[[asyncio.StreamWriter], Awaitable[None]] | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'{"QMP": {"version": {}, "capabilities": []}}\n')
        with suppress(ConnectionError):
            while line := await reader.readline():
                request = json.loads(line)
                name = request["execute"]
                self.asked.append(name)
                if name == "migrate" and self.sends is not None:
                    self._tasks.append(asyncio.create_task(self._send(request["arguments"]["uri"])))
                answer = self.answers.get(name, {})
                if answer is not None:
                    writer.write(json.dumps({"return": answer, "id": request["id"]}).encode() + b"\n")
        writer.close()

    async def _send(self, uri: str) -> None:
        assert self.sends is not None
        _, writer = await asyncio.open_unix_connection(uri.removeprefix("unix:"))
        try:
            with suppress(ConnectionError):
                await self.sends(writer)
        finally:
            writer.close()

    async def end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.sleep(0.01)  # for what was closed to be gone


class Sink:
    def __init__(self) -> None:
        self.length = 0

    async def write(self, content: Buffer) -> None:
        self.length += memoryview(content).nbytes


def refused(folder: Path, qemu: Qemu, step: Callable[[QemuMachine], Awaitable[object]]) -> str:
    """The error of a step with the machine."""

    async def run() -> str:
        path = str(folder / "g")
        server = await asyncio.start_unix_server(qemu.serve, path)
        try:
            with pytest.raises(UsageError) as caught:
                await asyncio.wait_for(step(QemuMachine(path, "true", SystemClock())), 10)
        finally:
            server.close()
            await qemu.end()
        return str(caught.value)

    return asyncio.run(run())


async def a_state(writer: asyncio.StreamWriter) -> None:
    writer.write(b"QEVM")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu_machine, "STALL_S_MAX", 0.2)
    monkeypatch.setattr(qemu_machine, "CONNECT_S_MAX", 0.2)


def test_one_that_freezes_while_it_sends(tmp_path: Path) -> None:
    qemu = Qemu()

    async def some(writer: asyncio.StreamWriter) -> None:
        writer.write(b"QEVM")
        qemu.answers["migrate_cancel"] = None
        await asyncio.sleep(3)

    qemu.sends = some
    assert "does not move its state any more" in refused(tmp_path, qemu, lambda machine: machine.save(Sink()))
    assert qemu.asked[-1] == "migrate_cancel"


@pytest.mark.parametrize("name", ["query-memory-size-summary", "migrate", "query-migrate"])
def test_one_that_does_not_answer(tmp_path: Path, name: str) -> None:
    qemu = Qemu()
    qemu.sends = a_state
    qemu.answers[name] = None
    assert "does not answer any more" in refused(tmp_path, qemu, lambda machine: machine.save(Sink()))


def test_one_that_never_says_that_it_is_through(tmp_path: Path) -> None:
    qemu = Qemu()
    qemu.sends = a_state
    assert "does not move its state any more" in refused(tmp_path, qemu, lambda machine: machine.save(Sink()))


def test_one_that_cannot_come_to_our_socket_says_why(tmp_path: Path) -> None:
    qemu = Qemu()
    qemu.answers["query-migrate"] = {"status": "failed", "error-desc": "Permission denied"}
    error = refused(tmp_path, qemu, lambda machine: machine.save(Sink()))
    assert "did not move its state: Permission denied" in error


def test_one_that_never_comes_to_our_socket(tmp_path: Path) -> None:
    qemu = Qemu()
    assert "sends no state" in refused(tmp_path, qemu, lambda machine: machine.save(Sink()))
    assert qemu.asked[-1] == "migrate_cancel"


def test_one_that_sends_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu_machine, "DEVICES_BYTES_MAX", 1 << 20)
    qemu, sink = Qemu(), Sink()

    async def endless(writer: asyncio.StreamWriter) -> None:
        while True:
            writer.write(bytes(1 << 16))
            await writer.drain()

    qemu.sends = endless
    assert "is longer than 3145728 bytes" in refused(tmp_path, qemu, lambda machine: machine.save(sink))
    assert sink.length <= 3 << 20


def test_one_that_does_not_end(tmp_path: Path) -> None:
    assert "does not end" in refused(tmp_path, Qemu(), lambda machine: machine.disks_change())
