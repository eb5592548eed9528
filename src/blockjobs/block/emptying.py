"""Emptying an image whose content the one below it has: the last step of a commit."""

from typing import TYPE_CHECKING

from blockjobs.block.driver import FormatDriver

if TYPE_CHECKING:
    from blockjobs.block.node import Node


async def empty(top: "Node", below: "Node") -> None:
    """Let an image hold nothing itself: ▷ what it holds is durable below before it goes.

    A crash in between leaves an image that shows the same, whatever is left of it.

    Args:
        top: a format node that the caller may write, and that nobody else uses now.
        below: its backing node, which shows the same.

    Raises:
        UsageError: the format has no layers; nothing changed.
        IoFailure, ImageCorrupt: any part of it may be gone from `top`; it shows the same.
    Waits: flushes, table I/O. Checkpoint: no.
    """
    driver = top.driver
    assert isinstance(driver, FormatDriver), "only formats have backing files"
    await below.flush()
    await driver.make_empty()
