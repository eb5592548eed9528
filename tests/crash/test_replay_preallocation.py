"""A power cut while a disk grows and what is new gets its clusters: old or new length, the old content, then zeroes.

The clusters that it gets have been somebody's before: their bytes must not show.
"""

import asyncio
import random

import pytest
from replay import blank, opened, own_errors
from workload import states_of

from blockjobs.base.span import Span
from blockjobs.block.claims import ALL, Perm
from blockjobs.block.drivers.qcow2.create import NewImage
from blockjobs.block.drivers.qcow2.driver import Qcow2
from blockjobs.block.vocabulary import Kind, ZeroMode
from blockjobs.testing.crash import RecordingMedium, WriteLog
from blockjobs.testing.disk import Pages, SimDisk

KIB = 1 << 10
SIZE, GROWN = 160 * KIB, 416 * KIB
FREED = Span(64 * KIB, 64 * KIB)
KINDS: dict[str, dict[str, object]] = {
    "4k": {"cluster_size": 4 * KIB},
    "512": {"cluster_size": 512},
    "version 2": {"cluster_size": 4 * KIB, "is_v2": True},
    "extended L2": {"cluster_size": 16 * KIB, "extended_l2": True},
    "raw data file": {"cluster_size": 4 * KIB, "data_file_name": "data", "data_file_raw": True},
}


@pytest.mark.parametrize("mode", [ZeroMode.UNMAP, ZeroMode.KEEP])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_growing_with_clusters(kind: dict[str, object], mode: ZeroMode) -> None:
    options: dict[str, object] = {"file": "disk"} | ({"data-file": "data"} if "data_file_name" in kind else {})

    async def used() -> dict[str, Pages]:
        """Images with data, and in the middle clusters that were freed."""
        disks = {name: SimDisk(pages) for name, pages in (await blank(NewImage(size=SIZE, **kind))).items()}
        async with opened(disks, options) as node:
            await node.write(0, random.Random(1).randbytes(SIZE))
            await node.discard(FREED)
            await node.flush()
        return {name: disk.pages for name, disk in disks.items()}

    async def judge() -> None:
        start, log = await used(), WriteLog()
        media = {name: RecordingMedium(SimDisk(pages), log, name) for name, pages in start.items()}
        async with opened(media, options) as node:
            before = await node.read(0, SIZE)
            graph = node.graph
            user = await graph.claim("a test", node, needs=Perm.RESIZE | Perm.WRITE, shares=ALL)
            await node.resize(GROWN)
            log.mark("grown")
            assert isinstance(node.driver, Qcow2)
            async with graph.drained(node):
                await node.driver.preallocate(Span(SIZE, GROWN - SIZE), mode)
            log.mark("done")
            await graph.release(user)
        after, lengths = before + bytes(GROWN - SIZE), set()
        for state in states_of(log, start, seed=1, least=8):
            images = {name: SimDisk(pages) for name, pages in state.images.items()}
            assert not await own_errors(state.images), state.story
            labels = {label for _, label in log.marks(state.issued)}
            async with opened(images, options) as node:
                assert node.length == GROWN or (node.length == SIZE and "grown" not in labels), state.story
                assert await node.read(0, node.length) == after[: node.length], state.story
                lengths.add(node.length)
                if "done" in labels:
                    assert isinstance(node.driver, Qcow2)
                    parts = await node.driver.resolve(Span(SIZE, GROWN - SIZE))
                    assert all(part.kind is Kind.DATA for part in parts), state.story
        assert GROWN in lengths

    asyncio.run(judge())
