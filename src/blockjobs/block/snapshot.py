"""An overlay takes the place of a node, which becomes its backing image: the external snapshot (spec/jobs.md §8)."""

from typing import TYPE_CHECKING

from blockjobs.base.errors import UsageError
from blockjobs.block.claims import Perm
from blockjobs.block.driver import FilterDriver
from blockjobs.block.edit import Edit
from blockjobs.block.node import Node
from blockjobs.block.options import NodeOptions
from blockjobs.block.settings import Settings

if TYPE_CHECKING:
    from blockjobs.block.graph import Graph

OPERATION = "external-snapshot"
"""What somebody who holds the node may forbid."""


async def take_snapshot(graph: "Graph", node: Node, overlay: Node | NodeOptions) -> Edit:
    """Let all users of `node` use the overlay, and make `node` its read-only backing image.

    The instant of the snapshot is the first moment at which all users of `node` stand still. They stand still until the
    caller ends the edit, which has been settled: by `finish` or by `undo`.

    Args:
        node: everything that was written to it is in its files afterwards.
        overlay: an open node, or a description of one to open, that has no backing image. One that is opened here lives
            as long as something uses it.

    Raises:
        UsageError: in QEMU's words; everything is as before.
        IoFailure: `node` could not be flushed; everything is as before.
    Waits: for the users of both to park, then I/O. Checkpoint: no.
    """
    edit = Edit(graph)
    try:
        if isinstance(overlay, NodeOptions):
            overlay = await edit.open(overlay, _inherited(node))
        check_overlay(overlay)
        await edit.drain(node, overlay)
        if not node.read_only:
            await node.flush()
        # What waits comes first, so that nobody derives rights from a graph that is changed in part.
        await edit.set_read_only(node, read_only=True)
        await edit.set_child(overlay, "backing", node)
        await edit.replace(node, overlay)
    except BaseException:
        await edit.undo()
        raise
    await edit.settle()
    return edit


def check_overlay(overlay: Node) -> None:
    """Whether a node can become an overlay.

    Raises:
        UsageError: in QEMU's words.
    """
    if Perm.CONSISTENT_READ in overlay.rights.needs:
        raise UsageError("The overlay is already in use")
    if isinstance(overlay.driver, FilterDriver):
        raise UsageError("Filters cannot be used as overlays")
    if "backing" in overlay.children:
        raise UsageError("The overlay already has a backing image")
    if not hasattr(overlay.options, "backing"):
        raise UsageError("The overlay does not support backing images")


def _inherited(node: Node) -> Settings:
    """An overlay is opened as the node below was."""
    before = node.settings
    return Settings(read_only=before.read_only, unmap=before.unmap, direct=before.direct, no_flush=before.no_flush)
