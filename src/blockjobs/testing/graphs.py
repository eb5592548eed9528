"""A block graph on its own, for tests of drivers and of whatever uses nodes."""

import asyncio
from collections.abc import Awaitable, Callable

from blockjobs.base.bus import Bus
from blockjobs.base.clock import SystemClock
from blockjobs.base.entropy import SeededEntropy
from blockjobs.base.offload import InlineOffload, Offload
from blockjobs.block.graph import Graph
from blockjobs.block.node import Node
from blockjobs.block.options import BlockdevOptions
from blockjobs.block.policy import OpenPolicy
from blockjobs.schema.command import convert


def new_graph(
    *, offload: Offload | None = None, policy: OpenPolicy | None = None, objects: dict[str, object] | None = None
) -> Graph:
    """An empty graph; work runs in the loop's thread unless an offload is given."""
    return Graph(
        clock=SystemClock(),
        offload=offload or InlineOffload(),
        entropy=SeededEntropy(1),
        bus=Bus(),
        policy=policy,
        objects=objects,
    )


async def add_node(graph: Graph, **options: object) -> Node:
    """As blockdev-add, with `_` for `-`: `add_node(graph, driver="raw", node_name="r", file={...})`.

    Waits: I/O. Checkpoint: no.
    """
    return await graph.open(
        convert({name.replace("_", "-"): value for name, value in options.items()}, BlockdevOptions)
    )


def run_in_graph(body: Callable[[Graph], Awaitable[None]], graph: Graph | None = None) -> None:
    """Run a coroutine function with a graph, in a loop of its own, and close the graph afterwards."""

    async def main() -> None:
        opened = graph or new_graph()
        try:
            await body(opened)
        finally:
            await opened.close()
            opened.offload.close()

    asyncio.run(main())
