"""A power cut while a header gets another backing file: the old name, or the new one and all data from before."""

import asyncio

import pytest
from replay import blank, graph_over, opened, own_errors
from workload import states_of

from blockjobs.block.backing_file import name_backing_file
from blockjobs.block.claims import ALL, Perm
from blockjobs.block.drivers.qcow2.create import NewImage
from blockjobs.testing.crash import RecordingMedium, WriteLog
from blockjobs.testing.disk import Pages, SimDisk
from blockjobs.testing.graphs import add_node

KIB = 1 << 10
CONTENT = b"copied up" * 500


@pytest.mark.parametrize("new_name", [None, "o" * 900])
@pytest.mark.parametrize("old_name", ["base.raw", "b" * 900])
@pytest.mark.parametrize("read_only", [False, True])
def test_rename(old_name: str, new_name: str | None, read_only: bool) -> None:
    """Names of 900 bytes lie past the header's first sector, so that an old and a new one are there at once."""

    async def judge() -> None:
        image = NewImage(size=256 * KIB, cluster_size=4 * KIB, backing_file=old_name, backing_format="raw")
        start = await blank(image)
        log = WriteLog()
        async with graph_over({"disk": RecordingMedium(SimDisk(start["disk"]), log)}) as graph:
            node = await add_node(graph, driver="qcow2", node_name="n", file="disk", backing=None)
            user = await graph.claim("a test", node, needs=Perm.WRITE | Perm.CONSISTENT_READ, shares=ALL)
            await node.write(8 * KIB, CONTENT)
            await graph.release(user)
            if read_only:
                await graph.set_read_only(node, read_only=True)
            await name_backing_file(graph, node, new_name, "raw")
            assert node.read_only is read_only
            log.mark("renamed")
        found = set()
        for state in states_of(log, start, seed=1, least=5):
            assert not await own_errors(state.images), state.story
            name, content = await look(state.images)
            found.add(name)
            assert name in (old_name, new_name), state.story
            if name == new_name:
                assert content == CONTENT, state.story
            if any(label == "renamed" for _, label in log.marks(state.issued)):
                assert name == new_name, state.story
        assert found == {old_name, new_name}

    asyncio.run(judge())


async def look(images: dict[str, Pages]) -> tuple[str | None, bytes]:
    async with opened({"disk": SimDisk(images["disk"])}, {"file": "disk", "backing": None}) as node:
        implied = node.driver.implied_children()
        return (implied[0].filename if implied else None), await node.read(8 * KIB, len(CONTENT))
