"""Options of the snapshot jobs, and their start; everything about them is checked inside the job (spec/jobs.md §7)."""

from blockjobs.jobs.block_job import JobHost
from blockjobs.jobs.snapshot_jobs import SnapshotDeleteJob, SnapshotLoadJob, SnapshotSaveJob
from blockjobs.lifecycle.handle import JobHandle
from blockjobs.lifecycle.job import Job
from blockjobs.schema.types import Options


class SnapshotSave(Options, frozen=True, kw_only=True):
    """What to save under which name, and which of the devices takes the machine's state."""

    job_id: str
    tag: str
    vmstate: str
    devices: list[str]


class SnapshotLoad(Options, frozen=True, kw_only=True):
    """What to make as it was, and which of the devices has the machine's state."""

    job_id: str
    tag: str
    vmstate: str
    devices: list[str]


class SnapshotDelete(Options, frozen=True, kw_only=True):
    """What to forget on which devices."""

    job_id: str
    tag: str
    devices: list[str]


def start_snapshot_save(host: JobHost, options: SnapshotSave) -> JobHandle:
    """Start the job.

    Raises:
        UsageError: the id is malformed or taken.
    """
    job = SnapshotSaveJob(host, options.tag, options.vmstate, options.devices)
    return _start(host, "snapshot-save", job, options.job_id)


def start_snapshot_load(host: JobHost, options: SnapshotLoad) -> JobHandle:
    """Start the job. Raises: as `start_snapshot_save`."""
    job = SnapshotLoadJob(host, options.tag, options.vmstate, options.devices)
    return _start(host, "snapshot-load", job, options.job_id)


def start_snapshot_delete(host: JobHost, options: SnapshotDelete) -> JobHandle:
    """Start the job. Raises: as `start_snapshot_save`."""
    return _start(host, "snapshot-delete", SnapshotDeleteJob(host, options.tag, options.devices), options.job_id)


def _start(host: JobHost, type: str, job: Job, id: str) -> JobHandle:
    handle = host.jobs.create(type, job, id=id, auto_dismiss=False)
    handle.start()
    return handle
