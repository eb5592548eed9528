"""What a worker does with a batch of plain steps."""

import errno
import itertools
import os
import random
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from blockjobs.base.offload import ThreadOffload
from blockjobs.base.units import KiB, MiB
from blockjobs.block.drivers import file_medium
from blockjobs.block.drivers.file_medium import FileMedium
from blockjobs.block.execute import PREALLOCATED_BYTES_MIN, STRIDE_BYTES, Copy, Gather, Patch, Step, Zero, execute
from blockjobs.block.medium import Medium
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


def test_work_stops_between_strides_and_says_how_far_it_came() -> None:
    content = random.Random(7).randbytes(3 * STRIDE_BYTES)
    at = [0, STRIDE_BYTES // 2, 5 * STRIDE_BYTES // 4, 2 * STRIDE_BYTES]
    for answers in range(11):
        source, target = SimDisk(content), SimDisk(b"")
        pieces = [(start, end - start) for start, end in itertools.pairwise([*at, len(content)])]
        steps: list[Step] = [
            *(Copy(source, start, target, start, length) for start, length in pieces),
            Zero(target, len(content), 4096),
            Gather(source, pieces[::-1], target, 4 * STRIDE_BYTES),
        ]
        done = execute(steps, iter([True] * answers + [False]).__next__)
        expected = [*at[1:], len(content), *(each * STRIDE_BYTES // 4 + 4096 for each in (12, 12, 16, 19, 22))]
        assert done == (expected[answers] if answers < len(expected) else None)
        whole = content + bytes(4096) + b"".join(content[start : start + length] for start, length in pieces[::-1])
        done = len(whole) if done is None else done
        first = min(done, len(content))
        assert read(target, 0, 4 * STRIDE_BYTES) == content[:first] + bytes(4 * STRIDE_BYTES - first)
        after = max(0, done - len(content) - 4096)
        assert read(target, 4 * STRIDE_BYTES, after + 512) == whole[len(content) + 4096 :][:after] + bytes(512)


class Counted(Hinted):
    """Notes the calls that reach it."""

    def __init__(self, content: bytes = b"") -> None:
        super().__init__()
        self.write(0, content)
        self.zeroed: list[tuple[int, int]] = []
        self.scattered: list[int] = []

    def zero(self, at: int, length: int, *, unmap: bool) -> None:
        self.zeroed.append((at, length))
        super().zero(at, length, unmap=unmap)

    def scatter_from(self, source: Medium, pieces: Sequence[tuple[int, int, int]]) -> None:
        assert pieces == sorted(pieces, key=lambda piece: piece[1])
        self.scattered.append(len(pieces))
        super().scatter_from(source, pieces)


def layered(length: int, layers: int) -> tuple[list[SimDisk], list[tuple[int, int, int]], bytes]:
    """Sources, pieces (source, place, length) of up to 64 KiB that cover a disk, and what that reads as."""
    chance = random.Random(6)
    sources = [SimDisk(chance.randbytes(length)) for _ in range(layers)]
    pieces: list[tuple[int, int, int]] = []
    at = 0
    while at < length:
        pieces.append((chance.randrange(layers), at, min(chance.randrange(1, 64 * KiB), length - at)))
        at += pieces[-1][2]
    return sources, pieces, b"".join(read(sources[source], at, count) for source, at, count in pieces)


def test_pieces_of_several_images_take_a_call_for_each_image_and_stride() -> None:
    sources, pieces, content = layered(3 * STRIDE_BYTES, 3)
    target = Counted()
    execute([Copy(sources[source], at, target, at, length) for source, at, length in pieces])
    assert read(target, 0, len(content)) == content
    assert sum(target.scattered) > len(pieces) / 2 and len(target.scattered) <= 3 * 4
    assert sum(length for _, length in target.hints) > len(content) * 3 // 4


@pytest.mark.parametrize("in_a_row", [True, False])
def test_patches_come_from_many_images_a_stride_at_a_time(in_a_row: bool) -> None:
    chance = random.Random(4)
    sources = [Hinted(), Hinted(), Hinted()]
    for source in sources:
        source.write(0, chance.randbytes(12 * MiB))
    target = Hinted()
    pieces, at = [], 4096
    for _ in range(60):
        length = chance.choice((512, 64 * KiB, 300 * KiB, 5 * MiB if chance.random() < 0.1 else 4096))
        pieces.append((chance.randrange(6 * MiB), at, chance.randrange(3), length))
        at += length + (0 if in_a_row else chance.choice((0, 512, 64 * KiB)))
    target.truncate(at)
    total = sum(length for *_, length in pieces)
    assert total > 2 * STRIDE_BYTES
    asked = iter([True, False])
    done = execute([Patch(sources, pieces, target)], lambda: next(asked))
    assert done is not None and STRIDE_BYTES // 2 < done <= 2 * STRIDE_BYTES
    left = done
    for source_at, place, number, length in pieces:  # what is done are the first bytes
        here = min(left, length)
        left -= here
        assert read(target, place, here) == read(sources[number], source_at, here)
        assert read(target, place + here, length - here) == bytes(length - here)
    assert execute([Patch(sources, pieces, target)]) is None
    for source_at, place, number, length in pieces:
        assert read(target, place, length) == read(sources[number], source_at, length)
    assert target.hints == ([(4096, total)] * 2 if in_a_row else [])


def test_places_may_come_in_any_order() -> None:
    sources, pieces, content = layered(STRIDE_BYTES // 2, 2)
    target = Counted()
    moved = [(source, at, length, len(content) - at - length) for source, at, length in pieces]
    execute([Copy(sources[source], at, target, place, length) for source, at, length, place in moved])
    for _, at, length, place in moved:
        assert read(target, place, length) == content[at : at + length]
    assert len(target.scattered) == 2


def test_strides_of_short_and_long_steps_are_done_from_the_first_on() -> None:
    lengths = [64 * KiB, STRIDE_BYTES, 64 * KiB, 4096, STRIDE_BYTES // 2 + 1, 64 * KiB, 2 * STRIDE_BYTES]
    places = [sum(lengths[:number]) for number in range(len(lengths) + 1)]
    content = random.Random(3).randbytes(places[-1])
    last = lengths[0]
    for answers in range(12):
        source, other = SimDisk(content), SimDisk(content)
        target = Counted()
        steps = [
            Copy((source, other)[number % 2], at, target, at, length)
            for number, (at, length) in enumerate(zip(places, lengths, strict=False))
        ]
        done = execute(steps, iter([True] * answers + [False] * 9).__next__)
        done = len(content) if done is None else done
        assert done >= last > 0
        last = done
        assert read(target, 0, len(content)) == content[:done] + bytes(len(content) - done)
    assert last == len(content)


@pytest.mark.parametrize("short", [4096, 3 * STRIDE_BYTES])
def test_what_nobody_has_ever_written_is_not_zeroed_if_bytes_follow(short: int) -> None:
    source, target = SimDisk(b"x" * 4096), Counted(b"old" * 4096)
    steps: list[Step] = []
    at = 0
    for _ in range(6):
        steps += [Copy(source, 0, target, at, 4096), Zero(target, at + 4096, short)]
        at += 4096 + short
    execute(steps)
    assert target.zeroed == [(4096, short), (at - short, short)]
    assert target.size() == at
    assert read(target, 0, at) == (b"x" * 4096 + bytes(short)) * 6


def test_what_may_have_been_written_is_zeroed() -> None:
    class Opaque(Counted):
        def unwritten_at(self) -> int:
            return Medium.unwritten_at(self)

    source, target = SimDisk(b"x"), Opaque()
    execute([Copy(source, 0, target, 0, 1), Zero(target, 1, 5), Copy(source, 0, target, 6, 1)])
    assert target.zeroed == [(1, 5)]


class Shared(SimDisk):
    """Gains by a second thread; each copy waits until there are two, and it is noted who made it."""

    def __init__(self, *, fails_at: int | None = None) -> None:
        super().__init__(b"")
        self.together = threading.Barrier(2)
        self.threads: list[int] = []
        self.fails_at = fails_at

    @property
    def is_faster_by_two(self) -> bool:
        return True

    def gather_from(self, source: Medium, pieces: Sequence[tuple[int, int]], at: int) -> None:
        self.together.wait(timeout=30)
        self.threads.append(threading.get_ident())
        if at == self.fails_at:
            raise OSError(errno.EIO, "spoiled")
        super().gather_from(source, pieces, at)


@pytest.fixture
def workers() -> Iterator[ThreadOffload]:
    offload = ThreadOffload(1)
    yield offload
    offload.close()


def test_two_threads_share_the_strides_where_that_is_faster(workers: ThreadOffload) -> None:
    content = random.Random(8).randbytes(6 * STRIDE_BYTES)
    source, target = SimDisk(content), Shared()
    assert execute([Copy(source, 0, target, 0, len(content))], start=workers.start) is None
    assert read(target, 0, len(content)) == content
    assert sorted(target.threads.count(thread) for thread in set(target.threads)) == [3, 3]


def test_what_is_done_when_two_threads_are_stopped_are_the_first_bytes(workers: ThreadOffload) -> None:
    content = random.Random(9).randbytes(8 * STRIDE_BYTES)
    source, target = SimDisk(content), Shared()
    target.together = threading.Barrier(1)  # one of them may be told to stop before the other
    done = execute([Copy(source, 0, target, 0, len(content))], lambda: len(target.threads) < 4, workers.start)
    assert done in (4 * STRIDE_BYTES, 5 * STRIDE_BYTES)  # the other one may have been asked just before the fourth
    assert read(target, 0, len(content)) == content[:done] + bytes(len(content) - done)


def test_a_failure_in_either_thread_ends_both_and_is_told(workers: ThreadOffload) -> None:
    for number in range(4):
        source, target = SimDisk(bytes(4 * STRIDE_BYTES)), Shared(fails_at=number * STRIDE_BYTES)
        # The other thread must not wait for a partner that will not come.
        target.together = threading.Barrier(1)
        with pytest.raises(OSError, match="spoiled"):
            execute([Copy(source, 0, target, 0, 4 * STRIDE_BYTES)], start=workers.start)
        assert len(target.threads) <= 4


def test_a_worker_that_is_not_free_is_not_waited_for() -> None:
    offload, free = ThreadOffload(1), threading.Event()
    try:
        offload.start(lambda: free.wait(30) and None)
        source, target = SimDisk(bytes(range(256)) * (16 * KiB) * 2), Shared()
        target.together = threading.Barrier(1)
        assert execute([Copy(source, 0, target, 0, 2 * STRIDE_BYTES)], start=offload.start) is None
        assert set(target.threads) == {threading.get_ident()}
    finally:
        free.set()
        offload.close()
