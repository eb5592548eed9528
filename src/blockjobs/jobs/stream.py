"""The stream job: an image takes in what it reads from its backing images, and then does without them (jobs.md §1).

A copy-on-read filter above the image takes in what guests read; the job does the rest with the filter's populator. At
the end the data is made durable first, then the header names the new backing file, then the nodes below are let go.
"""

import asyncio
from functools import partial
from typing import ClassVar, Final

from blockjobs.base.errors import ImageCorrupt, PermissionConflict, UsageError
from blockjobs.base.span import Span, coalesce
from blockjobs.block import requests
from blockjobs.block.chain import chain_of, edges_between, header_names
from blockjobs.block.claims import ALL, Perm
from blockjobs.block.driver import FormatDriver
from blockjobs.block.drivers.copy_on_read import CopyOnRead, CopyOnReadOptions
from blockjobs.block.edit import Edit
from blockjobs.block.node import Node
from blockjobs.block.populate import CHUNK_BYTES_MAX, Missed
from blockjobs.block.users import Edge
from blockjobs.jobs.block_job import BlockJob, JobHost, back_to_read_only
from blockjobs.jobs.chain_options import BlockStream
from blockjobs.lifecycle.context import JobContext
from blockjobs.lifecycle.error_policy import Side
from blockjobs.lifecycle.handle import JobHandle
from blockjobs.lifecycle.registry import job_type

BATCHES_IN_FLIGHT: Final = 2
"""One is planned while the other moves."""
THROTTLED_BATCHES_PER_S: Final = 10
"""A fast job under a limit moves a tenth of a second's worth at once."""


@job_type("stream")
class StreamJob(BlockJob):
    """Populates the image below a copy-on-read filter that was put there for it."""

    type_name: ClassVar[str] = "stream"

    def __init__(self, host: JobHost, options: BlockStream, device: Node, bottom: Node) -> None:
        super().__init__(host, on_source_error=options.on_error, on_target_error=options.on_error)
        self._options = options
        self._top, self._bottom = device.storage, bottom
        self._has_work = bottom is not self._top
        self._filter_node: Node | None = None
        self._filter_in_place = False
        self._frozen: list[Edge] = []
        self._was_read_only = False
        self._keeps_nodes = not options.auto_dismiss
        self._left = [Span(0, self._top.length)] if self._has_work and self._top.length else []
        self._missed: list[Missed] = []
        self._first_error: OSError | None = None
        self._planning, self._lane = asyncio.Lock(), asyncio.Lock()

    async def set_up(self, device: Node) -> None:
        """Make the image writable, and put the filter above it.

        Raises:
            UsageError, IoFailure: it cannot be done; `dismantle` must follow.
        Waits: for the users of `device` to park, then I/O. Checkpoint: no.
        """
        if self._top.read_only:
            await self.graph.set_read_only(self._top, read_only=False)
            self._was_read_only = True
        name = self._options.filter_node_name
        described = CopyOnReadOptions(node_name=name, file=device.name, bottom=self._bottom.name)
        async with self.graph.edit() as edit:
            try:
                node = await edit.insert(above=device, filter=described, implicit=name is None)
            except PermissionConflict:
                raise
            except UsageError as error:
                raise UsageError(f"Could not create node: {error}") from error
            driver = node.driver
            assert isinstance(driver, CopyOnRead)
            driver.streams = True
            driver.populator.keeps_zeroes = "backing" in self._bottom.children
        self._filter_node, self._filter_in_place = node, True
        self._frozen = edges_between(node, self._bottom)
        for edge in self._frozen:
            edge.freeze(self)

    async def hold_all(self, handle: JobHandle) -> None:
        """Attach the job to the filter, the image and those between.

        Raises:
            UsageError: somebody writes to one of them; `dismantle` must follow.
        """
        assert self._filter_node is not None
        await self.hold(self._filter_node, handle, name="main node")
        await self.hold(self._top, handle, name="active node", shares=ALL & ~Perm.RESIZE)
        shares = ALL  # guests write through filters that are between ours and the image
        for node in chain_of(self._filter_node):
            if node is self._top:
                shares = Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED
            elif node is not self._filter_node:
                await self.hold(node, handle, name="intermediate node", shares=shares)
            if node is self._bottom:
                break
        if self._has_work:
            handle.progress.set_remaining(self._top.length)

    async def run(self, ctx: JobContext) -> None:
        """See `Job`."""
        async with ctx.window(max_in_flight=BATCHES_IN_FLIGHT) as window:
            while True:
                await ctx.checkpoint()
                if self._missed:
                    await window.drain()  # as QEMU: what is in flight ends before the error is acted on
                    await self._retry(ctx, self._missed.pop(0))
                elif self._left:
                    await window.submit(partial(self._copy_next, ctx))
                    if ctx.speed_bytes_per_s:
                        await window.drain()  # what it costs is known only afterwards
                else:
                    await window.drain()
                    if not (self._missed or self._left):
                        break
        if self._first_error is not None:
            raise self._first_error

    async def prepare(self, ctx: JobContext) -> None:
        """See `Job`: flush ▷ header ▷ the job completes (durability §1, Stream); all or nothing."""
        top, driver = self._top, self._top.driver
        if "backing" not in top.children or not isinstance(driver, FormatDriver):
            return
        base = self._bottom.children.get("backing") if self._has_work else top.children["backing"]
        if base is not None and self._has_work and not self._filter.populator.keeps_zeroes:
            raise UsageError(f"Node '{self._bottom.name}' has got a backing image meanwhile")
        names: tuple[str | None, str | None] = None, None
        if base is not None:
            given, masks = self._options.backing_file, bool(self._options.backing_mask_protocol)
            names = header_names(top, base, given=given, mask_protocol=masks)
        await top.flush()
        edit = Edit(self.graph)
        try:
            await self._take_filter_out(edit)
            await edit.set_child(top, "backing", base)
            await edit.settle()
            await driver.name_backing_file(*names)
        except BaseException:
            self._filter.retired = False
            await edit.undo()
            raise
        self._filter_in_place = False
        await edit.finish()

    async def clean(self, ctx: JobContext) -> None:
        """See `Job`. The nodes are kept until the job is dismissed (spec/jobs.md §0)."""
        await self._restore()
        if not self._keeps_nodes:
            await self.let_go()

    async def dismantle(self) -> None:
        """Everything as before the command."""
        await self._restore()
        await self.let_go()

    @property
    def _filter(self) -> CopyOnRead:
        assert self._filter_node is not None
        driver = self._filter_node.driver
        assert isinstance(driver, CopyOnRead)
        return driver

    async def _take_filter_out(self, edit: Edit) -> None:
        assert self._filter_node is not None
        for edge in self._frozen:
            edge.thaw(self)
        self._frozen.clear()
        await edit.drop(self._filter_node)
        # Not earlier: until the filter is drained, guests' requests under way still need its rights.
        self._filter.retired = True

    async def _restore(self) -> None:
        """Take the filter out, if it is still there, and make the image read-only again, if it was."""
        if self._filter_in_place:
            self._filter_in_place = False
            async with self.graph.edit() as edit:
                await self._take_filter_out(edit)
        if self._filter_node is not None:
            await self.let_go_of(self._filter_node)
        if self._was_read_only:
            self._was_read_only = False
            await back_to_read_only(self._top)

    async def _copy_next(self, ctx: JobContext) -> None:
        """Plan and move the next batch. It begins and ends here: a parked job keeps no guest from writing."""
        populator = self._filter.populator
        async with self._planning:
            if not self._left or self._missed or not ctx.goes_on():
                return
            first = self._left.pop(0)
            moved_max = self._moved_max(ctx)
            span = Span(first.at, min(first.length, max(populator.pace.reach_bytes, CHUNK_BYTES_MAX)))
            try:
                population = await populator.plan(span, moved_max=moved_max)
            except (OSError, ImageCorrupt) as error:
                chunk = Span(span.at, min(span.length, CHUNK_BYTES_MAX))
                self._missed.append(Missed(chunk, requests.as_failure(error, self._top, chunk)))
                self._put_back(Span.between(chunk.end, first.end))
                return
            self._put_back(Span.between(population.span.end, first.end))
            ctx.charge(population.moved_bytes)
        missed = await populator.move(population, lane=self._lane, goes_on=ctx.goes_on)
        left = [part.intersect(population.span) for part in population.left]
        left_bytes = sum(part.length for part in left)
        ctx.refund(min(left_bytes, population.moved_bytes))
        # Only the first has failed; the others were not tried.
        lost = [part.span.intersect(population.span) for part in missed]
        self._put_back(*left, *lost[1:])
        if missed:
            self._missed.append(Missed(lost[0], missed[0].error))
        ctx.progress.advance(population.span.length - left_bytes - sum(part.length for part in lost))

    def _put_back(self, *spans: Span) -> None:
        self._left = coalesce([*self._left, *spans])

    def _moved_max(self, ctx: JobContext) -> int | None:
        """What to transfer at once. A slow job goes in QEMU's chunks, whose sizes clients can see."""
        speed = ctx.speed_bytes_per_s
        if not speed:
            return None
        return max(CHUNK_BYTES_MAX, min(speed // THROTTLED_BATCHES_PER_S, self._filter.populator.pace.batch_bytes))

    async def _retry(self, ctx: JobContext, missed: Missed) -> None:
        """Announce an error and do as its policy says: fail, leave the chunk out, or try it again."""
        pending = [missed.error]

        async def copy() -> None:
            if pending:
                raise pending.pop()
            try:
                await self._filter.populator.populate(missed.span)
            except ImageCorrupt as error:
                raise requests.as_failure(error, self._top, missed.span) from error

        if not await ctx.attempt(copy, side=Side.SOURCE, ignore="skip"):
            self._first_error = self._first_error or missed.error
        ctx.progress.advance(missed.span.length)
