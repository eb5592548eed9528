"""Stored zeroes are found in whole units, and everything else stays where it is."""

import random

from hypothesis import given
from hypothesis import strategies as st

from blockjobs.block.plan import Run, RunKind
from blockjobs.block.zero_search import LOOK_BYTES, without_zeroes
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


def test_over_several_reads() -> None:
    content = bytes(LOOK_BYTES) + b"x" * UNIT + bytes(LOOK_BYTES)
    medium = disk_of(content)
    zero = Run(0, 64, RunKind.ZERO)
    kinds = [
        (run.kind, run.at, run.length)
        for run in without_zeroes([zero, Run(UNIT, len(content), RunKind.DATA, medium, 0)], UNIT)
    ]
    assert kinds == [
        (RunKind.ZERO, 0, 64),
        (RunKind.ZERO, UNIT, LOOK_BYTES),
        (RunKind.DATA, UNIT + LOOK_BYTES, UNIT),
        (RunKind.ZERO, 2 * UNIT + LOOK_BYTES, LOOK_BYTES),
    ]  # fmt: skip
