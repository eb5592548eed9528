"""Asking another image what its snapshot table says: the ones that a snapshot of several images is made of."""

import os
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

from blockjobs.base.errors import UsageError
from blockjobs.block.filenames import directories_of
from blockjobs.block.internal_snapshots import InternalSnapshot
from blockjobs.block.options import BlockdevOptions
from blockjobs.block.policy import refuse_protocols
from blockjobs.schema.command import convert

if TYPE_CHECKING:
    from blockjobs.block.node import Node


def image_name(node: "Node") -> str:
    """How images name that of `node`, which is open or about to be."""
    return os.path.abspath(node.children["file"].filename)


def peer_snapshots(node: "Node") -> Callable[[str], Awaitable[Sequence[InternalSnapshot]]]:
    """How the image of `node` asks another one, by its absolute name: an open node, or a file in an allowed place.

    Files that were moved together are found beside each other. What is asked raises UsageError or IoFailure if there
    is no such image.
    """

    async def ask(name: str) -> Sequence[InternalSnapshot]:
        beside = os.path.join(os.path.dirname(image_name(node)), os.path.basename(name))
        for other in node.graph.nodes():
            known = other.driver.internal_snapshots
            if known is not None and other is not node and image_name(other) in (name, beside):
                return known.entries
        try:
            return await _read_entries(node, name)
        except UsageError:
            if beside == name:
                raise
            return await _read_entries(node, beside)

    return ask


async def _read_entries(node: "Node", name: str) -> Sequence[InternalSnapshot]:
    """The snapshots in a file that may be in use. Waits: reads of headers. Checkpoint: no.

    Raises:
        UsageError: it is not where images may name files, or is no image.
        IoFailure: it could not be read.
    """
    graph = node.graph
    refuse_protocols(name)
    scope = graph.policy.scope(name, directories_of(node.children["file"]))
    os.close(scope.open(name, os.O_RDONLY | os.O_CLOEXEC))
    options = {
        "driver": node.driver_name,
        "file": {"driver": "file", "filename": name},
        "backing": None,
        "read-only": True,
        "force-share": True,
    }
    peer = await graph.open(convert(options, BlockdevOptions), monitor_owned=False, looks_only=True)
    try:
        snapshots = peer.driver.internal_snapshots
        return [] if snapshots is None else list(snapshots.entries)
    finally:
        await graph.close_unused(peer)
