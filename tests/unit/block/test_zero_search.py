"""Stored zeroes are found in whole units, and everything else stays where it is."""

import random

from hypothesis import given
from hypothesis import strategies as st

from blockjobs.block.pieces import Pieces
from blockjobs.block.plan import Run, RunKind
from blockjobs.block.zero_search import pieces_without_zeroes, without_zeroes
from blockjobs.testing.disk import SimDisk

UNIT = 4096


def disk_of(content: bytes) -> SimDisk:
    disk = SimDisk()
    disk.write(0, content)
    return disk


def shown(runs: list[Run]) -> bytes:
    parts = bytearray()
    for run in runs:
        part = bytearray(run.length)
        if run.kind is RunKind.DATA:
            assert run.medium is not None
            run.medium.read_into(run.medium_at, memoryview(part))
        parts += part
    return bytes(parts)


@given(
    pattern=st.lists(st.sampled_from([0, 1, 2]), min_size=1, max_size=40),
    shift=st.integers(0, 2 * UNIT),
    tail=st.integers(0, UNIT - 1),
    seed=st.integers(0, 99),
)
def test_whole_units_of_zeroes(pattern: list[int], shift: int, tail: int, seed: int) -> None:
    chance = random.Random(seed)
    kinds = {0: bytes(UNIT), 1: bytes(UNIT - 1) + b"x", 2: chance.randbytes(UNIT)}
    content = b"".join(kinds[each] for each in pattern) + bytes(tail)
    medium = disk_of(bytes(512) + content)
    run = Run(shift, len(content), RunKind.DATA, medium, 512)
    found = without_zeroes([run], UNIT)
    assert shown(found) == content
    assert [part.at for part in found] == [shift + sum(p.length for p in found[:i]) for i in range(len(found))]
    for part in found:
        if part.kind is RunKind.DATA:
            first, end = -(-part.at // UNIT) * UNIT, part.end // UNIT * UNIT
            assert all(any(content[at - shift : at - shift + UNIT]) for at in range(first, end, UNIT))
        else:
            assert part.at % UNIT == 0
            assert part.length % UNIT == 0 or part.end == run.end


def test_runs_around_data() -> None:
    zeroes = 5 * UNIT
    content = bytes(zeroes) + b"x" * UNIT + bytes(zeroes)
    medium = disk_of(content)
    zero = Run(0, 64, RunKind.ZERO)
    kinds = [
        (run.kind, run.at, run.length)
        for run in without_zeroes([zero, Run(UNIT, len(content), RunKind.DATA, medium, 0)], UNIT)
    ]
    assert kinds == [
        (RunKind.ZERO, 0, 64),
        (RunKind.ZERO, UNIT, zeroes),
        (RunKind.DATA, UNIT + zeroes, UNIT),
        (RunKind.ZERO, 2 * UNIT + zeroes, zeroes),
    ]
    left = pieces_without_zeroes(Pieces(medium, [UNIT], [len(content)], [0]), UNIT)
    assert left == Pieces(medium, [UNIT + zeroes], [UNIT], [zeroes])


class Cached(SimDisk):
    """A disk with all of it in memory; `reads` are those of whole units."""

    reads = 0

    def read_cached(self, at: int, buffer: memoryview) -> bool:
        buffer[:] = self.pages.read(at, len(buffer))
        return True

    def read_into(self, at: int, buffer: memoryview) -> None:
        self.reads += 1
        super().read_into(at, buffer)


def test_a_glance_at_what_is_in_memory_spares_the_reading_of_data() -> None:
    late = bytes(UNIT - 1) + b"x"
    medium = Cached()
    medium.write(0, b"x" * UNIT + bytes(UNIT) + late + b"x" * UNIT)
    pieces = pieces_without_zeroes(Pieces(medium, [0], [4 * UNIT], [0]), UNIT)
    assert pieces == Pieces(medium, [0, 2 * UNIT], [UNIT, 2 * UNIT], [0, 2 * UNIT])
    assert medium.reads == 2
