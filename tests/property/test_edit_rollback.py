"""Random changes of a graph of real files, with a failure at a random step: all of it, or nothing.

What must be as before: nodes, edges and their order, rights, options, open descriptors, and the locks on the files as
another process sees them.
"""

import asyncio
import os
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockjobs.base.errors import BlockjobsError
from blockjobs.block.claims import ALL, Perm
from blockjobs.block.drivers import host_syscalls
from blockjobs.block.drivers.copy_before_write import CopyBeforeWriteOptions
from blockjobs.block.drivers.file import File
from blockjobs.block.drivers.file_medium import FileMedium
from blockjobs.block.drivers.qcow2.create import NewImage, create_image
from blockjobs.block.edit import Edit
from blockjobs.block.graph import Graph
from blockjobs.block.node import Node
from blockjobs.testing.graphs import add_node, new_graph

NAMES = ("a", "b", "c", "d")
SIZE = 1 << 20


class Injected(Exception):
    """The failure of the test."""


async def new_images(directory: Path) -> None:
    graph = new_graph()
    for name in NAMES:
        path = directory / name
        path.touch()
        file = await add_node(graph, driver="file", node_name=name, filename=str(path))
        user = await graph.claim("test", file, Perm.WRITE | Perm.RESIZE, ALL)
        await create_image(file, None, NewImage(size=SIZE))
        await graph.release(user)
    await graph.close()


async def populate(graph: Graph, directory: Path) -> None:
    """a and b have users; b stands on c; d is for whatever comes."""
    for name, options in (("a", {}), ("c", {"read_only": True}), ("b", {"backing": "c"}), ("d", {"read_only": True})):
        file = {"driver": "file", "filename": str(directory / name), "node-name": f"{name}f"}
        await add_node(graph, driver="qcow2", node_name=name, file=file, **{"backing": None, **options})
    await graph.claim("an unnamed block device", graph.node("a"), Perm.CONSISTENT_READ | Perm.WRITE, ALL)
    await graph.claim("an unnamed block device", graph.node("b"), Perm.CONSISTENT_READ, ALL & ~Perm.RESIZE)
    await graph.claim("a job", graph.node("b"), Perm(0), ALL, name="main node", follows=False)


def locks_on(path: Path) -> list[bool]:
    descriptor = os.open(path, os.O_RDWR)
    try:
        places = [start + index for start in (100, 200) for index in range(4)]
        return [host_syscalls.is_locked_by_others(descriptor, at) for at in places]
    finally:
        os.close(descriptor)


def state_of(graph: Graph, directory: Path) -> list[object]:
    state: list[object] = [
        (
            node,
            node.options,
            node.settings,
            node.rights,
            list(node.edges.items()),
            [edge.rights for edge in node.edges.values()],
            list(node.children.items()),
            list(node.parents),
            _descriptor(node),
        )
        for node in graph.nodes()
    ]
    return [*state, [locks_on(directory / name) for name in NAMES], len(os.listdir("/proc/self/fd"))]


def _descriptor(node: Node) -> int | None:
    if isinstance(node.driver, File) and isinstance(node.driver.medium, FileMedium):
        return node.driver.medium.descriptor
    return None


Step = Callable[[Graph, Edit], Awaitable[None]]
node_names = st.sampled_from(NAMES)


def insert(above: str, target: str) -> Step:
    async def step(graph: Graph, edit: Edit) -> None:
        node = graph.node(above)
        await edit.insert(above=node, filter=CopyBeforeWriteOptions(file=node.name, target=target), implicit=True)

    return step


def set_backing(parent: str, child: str | None) -> Step:
    async def step(graph: Graph, edit: Edit) -> None:
        await edit.set_child(graph.node(parent), "backing", None if child is None else graph.node(child))

    return step


def replace(old: str, new: str) -> Step:
    async def step(graph: Graph, edit: Edit) -> None:
        await edit.replace(graph.node(old), graph.node(new))

    return step


def switch(name: str, read_only: bool) -> Step:
    async def step(graph: Graph, edit: Edit) -> None:
        if graph.node(name) not in edit._turned:  # once in an edit
            await edit.set_read_only(graph.node(name), read_only=read_only)

    return step


async def fail(graph: Graph, edit: Edit) -> None:
    raise Injected


steps = st.one_of(
    st.builds(insert, node_names, node_names),
    st.builds(set_backing, node_names, st.none() | node_names),
    st.builds(replace, node_names, node_names),
    st.builds(switch, node_names, st.booleans()),
)
INSIDE = (
    "blockjobs.block.drivers.file_reopen.FileSwitch.prepare",
    "blockjobs.block.drivers.file_reopen.FileSwitch.activate",
    "blockjobs.block.drivers.qcow2.reopen.Qcow2Switch.prepare",
    "blockjobs.block.drivers.qcow2.reopen.Qcow2Switch.activate",
)


@settings(max_examples=60, deadline=None)
@given(wanted=st.lists(steps, min_size=1, max_size=5), fails=st.booleans(), inside=st.none() | st.sampled_from(INSIDE))
def test_all_or_nothing(wanted: list[Step], fails: bool, inside: str | None) -> None:
    async def body(directory: Path) -> None:
        await new_images(directory)
        graph = new_graph()
        try:
            await populate(graph, directory)
            before = state_of(graph, directory)
            with pytest.MonkeyPatch.context() as patch:
                if inside is not None:
                    patch.setattr(inside, refuse)
                done = await change(graph, [*wanted, fail] if fails else wanted)
            if not done:
                assert state_of(graph, directory) == before
            await check_rights(graph)
        finally:
            await graph.close()
            graph.offload.close()

    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(body(Path(directory)))


async def refuse(*arguments: object) -> None:
    raise Injected


async def change(graph: Graph, wanted: list[Step]) -> bool:
    try:
        async with graph.edit() as edit:
            for step in wanted:
                await step(graph, edit)
    except (BlockjobsError, Injected):
        return False
    return True


async def check_rights(graph: Graph) -> None:
    """What was derived step by step is what follows from the users alone; and every node still reads."""
    held = {node: node.rights for node in graph.nodes()}
    graph._unsettled.update(graph.nodes())
    graph.refresh_rights()
    assert {node: node.rights for node in graph.nodes()} == held
    for node in graph.nodes():
        if node.driver_name == "qcow2" and Perm.CONSISTENT_READ in node.rights.needs:
            assert await node.read(0, 512) == bytes(512)
