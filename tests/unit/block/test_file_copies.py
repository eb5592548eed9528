"""Two ways from one file to another, which must be one in what they leave."""

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockjobs.block.drivers import file_copies
from blockjobs.block.drivers.file_copies import BUFFER_BYTES, FileCopies

SOURCE = random.Random(5).randbytes(5 * BUFFER_BYTES + 777)
LENGTHS = st.one_of(st.integers(1, 3000), st.sampled_from([BUFFER_BYTES - 1, BUFFER_BYTES, BUFFER_BYTES + 1]))
Noted = list[tuple[int, int, int]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    folder = tmp_path_factory.mktemp("copies")
    (folder / "source").write_bytes(SOURCE)
    return os.open(folder / "source", os.O_RDONLY), folder / "target"


def copies_to(path: Path) -> tuple[FileCopies, Noted]:
    path.write_bytes(b"")
    noted: Noted = []
    copies = FileCopies(os.open(path, os.O_RDWR), on_copied=lambda *told: noted.append(told))
    copies.is_faster_by_two = True  # wherever the tests have their files
    return copies, noted


def by_two(copies: FileCopies, source: int, pieces: list[tuple[int, int, int]]) -> int:
    with copies.beside_others(), copies.beside_others():
        return copies.copy_pieces(source, pieces)


@settings(max_examples=150)
@given(st.lists(st.tuples(st.integers(0, len(SOURCE)), LENGTHS, st.integers(0, 2)), min_size=1, max_size=12))
def test_both_ways_leave_the_same_as_a_slice_would(files: tuple[int, Path], drawn: list[tuple[int, int, int]]) -> None:
    source, path = files
    at, pieces = 0, []
    for source_at, length, gap in drawn:
        at += (0, 1, 4096)[gap]
        pieces.append((source_at, at, length))
        at += length
    for copy in (FileCopies.copy_pieces, by_two):
        copies, noted = copies_to(path)
        done = copy(copies, source, pieces)
        whole = bytearray(at)
        for source_at, place, length in pieces[:done]:
            assert source_at + length <= len(SOURCE)
            whole[place : place + length] = SOURCE[source_at : source_at + length]
        end = pieces[done - 1][1] + pieces[done - 1][2] if done else 0
        assert path.read_bytes()[:end] == bytes(whole[:end])
        ends = [number for number, (start, _, length) in enumerate(pieces) if start + length > len(SOURCE)]
        stops = min(ends, default=len(pieces))  # nothing but a source that ends stops either
        assert done == stops if copy is not by_two else done <= stops and (done == len(pieces)) == (not ends)
        copied = sum(length for _, _, length in pieces[:done])
        assert [told for told in noted if told[2]] == ([(pieces[0][1], end, copied)] if done else [])
        reached = [told[1] for told in noted]
        if copy is not by_two and done < len(pieces):
            reached.append(pieces[done][1] + pieces[done][2])  # which `copy_range` tells
        assert max(reached) >= path.stat().st_size


def fail(number: int, answer: int | OSError, real: Callable[..., int]) -> Callable[..., int]:
    """The `number`th call gives that answer, or moves at most so many bytes."""
    calls: list[int] = []

    def call(descriptor: int, data: object, at: int) -> int:
        calls.append(at)
        if len(calls) != number:
            return real(descriptor, data, at)
        if isinstance(answer, OSError):
            raise answer
        assert isinstance(data, memoryview)
        return real(descriptor, data[:answer], at)

    return call


@pytest.mark.parametrize("answer", [7, OSError(errno.ENOSPC, "full")])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_write_that_fails_or_is_short_counts_for_nothing(
    files: tuple[int, Path], monkeypatch: pytest.MonkeyPatch, number: int, answer: int | OSError
) -> None:
    source, path = files
    pieces = [(0, 0, 100), (300, 100, BUFFER_BYTES), (9, BUFFER_BYTES + 100, 50), (50, 3 * BUFFER_BYTES, 60)]
    copies, noted = copies_to(path)
    monkeypatch.setattr(file_copies.os, "pwrite", fail(number, answer, os.pwrite))
    done = by_two(copies, source, pieces)
    assert done == (0, 1, 3)[number - 1]
    for source_at, at, length in pieces[:done]:
        assert path.read_bytes()[at : at + length] == SOURCE[source_at : source_at + length]
    assert noted[0][1] == 3 * BUFFER_BYTES + 60  # whatever came beyond what counts: the size is to be asked for


def test_a_buffer_is_kept_for_the_next_time_also_after_a_failure(
    files: tuple[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, path = files
    copies, _ = copies_to(path)
    made: list[int] = []
    real = file_copies.aligned
    monkeypatch.setattr(file_copies, "aligned", lambda length: made.append(length) or real(length))
    with monkeypatch.context() as broken:
        broken.setattr(file_copies.os, "pwrite", fail(1, OSError(errno.EIO, "bad"), os.pwrite))
        assert by_two(copies, source, [(0, 0, 10)]) == 0
    for _ in range(3):
        assert by_two(copies, source, [(0, 0, 10)]) == 1
    assert made == [BUFFER_BYTES]
