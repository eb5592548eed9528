"""A guest that writes to an NBD export from its own threads, believes in flushes, and remembers both.

Every sector it writes says which write put it there, so whatever a disk shows after a crash can be judged: a sector
holds what was durable before the last acknowledged flush began, or something issued later; nothing else.
"""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from blockjobs.wire import nbd_options as options
from blockjobs.wire.nbd import Command, HandshakeFlag, Option, OptionReplyType
from blockjobs.wire.nbd_requests import Request, encode_request

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SECTOR = 512
BLOCK = 4096
STAMP = struct.Struct(">QQ")
MARK = 0x626C6F636B6A6F62


class Gone(Exception):
    """The server hung up."""


class NbdConnection:
    """One connection, one request at a time."""

    def __init__(self, path: Path, export: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(30)
        self._socket.connect(str(path))
        options.decode_greeting(self._take(options.GREETING_BYTES))
        self._socket.sendall(options.encode_client_flags(HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES))
        self._socket.sendall(options.encode_option(Option.GO, options.encode_info_query(options.InfoQuery(export, ()))))
        self.length = 0
        while True:
            reply = options.decode_option_reply_header(self._take(options.OPTION_REPLY_HEADER_BYTES))
            payload = self._take(reply.length)
            if reply.type == OptionReplyType.ACK:
                break
            assert reply.type == OptionReplyType.INFO, (reply, payload)
            info = options.decode_info(payload)
            if isinstance(info, options.ExportInfo):
                self.length = info.length

    def ask(self, command: Command, at: int = 0, length: int = 0, payload: bytes = b"") -> int:
        """Send a request and wait for its simple reply; returns the error number.

        Raises:
            Gone: the connection broke.
        """
        try:
            self._socket.sendall(encode_request(Request(0, command, 7, at, length)) + payload)
            magic, error, cookie = struct.unpack(">IIQ", self._take(16))
        except OSError as broken:
            raise Gone(str(broken)) from broken
        assert (magic, cookie) == (0x67446698, 7)
        return int(error)

    def close(self) -> None:
        """Hang up without a word."""
        self._socket.close()

    def _take(self, count: int) -> bytes:
        content = b""
        while len(content) < count:
            received = self._socket.recv(count - len(content))
            if not received:
                raise Gone("the server hung up")
            content += received
        return content


@dataclass(slots=True)
class Write:
    """One write of the guest: where, what, and when in the order of all that happened to the guest."""

    at: int
    content: bytes
    issued: int
    ended: int | None = None


@dataclass
class NbdGuest:
    """Writers on one export; use it as a context manager, or `stop` it.

    Attributes:
        path: of the server's socket.
        export: its name.
        start: what the disk showed before.
        area: the guest writes below this byte only, so that sectors are written again and again.
    """

    path: Path
    export: str
    start: bytes
    seed: int
    connections: int = 2
    area: int = 1 << 20
    pace_s: float = 0.0
    writes: list[Write] = field(default_factory=list)
    promises: list[tuple[int, int]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    _clock: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _threads: list[threading.Thread] = field(default_factory=list)
    _stopping: bool = False

    def __enter__(self) -> Self:
        for number in range(self.connections):
            connection = NbdConnection(self.path, self.export)
            assert connection.length == len(self.start)
            work = threading.Thread(target=self._work, args=(connection, random.Random(self.seed * 100 + number)))
            self._threads.append(work)
            work.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End after the requests under way."""
        self._stopping = True
        for thread in self._threads:
            thread.join()

    def wait_for_writes(self, count: int) -> None:
        """Until so many more writes have ended."""
        wanted, deadline = len(self.writes) + count, time.monotonic() + 20
        while len(self.writes) < wanted:
            assert time.monotonic() < deadline, "the guest is stuck"
            time.sleep(0.005)

    def _tick(self) -> int:
        with self._lock:
            self._clock += 1
            return self._clock

    def _work(self, connection: NbdConnection, chance: random.Random) -> None:
        try:
            while not self._stopping:
                self._step(connection, chance)
                if self.pace_s:
                    time.sleep(self.pace_s)
        except Gone:
            pass
        finally:
            connection.close()

    def _step(self, connection: NbdConnection, chance: random.Random) -> None:
        if chance.random() < 0.15:
            began = self._tick()
            if self._did(connection.ask(Command.FLUSH), "flush"):
                self.promises.append((began, self._tick()))
            return
        length = BLOCK * chance.randint(1, 24)
        at = chance.randrange((min(self.area, len(self.start)) - length) // SECTOR) * SECTOR
        if chance.random() < 0.2:
            write = Write(at, bytes(length), self._tick())
            self.writes.append(write)
            done = self._did(connection.ask(Command.WRITE_ZEROES, at, length), "zeroes")
        else:
            write = Write(at, b"", self._tick())
            write.content = STAMP.pack(MARK, write.issued) * (length // STAMP.size)
            self.writes.append(write)
            done = self._did(connection.ask(Command.WRITE, at, length, write.content), "write")
        if done:
            write.ended = self._tick()

    def _did(self, error: int, what: str) -> bool:
        if error:
            self.errors.append(f"{what}: error {error}")
        return not error

    # --- judging

    def faults(self, shown: bytes) -> list[str]:
        """What is wrong with a disk that shows these bytes after a crash: flushed writes lost, or foreign bytes."""
        began = max((began for began, _ in self.promises), default=-1)
        by_sector: dict[int, list[Write]] = {}
        for write in self.writes:
            for at in range(write.at, write.at + len(write.content), SECTOR):
                by_sector.setdefault(at, []).append(write)
        told = []
        for at in range(0, len(self.start), SECTOR):
            allowed = _allowed(at, by_sector.get(at, []), began, self.start[at : at + SECTOR])
            sector = shown[at : at + SECTOR]
            if sector not in allowed:
                told.append(f"sector at {at:#x} shows {_said(sector)}, allowed: {sorted(map(_said, allowed))}")
        return told


def _allowed(at: int, writes: list[Write], began: int, start: bytes) -> set[bytes]:
    """What a sector may show if the last flush that was acknowledged began at `began`."""
    durable = [write.issued for write in writes if write.ended is not None and write.ended < began]
    newest = max(durable, default=-1)
    # What had ended before the newest durable write was issued is overwritten for sure.
    allowed = {
        write.content[at - write.at : at - write.at + SECTOR]
        for write in writes
        if write.ended is None or write.ended > newest
    }
    return allowed if durable else allowed | {start}


def _said(sector: bytes) -> str:
    mark, number = STAMP.unpack_from(sector)
    if mark == MARK:
        return f"write {number}"
    return "zeroes" if not any(sector) else f"other bytes {sector[:8].hex()}"


def until(condition: Callable[[], bool], *, wait_s: float = 20.0) -> None:
    """Wait for something that a daemon does."""
    deadline = time.monotonic() + wait_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)
