"""What a worker does with a batch of plain steps."""

import os
from pathlib import Path

import pytest

from blockjobs.base.units import KiB, MiB
from blockjobs.block.drivers import file_medium
from blockjobs.block.drivers.file_medium import FileMedium
from blockjobs.block.execute import PREALLOCATED_BYTES_MIN, Copy, Zero, execute
from blockjobs.testing.disk import SimDisk


class Hinted(SimDisk):
    """Notes what it was told to expect."""

    def __init__(self) -> None:
        super().__init__(b"")
        self.hints: list[tuple[int, int]] = []

    def preallocate(self, at: int, length: int) -> None:
        self.hints.append((at, length))


def read(medium: SimDisk | FileMedium, at: int, length: int) -> bytes:
    buffer = memoryview(bytearray(length))
    medium.read_into(at, buffer)
    return bytes(buffer)


def test_scattered_copies_into_one_run_are_announced_as_one() -> None:
    source, target, other = SimDisk(bytes(range(256)) * 8 * KiB), Hinted(), Hinted()
    pieces = [Copy(source, 7 * 64 * KiB - at, target, 4096 + at, 64 * KiB) for at in range(0, 7 * 64 * KiB, 64 * KiB)]
    rest = PREALLOCATED_BYTES_MIN - 7 * 64 * KiB
    steps = [
        *pieces,
        Copy(source, 0, target, 4096 + 7 * 64 * KiB, rest),
        Zero(target, 4 * MiB, 4096),
        Copy(source, 0, target, 8 * MiB, PREALLOCATED_BYTES_MIN - 1),
        Copy(source, 0, other, 8 * MiB + PREALLOCATED_BYTES_MIN - 1, 2 * MiB),
    ]
    execute(steps)
    assert target.hints == [(4096, PREALLOCATED_BYTES_MIN)]
    assert other.hints == [(8 * MiB + PREALLOCATED_BYTES_MIN - 1, 2 * MiB)]
    for step in steps:
        if isinstance(step, Copy):
            assert isinstance(step.target, SimDisk)
            assert read(step.target, step.target_at, step.length) == read(source, step.source_at, step.length)
    assert read(target, 4 * MiB, 4096) == bytes(4096)


def test_the_hint_changes_nothing_that_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        calls.append(args)
        raise OSError(95, "Operation not supported")

    path = tmp_path / "file"
    path.write_bytes(b"x" * 5000)
    monkeypatch.setattr(file_medium, "is_in_memory", lambda _: False)  # wherever the tests have their files
    medium = FileMedium(os.open(path, os.O_RDWR))
    medium.preallocate(4096, 2 * MiB)
    assert medium.size() == 5000 and path.read_bytes() == b"x" * 5000
    calls: list[tuple[object, ...]] = []
    monkeypatch.setattr(file_medium, "fallocate", refuse)
    medium.preallocate(0, MiB)
    medium.preallocate(0, MiB)
    assert len(calls) == 1  # remembered
    medium.close()
