"""Commands on block nodes (spec/jobs.md §5, §8; spec/block-layer.md §1, §5)."""

from typing import TYPE_CHECKING

from blockjobs.base.errors import NodeNotFound, UsageError
from blockjobs.block.activity import set_active
from blockjobs.block.info import BlockDeviceInfo
from blockjobs.block.kept_info import node_infos
from blockjobs.block.options import BlockdevOptions
from blockjobs.block.write_threshold import set_write_threshold
from blockjobs.jobs.create import CreateJob
from blockjobs.jobs.create_options import BlockdevCreateOptions
from blockjobs.schema.command import qmp
from blockjobs.schema.types import Record, UInt64

if TYPE_CHECKING:
    from blockjobs.host import Host


class BlockInfo(Record, frozen=True, kw_only=True):
    """A block device of a virtual machine; a storage daemon has none."""

    device: str


@qmp.command(since="2.9")
async def blockdev_add(host: "Host", options: BlockdevOptions) -> None:
    """Open a block node.

    Args:
        options: its driver and name, and what the driver asks for.
    """
    await host.graph.open(options)


@qmp.command(since="2.9")
async def blockdev_del(host: "Host", *, node_name: str) -> None:
    """Close a block node that `blockdev-add` opened and that nothing uses.

    Args:
        node_name: the node.
    """
    await host.graph.remove(node_name)


@qmp.command(since="10.0")
async def blockdev_set_active(host: "Host", *, node_name: str | None = None, active: bool) -> None:
    """Hand images over to another program, or take them back, without closing them.

    An inactive node refuses writes; all that was in memory is in its file, and others may open that for writing.

    Args:
        node_name: one node; all that were opened by name if left out.
        active: what they are to be.
    """
    await set_active(host.graph, node_name, active)


@qmp.command(since="3.0", waits=False)
def blockdev_create(host: "Host", *, job_id: str, options: BlockdevCreateOptions) -> None:
    """Start a job that makes an image; it must be dismissed when it has concluded.

    Args:
        job_id: identifier of the new job.
        options: the driver and what it asks for.
    """
    host.jobs.create("create", CreateJob(host.graph, options), id=job_id, auto_dismiss=False).start()


@qmp.command(since="0.14", name="block_resize")
async def block_resize(host: "Host", *, device: str | None = None, node_name: str | None = None, size: int) -> None:
    """Change the length of a node.

    Args:
        device: not for storage daemons, which have no devices.
        node_name: the node.
        size: new length in bytes.
    """
    if node_name is None:
        raise NodeNotFound(device=device or "")
    node = host.graph.node(node_name)
    try:
        node.check_op("resize")
    except UsageError as busy:
        raise UsageError(f"Device '{device or '(null)'}' is in use") from busy
    await host.graph.resize(node, size)


@qmp.command(since="2.3")
async def block_set_write_threshold(host: "Host", *, node_name: str, write_threshold: UInt64) -> None:
    """Ask for one BLOCK_WRITE_THRESHOLD when somebody writes past an offset.

    Args:
        node_name: the node; for a thin volume the one of the file below the format.
        write_threshold: the offset in bytes; 0 takes the wish back.
    """
    set_write_threshold(host.graph, node_name, write_threshold)


@qmp.command(since="2.0", waits=False)
def query_named_block_nodes(host: "Host", *, flat: bool = False) -> list[BlockDeviceInfo]:
    """List all nodes, the newest first.

    Args:
        flat: leave out the information on backing images inside each node's.
    """
    return node_infos(host.graph.nodes(), flat=flat)


@qmp.command(since="0.14", waits=False)
def query_block(host: "Host") -> list[BlockInfo]:
    """List the block devices: none, since a storage daemon drives no virtual hardware."""
    del host
    return []
