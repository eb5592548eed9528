"""What a driver may use of the graph that opens it."""

import os
from collections.abc import Awaitable, Callable, Sequence

from msgspec import Struct

from blockjobs.base.clock import Clock
from blockjobs.base.entropy import Entropy
from blockjobs.base.errors import ImageCorrupt, UsageError
from blockjobs.base.offload import Offload
from blockjobs.block.dial import Dial, dial_socket
from blockjobs.block.internal_snapshots import InternalSnapshot
from blockjobs.block.node_bitmap import NodeBitmap


def _no_bitmap(node: str, name: str) -> NodeBitmap:
    raise UsageError(f"Dirty bitmap '{name}' not found")


async def _no_peer(name: str) -> Sequence[InternalSnapshot]:
    raise UsageError(f"Could not open '{name}'")


class OpenContext(Struct, frozen=True, kw_only=True):
    """What a driver may use while it is open; handed to `open`.

    Attributes:
        node_name: only for messages.
        read_only: no request will ever write.
        looks_only: nobody will read the disk's bytes, so that no key is needed.
        objects: things made by `object-add`, by id (throttle groups, secrets).
        unmap: space that requests give up goes back to the host, if the options do not say otherwise.
        direct: the host's page cache is to be bypassed (cache.direct).
        no_flush: nothing will be flushed (cache.no-flush).
        force_share: neither take nor look at file locks.
        open_path: how to open a host file: `(filename, flags) -> descriptor`. Names that come from an image's header
            are resolved under the graph's open policy, the user's own ones as they are.
        corrupted: to be called once when the image is found to break its format's rules, with whether it takes no
            further changes because of that.
        routes_changed: to be called whenever `watches` of a filter changed.
        publish: tells users of an event.
        bitmap: the dirty bitmap of a node, by the names of both; raises UsageError.
        peer_snapshots: the snapshots in another image, by its absolute name; raises UsageError or IoFailure.
        dial: how to reach servers.
    """

    node_name: str
    read_only: bool
    looks_only: bool = False
    unmap: bool = True
    direct: bool = False
    no_flush: bool = False
    force_share: bool = False
    open_path: Callable[[str, int], int] = os.open
    corrupted: Callable[[ImageCorrupt, bool], None] = lambda error, is_fatal: None
    routes_changed: Callable[[], None] = lambda: None
    publish: Callable[[object], None] = lambda event: None
    bitmap: Callable[[str, str], NodeBitmap] = _no_bitmap
    peer_snapshots: Callable[[str], Awaitable[Sequence[InternalSnapshot]]] = _no_peer
    dial: Dial = dial_socket
    offload: Offload
    clock: Clock
    entropy: Entropy
    objects: dict[str, object]
