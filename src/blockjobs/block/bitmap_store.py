"""Where a driver keeps the persistent bitmaps of its node (spec/durability.md §1, "Bitmaps").

The rule that all stores keep: false dirty yes, false clean never. A stored bitmap is believed only if it says that
nobody has it in use, and it says so only from the end of `store` to the next `begin_use`.
"""

import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Final

from blockjobs.base.errors import UsageError
from blockjobs.block.node_bitmap import NodeBitmap, find_bitmap

log = logging.getLogger(__name__)

LOADED_BYTES_MAX: Final = 1 << 30
"""Of all bitmaps of one image in memory: a few hundred bytes of a hostile image can describe any amount."""
MAP_BYTES_MAX: Final = 512 << 20
"""Of one stored bitmap's bits; QEMU refuses larger ones."""


class BitmapStore(ABC):
    """Reads and writes the persistent ones among the bitmaps of one node.

    Attributes:
        node_name: for messages.
        bitmaps: the node's own list, once `load` has been there.
    """

    def __init__(self, node_name: str, *, read_only: bool) -> None:
        self.node_name = node_name
        self.bitmaps: list[NodeBitmap] | None = None
        self._read_only = read_only
        self._digests: dict[str, bytes] = {}

    # --- what each store does in its own way

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

    @abstractmethod
    def stored_names(self) -> list[str]:
        """Of what is in the file now, in its order."""

    # --- what they have in common

    def set_read_only(self, read_only: bool) -> None:
        """Nobody may change stored bitmaps from now on, or may again."""
        self._read_only = read_only
        for bitmap in self.persistent().values():
            bitmap.readonly = read_only

    def persistent(self) -> dict[str, NodeBitmap]:
        """The node's persistent bitmaps by name, oldest first."""
        return {each.name: each for each in self.bitmaps or () if each.persistent and each.name is not None}

    def warn_of_lost(self) -> None:
        """The node closes and may not write: what was to be stored is lost, as in QEMU."""
        for name in self.persistent().keys() - set(self.stored_names()):
            log.warning("node '%s' is read-only: its new bitmap '%s' is not stored", self.node_name, name)

    def _take_over(self, bitmaps: list[NodeBitmap], loaded: Iterable[NodeBitmap]) -> None:
        """Enter what was loaded into the node's list."""
        self.bitmaps = bitmaps
        fresh = {each.name: each for each in loaded if each.name is not None}
        for old, bitmap in self.persistent().items():
            if bitmap.readonly and not bitmap.busy and old not in fresh:
                bitmaps.remove(bitmap)
        for name, bitmap in fresh.items():
            if not bitmap.inconsistent:
                self._digests[name] = digest(bitmap)
            known = find_bitmap(bitmaps, name)
            if known is None:
                bitmaps.append(bitmap)
                continue
            known.readonly = bitmap.readonly
            known.inconsistent |= bitmap.inconsistent
            if not known.busy:
                known.map, known.enabled, known.inconsistent = bitmap.map, bitmap.enabled, bitmap.inconsistent

    def _is_out_of_date(self, *, is_marked: bool) -> bool:
        """Whether the file says something else than memory."""
        wanted = self.persistent()
        if set(self.stored_names()) != set(wanted):
            return True
        usable = [(name, each) for name, each in wanted.items() if not each.inconsistent]
        return any(is_marked or self._digests.get(name) != digest(each) for name, each in usable)

    def _stored(self) -> None:
        """The file has what memory has."""
        self._digests = {name: digest(each) for name, each in self.persistent().items() if not each.inconsistent}

    def _in_order(self) -> list[str]:
        """As QEMU: what was there stays in its place, new ones follow, the newest first."""
        stored, wanted = self.stored_names(), self.persistent()
        kept = [name for name in stored if name in wanted]
        return kept + [name for name in reversed(wanted) if name not in kept]

    def _check_memory(self, length: int, granularity: int) -> None:
        """Refuse another bitmap that would make the image one that nobody opens."""
        kept = sum(map_bytes(each.map.length, each.map.granularity) for each in self.persistent().values())
        check_total(kept + map_bytes(length, granularity))


def map_bytes(length: int, granularity: int) -> int:
    """Bytes that the bits of a bitmap take."""
    granules = -(-length // granularity)
    return -(-granules // 8)


def check_total(total_bytes: int) -> None:
    """Refuse to load more than fits.

    Raises:
        UsageError: naming both numbers.
    """
    if total_bytes > LOADED_BYTES_MAX:
        text = f"The image's dirty bitmaps would take {total_bytes} bytes of memory: {LOADED_BYTES_MAX} are allowed"
        raise UsageError(text)


def digest(bitmap: NodeBitmap) -> bytes:
    """Tells whether a bitmap is as it was stored."""
    state = f"{bitmap.map.length} {bitmap.map.granularity} {bitmap.enabled}".encode()
    return hashlib.blake2b(state + bitmap.everything.packed(), digest_size=16).digest()
