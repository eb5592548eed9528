"""A node as clients of the NBD server see it: a user of the node from outside the graph, like a guest."""

import asyncio
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from blockjobs.base.errors import UsageError
from blockjobs.block.claims import ALL, Perm
from blockjobs.block.driver import FilterDriver
from blockjobs.block.graph import Graph
from blockjobs.block.node import Node
from blockjobs.block.node_bitmap import NodeBitmap, find_bitmap
from blockjobs.block.users import Root
from blockjobs.export.contexts import Contexts
from blockjobs.export.options import BlockDirtyBitmap, NbdExportOptions
from blockjobs.wire.nbd import REQUEST_BYTES_MAX, STRING_BYTES_MAX, TransmissionFlag
from blockjobs.wire.nbd_options import ExportInfo

if TYPE_CHECKING:
    from blockjobs.export.connection import Connection


class ExportClosed(Exception):
    """The export went away before the request was begun."""


class NbdExport:
    """One export. Requests pass `admit`; while the node is drained they wait there.

    Attributes:
        id, name, description, writable: as given.
        length: bytes, as when it was added: the node cannot be resized meanwhile.
        contexts: of block status.
        writethrough: every write is durable when it is answered.
        clients: who works on it.
        is_closing: it accepts nothing new and goes when its last request has ended.
    """

    request_bytes_max: Final = REQUEST_BYTES_MAX
    _root: Root

    def __init__(self, options: NbdExportOptions, node: Node, bitmaps: list[NodeBitmap], *, shared: bool) -> None:
        self.id = options.id
        self.name = node.name if options.name is None else options.name
        self.description = options.description or ""
        self.writable, self.writethrough = options.writable, options.writethrough
        self.length = node.length
        self.contexts = Contexts(options.allocation_depth, tuple(bitmaps))
        self._can_multi_conn = shared or not options.writable
        self.clients: set[Connection] = set()
        self.is_closing = False
        self._held = 0
        self._active = 0
        self._opened = asyncio.Event()
        self._opened.set()
        self._idle = asyncio.Event()
        self._idle.set()

    @classmethod
    async def open(cls, graph: Graph, node: Node, options: NbdExportOptions, *, shared: bool) -> "NbdExport":
        """Become a user of the node.

        Args:
            graph: where the node is.
            node: what to export.
            options: the rest; the id is free.
            shared: several clients may work at once.

        Raises:
            UsageError: in QEMU's words; nothing has changed.
        """
        for what, text in (("export name", options.name), ("description", options.description)):
            if text is not None and len(text.encode()) > STRING_BYTES_MAX:
                raise UsageError(f"{what} '{text}' too long")
        bitmaps: list[NodeBitmap] = []
        try:
            for wanted in options.bitmaps or ():
                bitmap = _bitmap(graph, node, wanted, writable=options.writable)
                bitmap.busy = True
                bitmaps.append(bitmap)
            export = cls(options, node, bitmaps, shared=shared)
            needs = Perm.CONSISTENT_READ | (Perm.WRITE if options.writable else Perm(0))
            export._root = await graph.claim(
                "an unnamed block device", node, needs=needs, shares=ALL & ~Perm.RESIZE, user=export
            )
        except UsageError:
            for bitmap in bitmaps:
                bitmap.busy = False
            raise
        return export

    def __repr__(self) -> str:
        return f"<NbdExport {self.id} of {self.node.name}>"

    @property
    def node(self) -> Node:
        """Where requests go now: filters and pivots move it, so look it up at each request."""
        return self._root.node

    def info(self, *, structured: bool) -> ExportInfo:
        """What clients are told."""
        flags = (
            TransmissionFlag.HAS_FLAGS
            | TransmissionFlag.SEND_FLUSH
            | TransmissionFlag.SEND_FUA
            | TransmissionFlag.SEND_CACHE
        )
        if self.writable:
            flags |= TransmissionFlag.SEND_TRIM | TransmissionFlag.SEND_WRITE_ZEROES | TransmissionFlag.SEND_FAST_ZERO
        else:
            flags |= TransmissionFlag.READ_ONLY
        if structured:
            flags |= TransmissionFlag.SEND_DF
        if self._can_multi_conn:
            flags |= TransmissionFlag.CAN_MULTI_CONN
        return ExportInfo(self.length, flags)

    # --- requests

    @property
    def is_open(self) -> bool:
        """Whether a request may begin without waiting."""
        return not self._held and not self.is_closing

    async def admit(self) -> None:
        """Begin a request, which `leave` ends; while the node is drained it waits.

        Raises:
            ExportClosed: the export goes away; nothing was begun.
        Waits: for drained sections. Checkpoint: no.
        """
        while self._held and not self.is_closing:
            await self._opened.wait()
        if self.is_closing:
            raise ExportClosed(self.id)
        self.enter()

    def enter(self) -> None:
        """As `admit`, while the export `is_open`."""
        self._active += 1
        self._idle.clear()

    def leave(self) -> None:
        """A request has ended, however it did."""
        self._active -= 1
        if not self._active:
            self._idle.set()

    def quiesce_begin(self) -> None:
        """See `Quiescable`."""
        self._held += 1
        if not self.is_closing:
            self._opened.clear()

    def is_quiet(self) -> bool:
        """See `Quiescable`."""
        return not self._active

    async def quiet(self) -> None:
        """See `Quiescable`. Waits: for requests."""
        await self._idle.wait()

    def quiesce_end(self) -> None:
        """See `Quiescable`."""
        self._held -= 1
        if not self._held:
            self._opened.set()

    # --- the end

    def close(self) -> None:
        """Drop the clients and begin nothing new; requests that were begun end by themselves."""
        self.is_closing = True
        self._opened.set()
        for client in list(self.clients):
            client.abort()

    async def release(self, graph: Graph) -> None:
        """Stop using the node, once `is_quiet()`.

        Raises:
            IoFailure, ImageCorrupt: the node closed with it, and that failed; it is gone nevertheless.
        Waits: I/O. Checkpoint: no.
        """
        for bitmap in self.contexts.bitmaps:
            bitmap.busy = False
        await graph.release(self._root)


def _bitmap(graph: Graph, node: Node, wanted: str | BlockDirtyBitmap, *, writable: bool) -> NodeBitmap:
    """The bitmap to export, free for it.

    Raises:
        UsageError: in QEMU's words.
    """
    if isinstance(wanted, str):
        found = _named(node, wanted, writable=writable)
    else:
        owner = next((each for each in graph.nodes() if each.name == wanted.node), None)
        if owner is None:
            raise UsageError(f"Node '{wanted.node}' not found")
        listed = find_bitmap(owner.bitmaps, wanted.name)
        if listed is None:
            raise UsageError(f"Dirty bitmap '{wanted.name}' not found")
        found = listed
        found.check(may_be_readonly=True)
    return found


def _named(node: Node, name: str, *, writable: bool) -> NodeBitmap:
    """The first bitmap of that name down the chain; one that still records is no use to readers.

    QEMU asks that of bitmaps given by name only, and only where their own node can be written to.
    """
    for owner in _chain(node):
        bitmap = find_bitmap(owner.bitmaps, name)
        if bitmap is None:
            continue
        bitmap.check(may_be_readonly=True)
        if bitmap.enabled and not writable and not owner.read_only:
            raise UsageError(f"Enabled bitmap '{name}' incompatible with readonly export")
        return bitmap
    raise UsageError(f"Bitmap '{name}' is not found")


def _chain(node: Node | None) -> Iterable[Node]:
    while node is not None:
        yield node
        driver = node.driver
        node = node.children.get(driver.filtered if isinstance(driver, FilterDriver) else "backing")
