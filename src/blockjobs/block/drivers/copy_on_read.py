"""The copy-on-read filter: what is read from backing images becomes the filtered image's own.

blockdev-add can use it alone; the stream job puts it above its image, so that what guests read need not be copied later
(spec/jobs.md §1, spec/block-layer.md §2).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from blockjobs.base.errors import NodeNotFound, UsageError
from blockjobs.base.span import Span
from blockjobs.block.claims import Perm, Rights
from blockjobs.block.driver import Child, FilterDriver, Forward, OpenContext
from blockjobs.block.options import BlockRef, NodeOptions, driver
from blockjobs.block.populate import Populator
from blockjobs.block.vocabulary import NO_PERMS, Watch

if TYPE_CHECKING:
    from blockjobs.block.node import Node


class CopyOnReadOptions(NodeOptions, frozen=True, kw_only=True, tag="copy-on-read"):
    """Copies what is read from backing images into `file`'s image.

    Attributes:
        bottom: the last image of the chain to copy from; all of them if not given.
    """

    file: BlockRef
    bottom: str | None = None


@driver(CopyOnReadOptions)
@dataclass(eq=False, kw_only=True)
class CopyOnRead(FilterDriver):
    """The filter; a stream job drives the same populator in the background.

    Attributes:
        streams: a job populates everything anyway: reads do not wait for what it is just copying.
        retired: it was taken out of the graph, and only its job still holds it.
    """

    children: dict[str, Child]
    populator: Populator
    streams: bool = False
    retired: bool = False
    watches: Watch = Watch.READ

    @classmethod
    async def open(cls, options: CopyOnReadOptions, children: dict[str, Child], context: OpenContext) -> "CopyOnRead":
        """Start copying.

        Raises:
            UsageError: `bottom` is unknown, a filter, or not in the chain.
        """
        node = cast("Node", children["file"])
        bottom = None if options.bottom is None else find_bottom(node, options.bottom)
        populator = Populator(
            node=lambda: cast("Node", children["file"]),
            bottom=bottom,
            keeps_zeroes=True,
            offload=context.offload,
            clock=context.clock,
        )
        return cls(children=children, populator=populator)

    @classmethod
    def opening_rights(cls, edge: str, options: CopyOnReadOptions, *, read_only: bool) -> Rights:
        """See `Driver`: an image that nobody may write to cannot be populated, and QEMU says so at once."""
        del edge, options, read_only
        return Rights(Perm.WRITE_UNCHANGED, Perm.CONSISTENT_READ | Perm.WRITE | Perm.WRITE_UNCHANGED)

    def child_perms(self, child: str, needs: Perm, shares: Perm) -> tuple[Perm, Perm]:
        """See `Driver`: reads write, but nothing that anybody sees changes."""
        if self.retired:
            return NO_PERMS
        if self.streams:
            needs, shares = needs | Perm.CONSISTENT_READ, shares & ~Perm.RESIZE
        return needs | Perm.WRITE_UNCHANGED, shares

    async def read_into(self, at: int, buffer: memoryview, forward: Forward) -> None:
        """See `FilterDriver`. Waits: for the copy, which is a part of the read: if it fails, so does the read."""
        span = Span(at, len(buffer))
        if not (self.streams and not self._is_idle(span)):
            await self.populator.populate(span)
        await forward.read_into(at, buffer)

    def _is_idle(self, span: Span) -> bool:
        return cast("Node", self.children["file"]).storage.populating.is_free(span, exclusive=True)


def find_bottom(node: "Node", name: str) -> "Node":
    """The image called `name` at or below `node`.

    Raises:
        UsageError: there is none, in QEMU's words.
    """
    try:
        bottom = node.graph.node(name)
    except NodeNotFound as error:
        raise UsageError(f"Bottom node '{name}' not found") from error
    if isinstance(bottom.driver, FilterDriver):
        raise UsageError(f"Bottom node '{name}' is a filter")
    below: Node | None = node.storage
    while below is not None and below is not bottom:
        below = below.backing.storage if below.backing is not None else None
    if below is None:
        raise UsageError(f"Bottom node '{name}' is not in the chain of '{node.name}'")
    return bottom
