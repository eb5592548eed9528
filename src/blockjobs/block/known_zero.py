"""What a target is proven to show as zeroes, so that nobody need write them."""

from typing import TYPE_CHECKING

from blockjobs.base.span import Span
from blockjobs.block.driver import FormatDriver
from blockjobs.block.plan import RunKind, trace

if TYPE_CHECKING:
    from blockjobs.block.node import Node


async def known_zero(node: "Node", span: Span) -> list[Span]:
    """The parts of `span` that are proven to read as zeroes, now and after the image is opened anew.

    A cluster that is absent from an image whose header names a backing file is not proven, even if the node was opened
    without it: an image made for `sync=top` gets its backing file later.

    Raises:
        IoFailure, ImageCorrupt: metadata could not be read.
    Waits: metadata reads. Checkpoint: no.
    """
    absent_is_zero = not _names_backing(node)
    return [
        Span(run.at, run.length)
        for run in await trace(node, span, through_backing=False)
        if run.kind is RunKind.ZERO or (run.kind is RunKind.ABSENT and absent_is_zero)
    ]


def _names_backing(node: "Node") -> bool:
    """Whether the first format at or below `node` has a backing node or names one in its header."""
    driver = node.storage.driver
    if node.backing is not None:
        return True
    return isinstance(driver, FormatDriver) and any(child.name == "backing" for child in driver.implied_children())
