"""The backup job: the target becomes what the source was when the command came (spec/jobs.md §4).

A copy-before-write filter above the source saves what guests overwrite; the job copies the rest in the background with
the filter's own copier. The filter stays until the job is cleaned, so the point in time holds while the job is pending.
"""

import asyncio
from collections.abc import Iterable
from functools import partial
from typing import ClassVar, Final

from blockjobs.base.errors import ImageCorrupt, IoFailure, UsageError
from blockjobs.base.span import Span
from blockjobs.base.units import GiB
from blockjobs.block.compress_batch import CompressedWriter, compressing_driver
from blockjobs.block.copier import CHUNK_BYTES_MAX, CHUNKS_IN_FLIGHT_MAX, copy_cluster_size
from blockjobs.block.drain import with_all_below
from blockjobs.block.drivers.copy_before_write import CopyBeforeWrite, CopyBeforeWriteOptions
from blockjobs.block.flight import CopyFailed
from blockjobs.block.node import Node
from blockjobs.block.users import Edge
from blockjobs.jobs.backup_bitmap import BackupBitmap, find_backup_bitmap
from blockjobs.jobs.backup_options import BackupCommon, BackupPerf, BlockdevBackup, MirrorSyncMode
from blockjobs.jobs.block_job import BlockJob, JobHost
from blockjobs.lifecycle.context import JobContext
from blockjobs.lifecycle.error_policy import Side
from blockjobs.lifecycle.handle import JobHandle
from blockjobs.lifecycle.registry import job_type
from blockjobs.lifecycle.spec import Group

BATCHES_IN_FLIGHT: Final = 2
"""One is planned while the other moves."""
THROTTLED_BATCHES_PER_S: Final = 10
"""A fast job under a limit moves a tenth of a second's worth at once: its own overhead must not be the limit."""
LOOK_BYTES: Final = 1 * GiB
"""How much of the source one look for unallocated clusters covers; a checkpoint follows."""
_WORKERS_MAX: Final = 2**31 - 1


@job_type("backup")
class BackupJob(BlockJob):
    """Copies through the copier of the filter that was put above the source for it."""

    type_name: ClassVar[str] = "backup"

    def __init__(self, host: JobHost, options: BackupCommon, filter_node: Node) -> None:
        super().__init__(host, on_source_error=options.on_source_error, on_target_error=options.on_target_error)
        driver = filter_node.driver
        assert isinstance(driver, CopyBeforeWrite)
        self._sync, self._discards_source = options.sync, options.discard_source
        self._bitmap: BackupBitmap | None = None
        self._began = self._succeeded = False
        self._filter_node, self._filter, self._copier = filter_node, driver, driver.copier
        self._perf = options.x_perf or BackupPerf()
        self._failures: list[CopyFailed] = []
        self._at = 0
        self._lane = asyncio.Lock()

    async def run(self, ctx: JobContext) -> None:
        """See `Job`. The target is flushed before this returns: COMPLETED means durable (durability §1)."""
        self._began = True
        copier = self._copier
        copier.on_guest_moved = ctx.charge
        self._filter.on_broken = ctx.nudge
        if self._sync is MirrorSyncMode.NONE:
            await ctx.idle(lambda: self._filter.broken is not None)
        else:
            if self._sync is MirrorSyncMode.TOP:
                await self._skip_absent(ctx)
            await self._copy_everything(ctx)
        self._demand_whole_view()
        await ctx.attempt(self._target.flush, side=Side.TARGET)

    async def commit(self, ctx: JobContext) -> None:
        """See `Job`."""
        self._succeeded = True

    async def clean(self, ctx: JobContext) -> None:
        """See `Job`."""
        await self.dismantle()

    def freeze(self, bitmap: BackupBitmap) -> None:
        """Keep `bitmap` as it is until `dismantle`."""
        bitmap.bitmap.freeze()
        self._bitmap = bitmap

    async def dismantle(self) -> None:
        """Take the filter out, settle the bitmap and let go of the nodes; a target that only the job used is closed."""
        async with self.graph.edit() as edit:
            self._filter.guards = self._filter.changes_source = False
            await edit.drop(self._filter_node)
            # No guest's copy is in flight here, so the copier's map says what did not arrive.
            await self._settle_bitmap()
        await self.let_go()

    async def _settle_bitmap(self) -> None:
        bitmap, self._bitmap = self._bitmap, None
        if bitmap is None:
            return
        if self._succeeded:
            bitmap.succeed()
        elif not self._began:
            bitmap.keep()
        else:
            bitmap.fail(self._copier.dirty if await self._is_durable() else None)

    async def _is_durable(self) -> bool:
        """Whether what was copied is on the target for sure."""
        try:
            await self._target.flush()
        except (IoFailure, ImageCorrupt):
            return False
        return True

    def written(self) -> Iterable[Node]:
        """See `BlockJob`."""
        return [self._target]

    def meter(self, handle: JobHandle) -> None:
        """Show all that is dirty as the work to do, from now on."""
        progress, copier = handle.progress, self._copier
        progress.set_remaining(copier.dirty.dirty_bytes())

        def skip(count: int) -> None:
            progress.set_remaining(progress.total - progress.current - count)

        copier.on_arrived, copier.on_skipped = progress.advance, skip

    @property
    def _target(self) -> Node:
        return self._filter_node.children["target"]

    async def _skip_absent(self, ctx: JobContext) -> None:
        """The first pass of `sync=top`: drop what the source's own layer does not hold."""
        copier = self._copier
        for part in Span(0, copier.length).split(LOOK_BYTES):
            await ctx.checkpoint()
            while True:
                try:
                    await copier.skip_absent(part)
                    break
                except CopyFailed as failure:
                    await self._apply_policy(ctx, failure)
        copier.own_layer_only = False

    async def _copy_everything(self, ctx: JobContext) -> None:
        copier = self._copier
        in_flight_max = min(BATCHES_IN_FLIGHT, self._perf.max_workers)
        async with ctx.window(max_in_flight=in_flight_max) as window:
            while True:
                await ctx.checkpoint()
                self._demand_whole_view()
                if self._failures:
                    await window.drain()  # as QEMU: what is in flight ends before the error is acted on
                    failure, self._failures = self._failures[0], []
                    await self._apply_policy(ctx, failure)
                elif copier.dirty.any():
                    await window.submit(partial(self._copy_next, ctx))
                    if ctx.speed_bytes_per_s:
                        await window.drain()  # what it costs is known only afterwards
                else:
                    await window.drain()
                    await copier.landed()
                    if not self._failures and not copier.dirty.any():
                        return

    async def _copy_next(self, ctx: JobContext) -> None:
        """Plan and move the next batch. The flight begins and ends here: a parked job holds no guest's write up."""
        copier = self._copier
        flight = (copier.take(self._at) or copier.take()) if ctx.goes_on() else None
        if flight is None:
            return
        self._at = flight.span.end
        try:
            batch = await copier.prepare(flight, moved_max=self._moved_max(ctx))
            self._at = flight.span.end
            ctx.charge(batch.moved_bytes)
            left = await copier.move(batch, lane=self._lane, discard_source=self._discards_source, goes_on=ctx.goes_on)
            if left:
                self._at = min(self._at, left[0].at)
                ctx.refund(sum(part.length for part in left))
        except CopyFailed as failure:
            self._failures.append(failure)

    def _moved_max(self, ctx: JobContext) -> int | None:
        """What to transfer at once. A slow job goes in QEMU's chunks, whose sizes clients can see."""
        copier, speed = self._copier, ctx.speed_bytes_per_s
        limits = [self._perf.max_chunk] if self._perf.max_chunk else []
        if speed:
            chunk = copier.cluster_size if copier.compressed else CHUNK_BYTES_MAX
            limits.append(max(chunk, min(speed // THROTTLED_BATCHES_PER_S, copier.batch_bytes)))
        return min(limits, default=None)

    async def _apply_policy(self, ctx: JobContext, failure: CopyFailed) -> None:
        """Announce an error and do as its policy says; returns if the work is to be tried again."""
        pending = [failure]

        async def fail_once() -> None:
            if pending:
                raise pending.pop()

        await ctx.attempt(fail_once, side=Side.SOURCE if failure.reading else Side.TARGET)

    def _demand_whole_view(self) -> None:
        if self._filter.broken is not None:
            raise self._filter.broken


async def prepare_backup(
    host: JobHost, options: BackupCommon, source: Node, target: Node, *, group: Group | None = None
) -> JobHandle:
    """Check everything, put the filter in place and make the job, unstarted; the point in time is now.

    Call it in a drained section, so that a group of backups shares one instant. Then start the job, or cancel it.

    Raises:
        UsageError: with QEMU's text, in QEMU's order of checks; the graph is as before.
    Waits: for drains and for opening the filter. Checkpoint: no.
    """
    bitmap = find_backup_bitmap(options, source)
    if source is target:
        raise UsageError("Source and target cannot be the same")
    compressed = _compressed_writer(options, target)
    source.check_op("backup-source")
    target.check_op("backup-target")
    perf = options.x_perf or BackupPerf()
    cluster_size = max(copy_cluster_size(target.cluster_size), perf.min_cluster_size)
    _check_perf(perf, cluster_size)
    if bitmap is not None:
        bitmap.check_writable()
    _check_pair(options, source, target)
    filter_node = await _insert_filter(host, options, source, target)
    job = BackupJob(host, options, filter_node)
    try:
        driver = filter_node.driver
        assert isinstance(driver, CopyBeforeWrite)
        copier = driver.copier
        copier.compressed = compressed
        if bitmap is not None:
            bitmap.select(copier.dirty)
        copier.own_layer_only = options.sync is MirrorSyncMode.TOP
        copier.chunks_in_flight_max = min(CHUNKS_IN_FLIGHT_MAX, perf.max_workers)
        copier.chunk_bytes_max = _chunk_bytes(perf, copier.cluster_size)
        handle = host.jobs.create(
            job.type_name,
            job,
            id=options.job_id or "",
            auto_finalize=options.auto_finalize,
            auto_dismiss=options.auto_dismiss,
            speed_bytes_per_s=options.speed,
            group=group,
        )
    except UsageError:
        await job.dismantle()
        raise
    try:
        job.meter(handle)
        await job.hold(filter_node, handle, name="main node")
        await job.hold(target, handle, name="target")
    except UsageError:  # the rights of a filter without users show only now
        handle.discard()
        await job.dismantle()
        raise
    if bitmap is not None:
        job.freeze(bitmap)
    return handle


async def prepare_blockdev_backup(host: JobHost, options: BlockdevBackup, *, group: Group | None = None) -> JobHandle:
    """`prepare_backup` between two nodes that exist.

    Raises:
        UsageError: as `prepare_backup`; unknown nodes first.
    Waits: as `prepare_backup`. Checkpoint: no.
    """
    source, target = host.graph.find(options.device), host.graph.find(options.target)
    return await prepare_backup(host, options, source, target, group=group)


def _check_perf(perf: BackupPerf, cluster_size: int) -> None:
    if not 1 <= perf.max_workers <= _WORKERS_MAX:
        raise UsageError(f"max-workers must be between 1 and {_WORKERS_MAX}")
    if perf.max_chunk < 0:
        raise UsageError("max-chunk must be zero (which means no limit) or positive")
    if perf.max_chunk and perf.max_chunk < cluster_size:
        raise UsageError(f"Required max-chunk ({perf.max_chunk}) is less than backup cluster size ({cluster_size})")


def _check_pair(options: BackupCommon, source: Node, target: Node) -> None:
    if options.discard_source and source.read_only:
        raise UsageError(f"Cannot discard what was copied (discard-source): node '{source.name}' is read-only")
    if source.length != target.length:
        raise UsageError("Source and target image have different sizes")


def _chunk_bytes(perf: BackupPerf, cluster_size: int) -> int:
    """Bytes per request through the nodes' doors: whole clusters."""
    wanted = min(perf.max_chunk or CHUNK_BYTES_MAX, CHUNK_BYTES_MAX)
    return max(cluster_size, wanted // cluster_size * cluster_size)


def _compressed_writer(options: BackupCommon, target: Node) -> CompressedWriter | None:
    if not options.compress:
        return None
    node, driver = compressing_driver(target)
    compress = driver.compressor(options.x_compress_level) if driver else None
    if compress is None or node.cluster_size is None:
        # QEMU names the device here, and a node without one has the empty name.
        raise UsageError("Compression is not supported for this drive ")
    return CompressedWriter(offload=target.graph.offload, compress=compress, unit=node.cluster_size)


async def _insert_filter(host: JobHost, options: BackupCommon, source: Node, target: Node) -> Node:
    """Put the copy-before-write filter above the source, named by the user or hidden from users."""
    described = CopyBeforeWriteOptions(
        node_name=options.filter_node_name,
        file=source.name,
        target=target.name,
        on_cbw_error=options.on_cbw_error,
        min_cluster_size=options.x_perf.min_cluster_size if options.x_perf else 0,
    )
    # A target that reads from the source (fleecing) goes on doing so directly.
    inside = with_all_below(target)
    exclude = [parent for parent in source.parents if isinstance(parent, Edge) and parent.parent in inside]
    try:
        async with host.graph.edit() as edit:
            node = await edit.insert(
                above=source, filter=described, implicit=options.filter_node_name is None, exclude=exclude
            )
            assert isinstance(node.driver, CopyBeforeWrite)
            node.driver.guards = True
            node.driver.changes_source = options.discard_source
            return node
    except UsageError as error:
        raise UsageError(f"Could not create node: {error}") from error
