"""The job type `create`: make a file, or lay out an image in a node (spec/jobs.md §5)."""

from blockjobs.base.errors import UsageError
from blockjobs.block.graph import Graph
from blockjobs.jobs.create_image import create_image
from blockjobs.jobs.create_options import CreateOptions, FileCreateOptions, LuksCreateOptions, Qcow2CreateOptions
from blockjobs.lifecycle.context import JobContext
from blockjobs.lifecycle.job import Job
from blockjobs.lifecycle.registry import job_type


@job_type("create")
class CreateJob(Job):
    """One step that is never interrupted: pause and cancel take effect when it is done.

    Raises:
        UsageError: the driver cannot create anything; everything else fails inside the job.
    """

    def __init__(self, graph: Graph, options: CreateOptions) -> None:
        if not isinstance(options, FileCreateOptions | LuksCreateOptions | Qcow2CreateOptions):
            raise UsageError("Driver does not support blockdev-create")
        self._graph = graph
        self._options = options

    async def run(self, ctx: JobContext) -> None:
        """See `Job`. Progress is 1 of 1 when the attempt is over, also if it failed. Checkpoint: no. Waits: I/O."""
        ctx.progress.set_remaining(1)
        try:
            await create_image(self._graph, self._options)
        finally:
            ctx.progress.advance(1)
