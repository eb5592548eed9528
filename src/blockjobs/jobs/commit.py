"""The commit job: images in the middle of a chain are merged down into one below them (spec/jobs.md §2).

Meanwhile whoever reads from above sees nothing of it: what was copied down is still hidden by the images it came from.
At the end the base is made durable, then the headers above name it, then the nodes above use it. The images in between
stay as they are; alone they are no longer valid.
"""

import asyncio
import logging
from functools import partial
from typing import ClassVar, Final

from blockjobs.base.errors import BlockjobsError
from blockjobs.base.span import Span
from blockjobs.base.units import KiB
from blockjobs.block.backing_file import name_backing_file
from blockjobs.block.bitmap import DirtyBitmap
from blockjobs.block.chain import chain_of, edges_between, header_names, named_backing, overlays_of
from blockjobs.block.claims import ALL, NONE, Perm
from blockjobs.block.copier import CLUSTER_BYTES_MIN
from blockjobs.block.drain import with_all_above
from blockjobs.block.drivers.commit_top import CommitTopOptions
from blockjobs.block.edit import Edit
from blockjobs.block.flight import CopyFailed
from blockjobs.block.mirror_copy import ChangeMap, MirrorCopy
from blockjobs.block.node import Node
from blockjobs.block.users import Edge, Root
from blockjobs.jobs.block_job import BlockJob, JobHost, back_to_read_only
from blockjobs.jobs.chain_options import BlockCommit
from blockjobs.lifecycle.context import JobContext
from blockjobs.lifecycle.error_policy import Side
from blockjobs.lifecycle.handle import JobHandle

_LOG: Final = logging.getLogger(__name__)

BATCHES_IN_FLIGHT: Final = 2
"""One is planned while the other moves."""
CHUNK_BYTES_MAX: Final = 512 * KiB
"""Longest request through the nodes' ordinary doors, and batch of a slow job (spec/jobs.md §2)."""
THROTTLED_BATCHES_PER_S: Final = 10
"""A fast job under a limit moves a tenth of a second's worth at once."""


class CommitJob(BlockJob):
    """Copies what the images from `top` down to above `base` hold into `base`."""

    type_name: ClassVar[str] = "commit"

    def __init__(self, host: JobHost, options: BlockCommit, device: Node, top: Node, base: Node) -> None:
        super().__init__(host, on_source_error=options.on_error, on_target_error=options.on_error)
        self._options, self._device, self._top, self._base = options, device, top, base
        self._filter_node: Node | None = None
        self._frozen: list[Edge] = []
        self._users: list[Root] = []
        self._was_read_only = False
        self._keeps_nodes = not options.auto_dismiss
        self._failures: list[CopyFailed] = []
        self._at = 0
        self._lane = asyncio.Lock()
        changes = ChangeMap(name=None, map=DirtyBitmap(top.length, CLUSTER_BYTES_MIN))
        self._copy = MirrorCopy(
            source=top,
            target=base,
            changes=changes,
            unit=CLUSTER_BYTES_MIN,
            offload=host.graph.offload,
            clock=host.graph.clock,
            base=base,
        )
        self._copy.chunk_bytes_max = CHUNK_BYTES_MAX
        self._copy.dirty.set_all()

    async def set_up(self) -> None:
        """Make the base writable, and put the filter above the uppermost image.

        Raises:
            UsageError, IoFailure: it cannot be done; `dismantle` must follow.
        Waits: for the users of the chain to park, then I/O. Checkpoint: no.
        """
        if self._base.storage.read_only:
            await self.graph.set_read_only(self._base.storage, read_only=False)
            self._was_read_only = True
        name = self._options.filter_node_name
        described = CommitTopOptions(node_name=name, backing=self._top.name, read_only=True)
        async with self.graph.edit() as edit:
            node = await edit.insert(above=self._top, filter=described, implicit=name is None)
        self._filter_node = node
        # Those above would see a base that holds only a part of what is merged.
        self._frozen = [*edges_between(node, self._base), *(each for each in node.parents if isinstance(each, Edge))]
        for edge in self._frozen:
            edge.freeze(self)

    async def hold_all(self, handle: JobHandle) -> None:
        """Attach the job to the device, the images that are merged, and the base.

        Raises:
            UsageError: somebody else writes to the base or reads what will become invalid; `dismantle` must follow.
        """
        await self.hold(self._device, handle, name="main node")
        shares = Perm.WRITE | Perm.WRITE_UNCHANGED
        for node in chain_of(self._top):
            if node is self._base:
                break
            await self.hold(node, handle, name="intermediate node", shares=shares)
        await self.hold(self._base, handle, name="base")
        grows = Perm.RESIZE if self._base.length < self._top.length else NONE
        needs = Perm.CONSISTENT_READ | Perm.WRITE | grows
        await self._use(self._base, needs, Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED)
        await self._use(self._top, NONE, ALL)
        handle.progress.set_remaining(self._top.length)
        self._copy.on_arrived = handle.progress.advance

    async def run(self, ctx: JobContext) -> None:
        """See `Job`."""
        base, length = self._base, self._top.length
        if base.length < length:
            await ctx.attempt(lambda: base.resize(length), side=Side.TARGET)
        elif hidden := self._hidden_by_a_short_top():
            await ctx.attempt(lambda: base.zero(hidden), side=Side.TARGET)
        await self._copy_everything(ctx)
        await ctx.attempt(base.flush, side=Side.TARGET)

    async def prepare(self, ctx: JobContext) -> None:
        """See `Job`: flush ▷ headers ▷ nodes (durability §1, Commit intermediate); all or nothing."""
        assert self._filter_node is not None
        await self._base.flush()
        await self._release_users()
        renamed: list[tuple[Node, tuple[str | None, str | None]]] = []
        given, masks = self._options.backing_file, bool(self._options.backing_mask_protocol)
        edit = Edit(self.graph)
        try:
            for overlay in overlays_of(self._filter_node):
                renamed.append((overlay, named_backing(overlay)))
                names = header_names(overlay, self._base, given=given, mask_protocol=masks)
                await name_backing_file(self.graph, overlay, *names)
            self._thaw()
            await edit.replace(self._filter_node, self._base)
            await edit.settle()
        except BaseException:
            await edit.undo()
            await self._name_as_before(renamed)
            raise
        self._filter_node = None
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

    async def _restore(self) -> None:
        """Take the filter out, if it is still there, and make the base read-only again, if it was."""
        await self._release_users()
        self._thaw()
        if self._filter_node is not None:
            node, self._filter_node = self._filter_node, None
            await self.share_all()  # who is above the filter reads the images below it directly again
            async with self.graph.edit() as edit:
                await edit.drop(node)
        if self._was_read_only:
            self._was_read_only = False
            await back_to_read_only(self._base.storage)

    async def _use(self, node: Node, needs: Perm, shares: Perm) -> None:
        owner = "an unnamed block device"
        self._users.append(await self.graph.claim(owner, node, needs=needs, shares=shares, follows=False))

    async def _release_users(self) -> None:
        while self._users:
            await self.graph.release(self._users.pop())

    def _thaw(self) -> None:
        for edge in self._frozen:
            edge.thaw(self)
        self._frozen.clear()

    async def _name_as_before(self, renamed: list[tuple[Node, tuple[str | None, str | None]]]) -> None:
        """Undo changes of headers. One that cannot be undone names a base that shows the same."""
        for overlay, names in renamed:
            if named_backing(overlay) != names:
                try:
                    await name_backing_file(self.graph, overlay, *names)
                except BlockjobsError as error:
                    _LOG.error("the header of '%s' still names the base of a failed commit: %s", overlay.name, error)

    def _hidden_by_a_short_top(self) -> Span:
        """The part of the base that longer overlays would see once the shorter image above is gone."""
        assert self._filter_node is not None
        longest = max(node.length for node in with_all_above(self._filter_node))
        return Span.between(self._top.length, max(self._top.length, min(self._base.length, longest)))

    async def _copy_everything(self, ctx: JobContext) -> None:
        copy = self._copy
        async with ctx.window(max_in_flight=BATCHES_IN_FLIGHT) as window:
            while True:
                await ctx.checkpoint()
                if self._failures:
                    await window.drain()  # as QEMU: what is in flight ends before the error is acted on
                    failure, self._failures = self._failures[0], []
                    await self._apply_policy(ctx, failure)
                elif copy.dirty.any():
                    await window.submit(partial(self._copy_next, ctx))
                    if ctx.speed_bytes_per_s:
                        await window.drain()  # what it costs is known only afterwards
                else:
                    await window.drain()
                    if not self._failures and not copy.dirty.any():
                        return

    async def _copy_next(self, ctx: JobContext) -> None:
        """Plan and move the next batch."""
        copy, speed = self._copy, ctx.speed_bytes_per_s
        flight = (copy.take(self._at) or copy.take()) if ctx.goes_on() else None
        if flight is None:
            return
        self._at = flight.span.end
        moved_max = max(CHUNK_BYTES_MAX, min(speed // THROTTLED_BATCHES_PER_S, copy.batch_bytes)) if speed else None
        try:
            batch = await copy.prepare(flight, moved_max=moved_max)
            self._at = flight.span.end
            ctx.charge(batch.moved_bytes)
            if left := await copy.move(batch, lane=self._lane, goes_on=ctx.goes_on):
                self._at = min(self._at, left[0].at)
                ctx.refund(sum(part.length for part in left))
        except CopyFailed as failure:
            self._failures.append(failure)

    async def _apply_policy(self, ctx: JobContext, failure: CopyFailed) -> None:
        """Announce an error and do as its policy says; returns if the work is to be tried again."""
        pending = [failure]

        async def fail_once() -> None:
            if pending:
                raise pending.pop()

        await ctx.attempt(fail_once, side=Side.SOURCE if failure.reading else Side.TARGET)
