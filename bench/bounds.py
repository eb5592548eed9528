"""What no program can be faster than, however it copies: as many bytes, written by a loop that does nothing else."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from memory import settle

from blockjobs.block.drivers.host_syscalls import start_writeback

RUNS = 3
"""The first one of a full disk may take ten times as long: the kernel does not know yet what the disk can take."""
PIECE_BYTES, AHEAD_BYTES = 1 << 20, 16 << 20


class Bound(NamedTuple):
    """The least of some runs, in seconds: until the bytes are in memory, and until they are on the disk."""

    wall_s: float
    durable_s: float

    def later(self, by_s: float) -> "Bound":
        """The same for a program that must be started first."""
        return Bound(self.wall_s + by_s, self.durable_s + by_s)

    def shown(self, peer_s: float) -> str:
        """What it means for a ratio, given the time of the peer, which does not wait for the disk."""
        alone = f"written alone {self.wall_s:.3f} s, on disk {self.durable_s:.3f} s"
        return f"{alone}: at most {peer_s / self.durable_s:.2f}, without waiting {peer_s / self.wall_s:.2f}"


def written(source: Path, target: Path, *, in_place: bool = False) -> Bound:
    """Write as many bytes as `source` has stored to a new file, which is gone afterwards.

    Args:
        in_place: where they are in `source`; else one after another.
    """
    stored = list(_stored(source))
    if not in_place:
        stored = [(0, sum(length for _, length in stored))]
    pieces = [
        (start, min(PIECE_BYTES, at + length - start))
        for at, length in stored
        for start in range(at, at + length, PIECE_BYTES)
    ]
    times = (min(_write(source, target, pieces, durably=durably) for _ in range(RUNS)) for durably in (False, True))
    return Bound(*times)


def _stored(source: Path) -> Iterator[tuple[int, int]]:
    """Where a file is no hole: place and length."""
    descriptor = os.open(source, os.O_RDONLY)
    try:
        at, end = 0, os.fstat(descriptor).st_size
        while at < end:
            try:
                start = os.lseek(descriptor, at, os.SEEK_DATA)
            except OSError:
                return  # nothing but a hole follows
            at = os.lseek(descriptor, start, os.SEEK_HOLE)
            yield start, at - start
    finally:
        os.close(descriptor)


def _write(source: Path, target: Path, pieces: list[tuple[int, int]], *, durably: bool) -> float:
    content = memoryview(os.urandom(PIECE_BYTES))
    settle(source)
    began_s = time.perf_counter()
    descriptor = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        first = ahead = 0
        for at, length in pieces:
            os.pwrite(descriptor, content[:length], at)
            ahead += length
            if durably and ahead >= AHEAD_BYTES:
                start_writeback(descriptor, first, at + length - first)
                first, ahead = at + length, 0
        if durably:
            os.fdatasync(descriptor)
        return time.perf_counter() - began_s
    finally:
        os.close(descriptor)
        target.unlink()
