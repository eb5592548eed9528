"""How a job that shortens a chain begins: set up, made, attached to its nodes, started; or nothing has happened."""

from collections.abc import Awaitable, Callable

from blockjobs.jobs.block_job import JobHost
from blockjobs.jobs.chain_options import BlockCommit, BlockStream
from blockjobs.jobs.commit import CommitJob
from blockjobs.jobs.stream import StreamJob
from blockjobs.lifecycle.handle import JobHandle


async def start_chain_job(
    host: JobHost,
    job: CommitJob | StreamJob,
    options: BlockCommit | BlockStream,
    set_up: Callable[[], Awaitable[None]],
    *,
    job_first: bool = False,
) -> JobHandle:
    """Start a job whose arguments are checked.

    Args:
        host: where it runs.
        job: not set up yet.
        options: of the job in general: identifier, speed, how it ends.
        set_up: puts the job's filter in place.
        job_first: the job exists before its filter, so that a bad filter shows in events too, as with QEMU.

    Raises:
        UsageError: with QEMU's text; the graph is as before.
        IoFailure: an image could not be made writable.
    Waits: for drains and for opening the filter. Checkpoint: no.
    """
    handle: JobHandle | None = None
    try:
        if not job_first:
            await set_up()
        handle = host.jobs.create(
            job.type_name,
            job,
            id=options.job_id or "",
            auto_finalize=options.auto_finalize,
            auto_dismiss=options.auto_dismiss,
            speed_bytes_per_s=options.speed,
        )
        if job_first:
            await set_up()
        await job.hold_all(handle)
    except BaseException:
        if handle is not None:
            handle.discard()
        await job.dismantle()
        raise
    handle.start()
    return handle
