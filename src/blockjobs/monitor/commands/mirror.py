"""Commands that start mirrors (spec/jobs.md §3)."""

from typing import TYPE_CHECKING

from blockjobs.jobs.drive_mirror import start_drive_mirror
from blockjobs.jobs.mirror_options import BlockdevMirror, DriveMirror
from blockjobs.jobs.mirror_start import start_blockdev_mirror
from blockjobs.schema.command import qmp

if TYPE_CHECKING:
    from blockjobs.host import Host


@qmp.command(since="2.6")
async def blockdev_mirror(host: "Host", options: BlockdevMirror) -> None:
    """Start a job that makes a node the same as another and keeps it so, until its users move over.

    Args:
        options: source, target, and how to copy.
    """
    await start_blockdev_mirror(host, options)


@qmp.command(since="1.3")
async def drive_mirror(host: "Host", options: DriveMirror) -> None:
    """Start a job as `blockdev-mirror` does, to an image file, which it makes unless told that it exists.

    Args:
        options: source, target file, and how to copy.
    """
    await start_drive_mirror(host, options)
