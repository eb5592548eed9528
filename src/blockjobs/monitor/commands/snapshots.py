"""Snapshots inside images, and the machine whose state goes with them (spec/jobs.md §7)."""

from enum import StrEnum
from typing import TYPE_CHECKING

from blockjobs.block.info import SnapshotInfo
from blockjobs.jobs.internal_snapshot_sync import (
    BlockdevSnapshotInternal,
    InternalSnapshotAction,
    delete_internal_snapshot,
)
from blockjobs.jobs.snapshot_start import (
    SnapshotDelete,
    SnapshotLoad,
    SnapshotSave,
    start_snapshot_delete,
    start_snapshot_load,
    start_snapshot_save,
)
from blockjobs.jobs.transaction import run_transaction
from blockjobs.schema.command import qmp
from blockjobs.schema.types import Record

if TYPE_CHECKING:
    from blockjobs.host import Host


@qmp.command(since="6.0")
async def snapshot_save(host: "Host", options: SnapshotSave) -> None:
    """Start a job that saves the machine's state, and keeps all devices as they are then, inside their images.

    Args:
        options: the devices, and the name of the snapshot.
    """
    start_snapshot_save(host, options)


@qmp.command(since="6.0")
async def snapshot_load(host: "Host", options: SnapshotLoad) -> None:
    """Start a job that makes all devices, and the machine, what they were.

    Args:
        options: the devices, and the name of the snapshot.
    """
    start_snapshot_load(host, options)


@qmp.command(since="6.0")
async def snapshot_delete(host: "Host", options: SnapshotDelete) -> None:
    """Start a job that deletes a snapshot on every device that has it.

    Args:
        options: the devices, and the name of the snapshot.
    """
    start_snapshot_delete(host, options)


@qmp.command(since="1.7")
async def blockdev_snapshot_internal_sync(host: "Host", options: BlockdevSnapshotInternal) -> None:
    """Keep a disk as it is now, inside its image.

    Args:
        options: the disk, and the name of the snapshot.
    """
    await run_transaction(host, [InternalSnapshotAction(data=options)])


@qmp.command(since="1.7")
async def blockdev_snapshot_delete_internal_sync(
    host: "Host", *, device: str, id: str | None = None, name: str | None = None
) -> SnapshotInfo:
    """Delete a snapshot inside an image, and tell what it was.

    Args:
        device: the disk.
        id: the snapshot's number; it, or the name, must be given, and both must fit if both are.
        name: the snapshot's name.
    """
    return await delete_internal_snapshot(host, device, id, name)


class RunState(StrEnum):
    """What the machine does."""

    PAUSED = "paused"
    RUNNING = "running"


class StatusInfo(Record, frozen=True, kw_only=True):
    """Whether the machine runs."""

    running: bool
    singlestep: bool
    status: RunState


@qmp.command(since="0.14")
async def query_status(host: "Host") -> StatusInfo:
    """Tell whether the machine runs whose state goes with snapshots."""
    running = await host.machine.is_running()
    return StatusInfo(running=running, singlestep=False, status=RunState.RUNNING if running else RunState.PAUSED)


@qmp.command(since="0.14")
async def stop(host: "Host") -> None:
    """Let the machine stand still whose state goes with snapshots."""
    await host.machine.stop()


@qmp.command(since="0.14")
async def cont(host: "Host") -> None:
    """Let the machine run whose state goes with snapshots."""
    await host.machine.cont()
