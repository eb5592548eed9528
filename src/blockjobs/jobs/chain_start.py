"""How a job that shortens a chain begins: set up, made, attached to its nodes, started; or nothing has happened."""

from collections.abc import Awaitable

from blockjobs.base.errors import UsageError
from blockjobs.jobs.block_job import JobHost
from blockjobs.jobs.chain_options import BlockCommit, BlockStream
from blockjobs.jobs.commit import CommitJob
from blockjobs.jobs.stream import StreamJob
from blockjobs.lifecycle.handle import JobHandle


async def start_chain_job(
    host: JobHost, job: CommitJob | StreamJob, options: BlockCommit | BlockStream, set_up: Awaitable[None]
) -> JobHandle:
    """Start a job whose arguments are checked.

    Args:
        host: where it runs.
        job: not set up yet.
        options: of the job in general: identifier, speed, how it ends.
        set_up: puts the job's filter in place.

    Raises:
        UsageError: with QEMU's text; the graph is as before.
        IoFailure: an image could not be made writable.
    Waits: for drains and for opening the filter. Checkpoint: no.
    """
    try:
        await set_up
        handle = host.jobs.create(
            job.type_name,
            job,
            id=options.job_id or "",
            auto_finalize=options.auto_finalize,
            auto_dismiss=options.auto_dismiss,
            speed_bytes_per_s=options.speed,
        )
    except BaseException:
        await job.dismantle()
        raise
    try:
        await job.hold_all(handle)
    except UsageError:
        handle.discard()
        await job.dismantle()
        raise
    handle.start()
    return handle
