"""Where spoiled images are opened: one event loop and one host for all of them, and what they may cost.

A new host for every image would take more time than the images themselves. What an image leaves open is closed behind
it, so that the next one finds the bench empty.
"""

import asyncio
import os
import re
import signal
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from seeds import add_key

from blockjobs.base.offload import InlineOffload
from blockjobs.host import Host

MEMORY = Path("/dev/shm")
CPU_S_MAX = 2.0
WALL_S_MAX = 20.0
"""A busy machine makes everything slow; only what waits for ever gets here."""
GROWTH_BYTES_MAX = 128 << 20
FORBIDDEN = ("/etc/passwd", "/outside/", "/dev/zero", "/proc/self/mem", "/fifo")
_opened = []


def _note_open(event, args):
    if event == "open" and isinstance(args[0], str | bytes):
        _opened.append(os.fsdecode(args[0]))


sys.addaudithook(_note_open)


class Hung(BaseException):
    """An action took far too long."""


def _hung(number, frame):
    raise Hung(f"hangs in {frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}")


def peak_bytes():
    """The most memory that this process has had since `forget_peak`."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10


def forget_peak():
    """Begin to measure anew."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


class Bench:
    """A context manager; `complain` gets what an action has done that it must not do."""

    def __enter__(self):
        self._set_up()
        return self

    def __exit__(self, *error):
        self._take_down()

    def _set_up(self):
        self._runner = asyncio.Runner()
        # One worker is enough, and a tenth of the price of threads, which the daemon and the command have.
        self.host = self._runner.run(_new_host())
        self.events = []
        self._listening = self.host.bus.listening(self.events.append)
        self._listening.__enter__()

    def _take_down(self):
        self._listening.__exit__(None, None, None)
        with suppress(Exception):
            self._runner.run(self.host.__aexit__(None, None, None))
        self._runner.close()

    def do(self, action, complain):
        """Let `action(host)` run to its end and close what it has left open; returns or raises what it does."""
        self.events.clear()
        _opened.clear()
        began_s = time.process_time()
        signal.signal(signal.SIGALRM, _hung)  # each time: whoever runs tests has alarms too
        signal.setitimer(signal.ITIMER_REAL, WALL_S_MAX)
        try:
            return self._runner.run(self._alone(action))
        except Hung:
            signal.setitimer(signal.ITIMER_REAL, 0)
            self._take_down()
            self._set_up()
            raise
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            if (took_s := time.process_time() - began_s) > CPU_S_MAX:
                complain(f"took {took_s:.1f} s of processor time")
            for path in _opened:
                if any(word in path for word in FORBIDDEN):
                    complain(f"opened {path}")

    async def _alone(self, action):
        try:
            return await action(self.host)
        finally:
            await self.host.jobs.cancel_all()
            await self.host.graph.close()

    @contextmanager
    def measuring(self, complain):
        """Inside the block memory must not grow by much."""
        forget_peak()
        before = peak_bytes()
        yield
        if (growth := peak_bytes() - before) > GROWTH_BYTES_MAX:
            complain(f"took {growth >> 20} MiB of memory")


async def _new_host():
    host = await Host(offload=InlineOffload(), history_max=1).__aenter__()
    add_key(host)
    return host
