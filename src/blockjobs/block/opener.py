"""Opening nodes: inline children, references, and the chains that headers name; all or nothing."""

import errno
import logging
import os
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self, cast

from msgspec.structs import replace

from blockjobs.base.errors import BlockjobsError, UsageError
from blockjobs.base.trace import TracePoint
from blockjobs.block import drain
from blockjobs.block.claims import Rights
from blockjobs.block.driver import Child, Driver, FormatDriver, OpenContext
from blockjobs.block.drivers.file import File, FileOptions
from blockjobs.block.events import BlockImageCorrupted
from blockjobs.block.filenames import combine, directories_of
from blockjobs.block.medium import Medium
from blockjobs.block.node import Node
from blockjobs.block.node_bitmap import bitmap_at
from blockjobs.block.options import (
    NodeOptions,
    Reference,
    driver_named,
    node_options,
    references,
    tag_of,
)
from blockjobs.block.peer_images import peer_snapshots
from blockjobs.block.policy import ChainRefused, Scope, refuse_protocols
from blockjobs.block.settings import Settings, settings_for_child, settings_of
from blockjobs.block.vocabulary import ImpliedChild

if TYPE_CHECKING:
    from blockjobs.block.graph import Graph

log = logging.getLogger(__name__)
_trace_open = TracePoint("node_open", "a node is open")

_NOT_WRITABLE: Final = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


class Opening:
    """One transaction: what was opened inside the `async with` block is closed again if it fails."""

    def __init__(self, graph: "Graph") -> None:
        self._graph = graph
        self._made: list[Node] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            await self.undo()

    async def undo(self) -> None:
        """Close what was opened, newest first. Waits: I/O. Checkpoint: no."""
        made, self._made = self._made[::-1], []
        unused: list[Node] = []
        for node in made:
            node.monitor_owned = False
            if node.is_open:
                unused.append(node)
            elif node in self._graph:
                unused.extend(self._graph.forget(node))
        try:
            # All before rights are derived anew: any of them may be what makes the rights impossible.
            await self._graph.close_unused(*unused)
        except BlockjobsError as error:
            log.warning("closing what was opened in vain: %s", error)

    async def open_root(self, options: NodeOptions, *, base: Settings | None = None) -> Node:
        """Open a node that the user described.

        Args:
            options: what the user said.
            base: what holds where the user said nothing; the documented defaults if None.
        """
        return await self._open(options, base or Settings(), None)

    def adopt_medium(self, medium: Medium, name: str, settings: Settings) -> Node:
        """Make a `file` node over a given medium."""
        node = self._graph.register(FileOptions(node_name=name, filename=name), settings)
        self._made.append(node)
        node.driver = File(medium, self._graph.offload, name=name)
        self._graph.opened(node)
        return node

    async def _open(self, options: NodeOptions, inherited: Settings, scope: Scope | None) -> Node:
        driver_class = driver_named(tag_of(options))
        if driver_class is None:
            raise UsageError(f"Unknown driver '{tag_of(options)}'")
        settings = settings_of(options, inherited)
        given = dict(references(options))
        # `file` comes first, so that it is older than the node: generated names and listings show the order.
        below: dict[str, Node] = {}
        if given.get("file") is not None:
            below["file"] = await self._resolve(given["file"], settings_for_child(settings, "file"), scope)
        node = self._graph.register(options, settings)
        self._made.append(node)
        for edge, reference in given.items():
            if reference is not None:
                child = below.get(edge) or await self._resolve_edge(edge, reference, node, scope)
                if not isinstance(reference, str):
                    child.heir_of = node
                rights = driver_class.opening_rights(edge, options, read_only=settings.read_only)
                self._graph.attach(node, edge, child, rights)
        self._graph.refresh_rights()
        for child in node.children.values():
            if child in self._made and isinstance(child.driver, File):
                child.driver.recheck()
        await self._open_driver(node, driver_class, scope)
        if isinstance(node.driver, FormatDriver):
            for implied in node.driver.implied_children():
                if implied.name not in given:
                    await self._open_implied(node, implied, scope)
        self._graph.refresh_rights()
        if _trace_open.is_on:
            _trace_open(node=node.name, driver=node.driver_name, read_only=node.read_only, length=node.length)
        return node

    async def _resolve(self, reference: Reference, inherited: Settings, scope: Scope | None) -> Node:
        assert reference is not None
        if isinstance(reference, str):
            return self._graph.find(reference)
        return await self._open(reference, inherited, scope)

    async def _resolve_edge(self, edge: str, reference: Reference, node: Node, scope: Scope | None) -> Node:
        inherited = settings_for_child(node.settings, edge)
        if edge != "backing":
            return await self._resolve(reference, inherited, scope)
        if reference == node.name:
            raise UsageError(f"Making '{reference}' a backing child of '{reference}' would create a cycle")
        try:
            return await self._resolve(reference, inherited, scope)
        except UsageError as error:
            raise UsageError(f"Could not open backing file: {error}") from error

    async def _open_driver(self, node: Node, driver_class: type[Driver], scope: Scope | None) -> None:
        # The same dict: the graph changes it, the driver sees the change through fewer methods.
        children = cast("dict[str, Child]", node.children)
        try:
            node.driver = await driver_class.open(node.options, children, open_context(node, node.settings, scope))
        except UsageError as error:
            cause = error.__cause__
            writable = node.settings.auto_read_only and not node.read_only
            if not (writable and isinstance(cause, OSError) and cause.errno in _NOT_WRITABLE):
                raise
            node.settings = replace(node.settings, read_only=True)
            node.driver = await driver_class.open(node.options, children, open_context(node, node.settings, scope))
        self._graph.opened(node)
        # Somebody else may be writing to an image that is opened without locks.
        if node.driver.bitmap_store is not None and not node.settings.force_share:
            await node.driver.bitmap_store.load(node.bitmaps)
        if scope is not None and isinstance(node.driver, File):
            scope.enter(node.driver.name, node.driver.identity)

    async def open_backing(self, node: Node) -> bool:
        """Open what the header of `node` names as its backing file; returns whether it names one.

        Raises:
            UsageError: it cannot be opened.
        Waits: I/O. Checkpoint: no.
        """
        driver = node.storage.driver
        assert isinstance(driver, FormatDriver)
        named = [implied for implied in driver.implied_children() if implied.name == "backing"]
        for implied in named:
            await self._open_implied(node.storage, implied, None)
        return bool(named)

    async def _open_implied(self, node: Node, implied: ImpliedChild, scope: Scope | None) -> None:
        """Open a child that the header names, under the open policy."""
        is_backing = implied.name == "backing"
        try:
            refuse_protocols(implied.filename)
            options = _implied_options(node, implied)
            if scope is None:
                scope = self._graph.policy.scope(node.filename, directories_of(node))
                for below in drain.with_all_below(node):
                    if isinstance(below.driver, File):
                        scope.enter(below.driver.name, below.driver.identity)
            scope.descend()
            child = await self._open(options, settings_for_child(node.settings, implied.name), scope)
            scope.depth -= 1
        except ChainRefused:
            raise
        except UsageError as error:
            if not is_backing:
                raise
            raise UsageError(f"Could not open backing file: {error}") from error
        child.heir_of = node
        self._graph.attach(node, implied.name, child, Rights(*node.driver.child_perms(implied.name, *node.rights)))


def open_context(node: Node, settings: Settings, scope: Scope | None = None) -> OpenContext:
    """What the driver of `node` may use when it is opened, or reopened, with these settings."""
    graph = node.graph
    return OpenContext(
        node_name=node.name,
        read_only=settings.read_only,
        looks_only=settings.looks_only,
        unmap=settings.unmap,
        direct=settings.direct,
        no_flush=settings.no_flush,
        force_share=settings.force_share,
        open_path=os.open if scope is None else scope.open,
        corrupted=lambda error, is_fatal: graph.bus.publish(
            BlockImageCorrupted(
                device="",
                node_name=node.name,
                msg=error.text,
                offset=error.at,
                size=error.length,
                fatal=is_fatal,
            )
        ),
        routes_changed=graph.routes_changed,
        publish=graph.bus.publish,
        bitmap=lambda owner, name: bitmap_at(graph, owner, name)[1],
        peer_snapshots=peer_snapshots(node),
        dial=graph.dial,
        offload=graph.offload,
        clock=graph.clock,
        entropy=graph.entropy,
        objects=graph.objects,
    )


def _implied_options(node: Node, implied: ImpliedChild) -> NodeOptions:
    """Options for a child that a header names.

    Raises:
        UsageError: its format is not recorded, or unknown.
    """
    filename = combine(node, implied.filename)
    if implied.format is None:
        if implied.name == "backing":
            # Guessing by content lets whoever wrote a raw disk choose how it is read (CVE-2008-2004).
            raise ChainRefused(
                f"'{node.filename}' does not record the format of its backing file '{implied.filename}': "
                f"record it (qemu-img rebase -u -b {implied.filename} -F FORMAT) or give 'backing' explicitly"
            )
        return FileOptions(filename=filename)
    kind = node_options.variant(implied.format)
    driver_class = driver_named(implied.format)
    if kind is None or driver_class is None or not issubclass(driver_class, FormatDriver):
        raise UsageError(f"Unknown driver {implied.format!a}")
    return kind(file=FileOptions(filename=filename))  # type: ignore[call-arg]  # every format has a file
