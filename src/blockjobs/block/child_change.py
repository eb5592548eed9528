"""Children that come and go while their parent is in use, as a quorum's (spec/block-layer.md §1)."""

from typing import TYPE_CHECKING

from blockjobs.base.errors import NodeNotFound, UsageError
from blockjobs.block.node import Node

if TYPE_CHECKING:
    from blockjobs.block.graph import Graph


async def add_child(graph: "Graph", parent: Node, name: str) -> None:
    """Give `parent` one more child, the node of that name.

    Raises:
        UsageError: in QEMU's words; nothing changed.
    Waits: for the users of `parent` to park. Checkpoint: no.
    """
    try:
        child = graph.find(name)
    except NodeNotFound:
        raise UsageError(f"Node '{name}' not found") from None
    if not parent.driver.takes_children:
        raise UsageError(f"The node {parent.name} does not support adding a child")
    if child.parents:
        raise UsageError(f"The node {child.name} already has a parent")
    async with graph.edit() as edit:
        await edit.set_child(parent, parent.driver.edge_for(child), child)


async def remove_child(graph: "Graph", parent: Node, edge: str) -> None:
    """Take a child away from `parent`; it is closed if nothing else holds it.

    Raises:
        UsageError: in QEMU's words; nothing changed.
    Waits: for the users of `parent` to park. Checkpoint: no.
    """
    if edge not in parent.edges:
        raise UsageError(f"Node '{parent.name}' does not have child '{edge}'")
    if not parent.driver.takes_children:
        raise UsageError(f"The node {parent.name} does not support removing a child")
    async with graph.drained(parent), graph.edit() as edit:
        parent.driver.check_may_lose(edge)
        await edit.set_child(parent, edge, None)
