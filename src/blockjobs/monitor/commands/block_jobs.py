"""The `block-job-*` commands: only jobs on block nodes, with their own not-found error (spec/lifecycle.md §3)."""

from typing import TYPE_CHECKING

from blockjobs.base.errors import ParameterError, UsageError
from blockjobs.jobs.block_job import BlockJobInfo, block_job_info
from blockjobs.jobs.mirror_options import MirrorCopyMode
from blockjobs.lifecycle.registry import JobType
from blockjobs.schema.command import qmp
from blockjobs.schema.types import Options

if TYPE_CHECKING:
    from blockjobs.host import Host


class BlockJobChange(Options, frozen=True, kw_only=True):
    """What `block-job-change` is told; `copy_mode` belongs to mirrors."""

    id: str
    type: JobType
    copy_mode: MirrorCopyMode | None = None


@qmp.command(since="1.1", waits=False)
def query_block_jobs(host: "Host") -> list[BlockJobInfo]:
    """List the block jobs, the newest first."""
    return [block_job_info(job) for job in host.jobs.jobs() if job.is_block_job]


@qmp.command(since="1.3", waits=False)
def block_job_pause(host: "Host", *, device: str) -> None:
    """Pause a block job at its next checkpoint.

    Args:
        device: the job's identifier.
    """
    host.jobs.block_job(device).pause()


@qmp.command(since="1.3", waits=False)
def block_job_resume(host: "Host", *, device: str) -> None:
    """Let a block job go on that a user or an error policy paused, and reset its I/O status.

    Args:
        device: the job's identifier.
    """
    host.jobs.block_job(device).resume()


@qmp.command(since="1.1")
async def block_job_cancel(host: "Host", *, device: str, force: bool = False) -> None:
    """Cancel a block job; a ready mirror ends well instead, keeping its source, unless forced.

    Args:
        device: the job's identifier.
        force: cancel whatever the job could do more gently, and even if it is paused.
    """
    await host.jobs.block_job(device).block_cancel(force=force)


@qmp.command(since="1.3", waits=False)
def block_job_complete(host: "Host", *, device: str) -> None:
    """Ask a ready block job to finish its work.

    Args:
        device: the job's identifier.
    """
    host.jobs.block_job(device).complete()


@qmp.command(since="1.1", waits=False)
def block_job_set_speed(host: "Host", *, device: str, speed: int) -> None:
    """Change a block job's rate limit; it takes effect at once.

    Args:
        device: the job's identifier.
        speed: bytes per second, 0 for none.
    """
    host.jobs.block_job(device).set_speed(speed)


@qmp.command(since="2.12", waits=False)
def block_job_dismiss(host: "Host", *, id: str) -> None:
    """Forget a concluded block job; its identifier is free again.

    Args:
        id: the job's identifier.
    """
    host.jobs.block_job(id).dismiss()


@qmp.command(since="2.12")
async def block_job_finalize(host: "Host", *, id: str) -> None:
    """Settle a pending block job, and with it the whole transaction it belongs to.

    Args:
        id: the identifier of any job of the transaction.
    """
    await host.jobs.block_job(id).finalize()


@qmp.command(since="8.2", waits=False)
def block_job_change(host: "Host", options: BlockJobChange) -> None:
    """Change options of a live block job; which ones depends on its type.

    Args:
        options: the job's identifier and type, and what is to change.
    """
    if options.type == "mirror" and options.copy_mode is None:
        raise ParameterError.missing("copy-mode")
    if options.type != "mirror" and options.copy_mode is not None:
        raise ParameterError.unexpected("copy-mode")
    job = host.jobs.block_job(options.id)
    if job.type != options.type:
        raise UsageError(f"Job '{options.id}' is '{job.type}' job, not '{options.type}'")
    job.change(options)
