"""Any order of opens, claims, edits and removals: refused ones change nothing, and rights always fit."""

import asyncio
import random
from typing import Any

import msgspec
import pytest

from blockjobs.base.errors import BlockjobsError
from blockjobs.block.claims import ALL, Perm, solve
from blockjobs.block.drivers.copy_before_write import CopyBeforeWriteOptions
from blockjobs.block.graph import Graph
from blockjobs.block.info import describe, dirty_infos
from blockjobs.block.kept_info import node_info, node_infos
from blockjobs.block.node import Node
from blockjobs.block.users import Root
from blockjobs.testing.disk import SimDisk
from blockjobs.testing.graphs import add_node, new_graph
from blockjobs.wire.qmp_encode import encode

STEPS = 120


def picture(graph: Graph) -> dict[str, Any]:
    """Everything about the graph that a refused change must leave alone."""
    return {
        node.name: (
            {edge: (child.node.name, child.rights) for edge, child in node.edges.items()},
            {edge: child.name for edge, child in node.children.items()},
            sorted(parent.holder for parent in node.parents),
            node.rights,
            node.monitor_owned,
        )
        for node in graph.nodes()
    }


class Walk:
    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.graph = new_graph()
        self.roots: list[Root] = []
        self.count = 0

    def any_node(self) -> Node:
        return self.chance.choice(self.graph.nodes())

    def any_perms(self) -> Perm:
        return Perm(self.chance.choice([0, 1, 3, 3, 8, 15]))

    async def step(self) -> None:
        self.count += 1
        name = f"n{self.count}"
        match self.chance.randrange(9):
            case 0:
                await self.graph.open_medium(SimDisk(bytes(65536)), name, read_only=self.chance.random() < 0.3)
            case 1:
                read_only = self.chance.random() < 0.3
                await add_node(self.graph, driver="raw", node_name=name, read_only=read_only, file=self.any_node().name)
            case 2:
                inner = {"driver": "raw", "offset": 512, "file": self.any_node().name}
                await add_node(self.graph, driver="raw", node_name=name, file=inner)
            case 3 | 4:
                needs, shares = self.any_perms(), ALL & ~self.any_perms()
                self.roots.append(await self.graph.claim("a walker", self.any_node(), needs, shares))
            case 5 if self.roots:
                await self.graph.release(self.roots.pop(self.chance.randrange(len(self.roots))))
            case 6:
                await self.graph.remove(self.any_node().name)
            case 7:
                source, target = self.any_node(), self.any_node()
                async with self.graph.edit() as edit:
                    options = CopyBeforeWriteOptions(node_name=name, file=source.name, target=target.name)
                    await edit.insert(above=source, filter=options)
                    if self.chance.random() < 0.3:
                        raise BlockjobsError("changed my mind")
                    self.roots.append(await self.graph.claim("a job", self.graph.node(name), Perm(0), ALL, name="hold"))
            case 8:
                filters = [node for node in self.graph.nodes() if node.driver_name == "copy-before-write"]
                async with self.graph.edit() as edit:
                    if filters and self.chance.random() < 0.6:
                        await edit.drop(self.chance.choice(filters))
                    else:
                        await edit.replace(self.any_node(), self.any_node())

    async def check(self) -> None:
        nodes = self.graph.nodes()
        solution = solve(nodes)
        for node in nodes:
            assert solution.nodes[node] == node.rights
            assert {edge: child.node for edge, child in node.edges.items()} == node.children
            assert node.parents or node.monitor_owned or node.driver_name == "copy-before-write"
            for parent in node.parents:
                assert parent.node is node
        for root in self.roots:
            assert root in root.node.parents
        for node in nodes:
            fresh = msgspec.structs.replace(describe(node, flat=False), dirty_bitmaps=dirty_infos(node) or None)
            assert await node_info(node) == fresh
            assert node_infos([node]).texts == [encode(fresh).rstrip()]


@pytest.mark.parametrize("seed", range(12))
def test_walk(seed: int) -> None:
    async def main() -> None:
        walk, refused = Walk(seed), 0
        await walk.graph.open_medium(SimDisk(bytes(65536)), "first")
        for _ in range(STEPS):
            if not walk.graph.nodes():
                await walk.graph.open_medium(SimDisk(bytes(65536)), f"again{walk.count}")
            before = picture(walk.graph)
            try:
                await walk.step()
            except BlockjobsError:
                refused += 1
                assert picture(walk.graph) == before
            await walk.check()
        assert 5 < refused < STEPS - 10
        await walk.graph.close()
        assert walk.graph.nodes() == []

    asyncio.run(main())
