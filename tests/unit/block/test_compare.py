"""Comparing nodes: the exact byte, the tail of the longer one, and no reading of holes."""

import asyncio
import random
from pathlib import Path

import pytest

from blockjobs.base.errors import IoFailure
from blockjobs.base.span import Span
from blockjobs.block import compare
from blockjobs.block.compare import first_difference
from blockjobs.block.node import Node
from blockjobs.host import Host
from blockjobs.testing.disk import SimDisk

MIB = 1 << 20


class BrokenDisk(SimDisk):
    """Fails every read."""

    def read_into(self, at: int, buffer: memoryview) -> None:
        raise OSError(5, "Input/output error")


def make_disk(length: int, *writes: tuple[int, bytes], kind: type[SimDisk] = SimDisk) -> SimDisk:
    disk = kind()
    disk.truncate(length)
    for at, content in writes:
        disk.write(at, content)
    return disk


def search(one: SimDisk, other: SimDisk) -> tuple[int | None, int]:
    """The difference, and how many bytes were said to be dealt with."""

    async def run() -> tuple[int | None, int]:
        told = 0

        def advance(count: int) -> None:
            nonlocal told
            told += count

        async with Host() as host:
            nodes: list[Node] = [
                await host.graph.open_medium(disk, name) for name, disk in (("one", one), ("other", other))
            ]
            async with host.access(nodes[0]), host.access(nodes[1]):
                return await first_difference(*nodes, advance=advance), told

    return asyncio.run(run())


def test_equal_disks_of_different_layout_are_equal() -> None:
    one = make_disk(9 * MIB, (MIB, b"x" * 1000), (5 * MIB, bytes(4096)))
    other = make_disk(9 * MIB, (MIB, b"x" * 1000))
    assert search(one, other) == (None, 9 * MIB)


def test_the_first_byte_is_found_wherever_it_is() -> None:
    chance = random.Random(1)
    for _ in range(20):
        at = chance.randrange(8 * MIB)
        later = chance.randrange(at, 8 * MIB)
        one = make_disk(8 * MIB, (0, b"a" * (8 * MIB)))
        other = make_disk(8 * MIB, (0, b"a" * (8 * MIB)), (at, b"b"), (later, b"c"))
        assert search(one, other)[0] == at


def test_a_tail_of_zeroes_is_no_difference_but_one_of_data_is() -> None:
    short = make_disk(MIB, (0, b"a" * MIB))
    assert search(short, make_disk(3 * MIB, (0, b"a" * MIB)))[0] is None
    assert search(make_disk(3 * MIB, (0, b"a" * MIB), (2 * MIB, b"b")), short)[0] == 2 * MIB


def test_large_sparse_files_take_few_looks_and_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[Span] = []
    pieces: list[Span] = []
    trace, fill = compare.trace, compare.fill

    async def noted_trace(node: Node, span: Span, *, through_backing: bool):
        looks.append(span)
        return await trace(node, span, through_backing=through_backing)

    async def noted_fill(node: Node, piece: Span, view: memoryview) -> None:
        pieces.append(piece)
        await fill(node, piece, view)

    monkeypatch.setattr(compare, "trace", noted_trace)
    monkeypatch.setattr(compare, "fill", noted_fill)
    length = 1 << 40
    for name, last in (("one", b"x"), ("other", b"y")):
        with (tmp_path / name).open("wb") as out:
            out.write(b"same")
            out.seek(length - 1)
            out.write(last)

    async def run() -> int | None:
        async with Host() as host:
            one, other = [await host.open(str(tmp_path / name), format="raw") for name in ("one", "other")]
            return await host.first_difference(one, other)

    assert asyncio.run(run()) == length - 1
    assert len(looks) < 30
    assert sum(piece.length for piece in pieces) < 32 * MIB


def test_an_empty_disk_equals_zeroes() -> None:
    assert search(make_disk(0), make_disk(MIB))[0] is None


def test_a_read_error_is_reported_as_itself() -> None:
    with pytest.raises(IoFailure, match="Input/output error"):
        search(make_disk(MIB, (0, b"x")), make_disk(MIB, (0, b"x"), kind=BrokenDisk))
