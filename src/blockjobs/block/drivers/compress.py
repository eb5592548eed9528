"""The compress filter: whatever is written through it is stored compressed (spec/block-layer.md §2)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from blockjobs.base.buffers import Buffer
from blockjobs.base.errors import UsageError
from blockjobs.block.driver import Child, FilterDriver, FormatDriver, Forward, OpenContext
from blockjobs.block.options import BlockRef, NodeOptions, driver
from blockjobs.block.vocabulary import Watch

if TYPE_CHECKING:
    from blockjobs.block.node import Node


class CompressOptions(NodeOptions, frozen=True, kw_only=True, tag="compress"):
    """Compresses what is written to its child, an image whose format can do that."""

    file: BlockRef


@driver(CompressOptions)
@dataclass(eq=False)
class Compress(FilterDriver):
    """Turns plain writes into compressed ones. Clusters that are written in part are read and compressed anew."""

    children: dict[str, Child]
    watches: Watch = Watch.WRITE

    @classmethod
    async def open(cls, options: CompressOptions, children: dict[str, Child], context: OpenContext) -> "Compress":
        """Make sure that the child can compress.

        Raises:
            UsageError: it cannot.
        """
        del options, context
        child = cast("Node", children["file"])
        if not isinstance(child.driver, FormatDriver) or child.driver.compressor("default") is None:
            raise UsageError(f"Compression is not supported for underlying format: {child.driver_name}")
        return cls(children)

    async def write(self, at: int, content: Buffer, forward: Forward, *, fua: bool) -> None:
        """See `FilterDriver`."""
        await forward.write(at, content, fua=fua, compressed=True)
