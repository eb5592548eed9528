"""The filter above a mirror's source: writes go to both sides while the mirror is `write-blocking` (spec/jobs.md §3).

A mirror in the background needs nothing from it, since the source itself records what changes: requests pass without a
call. Only jobs make this filter; users cannot.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blockjobs.base.buffers import Buffer
from blockjobs.base.errors import ImageCorrupt
from blockjobs.base.span import Span
from blockjobs.block.claims import ALL, Perm
from blockjobs.block.driver import Child, FilterDriver, Forward, OpenContext
from blockjobs.block.flight import CopyFailed
from blockjobs.block.mirror_copy import MirrorCopy, TargetFailed
from blockjobs.block.options import BlockRef, NodeOptions, hidden_driver
from blockjobs.block.vocabulary import NO_PERMS, Watch, ZeroMode

if TYPE_CHECKING:
    from blockjobs.block.node import Node


class MirrorTopOptions(NodeOptions, frozen=True, kw_only=True, tag="mirror_top"):
    """The filtered node."""

    backing: BlockRef


@hidden_driver(MirrorTopOptions)
@dataclass(eq=False, kw_only=True)
class MirrorTop(FilterDriver):
    """The filter.

    Attributes:
        guards: nobody else may resize the source, even while the filter has no users of its own: a job relies on it.
        commits: the target is below the source, so what is written there must not be unshared.
    """

    filtered = "backing"

    children: dict[str, Child]
    routes_changed: Callable[[], None]
    guards: bool = False
    commits: bool = False
    watches: Watch = Watch.NONE
    _copy: MirrorCopy | None = None
    _target: "Node | None" = None

    @classmethod
    async def open(cls, options: MirrorTopOptions, children: dict[str, Child], context: OpenContext) -> "MirrorTop":
        """See `Driver`."""
        return cls(children=children, routes_changed=context.routes_changed)

    def child_perms(self, child: str, needs: Perm, shares: Perm) -> tuple[Perm, Perm]:
        """See `Driver`: the source is read, and its length must not change (spec/block-layer.md §3)."""
        if not self.guards and (needs, shares) == NO_PERMS:
            return needs, shares
        if self.commits:
            shares |= ALL
        return needs | Perm.CONSISTENT_READ, shares & ~Perm.RESIZE

    def write_both(self, copy: MirrorCopy, target: "Node") -> None:
        """From now on writes are done on both sides before they complete."""
        self._copy, self._target = copy, target
        self.watches = Watch.WRITE | Watch.ZERO | Watch.FLUSH
        self.routes_changed()

    def write_one(self) -> None:
        """Stop that."""
        self.watches = Watch.NONE
        self.routes_changed()

    async def write(self, at: int, content: Buffer, forward: Forward, *, fua: bool) -> None:
        """See `FilterDriver`."""
        copy, target = self._copy, self._target
        assert copy is not None and target is not None
        await copy.change_both(
            Span(at, len(content)),
            lambda: forward.write(at, content, fua=fua),
            lambda: _on_target(target.write(at, content, fua=fua)),
        )

    async def zero(self, span: Span, mode: ZeroMode, forward: Forward) -> None:
        """See `FilterDriver`."""
        copy, target = self._copy, self._target
        assert copy is not None and target is not None
        await copy.change_both(
            span, lambda: forward.zero(span, mode=mode), lambda: _on_target(target.zero(span, mode=mode))
        )

    async def flush(self, forward: Forward) -> None:
        """See `FilterDriver`: durable on both sides; a target that fails is the job's affair, not the guest's."""
        copy, target = self._copy, self._target
        assert copy is not None and target is not None
        await forward.flush()
        try:
            await target.flush()
        except (OSError, ImageCorrupt) as error:
            copy.on_target_failed(CopyFailed(error, reading=False))


async def _on_target(request: Awaitable[None]) -> None:
    try:
        await request
    except (OSError, ImageCorrupt) as error:
        raise TargetFailed(error) from error
