"""A power cut while an overlay moves to another backing file: it reads the same on the one that its header names."""

import asyncio
import random

import pytest
from replay import blank, graph_over, opened, own_errors
from workload import states_of

from blockjobs.block.backing_file import name_backing_file
from blockjobs.block.claims import ALL, Perm
from blockjobs.block.drivers.qcow2.create import NewImage
from blockjobs.block.rebase import keep_differences
from blockjobs.testing.crash import RecordingMedium, WriteLog
from blockjobs.testing.disk import Pages, SimDisk
from blockjobs.testing.graphs import add_node

KIB = 1 << 10
SIZE = 256 * KIB
OLD = random.Random(1).randbytes(SIZE // 2) + bytes(SIZE // 2)
NEW = OLD[: 64 * KIB] + bytes(64 * KIB) + random.Random(2).randbytes(100 * KIB)


@pytest.mark.parametrize("is_v2", [False, True])
@pytest.mark.parametrize("has_old", [True, False])
def test_rebase(has_old: bool, is_v2: bool) -> None:
    """What has no backing image shows zeroes, which version 2 can only hold as bytes."""
    named_first = {"backing_file": "old", "backing_format": "raw"} if has_old else {}

    async def judge() -> None:
        image = NewImage(size=SIZE, cluster_size=4 * KIB, is_v2=is_v2, **named_first)
        start = await blank(image)
        start |= {"old": Pages(OLD), "new": Pages(NEW)}
        disk = SimDisk(start["disk"])
        async with opened({"disk": disk}, {"file": "disk", "backing": None}) as node:
            await node.write(20 * KIB, b"own" * KIB)
        start["disk"] = disk.pages
        log = WriteLog()
        media = {"disk": RecordingMedium(SimDisk(start["disk"]), log), "old": SimDisk(Pages(OLD))}
        async with graph_over({**media, "new": SimDisk(Pages(NEW))}) as graph:
            old, new = [
                await add_node(graph, driver="raw", node_name=f"{name}-r", file=name) for name in ("old", "new")
            ]
            top = await add_node(
                graph, driver="qcow2", node_name="n", file="disk", backing=old.name if has_old else None
            )
            shown = await top.read(0, SIZE)
            user = await graph.claim("a test", top, needs=Perm.WRITE | Perm.CONSISTENT_READ, shares=ALL)
            await keep_differences(top, old if has_old else None, new)
            await graph.release(user)
            await name_backing_file(graph, top, "new", "raw")
            log.mark("done")
        found = set()
        for state in states_of(log, {"disk": start["disk"]}, seed=1, least=5):
            assert not await own_errors(state.images), state.story
            async with opened({"disk": SimDisk(state.images["disk"])}, {"file": "disk", "backing": None}) as node:
                named = next((each.filename for each in node.driver.implied_children()), None)
            below = {"disk": SimDisk(state.images["disk"])} | ({named: SimDisk(start[named])} if named else {})
            backing = {"driver": "raw", "file": named} if named else None
            async with opened(below, {"file": "disk", "backing": backing}) as node:
                assert await node.read(0, SIZE) == shown, state.story
            found.add(named)
            if any(label == "done" for _, label in log.marks(state.issued)):
                assert named == "new", state.story
        assert found == {"old" if has_old else None, "new"}

    asyncio.run(judge())
