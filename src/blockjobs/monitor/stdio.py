"""The character device `stdio`: a client at the process's own standard input and output."""

import asyncio
import os
import stat
import sys
from typing import Any

from blockjobs.monitor.chardev import Chardev, Client


class Stdio(Chardev):
    """`stdio`: the process's own standard input and output. The end of input does not end anything else."""

    guarded = False
    filename = "stdio"

    def __init__(self, *, input_fd: int | None = None, output_fd: int | None = None) -> None:
        """See the class; the descriptors are the process's own unless given, and stay open in any case."""
        self._input = sys.stdin.fileno() if input_fd is None else input_fd
        self._output = sys.stdout.fileno() if output_fd is None else output_fd
        self._served = False

    async def open(self) -> None:
        """See `Chardev`."""

    async def attach(self, client: Client) -> bool:
        """See `Chardev`."""
        if self._served:
            return False
        self._served = True
        transport = _PipePair(client)
        await transport.open(os.dup(self._input), os.dup(self._output))
        return True


class _Output(asyncio.Protocol):
    """Passes the output pipe's flow control on to the client's protocol."""

    def __init__(self, pair: "_PipePair") -> None:
        self._pair = pair

    def pause_writing(self) -> None:
        self._pair.client.pause_writing()

    def resume_writing(self) -> None:
        self._pair.client.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._pair.lost(exc)


class _FileOutput(asyncio.WriteTransport):
    """Writes to a regular file, which is never worth waiting for and which event loops refuse as a pipe."""

    def __init__(self, descriptor: int, pair: "_PipePair") -> None:
        super().__init__()
        self._descriptor: int | None = descriptor
        self._pair = pair

    def write(self, data: Any) -> None:
        left = memoryview(data)
        while left and self._descriptor is not None:
            try:
                left = left[os.write(self._descriptor, left) :]
            except OSError as error:
                self._end(error)

    def get_write_buffer_size(self) -> int:
        return 0

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def is_closing(self) -> bool:
        return self._descriptor is None

    def close(self) -> None:
        self._end(None)

    def abort(self) -> None:
        self._end(None)

    def _end(self, error: OSError | None) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
            asyncio.get_running_loop().call_soon(self._pair.lost, error)


class _Input(asyncio.Protocol):
    """Passes input on; its end is the end of the requests, not of the connection."""

    def __init__(self, pair: "_PipePair") -> None:
        self._pair = pair

    def data_received(self, data: bytes) -> None:
        self._pair.client.data_received(data)

    def eof_received(self) -> None:
        self._pair.client.eof_received()


class _PipePair(asyncio.Transport):
    """Two one-way descriptors as one transport."""

    def __init__(self, client: asyncio.Protocol) -> None:
        super().__init__()
        self.client = client
        self._reader: asyncio.ReadTransport | None = None
        self._writer: asyncio.WriteTransport | None = None
        self._is_lost = False

    async def open(self, input_fd: int, output_fd: int) -> None:
        loop = asyncio.get_running_loop()
        if _can_wait(output_fd):
            self._writer, _ = await loop.connect_write_pipe(lambda: _Output(self), os.fdopen(output_fd, "wb", 0))
        else:
            self._writer = _FileOutput(output_fd, self)
        self.client.connection_made(self)
        source = os.fdopen(input_fd, "rb", 0)
        if _can_wait(input_fd):
            self._reader, _ = await loop.connect_read_pipe(lambda: _Input(self), source)
            return
        # A file cannot be waited for, and need not be: all of it is there.
        with source:
            self.client.data_received(source.read() or b"")
        self.client.eof_received()

    def write(self, data: Any) -> None:
        assert self._writer is not None
        self._writer.write(data)

    def get_write_buffer_size(self) -> int:
        return 0 if self._writer is None else self._writer.get_write_buffer_size()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        if self._writer is not None:
            self._writer.set_write_buffer_limits(high, low)

    def pause_reading(self) -> None:
        if self._reader is not None:
            self._reader.pause_reading()

    def resume_reading(self) -> None:
        if self._reader is not None and not self._reader.is_closing():
            self._reader.resume_reading()

    def is_closing(self) -> bool:
        return self._writer is None or self._writer.is_closing()

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()
        if self._writer is not None:
            self._writer.close()

    def abort(self) -> None:
        if self._reader is not None:
            self._reader.close()
        if self._writer is not None:
            self._writer.abort()

    def lost(self, error: Exception | None) -> None:
        """The output is gone, by our wish or not: so is the client."""
        if self._reader is not None:
            self._reader.close()
        if not self._is_lost:
            self._is_lost = True
            self.client.connection_lost(error)


def _can_wait(descriptor: int) -> bool:
    """Whether an event loop can watch it: a pipe, a socket or a terminal."""
    mode = os.fstat(descriptor).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or os.isatty(descriptor)
