"""A power cut while an overlay is emptied whose content was just written to the image below it: it shows the same."""

import asyncio
import random

import pytest
from replay import blank, graph_over, opened, own_errors
from workload import states_of

from blockjobs.block.claims import ALL, Perm
from blockjobs.block.drivers.qcow2.create import NewImage
from blockjobs.block.emptying import empty
from blockjobs.testing.crash import RecordingMedium, WriteLog
from blockjobs.testing.disk import Pages, SimDisk
from blockjobs.testing.graphs import add_node

KIB = 1 << 10
SIZE = 256 * KIB
BASE = random.Random(1).randbytes(SIZE)


@pytest.mark.parametrize(
    "kind", [{"cluster_size": 4 * KIB}, {"cluster_size": 64 * KIB, "is_v2": True}, {"extended_l2": True}]
)
def test_emptying(kind: dict[str, int]) -> None:
    async def judge() -> None:
        start = await blank(NewImage(size=SIZE, backing_file="base", backing_format="raw", **kind))
        disk = SimDisk(start["disk"])
        async with opened({"disk": disk}, {"file": "disk", "backing": None}) as node:
            for at, length in ((20, 3), (64, 70), (200, 9)):
                await node.write(at * KIB, random.Random(at).randbytes(length * KIB))
        start = {"disk": disk.pages, "base": Pages(BASE)}
        log = WriteLog()
        media = {name: RecordingMedium(SimDisk(pages), log, name) for name, pages in start.items()}
        async with graph_over(media) as graph:
            base = await add_node(graph, driver="raw", node_name="base-r", file="base")
            top = await add_node(graph, driver="qcow2", node_name="n", file="disk", backing=base.name)
            shown = await top.read(0, SIZE)
            writer = await graph.claim("a test", base, needs=Perm.WRITE, shares=ALL)
            await base.write(0, shown)
            user = await graph.claim("a test", top, needs=Perm.WRITE | Perm.CONSISTENT_READ, shares=ALL)
            await empty(top, base)
            log.mark("done")
            await graph.release(user)
            await graph.release(writer)
        ends = set()
        for state in states_of(log, start, seed=1, least=5):
            assert not await own_errors({"disk": state.images["disk"]}), state.story
            media = {name: SimDisk(pages) for name, pages in state.images.items()}
            async with opened(media, {"file": "disk", "backing": {"driver": "raw", "file": "base"}}) as node:
                assert await node.read(0, SIZE) == shown, state.story
            if any(label == "done" for _, label in log.marks(state.issued)):
                async with opened({"disk": SimDisk(state.images["disk"])}, {"file": "disk", "backing": None}) as node:
                    assert not any(await node.read(0, SIZE)), state.story
                    ends.add(state.story)
        assert ends

    asyncio.run(judge())
