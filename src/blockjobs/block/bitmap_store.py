"""Where a driver keeps the persistent bitmaps of its node (spec/durability.md §1, "Bitmaps").

The rule that all stores keep: false dirty yes, false clean never. A stored bitmap is believed only if it says that
nobody has it in use, and it says so only from the end of `store` to the next `begin_use`.
"""

from abc import ABC, abstractmethod

from blockjobs.block.node_bitmap import NodeBitmap


class BitmapStore(ABC):
    """Reads and writes the persistent ones among the bitmaps of one node."""

    @abstractmethod
    async def load(self, bitmaps: list[NodeBitmap]) -> None:
        """Put what is stored into the node's own list of bitmaps, and keep that list: `store` looks there.

        A bitmap of that name in the list (the node is being reopened) takes the stored content instead.

        Raises:
            UsageError: what is stored makes no sense.
            IoFailure: it cannot be read.
        Waits: reads. Checkpoint: no.
        """

    @abstractmethod
    def check_new(self, name: str, *, length: int, granularity: int) -> None:
        """Whether a bitmap over `length` bytes could be stored; `granularity` is bytes a bit.

        Raises:
            UsageError: the reason why not.
        """

    @abstractmethod
    async def begin_use(self) -> None:
        """Before the node, or a stored bitmap, is changed: make durable that stored bitmaps are out of date.

        Raises:
            IoFailure: the change must not be made.
        Waits: a write and a flush, the first time. Checkpoint: no.
        """

    @abstractmethod
    async def remove(self, name: str) -> None:
        """Forget a stored bitmap, if there is one of that name.

        Raises:
            IoFailure: it may still be there; `store` drops whatever is not in the node's list any more.
        Waits: I/O. Checkpoint: no.
        """

    @abstractmethod
    async def store(self) -> None:
        """Write the node's persistent bitmaps, which are believed from then on until the next `begin_use`.

        Raises:
            IoFailure: what was stored before still says that it is in use.
        Waits: I/O. Checkpoint: no.
        """
