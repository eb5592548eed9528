"""Commands that start backups, alone or together (spec/jobs.md §4, §8)."""

from typing import TYPE_CHECKING

from blockjobs.jobs.backup_options import BlockdevBackup, DriveBackup
from blockjobs.jobs.transaction import (
    BlockdevBackupAction,
    DriveBackupAction,
    TransactionAction,
    TransactionProperties,
    run_transaction,
)
from blockjobs.schema.command import qmp

if TYPE_CHECKING:
    from blockjobs.host import Host


@qmp.command(since="2.3")
async def blockdev_backup(host: "Host", options: BlockdevBackup) -> None:
    """Start a job that copies a node to another as it is at this instant.

    Args:
        options: source, target, and how to copy.
    """
    await run_transaction(host, [BlockdevBackupAction(data=options)])


@qmp.command(since="1.6", features=("deprecated",))
async def drive_backup(host: "Host", options: DriveBackup) -> None:
    """Start a job that copies a node to an image file, which it makes unless told that it exists.

    Args:
        options: source, target file, and how to copy.
    """
    await run_transaction(host, [DriveBackupAction(data=options)])


@qmp.command(since="1.1")
async def transaction(
    host: "Host", *, actions: list[TransactionAction], properties: TransactionProperties | None = None
) -> None:
    """Do several things at one instant: all or none.

    Args:
        actions: what to do, in order.
        properties: whether the jobs that are started settle together.
    """
    await run_transaction(host, actions, properties)
