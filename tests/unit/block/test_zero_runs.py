"""Many runs made zero in few steps, with the same result as one by one, and everybody told who wants to know."""

import asyncio
import errno
from collections.abc import Callable
from typing import TypeVar, TypeVarTuple

import pytest

from blockjobs.base.errors import IoFailure
from blockjobs.base.offload import InlineOffload
from blockjobs.base.span import Span
from blockjobs.base.units import KiB
from blockjobs.block.bitmap import DirtyBitmap
from blockjobs.block.drivers.qcow2.create import NewImage
from blockjobs.block.gate import Gate
from blockjobs.block.node import Node
from blockjobs.block.node_bitmap import NodeBitmap
from blockjobs.block.vocabulary import Limits
from blockjobs.block.zero_runs import zero_runs
from blockjobs.testing.clock import run
from blockjobs.testing.disk import SimDisk
from blockjobs.testing.faults import Fault, FaultPlan, FaultyMedium, Operation
from blockjobs.testing.little_host import LittleHost, make_disk

T = TypeVar("T")
Args = TypeVarTuple("Args")

SIZE = 1024 * KiB
CLUSTER = 64 * KiB
SPANS = [Span(CLUSTER, CLUSTER), Span(3 * CLUSTER, 2 * CLUSTER), Span(SIZE - CLUSTER, CLUSTER)]
RAGGED = [Span(512, 512), Span(CLUSTER - 512, CLUSTER + 1024), Span(5 * CLUSTER, CLUSTER)]
FULL = b"x" * SIZE


class CountingOffload(InlineOffload):
    hops = 0

    async def run(self, work: Callable[[*Args], T], *args: *Args) -> T:
        self.hops += 1
        return await super().run(work, *args)


class NotingMedium(FaultyMedium):
    """Notes where zeroes are asked for, and whether space may go."""

    def __init__(self, inner: SimDisk) -> None:
        super().__init__(inner)
        self.asked: list[tuple[int, int, bool]] = []

    def zero(self, at: int, length: int, *, unmap: bool) -> None:
        self.asked.append((at, length, unmap))
        super().zero(at, length, unmap=unmap)


def zeroed(spans: list[Span]) -> bytes:
    content = bytearray(FULL)
    for span in spans:
        content[span.at : span.end] = bytes(span.length)
    return bytes(content)


async def full(host: LittleHost, name: str, kind: str, **more: object) -> Node:
    """A node written all over, raw or qcow2, that somebody may write."""
    if kind == "qcow2":
        node = await host.qcow2(name, NewImage(size=SIZE, **more))
    elif kind == "raw":
        await host.disk(f"{name}-file", SIZE + 4096)
        node = await host.add(
            driver="raw", node_name=name, file=f"{name}-file", offset=4096, size=SIZE, discard="unmap"
        )
    else:
        node = await host.disk(name, SIZE)
    await host.guest(node)
    await node.write(0, FULL)
    return node


@pytest.mark.parametrize("spans", [SPANS, RAGGED, SPANS[:1], []])
@pytest.mark.parametrize("kind", ["file", "raw", "qcow2", "keeping", "version 2", "subclusters", "data file"])
def test_they_read_as_zeroes_and_nothing_else_does(kind: str, spans: list[Span]) -> None:
    async def main() -> None:
        async with LittleHost() as host:
            images = {
                "version 2": {"is_v2": True},
                "subclusters": {"extended_l2": True},
                "data file": {"data_file_name": "d"},
            }
            node = await full(host, "n", kind if kind in ("file", "raw") else "qcow2", **images.get(kind, {}))
            if kind == "keeping":
                node.driver.image.tuning = node.driver.image.tuning._replace(discards_keep_clusters=True)
            await zero_runs(node, spans)
            assert await node.read(0, SIZE) == zeroed(spans)

    run(main())


@pytest.mark.parametrize("kind", ["file", "raw"])
def test_files_take_one_hop(kind: str) -> None:
    async def main() -> None:
        offload = CountingOffload()
        async with LittleHost(offload=offload) as host:
            node = await full(host, "n", kind)
            before = offload.hops
            await zero_runs(node, SPANS)
            assert offload.hops == before + 1
            tally = node.tally.kinds["zero"]
            assert (tally.operations, tally.size_bytes, tally.failed) == (3, 4 * CLUSTER, 0)

    run(main())


def test_each_run_is_recorded_and_what_lies_between_is_not() -> None:
    async def main() -> None:
        async with LittleHost() as host:
            node = await full(host, "n", "raw")
            bitmap = NodeBitmap(name="b", map=DirtyBitmap(SIZE, CLUSTER))
            node.attach_bitmap(bitmap)
            await zero_runs(node, SPANS)
            assert list(bitmap.map.runs()) == SPANS

    run(main())


@pytest.mark.parametrize("unmap", [True, False])
def test_space_goes_only_where_it_may(unmap: bool) -> None:
    async def main() -> None:
        async with LittleHost() as host:
            medium = NotingMedium(make_disk(FULL))
            node = await host.disk("n", b"", medium=medium, unmap=unmap)
            await host.guest(node)
            await zero_runs(node, SPANS)
            assert medium.asked == [(*span, unmap) for span in SPANS]

    run(main())


def test_runs_that_must_be_padded_go_one_by_one() -> None:
    async def main() -> None:
        async with LittleHost() as host:
            medium = NotingMedium(make_disk(FULL))
            node = await host.disk("n", b"", medium=medium)
            await host.guest(node)
            node.driver.limits = Limits(zero_align=4096, request_align=512)
            await zero_runs(node, RAGGED)
            assert await node.read(0, SIZE) == zeroed(RAGGED)
            assert medium.asked == [(CLUSTER * number, CLUSTER, True) for number in (1, 5)]
            assert node.tally.kinds["zero"].operations == 3

    run(main())


def test_a_gate_is_passed_before() -> None:
    async def main() -> None:
        async with LittleHost() as host:
            node = await full(host, "n", "qcow2")
            gate = Gate()
            gate.shut([node])
            work = asyncio.create_task(zero_runs(node, SPANS))
            await asyncio.sleep(1)
            assert await node.read(0, SIZE) == FULL
            gate.open()
            await work
            assert await node.read(0, SIZE) == zeroed(SPANS)

    run(main())


@pytest.mark.parametrize("kind", ["file", "qcow2"])
def test_nothing_past_the_end(kind: str) -> None:
    async def main() -> None:
        async with LittleHost() as host:
            node = await full(host, "n", kind)
            with pytest.raises(IoFailure) as caught:
                await zero_runs(node, [*SPANS, Span(SIZE, CLUSTER)])
            assert caught.value.errno == errno.EIO
            assert await node.read(0, SIZE) == FULL

    run(main())


def test_a_failure_names_the_node() -> None:
    async def main() -> None:
        async with LittleHost() as host:
            plan = FaultPlan([Fault(nth=2, operation=Operation.ZERO, errno=errno.ENOSPC)])
            node = await host.disk("n", b"", medium=FaultyMedium(make_disk(FULL), plan))
            await host.guest(node)
            with pytest.raises(IoFailure) as caught:
                await zero_runs(node, SPANS)
            assert (caught.value.errno, caught.value.where) == (errno.ENOSPC, f"node 'n' at {CLUSTER}+{SIZE - CLUSTER}")
            assert node.tally.kinds["zero"].failed

    run(main())
