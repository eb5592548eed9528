"""A dirty bitmap as part of a node: who may change it, and what it records (spec/jobs.md §4, §8).

While a job uses a named bitmap, the bitmap is frozen: it shows what it held when the job began, and a *successor*
records what changes meanwhile. When the job ends the successor takes the bitmap's place (`abdicate`) or the two are
joined (`reclaim`).
"""

from typing import TYPE_CHECKING

from msgspec import Struct

from blockjobs.base.errors import UsageError
from blockjobs.base.span import Span
from blockjobs.block.bitmap import DirtyBitmap
from blockjobs.schema.types import Options

if TYPE_CHECKING:
    from blockjobs.block.graph import Graph
    from blockjobs.block.node import Node


class BlockDirtyBitmap(Options, frozen=True, kw_only=True):
    """A bitmap by node and name."""

    node: str
    name: str


class NodeBitmap(Struct, eq=False, kw_only=True):
    """One bitmap of one node.

    Attributes:
        map: the bits.
        name: None for one that belongs to a job.
        enabled: it records changes.
        persistent: it is stored in the image when that is closed.
        readonly: it was loaded from an image that cannot be written now.
        inconsistent: it was in use when its image was last open, so its content is unknown.
        busy: a job or an export uses it; set by `freeze` or by the user.
        successor: records in place of a frozen one.
    """

    map: DirtyBitmap
    name: str | None = None
    enabled: bool = True
    persistent: bool = False
    readonly: bool = False
    inconsistent: bool = False
    busy: bool = False
    successor: DirtyBitmap | None = None

    def __repr__(self) -> str:
        return f"<NodeBitmap {self.name} of {self.map.length} bytes>"

    @property
    def recording(self) -> bool:
        """Whether changes are recorded, here or in the successor."""
        return self.enabled and not self.inconsistent

    @property
    def everything(self) -> DirtyBitmap:
        """What would be dirty if the job that has it frozen failed now: this is what may be stored."""
        if self.successor is None:
            return self.map
        joined = self.map.copy()
        joined.merge(self.successor)
        return joined

    def record(self, span: Span) -> None:
        """`span` of the node has changed."""
        if self.recording:
            (self.map if self.successor is None else self.successor).set(span)

    def resize(self, length: int) -> None:
        """The node has another length. One that is inconsistent has no content to follow it."""
        if self.inconsistent:
            return
        self.map.resize(length)
        if self.successor is not None:
            self.successor.resize(length)

    def check(self, *, may_be_busy: bool = False, may_be_readonly: bool = False, may_be_broken: bool = False) -> None:
        """Refuse to use or change a bitmap that is not free for it.

        Raises:
            UsageError: in QEMU's words.
        """
        if self.busy and not may_be_busy:
            raise UsageError(f"Bitmap '{self.name}' is currently in use by another operation and cannot be used")
        if self.readonly and not may_be_readonly:
            raise UsageError(f"Bitmap '{self.name}' is readonly and cannot be modified")
        if self.inconsistent and not may_be_broken:
            raise UsageError(f"Bitmap '{self.name}' is inconsistent and cannot be used")

    def freeze(self) -> None:
        """Keep the content as it is now; a successor records from here on."""
        assert not self.busy and self.successor is None, self
        self.busy = True
        self.successor = DirtyBitmap(self.map.length, self.map.granularity)

    def abdicate(self) -> None:
        """The job has dealt with all that the frozen bitmap held: what the successor recorded remains."""
        assert self.successor is not None, self
        self.map, self.successor, self.busy = self.successor, None, False

    def reclaim(self) -> None:
        """What the frozen bitmap held is still to be dealt with: join both."""
        assert self.successor is not None, self
        self.map.merge(self.successor)
        self.successor, self.busy = None, False


def find_bitmap(bitmaps: list[NodeBitmap], name: str) -> NodeBitmap | None:
    """The bitmap of that name, if there is one."""
    return next((bitmap for bitmap in bitmaps if bitmap.name == name), None)


def bitmap_at(graph: "Graph", node: str, name: str) -> "tuple[Node, NodeBitmap]":
    """The bitmap of that name.

    Raises:
        UsageError: there is no such node or no such bitmap.
    """
    if not any(each.name == node for each in graph.nodes()):
        raise UsageError(f"Node '{node}' not found")
    owner = graph.node(node)
    bitmap = find_bitmap(owner.bitmaps, name)
    if bitmap is None:
        raise UsageError(f"Dirty bitmap '{name}' not found")
    return owner, bitmap
