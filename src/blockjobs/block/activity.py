"""Handing an image over to another program without closing it: `blockdev-set-active` (spec/since-7.2.md, 10.0).

An inactive node has nothing in memory that the file lacks, holds no lock that keeps writers away, and refuses writes.
"""

from typing import TYPE_CHECKING

from msgspec.structs import replace

from blockjobs.base.errors import NodeNotFound, UsageError

if TYPE_CHECKING:
    from blockjobs.block.graph import Graph
    from blockjobs.block.node import Node


async def set_active(graph: "Graph", name: str | None, active: bool) -> None:
    """Activate or inactivate a node, or all that users have opened.

    Args:
        name: of one node; None for all.
        active: what they are to be; those that are so already are left alone.

    Raises:
        UsageError: no such node, or somebody writes to one; those before it are done.
        IoFailure: what was only in memory could not be written, or the image not be opened for writing.
    Waits: for users of the nodes to park, then I/O. Checkpoint: no.
    """
    for node in _chosen(graph, name):
        if node.settings.is_active == active:
            continue
        wants_write = node.options.read_only is not True
        if active:
            node.settings = replace(node.settings, is_active=True)
        try:
            if wants_write:
                await graph.set_read_only(node, read_only=not active)
        except BaseException:
            if active:
                node.settings = replace(node.settings, is_active=False)
            raise
        # Rights below follow: nobody keeps writers away from an inactive image.
        graph.set_options(node, node.options, replace(node.settings, is_active=active))
        graph.refresh_rights()


def _chosen(graph: "Graph", name: str | None) -> "list[Node]":
    if name is None:
        return [node for node in graph.nodes() if node.monitor_owned]
    try:
        return [graph.node(name)]
    except NodeNotFound:
        raise UsageError(f"Failed to find node with node-name='{name}'") from None
