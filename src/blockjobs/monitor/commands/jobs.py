"""The `job-*` commands: they know every kind of job (spec/lifecycle.md §3)."""

from typing import TYPE_CHECKING

from blockjobs.lifecycle import events  # noqa: F401  importing it registers JOB_STATUS_CHANGE
from blockjobs.lifecycle.info import JobInfo
from blockjobs.schema.command import qmp

if TYPE_CHECKING:
    from blockjobs.host import Host


@qmp.command(since="3.0", waits=False)
def query_jobs(host: "Host") -> list[JobInfo]:
    """List all jobs, the newest first."""
    return [job.info() for job in host.jobs.jobs()]


@qmp.command(since="3.0", waits=False)
def job_pause(host: "Host", *, id: str) -> None:
    """Pause a job at its next checkpoint.

    A running job becomes paused, a ready one standby. Pausing a paused job is an error.

    Args:
        id: the job's identifier.
    """
    host.jobs.get(id).pause()


@qmp.command(since="3.0", waits=False)
def job_resume(host: "Host", *, id: str) -> None:
    """Let a job go on that a user or an error policy paused, and reset its I/O status.

    Args:
        id: the job's identifier.
    """
    host.jobs.get(id).resume()


@qmp.command(since="3.0")
async def job_cancel(host: "Host", *, id: str) -> None:
    """Cancel a job at its next checkpoint, whatever its type could do more gently.

    Args:
        id: the job's identifier.
    """
    await host.jobs.get(id).cancel(force=True)


@qmp.command(since="3.0", waits=False)
def job_complete(host: "Host", *, id: str) -> None:
    """Ask a ready job to finish its work.

    Args:
        id: the job's identifier.
    """
    host.jobs.get(id).complete()


@qmp.command(since="3.0", waits=False)
def job_dismiss(host: "Host", *, id: str) -> None:
    """Forget a concluded job; its identifier is free again.

    Args:
        id: the job's identifier.
    """
    host.jobs.get(id).dismiss()


@qmp.command(since="3.0")
async def job_finalize(host: "Host", *, id: str) -> None:
    """Settle a pending job, and with it the whole transaction it belongs to.

    Args:
        id: the identifier of any job of the transaction.
    """
    await host.jobs.get(id).finalize()
