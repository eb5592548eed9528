"""Whether the file of an image is to be searched for holes where the image says that it has data."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from blockjobs.block.driver import FilterDriver, FormatDriver

if TYPE_CHECKING:
    from blockjobs.block.node import Node


class Counting(ABC):
    """A `FormatDriver` that counts which clusters of its child `file` are in use."""

    @abstractmethod
    async def is_sparse(self, stored_bytes: int) -> bool:
        """Whether more clusters are in use than the file has space for, as in an image that was preallocated.

        Args:
            stored_bytes: what the file takes on its disk.

        Waits: table reads. Checkpoint: no.
        """


async def shows_holes(node: "Node") -> bool:
    """Whether holes of the files below count where `node` has data.

    Those of raw disks always do. Those of other images only if the image has far more clusters than its file has
    space: so does QEMU, and most images are described without a look at their files.

    Waits: table reads. Checkpoint: no.
    """
    driver = node.driver
    if not isinstance(driver, FormatDriver) or driver.shows_holes:
        return True
    if not isinstance(driver, Counting):
        return False
    stored_bytes = allocated_size(node.children["file"])
    return stored_bytes is not None and await driver.is_sparse(stored_bytes)


def allocated_size(node: "Node") -> int | None:
    """Bytes of storage that the files of an image take, its backing images not counted; a filter has its child's.

    But a blkdebug has none, as in QEMU. None: no file says.
    """
    if node.driver_name == "blkdebug":
        return None
    edges = (
        (node.driver.filtered,)
        if isinstance(node.driver, FilterDriver)
        else (edge for edge in node.children if edge != "backing")
    )
    sizes = [allocated_size(node.children[edge]) for edge in edges if edge in node.children]
    sizes.append(node.driver.info().get("actual-size"))
    known = [size for size in sizes if isinstance(size, int)]
    return sum(known) if known else None
