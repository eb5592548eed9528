"""The short way for small requests: what can be done at once, without a task and without waiting for anything.

Everything here either does all that the long way (`requests`) would do, or nothing.
"""

from blockjobs.base.span import Span
from blockjobs.block.driver import FormatDriver, ProtocolDriver
from blockjobs.block.drivers.file_medium import FileMedium
from blockjobs.block.node import Node
from blockjobs.block.requests import plain_medium
from blockjobs.block.vocabulary import Watch


def read_now(node: Node, at: int, view: memoryview) -> bool:
    """Fill `view` if the bytes lie in one run of a file whose pages the kernel has in memory.

    Returns:
        False if it is not so, if a filter wants to see the read, or if an overlapping write is under way: what `view`
        holds is unspecified then, and the long way must be gone.
    """
    length = len(view)
    began_ns = node.graph.clock.now_ns()
    if not _fill(node, at, view):
        return False
    node.tally.ended("read", at + length, length, began_ns=began_ns, failed=False)
    return True


def _fill(node: Node, at: int, view: memoryview) -> bool:
    length = len(view)
    target = node.route(Watch.READ)
    while True:
        if at + length > target.length:
            return False
        if target.tracker.live and not target.tracker.is_free(Span(at, length), exclusive=False):
            return False
        driver = target.driver
        if isinstance(driver, ProtocolDriver):
            medium = plain_medium(driver, at, length)
            return isinstance(medium, FileMedium) and medium.read_cached(at, view)
        if not isinstance(driver, FormatDriver):
            return False
        place = driver.place_now(at, length)
        if place is None:
            return False
        name, at = place
        below = target.children[name]
        if below.route(Watch.READ) is not below:
            return False  # the filters there may listen for the debug event that the long way raises
        target = below


def zeroes_fast(node: Node) -> bool:
    """Whether making a run of `node` read as zeroes costs less than writing so many bytes."""
    storage = node.storage
    while isinstance(storage.driver, FormatDriver) and storage.driver.write_align == 1:
        storage = storage.children["file"].storage
    medium = storage.driver.medium if isinstance(storage.driver, ProtocolDriver) else None
    return not isinstance(medium, FileMedium) or medium.zeroes_fast
