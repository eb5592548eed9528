"""Amending under power cuts and failing requests: the image is the old one or the new one, and shows what it did."""

import asyncio
import random
from collections.abc import Mapping
from contextlib import suppress

import pytest
from replay import blank, graph_over, opened, shown

from blockjobs.base.errors import BlockjobsError, JobCancelled
from blockjobs.base.span import Span
from blockjobs.block.amend_options import Amending, Qcow2AmendOptions
from blockjobs.block.drivers.qcow2.check import check_image
from blockjobs.block.drivers.qcow2.create import NewImage
from blockjobs.block.node import Node
from blockjobs.block.vocabulary import ZeroMode
from blockjobs.testing.crash import RecordingMedium, WriteLog, crash_states
from blockjobs.testing.disk import Pages, SimDisk
from blockjobs.testing.faults import Fault, FaultPlan, FaultyMedium, Operation

KIB = 1 << 10
SIZE = 128 * KIB
V3 = NewImage(size=SIZE, cluster_size=4 * KIB)
V2 = NewImage(size=SIZE, cluster_size=4 * KIB, is_v2=True)
TINY = NewImage(size=SIZE, cluster_size=512, refcount_bits=8)
CASES: Mapping[str, tuple[NewImage, bool, Qcow2AmendOptions]] = {
    "wider": (V3, False, Qcow2AmendOptions(refcount_bits=64)),
    "narrower": (V3, True, Qcow2AmendOptions(refcount_bits=1)),
    "many blocks": (TINY, False, Qcow2AmendOptions(refcount_bits=64)),
    "downgrade": (V3, False, Qcow2AmendOptions(version="v2")),
    "downgrade with a snapshot": (V3, False, Qcow2AmendOptions(version="v2")),
    "width with a snapshot": (V3, False, Qcow2AmendOptions(refcount_bits=4)),
    "shrink": (V3, False, Qcow2AmendOptions(size=SIZE - 48 * KIB)),
    "downgrade of an overlay": (V3, True, Qcow2AmendOptions(version="v2")),
    "upgrade": (V2, False, Qcow2AmendOptions(version="v3")),
    "upgrade and more": (V2, True, Qcow2AmendOptions(version="v3", refcount_bits=2, lazy_refcounts=True)),
    "lazy": (V3, False, Qcow2AmendOptions(lazy_refcounts=True)),
    "size": (V3, False, Qcow2AmendOptions(size=SIZE + 64 * KIB)),
    "backing": (V3, False, Qcow2AmendOptions(backing_file="other.raw", backing_fmt="raw")),
}
OPEN: Mapping[bool, dict[str, object]] = {
    False: {"file": "disk", "backing": None},
    True: {"file": "disk", "backing": {"driver": "raw", "file": "base"}},
}


def nothing(count: int = 0) -> None:
    del count


async def go_on() -> None:
    """Never paused, never cancelled."""


QUIETLY = Amending(force=True, expect=nothing, advance=nothing, checkpoint=go_on)


async def start_of(image: NewImage, *, backing: bool, snapshot: bool = False) -> dict[str, Pages]:
    start = await blank(image, backing=backing)
    disks = {name: SimDisk(pages) for name, pages in start.items()}
    async with opened(disks, OPEN[backing]) as node:
        await node.write(10 * KIB, random.Random(1).randbytes(30 * KIB))
        await node.zero(Span(16 * KIB, 8 * KIB), mode=ZeroMode.KEEP)
        await node.zero(Span(64 * KIB, 12 * KIB))
        await node.write(100 * KIB, b"compressed " * 372 + b"end.", compressed=True)
        if snapshot:
            await node.driver.internal_snapshots.create("s", date_ns=0)
    return {name: disk.pages for name, disk in disks.items()}


async def amended(node: Node, options: Qcow2AmendOptions, work: Amending = QUIETLY) -> None:
    await node.driver.amend(options, work)


async def errors(images: Mapping[str, Pages]) -> str:
    async with graph_over({"disk": SimDisk(images["disk"])}, read_only=True) as graph:
        result = await check_image(graph.node("disk"), offload=graph.offload)
    return "; ".join(result.problems) if result.corruptions or result.check_errors else ""


def facts(node: Node) -> tuple[object, ...]:
    header = node.driver.image.header
    return header.version, header.refcount_bits, int(header.compatible), header.size, header.backing_file


async def facts_of(images: Mapping[str, Pages], *, backing: bool) -> tuple[object, ...]:
    media = {name: SimDisk(pages) for name, pages in images.items()}
    async with opened(media, OPEN[backing], read_only=True) as node:
        return facts(node)


@pytest.mark.parametrize("name", CASES)
def test_power_cuts(name: str) -> None:
    image, backing, options = CASES[name]

    async def run() -> None:
        start = await start_of(image, backing=backing, snapshot="snapshot" in name)
        content = await shown(start, OPEN[backing])
        log = WriteLog()
        media = {disk: RecordingMedium(SimDisk(pages), log, disk) for disk, pages in start.items()}
        async with opened(media, OPEN[backing]) as node:
            await amended(node, options)
            log.mark("amended")
            after = facts(node)
            await node.write(0, b"goes on" * 100)
        kept = min(SIZE, options.size or SIZE)
        acknowledged = next(index for index, label in log.marks(len(log.changes)) if label == "amended")
        for state in crash_states(log, start, seed=0, exhaustive_up_to=5, samples=6):
            assert not (wrong := await errors(state.images)), f"{state.story}: {wrong}"
            found = await shown(state.images, OPEN[backing])
            assert found[KIB:kept] == content[KIB:kept], state.story
            assert not any(found[SIZE:]), state.story
            if state.issued > acknowledged:
                assert await facts_of(state.images, backing=backing) == after, state.story

    asyncio.run(run())


def test_power_cuts_while_a_data_file_stops_being_raw() -> None:
    """The name in the header and the flag change one after the other; whichever is there, the disk reads the same."""
    names = {"file": "disk", "data-file": "data"}

    async def run() -> None:
        start = await blank(NewImage(size=SIZE, cluster_size=4 * KIB, data_file_name="data", data_file_raw=True))
        disks = {name: SimDisk(pages) for name, pages in start.items()}
        async with opened(disks, names) as node:
            await node.write(10 * KIB, random.Random(1).randbytes(30 * KIB))
            await node.zero(Span(16 * KIB, 8 * KIB), mode=ZeroMode.KEEP)
        start = {name: disk.pages for name, disk in disks.items()}
        content, log = await shown(start, names), WriteLog()
        media = {name: RecordingMedium(SimDisk(pages), log, name) for name, pages in start.items()}
        async with opened(media, names) as node:
            await amended(node, Qcow2AmendOptions(data_file_raw=False, data_file="elsewhere"))
            acknowledged = log.mark("amended")
            await node.zero(Span(0, KIB))
        found = set()
        for state in crash_states(log, start, seed=0, exhaustive_up_to=5):
            assert not (wrong := await errors(state.images)), f"{state.story}: {wrong}"
            assert (await shown(state.images, names))[KIB:] == content[KIB:], state.story
            async with opened({name: SimDisk(each) for name, each in state.images.items()}, names) as node:
                header = node.driver.image.header
            found.add((header.is_data_file_raw, header.data_file_name))
            assert state.issued < acknowledged or (header.is_data_file_raw, header.data_file_name) == (
                False,
                "elsewhere",
            )
            if header.is_data_file_raw:
                assert state.images["data"].read(KIB, SIZE - KIB) == content[KIB:], state.story
        assert {(True, "data"), (False, "elsewhere")} <= found

    asyncio.run(run())


@pytest.mark.parametrize("operation", [Operation.WRITE, Operation.SYNC, Operation.READ])
@pytest.mark.parametrize("name", ["wider", "downgrade of an overlay", "upgrade and more", "size"])
def test_a_failing_request(name: str, operation: Operation) -> None:
    image, backing, options = CASES[name]

    async def once(nth: int) -> bool:
        start = await start_of(image, backing=backing)
        content = await shown(start, OPEN[backing])
        plan = FaultPlan()
        disks = {disk: SimDisk(pages) for disk, pages in start.items()}
        with suppress(BlockjobsError):
            async with opened({disk: FaultyMedium(each, plan) for disk, each in disks.items()}, OPEN[backing]) as node:
                plan.add(Fault(nth=nth, operation=operation))
                try:
                    await amended(node, options)
                except BlockjobsError:
                    assert plan.hits
                assert (await node.read(0, node.length))[:SIZE] == content
        images = {disk: each.pages for disk, each in disks.items()}
        assert not (wrong := await errors(images)), (nth, wrong)
        assert (await shown(images, OPEN[backing]))[:SIZE] == content, nth
        async with opened({disk: SimDisk(pages) for disk, pages in images.items()}, OPEN[backing]) as node:
            await amended(node, options)
        return plan.hits > 0

    async def at_every_place() -> None:
        for nth in range(1, 300):
            if not await once(nth):
                assert nth > 1
                return
        raise AssertionError("never ends")

    asyncio.run(at_every_place())


@pytest.mark.parametrize("name", ["many blocks", "narrower", "downgrade"])
def test_a_cancel_leaves_the_old_image(name: str) -> None:
    image, backing, options = CASES[name]

    async def once(nth: int) -> bool:
        start = await start_of(image, backing=backing)
        content, before = await shown(start, OPEN[backing]), await facts_of(start, backing=backing)
        disks = {disk: SimDisk(pages) for disk, pages in start.items()}
        asked = 0

        async def stop() -> None:
            nonlocal asked
            asked += 1
            if asked == nth:
                raise JobCancelled

        async with opened(disks, OPEN[backing]) as node:
            work = Amending(force=False, expect=nothing, advance=nothing, checkpoint=stop)
            with suppress(JobCancelled):
                await amended(node, options, work)
            cancelled = asked == nth
            assert (facts(node) == before) == cancelled or name == "narrower"
            assert await node.read(0, SIZE) == content
            await node.write(60 * KIB, b"x" * KIB)
        images = {disk: each.pages for disk, each in disks.items()}
        assert not await errors(images)
        return cancelled

    async def at_every_place() -> None:
        nth = 1
        while await once(nth):
            nth += 1
        assert nth > 1

    asyncio.run(at_every_place())
