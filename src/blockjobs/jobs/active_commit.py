"""Active commit: what a chain holds above one of its images goes there, and then the users do (spec/jobs.md §2).

It is a mirror whose target is below its source. Only what is allocated above the base is copied, so the top view is the
same at every moment: overlays mask what changes in the base (spec/jobs.md §9, point 5).
"""

from typing import ClassVar, Protocol

from blockjobs.block.mirror_copy import MirrorCopy
from blockjobs.block.node import Node
from blockjobs.jobs.backup_options import MirrorSyncMode
from blockjobs.jobs.block_job import JobHost, back_to_read_only
from blockjobs.jobs.mirror import MirrorJob, MirrorSetup
from blockjobs.jobs.mirror_start import default_granularity, launch
from blockjobs.lifecycle.context import JobContext
from blockjobs.lifecycle.error_policy import OnError, Side
from blockjobs.lifecycle.handle import JobHandle


class ActiveCommitOptions(Protocol):
    """What `block-commit` was told, as far as it matters here."""

    @property
    def job_id(self) -> str | None:
        """The job's identifier."""
        ...

    @property
    def speed(self) -> int:
        """Bytes per second, 0 for no limit."""
        ...

    @property
    def on_error(self) -> OnError:
        """The policy, for both sides."""
        ...

    @property
    def filter_node_name(self) -> str | None:
        """What to call the filter above the device."""
        ...

    @property
    def auto_finalize(self) -> bool:
        """Settle without a command."""
        ...

    @property
    def auto_dismiss(self) -> bool:
        """Forget the job once it has concluded."""
        ...


class ActiveCommitJob(MirrorJob):
    """A mirror into the chain below the source. The base goes back to read-only unless it becomes the active image."""

    type_name: ClassVar[str] = "commit"

    def __init__(self, host: JobHost, setup: MirrorSetup, filter_node: Node, copy: MirrorCopy) -> None:
        super().__init__(host, setup, filter_node, copy)
        self.was_read_only = False

    @property
    def is_actively_synced(self) -> bool | None:
        """See `BlockJob`."""
        return None

    async def _settle_lengths(self, ctx: JobContext) -> None:
        base, length = self.setup.target, self.setup.source.length
        if base.length < length:
            await ctx.attempt(lambda: base.resize(length), side=Side.TARGET)

    async def _tidy_up(self) -> None:
        if self.was_read_only and not self.has_pivoted:
            await back_to_read_only(self.setup.target)


async def start_active_commit(host: JobHost, options: ActiveCommitOptions, device: Node, base: Node) -> JobHandle:
    """Start to commit the active image of a chain; the caller has checked that `base` is below `device`.

    Raises:
        UsageError: with QEMU's text; the base may have been grown, else nothing has changed.
        IoFailure: the base could not be opened for writing or grown.
    Waits: for drains, I/O on the base, and for opening the filter. Checkpoint: no.
    """
    was_read_only = base.read_only
    if was_read_only:
        await host.graph.set_read_only(base, read_only=False)
    setup = MirrorSetup(
        source=device,
        target=base,
        base=base,
        sync=MirrorSyncMode.TOP,
        granularity=default_granularity(base),
        on_source_error=options.on_error,
        on_target_error=options.on_error,
    )
    try:
        handle = await launch(
            host,
            ActiveCommitJob,
            setup,
            filter_name=options.filter_node_name,
            job_id=options.job_id,
            speed_bytes_per_s=options.speed,
            auto_finalize=options.auto_finalize,
            auto_dismiss=options.auto_dismiss,
        )
        assert isinstance(handle.job, ActiveCommitJob)
        handle.job.was_read_only = was_read_only
        return handle
    except BaseException:
        if was_read_only:
            await back_to_read_only(base)
        raise
