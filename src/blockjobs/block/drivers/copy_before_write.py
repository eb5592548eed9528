"""The copy-before-write filter: what a guest is about to overwrite is saved on `target` first.

It makes a point-in-time view without stopping anybody: `backup` puts it above its source, and blockdev-add can use it
alone (spec/jobs.md §4, spec/block-layer.md §2).
"""

import asyncio
import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, cast

from blockjobs.base.buffers import Buffer
from blockjobs.base.errors import IoFailure, UsageError
from blockjobs.base.span import Span, subtract
from blockjobs.block.bitmap import DirtyBitmap
from blockjobs.block.claims import ALL, Perm
from blockjobs.block.copier import CLUSTERS_MAX, BlockCopy, copy_cluster_size
from blockjobs.block.driver import Child, FilterDriver, Forward, OpenContext
from blockjobs.block.flight import CopyFailed
from blockjobs.block.node_bitmap import BlockDirtyBitmap, NodeBitmap
from blockjobs.block.options import BlockRef, NodeOptions, driver
from blockjobs.block.tracker import RangeTracker
from blockjobs.block.vocabulary import NO_PERMS, Watch, ZeroMode
from blockjobs.schema.types import Size, UInt32

if TYPE_CHECKING:
    from blockjobs.block.node import Node


class OnCbwError(StrEnum):
    """Who suffers when old content cannot be saved."""

    BREAK_GUEST_WRITE = "break-guest-write"
    BREAK_SNAPSHOT = "break-snapshot"


class CopyBeforeWriteOptions(NodeOptions, frozen=True, kw_only=True, tag="copy-before-write"):
    """Copies what a write is about to change from `file` to `target` first.

    Attributes:
        bitmap: only what is dirty there belongs to the saved view.
        on_cbw_error: whether a failure fails the guest's request or gives the saved view up.
        cbw_timeout: seconds after which saving counts as failed; 0 waits for ever.
        min_cluster_size: copy in units of at least so many bytes, a power of two (QEMU 9.2).
    """

    file: BlockRef
    target: BlockRef
    bitmap: BlockDirtyBitmap | None = None
    on_cbw_error: OnCbwError = OnCbwError.BREAK_GUEST_WRITE
    cbw_timeout: UInt32 = 0
    min_cluster_size: Size = 0


@driver(CopyBeforeWriteOptions)
@dataclass(eq=False, kw_only=True)
class CopyBeforeWrite(FilterDriver):
    """The filter; its `copier` holds all state, and a backup job drives the same copier in the background.

    Attributes:
        access: what of the saved view may be asked for.
        done: what guests have overwritten since, and so was saved.
        guards: nobody else may write to the source even while the filter has no users of its own: a job relies on it.
        changes_source: whoever uses the copier discards on the source what was copied.
        broken: why the saved view is lost, once it is (on-cbw-error=break-snapshot).
        on_broken: called when that happens.
        viewers: how many nodes show the saved view; the source is guarded for them too.
        reads: what of the source is being read as part of the view: it is not overwritten meanwhile.
    """

    children: dict[str, Child]
    copier: BlockCopy
    access: DirtyBitmap
    done: DirtyBitmap
    on_cbw_error: OnCbwError
    timeout_s: int = 0
    watches: Watch = Watch.CHANGES
    guards: bool = False
    changes_source: bool = False
    broken: CopyFailed | None = None
    on_broken: Callable[[], None] = field(default=lambda: None)
    viewers: int = 0
    reads: RangeTracker = field(default_factory=RangeTracker)
    _late: set[asyncio.Task[CopyFailed | None]] = field(default_factory=set)

    @classmethod
    async def open(
        cls, options: CopyBeforeWriteOptions, children: dict[str, Child], context: OpenContext
    ) -> "CopyBeforeWrite":
        """Start with everything still to be saved: the view is that of this moment.

        Raises:
            UsageError: `min-cluster-size` is no power of two, there would be too many clusters, or there is no such
                bitmap, or it does not fit.
        """
        cluster_min = options.min_cluster_size
        if cluster_min & (cluster_min - 1):
            raise UsageError("min-cluster-size needs to be a power of 2")
        target = cast("Node", children["target"])
        cluster_size = max(copy_cluster_size(target.cluster_size), cluster_min)
        length = children["file"].length
        if length > CLUSTERS_MAX * cluster_size:
            raise UsageError(
                f"Node '{children['file'].name}' of {length} bytes is too large for copying in clusters of "
                f"{cluster_size} bytes: set min-cluster-size to at least {1 << (length // CLUSTERS_MAX).bit_length()}"
            )
        copier = BlockCopy(
            source=lambda: cast("Node", children["file"]),
            target=lambda: cast("Node", children["target"]),
            offload=context.offload,
            clock=context.clock,
            cluster_size=cluster_size,
        )
        if options.bitmap is None:
            copier.dirty.set_all()
        else:
            _take_over(copier.dirty, context.bitmap(options.bitmap.node, options.bitmap.name))
        return cls(
            children=children,
            copier=copier,
            access=copier.dirty.copy(),
            done=DirtyBitmap(length, cluster_size),
            on_cbw_error=options.on_cbw_error,
            timeout_s=options.cbw_timeout,
        )

    async def close(self) -> None:
        """See `Driver`. Waits: for copies that outlived the request they were for."""
        if self._late:
            await asyncio.wait(self._late)

    def child_perms(self, child: str, needs: Perm, shares: Perm) -> tuple[Perm, Perm]:
        """See `Driver`: nobody else may write to the source, or saved content would not be the old one."""
        if child == "target":
            return Perm.WRITE, ALL & ~Perm.RESIZE
        if not (self.guards or self.viewers) and (needs, shares) == NO_PERMS:
            return needs, shares
        if self.changes_source:
            needs |= Perm.WRITE
        if needs & (Perm.WRITE | Perm.WRITE_UNCHANGED):
            needs |= Perm.CONSISTENT_READ
        return needs, shares & ~(Perm.WRITE | Perm.RESIZE)

    def kept_maps(self, edge: str | None) -> Sequence[DirtyBitmap]:
        """See `Driver`: QEMU shows these three."""
        if edge is None:
            return self.access, self.done
        return (self.copier.dirty,) if edge == "file" else ()

    async def write(self, at: int, content: Buffer, forward: Forward, *, fua: bool) -> None:
        """See `FilterDriver`."""
        await self._save(Span(at, len(content)))
        await forward.write(at, content, fua=fua)

    async def zero(self, span: Span, mode: ZeroMode, forward: Forward) -> None:
        """See `FilterDriver`."""
        await self._save(span)
        await forward.zero(span, mode=mode)

    async def discard(self, span: Span, forward: Forward) -> None:
        """See `FilterDriver`."""
        await self._save(span)
        await forward.discard(span)

    def frozen(self, span: Span) -> list[tuple[Child, Span]]:
        """Where the saved view of `span` is now, in order: what to read it from, holding `reads`.

        Raises:
            IoFailure: EACCES: some of it does not belong to the view, or the view is lost.
        """
        missing = self.broken is not None or self.access.dirty_bytes(span) < _in_clusters(self.access, span)
        if missing:
            raise IoFailure(errno.EACCES, f"frozen view of node '{self.children['file'].name}' at {span.at}")
        saved = [part.intersect(span) for part in self.done.runs(span)]
        left = [(self.children["file"], part) for part in subtract(span, saved)]
        return sorted([*left, *((self.children["target"], part) for part in saved)], key=lambda place: place[1])

    async def give_up(self, span: Span) -> None:
        """Whole clusters of the view are not needed any more: they are neither saved nor kept on the target.

        Raises:
            IoFailure: the target could not discard them.
        """
        whole = span.narrow(self.copier.cluster_size)
        if span.end >= self.copier.length:
            whole = Span.between(whole.at, self.copier.length) if span.at <= whole.at else whole
        if not whole:
            return
        self.access.clear(whole)
        self.copier.forget(whole)
        await self.children["target"].discard(whole)

    async def _save(self, span: Span) -> None:
        """Make sure that the saved view does not need what `span` holds any more, unless the view is given up.

        Raises:
            IoFailure: it could not be copied, and the guest's request is to fail for it.
        """
        if self.broken is None:
            await self._save_content(span)
        if self.reads.live:
            async with self.reads.exclusive(span):
                pass  # whoever comes now finds it saved, or the view lost

    async def _save_content(self, span: Span) -> None:
        failure = await (self._copy_in_time(span) if self.timeout_s else self._copy(span, lambda: True))
        if failure is None:
            self.done.set(span)
            return
        if self.on_cbw_error is OnCbwError.BREAK_GUEST_WRITE:
            raise IoFailure(failure.errno or 0, failure.where) from failure
        if self.broken is None:
            self.broken = failure
            self.on_broken()

    async def _copy(self, span: Span, is_wanted: Callable[[], bool]) -> CopyFailed | None:
        try:
            await self.copier.copy_before_write(span, is_wanted=is_wanted)
        except CopyFailed as failure:
            return failure
        return None

    async def _copy_in_time(self, span: Span) -> CopyFailed | None:
        """As `_copy`, but give up after the timeout; I/O that was begun ends by itself, as it cannot be recalled."""
        waiting = True
        copy = asyncio.get_running_loop().create_task(self._copy(span, lambda: waiting))
        self._late.add(copy)
        copy.add_done_callback(self._late.discard)
        done, _ = await asyncio.wait({copy}, timeout=self.timeout_s)
        waiting = False
        return copy.result() if done else CopyFailed(OSError(errno.ETIMEDOUT, ""), reading=False)


def _take_over(dirty: DirtyBitmap, bitmap: NodeBitmap) -> None:
    """Mark what a user's bitmap has marked.

    Raises:
        UsageError: it is broken, or of another length.
    """
    bitmap.check(may_be_busy=True, may_be_readonly=True)
    if bitmap.map.length != dirty.length:
        raise UsageError(
            f"Cannot create block-copy-state: Failed to merge bitmap '{bitmap.name}' to internal copy-bitmap: Bitmaps "
            f"are of different sizes (destination size is {dirty.length}, source size is {bitmap.map.length}) and "
            f"can't be merged"
        )
    dirty.merge(bitmap.map)


def _in_clusters(marked: DirtyBitmap, span: Span) -> int:
    """Bytes of all clusters that `span` touches."""
    return span.widen(marked.granularity).intersect(Span(0, marked.length)).length
