"""Commands that start jobs which shorten chains of images (spec/jobs.md §1, §2)."""

from typing import TYPE_CHECKING

from blockjobs.jobs.chain_options import BlockCommit, BlockStream
from blockjobs.jobs.commit_start import start_commit
from blockjobs.jobs.stream_start import start_stream
from blockjobs.schema.command import qmp

if TYPE_CHECKING:
    from blockjobs.host import Host


@qmp.command(since="1.1")
async def block_stream(host: "Host", options: BlockStream) -> None:
    """Start a job that copies into an image what it reads from its backing images, and then does without them.

    Args:
        options: the image, what is to stay below it, and how to copy.
    """
    await start_stream(host, options)


@qmp.command(since="1.3")
async def block_commit(host: "Host", options: BlockCommit) -> None:
    """Start a job that merges images of a chain down into one below them.

    If guests write to the uppermost of them, the job becomes ready and is completed by a command.

    Args:
        options: the chain, which part of it, and how to copy.
    """
    await start_commit(host, options)
