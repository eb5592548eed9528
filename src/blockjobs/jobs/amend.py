"""The job type `amend`: change what was chosen when an image was made (spec/jobs.md §6)."""

from typing import TYPE_CHECKING

from blockjobs.base.errors import NodeNotFound, UsageError
from blockjobs.block.amend_options import Amending, AmendOptions, AnyAmendOptions, amend_options
from blockjobs.jobs.create_options import NOT_CREATABLE, empty_variant
from blockjobs.lifecycle.context import JobContext
from blockjobs.lifecycle.handle import JobHandle
from blockjobs.lifecycle.job import Job
from blockjobs.lifecycle.registry import job_type
from blockjobs.schema.types import Options

if TYPE_CHECKING:
    from blockjobs.block.graph import Graph
    from blockjobs.block.node import Node
    from blockjobs.jobs.block_job import JobHost

OPERATION = "amend"


class XBlockdevAmend(Options, frozen=True, kw_only=True):
    """Which node, what to change, and whether that may lose something."""

    job_id: str
    node_name: str
    options: AnyAmendOptions
    force: bool = False


for _driver in (*NOT_CREATABLE, "file"):
    amend_options.add(empty_variant(_driver, AmendOptions))


@job_type("amend")
class AmendJob(Job):
    """Guests of the node are held while it works, during a pause too. A cancel takes effect as long
    as nothing has changed.

    Progress is one unit for the whole, and whatever the driver adds: tables and reference count blocks.
    """

    def __init__(self, node: "Node", options: AmendOptions, *, force: bool) -> None:
        self._graph: Graph = node.graph
        self._node = node
        self._options, self._force = options, force

    async def run(self, ctx: JobContext) -> None:
        """See `Job`. Checkpoint: yes. Waits: for guests' requests, and I/O."""
        units = 1
        ctx.progress.set_remaining(1)

        def expect(more: int) -> None:
            nonlocal units
            units += more
            ctx.progress.set_remaining(units - ctx.progress.current)

        def advance(done: int) -> None:
            ctx.progress.advance(min(done, max(0, units - 1 - ctx.progress.current)))

        await ctx.checkpoint()
        work = Amending(force=self._force, expect=expect, advance=advance, checkpoint=ctx.checkpoint)
        self._node.block(f"block device is in use by job: {OPERATION}", self)
        try:
            async with self._graph.drained(self._node):
                await self._node.driver.amend(self._options, work)
        finally:
            self._node.unblock(self)
            ctx.progress.advance(max(0, units - ctx.progress.current))


def start_amend(host: "JobHost", options: XBlockdevAmend) -> JobHandle:
    """Check and start.

    Raises:
        UsageError: in QEMU's words; nothing is changed. What the driver has against it, the job says.
    """
    try:
        node = host.graph.find(options.node_name)
    except NodeNotFound:
        raise NodeNotFound(device="", node=options.node_name) from None
    wanted = options.options.__struct_config__.tag
    if not node.driver.can_amend and node.driver_name == wanted:
        raise UsageError("Driver does not support x-blockdev-amend")
    if node.driver_name != wanted:
        raise UsageError("x-blockdev-amend doesn't support changing the block driver")
    if node.read_only:
        raise UsageError(f"Node '{node.name}' is read-only")
    node.check_op(OPERATION)
    handle = host.jobs.create(
        "amend", AmendJob(node, options.options, force=options.force), id=options.job_id, auto_dismiss=False
    )
    handle.start()
    return handle
