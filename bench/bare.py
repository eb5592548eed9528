"""A server that makes files and has no jobs: what no daemon can be faster than that keeps its loop free of disks.

It is started as a storage daemon is. The loop, the threads and the reader of JSON are ours; nothing is checked, nothing
is locked, and what it answers is written down here. As ours, it has each file on the disk before it says so.
"""

import asyncio
import os
import queue
import sys
import threading
from typing import cast

import msgspec
import uvloop

GREETING = b'{"QMP": {"version": {}, "capabilities": []}}\r\n'
RETURN = b'{"return": {}}\r\n'
EVENT = (
    b'{"timestamp": {"seconds": 1795766400, "microseconds": 123456}, "event": "JOB_STATUS_CHANGE", '
    b'"data": {"status": "%s", "id": "job123"}}\r\n'
)
BEGUN = EVENT % b"created" + EVENT % b"running" + RETURN
ENDED = EVENT % b"waiting" + EVENT % b"pending" + EVENT % b"concluded"
GONE = EVENT % b"null" + RETURN
THREADS = 8


class Bare(asyncio.Protocol):
    """A client's connection."""

    def __init__(self, files: "queue.SimpleQueue[tuple[Bare, str, int]]", stopped: asyncio.Event) -> None:
        self._files, self._stopped = files, stopped
        self._read = msgspec.json.Decoder().decode

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Greet."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are so by behaviour, not by inheritance
        self._transport.write(GREETING)

    def data_received(self, data: bytes) -> None:
        """Answer all requests of a packet."""
        for line in data.replace(b"}{", b"}\n{").split(b"\n"):
            request = self._read(line)
            if request["execute"] == "blockdev-create":
                self._transport.write(BEGUN)
                options = request["arguments"]["options"]
                self._files.put((self, options["filename"], options["size"]))
            else:
                self._transport.write(GONE if request["execute"] == "job-dismiss" else RETURN)
            if request["execute"] == "quit":
                self._stopped.set()

    def ended(self) -> None:
        """A file is on the disk."""
        self._transport.write(ENDED)


def make(files: "queue.SimpleQueue[tuple[Bare, str, int]]", loop: asyncio.AbstractEventLoop) -> None:
    """Make files for ever."""
    while True:
        client, path, length = files.get()
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        os.ftruncate(descriptor, length)
        os.fsync(descriptor)
        os.close(descriptor)
        folder = os.open(os.path.dirname(path), os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
        loop.call_soon_threadsafe(client.ended)


async def serve(path: str) -> None:
    """Serve clients of a socket until one says quit."""
    loop, stopped = asyncio.get_running_loop(), asyncio.Event()
    files: queue.SimpleQueue[tuple[Bare, str, int]] = queue.SimpleQueue()
    for _ in range(THREADS):
        threading.Thread(target=make, args=(files, loop), daemon=True).start()
    await loop.create_unix_server(lambda: Bare(files, stopped), path)
    await stopped.wait()


if __name__ == "__main__":
    chardev = next(word for word in sys.argv if word.startswith("socket,"))
    uvloop.run(serve(dict(pair.split("=") for pair in chardev.split(",")[1:])["path"]))
