"""Which backing file an image's header names: changed on disk only, the graph is another matter (spec/jobs.md §8)."""

from typing import TYPE_CHECKING

from blockjobs.base.errors import UsageError
from blockjobs.block.driver import FilterDriver, FormatDriver
from blockjobs.block.node import Node
from blockjobs.block.users import Edge

if TYPE_CHECKING:
    from blockjobs.block.graph import Graph


async def name_backing_file(graph: "Graph", node: Node, filename: str | None, backing_format: str | None) -> None:
    """Let the header of an image name another backing file, or none.

    All that was written to the image before is durable before the header changes, so that a crash at any instant leaves
    an image that shows the same with one of the two names. A read-only image is writable for the moment.

    Args:
        node: the image itself, no filter.
        backing_format: the name of the file's format; ignored without a file.

    Raises:
        UsageError: the format has no such name, or the header no room for it; nothing changed.
        IoFailure: the header has one of the two names.
    Waits: if the node is read-only, for its users to park; then I/O. Checkpoint: no.
    """
    driver = node.driver
    if not isinstance(driver, FormatDriver):
        raise UsageError("Operation not supported")
    if not node.read_only:
        await driver.name_backing_file(filename, backing_format)
        return
    await graph.set_read_only(node, read_only=False)
    try:
        await driver.name_backing_file(filename, backing_format)
    finally:
        await graph.set_read_only(node, read_only=True)


def root_node(graph: "Graph", name: str) -> Node:
    """The node of that name, if no other node uses it.

    Raises:
        NodeNotFound, UsageError: in QEMU's words.
    """
    node = graph.find(name)
    if any(isinstance(parent, Edge) for parent in node.parents):
        raise UsageError("Need a root block node")
    return node


def check_in_chain(top: Node, image: Node) -> None:
    """Whether the backing file of `image`, somewhere below `top`, may get another name.

    Raises:
        UsageError: in QEMU's words.
    """
    if image.backing is None:
        raise UsageError("not allowing backing file change on an image without a backing file")
    node: Node | None = top
    while node is not None and node is not image:
        node = node.children[node.driver.filtered] if isinstance(node.driver, FilterDriver) else node.backing
    if node is None:
        raise UsageError(f"'{top.name}' and image file are not in the same chain")
