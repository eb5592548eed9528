"""Writing the root of an image: what it refers to ▷ the root ▷ (spec/durability.md §1, I5).

On a plain file all of it is one hop to a worker, as hops cost more than what is written.
"""

from collections.abc import Sequence
from contextlib import ExitStack

from blockjobs.base.buffers import Buffer
from blockjobs.base.span import Span
from blockjobs.block.claims import Perm
from blockjobs.block.driver import Child
from blockjobs.block.drivers.file import File
from blockjobs.block.node import Node
from blockjobs.block.requests import plain_medium


async def write_root(
    file: Child, at: int, content: Buffer, *, length: int | None = None, first: Sequence[tuple[int, Buffer]] = ()
) -> None:
    """Make everything that was written durable, then write, and make that durable too.

    Args:
        file: on which the caller may write, and resize if `length` is given.
        at: offset of the root.
        content: the root, inside one sector if it must not be torn.
        length: in bytes, which `file` is given before anything else.
        first: offset and content of what is written before the first flush.

    Raises:
        UsageError, IoFailure: the file may say the old or the new; nothing of the new root if it failed before the
            first flush had ended.

    Checkpoint: no. Waits: two flushes and the writes.
    """
    if isinstance(file, Node) and _is_plain(file, length) and isinstance(file.driver, File):
        pieces = [*first, (at, content)]
        if all(plain_medium(file.driver, place, len(piece)) is not None for place, piece in pieces):
            await _in_one_hop(file, file.driver, pieces, length)
            return
    if length is not None:
        await file.resize(length)
    for place, piece in first:
        await file.write(place, piece)
    await file.flush()
    await file.write(at, content)
    await file.flush()


def _is_plain(node: Node, length: int | None) -> bool:
    """Whether nobody but the driver has a say in requests to `node`, and all that is asked for is allowed."""
    settings = node.settings
    if node.gate is not None or node.bitmaps or node.detects_zeroes or settings.no_flush or settings.read_only:
        return False
    return length is None or Perm.RESIZE in node.rights.needs


async def _in_one_hop(node: Node, driver: File, pieces: list[tuple[int, Buffer]], length: int | None) -> None:
    end = max(place + len(piece) for place, piece in pieces)
    for place, piece in pieces:
        node.check_write(place, len(piece))
    with ExitStack() as under_way:
        if length is not None:
            under_way.enter_context(node.in_flight.request("resize", length, 0))
        for place, piece in pieces:
            under_way.enter_context(node.in_flight.request("write", place, len(piece)))
        for _ in range(2):
            under_way.enter_context(node.in_flight.request("flush", 0, 0))
        async with node.tracker.shared(Span(0, end)):
            try:
                await driver.write_root(pieces, length)
            finally:  # for bitmaps that came meanwhile
                for place, piece in pieces:
                    node.record(Span(place, len(piece)))
    for bitmap in node.bitmaps:
        bitmap.resize(node.length)
