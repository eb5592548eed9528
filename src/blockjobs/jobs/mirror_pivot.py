"""The last step of a mirror: its target takes the place of another node (spec/jobs.md §3, Prepare)."""

import errno
from enum import Enum, auto

from blockjobs.base.errors import IoFailure, NodeNotFound, UsageError
from blockjobs.block.driver import FilterDriver
from blockjobs.block.gate import Gate
from blockjobs.block.graph import Graph
from blockjobs.block.node import Node
from blockjobs.block.users import Edge
from blockjobs.jobs.backup_options import MirrorSyncMode


class Backing(Enum):
    """What becomes of the backing node of a mirror's target."""

    AS_IS = auto()
    """The user's affair (blockdev-mirror)."""
    SOURCE = auto()
    """The source's own for sync=top, the source for sync=none, none else: drive-mirror made the image so."""
    OWN = auto()
    """What the image's header names: drive-mirror found it."""


def find_replaced(graph: Graph, source: Node, name: str | None) -> Node:
    """The node that the target of a mirror of `source` shall replace.

    Raises:
        UsageError: it is not there, or showing the target in its place would change what its users see.
    """
    if name is None:
        return source
    try:
        node = graph.node(name)
    except NodeNotFound:
        raise UsageError(f"Failed to find node with node-name='{name}'") from None
    if not is_replaceable(source, node):
        raise UsageError(
            f"Cannot replace '{name}' by a node mirrored from '{source.name}', because it cannot be guaranteed that "
            "doing so would not lead to an abrupt change of visible data"
        )
    return node


def is_replaceable(source: Node, node: Node) -> bool:
    """Whether users may be shown a mirror of `source` in place of `node`.

    They may if that shows the same bytes: it is the source, or below a filter; or if its only user is a driver that
    compares it with others (quorum).
    """
    while True:
        if source is node:
            return True
        driver = source.driver
        if isinstance(driver, FilterDriver):
            source = source.children[driver.filtered]
            continue
        is_voter = any(child is node and driver.can_replace(name) for name, child in source.children.items())
        return is_voter and len(node.parents) == 1


def replaceable(graph: Graph, source: Node, name: str | None) -> Node:
    """`find_replaced` at the end of the job.

    Raises:
        IoFailure: EPERM: it is no longer so.
    """
    try:
        return find_replaced(graph, source, name)
    except UsageError as error:
        raise IoFailure(errno.EPERM, str(error)) from error


async def move_users(
    graph: Graph,
    *,
    filter_node: Node,
    source: Node,
    target: Node,
    replaced: Node | None,
    backing: Backing,
    sync: MirrorSyncMode,
    gate: Gate,
) -> None:
    """Attach the target's backing node, let the users of `replaced` use the target, and take the filter away.

    Args:
        replaced: None to leave the users where they are.
        gate: where changes wait; they go on where the users are then.

    Raises:
        IoFailure: the graph is as before: EPERM if rights forbid it.
    Waits: for users to park, I/O where nodes are reopened. Checkpoint: no.
    """
    try:
        async with graph.edit() as edit:
            if backing is Backing.OWN:
                await edit.open_backing(target)
            elif backing is Backing.SOURCE:
                below = {MirrorSyncMode.TOP: source.backing, MirrorSyncMode.NONE: source}.get(sync)
                if below is not None:
                    await edit.set_child(target, "backing", below)
            filter_node.driver.guards = False  # type: ignore[attr-defined]  # it is a MirrorTop
            if replaced is not None:
                if target.read_only is not replaced.read_only:
                    await edit.set_read_only(target, read_only=replaced.read_only)
                if replaced is source:
                    await edit.replace(filter_node, target)
                edges = [parent for parent in replaced.parents if isinstance(parent, Edge)]
                await edit.replace(replaced, target, exclude=[edge for edge in edges if edge.parent is filter_node])
            await edit.drop(filter_node)
    except UsageError as error:
        raise IoFailure(errno.EPERM, str(error)) from error
    where = target if replaced is source else source
    gate.leads_to.update({filter_node: where, source: where} if where is target else {filter_node: where})
