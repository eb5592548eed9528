"""The command that changes what was chosen when an image was made (spec/jobs.md §6)."""

from typing import TYPE_CHECKING

from blockjobs.jobs.amend import XBlockdevAmend, start_amend
from blockjobs.schema.command import qmp

if TYPE_CHECKING:
    from blockjobs.host import Host


@qmp.command(since="5.1", features=["unstable"])
async def x_blockdev_amend(host: "Host", options: XBlockdevAmend) -> None:
    """Start a job that changes what was chosen when an image was made.

    Args:
        options: the node, and what to change.
    """
    start_amend(host, options)
