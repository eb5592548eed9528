"""Changing the graph under running requests: filters come and go, nodes are replaced; all or nothing."""

from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Self

from blockjobs.base.errors import UsageError
from blockjobs.block import drain
from blockjobs.block.claims import Rights
from blockjobs.block.driver import FilterDriver
from blockjobs.block.node import Node
from blockjobs.block.opener import Opening, open_context
from blockjobs.block.options import NodeOptions
from blockjobs.block.reopen import Change, in_order, read_only_changes
from blockjobs.block.settings import Settings
from blockjobs.block.switch import Switch
from blockjobs.block.users import Edge, Root, place_of

if TYPE_CHECKING:
    from blockjobs.block.graph import Graph


class Edit:
    """Changes collected inside `async with graph.edit() as edit:`.

    Each change is made at once and noted with its reverse. Rights are derived at the end of the block, so that several
    changes may pass through states that would not be allowed. If anything fails, everything is reversed.
    """

    def __init__(self, graph: "Graph") -> None:
        self._graph = graph
        self._opening = Opening(graph)
        self._drains = AsyncExitStack()
        self._undo: list[Callable[[], None]] = []
        self._unused: list[Node] = []
        self._switches: list[Switch] = []
        self._active: list[Switch] = []
        self._turned: list[Node] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            await self.settle()
            await self.finish()
        else:
            await self.undo()

    async def settle(self) -> None:
        """Derive the rights, and let drivers get ready for what is new: from here on only `undo` takes it back.

        Raises:
            PermissionConflict, UsageError, IoFailure: the result is not allowed; everything is as before.
        Waits: what reopened drivers read and write. Checkpoint: no.
        """
        try:
            self._graph.refresh_rights()
            self._forget_turns()
            for switch in reversed(self._switches):  # children before parents
                self._active.append(switch)
                await switch.activate()
        except BaseException:
            await self.undo()
            raise

    async def finish(self) -> None:
        """After `settle`: close what is not used any more, and let the users go on.

        Raises:
            IoFailure: metadata of a node that was closed could not be written; the change stands.
        Waits: I/O of what is closed. Checkpoint: no.
        """
        try:
            for switch in self._switches:
                await switch.close(applied=True)
            await self._graph.tidy()
            for node in self._unused:
                await self._graph.close_unused(node)
        finally:
            await self._drains.aclose()

    async def undo(self) -> None:
        """Everything as it was before the edit. Waits: I/O of what was opened. Checkpoint: no."""
        self._forget_turns()
        try:
            for switch in reversed(self._active):
                await switch.deactivate()
            for step in reversed(self._undo):
                step()
            # What was opened may be what makes the rights impossible, so it goes before they are derived anew.
            await self._opening.undo()
            for switch in self._switches:
                await switch.close(applied=False)
        finally:
            await self._drains.aclose()

    def _forget_turns(self) -> None:
        for node in self._turned:
            node.turns_read_only = False

    async def set_read_only(self, node: Node, *, read_only: bool) -> None:
        """Let a node, and the children that were described inside it, be read-only or writable from now on.

        Raises:
            UsageError: it cannot be opened like that. That somebody writes to it shows at the end of the edit.
            IoFailure: what is only in memory could not be written.
        Waits: for the users of all these to park, then I/O. Checkpoint: no.
        """
        if node.read_only is not read_only:
            await self.reopen(read_only_changes(node, read_only=read_only))

    async def reopen(self, changes: Iterable[Change]) -> None:
        """Give nodes other options and settings, each once in an edit. Raises, Waits: as `set_read_only`.

        Checkpoint: no.
        """
        ordered = in_order(changes)
        assert not any(change.node in self._turned for change in ordered), "a node can be reopened once in an edit"
        for change in ordered:
            await self._drain(change.node)
        switches: list[Switch] = []
        for change in ordered:
            context = open_context(change.node, change.settings)
            switches.append(await change.node.driver.prepare_reopen(change.options, context))
            self._switches.append(switches[-1])
        for change, switch in zip(ordered, switches, strict=True):
            switch.apply()
            self._undo.append(switch.revert)
            self._set_options(change.node, change.options, change.settings)

    def _set_options(self, node: Node, options: NodeOptions, settings: Settings) -> None:
        before = node.options, node.settings
        node.turns_read_only = settings.read_only and not node.read_only
        self._turned.append(node)
        self._graph.set_options(node, options, settings)
        self._undo.append(lambda: self._graph.set_options(node, *before))

    async def drain(self, *nodes: Node) -> None:
        """Let the users of nodes stand still until the end of the edit.

        The changes that follow then wait for nothing, so that others never meet a graph that is changed in part.

        Waits: for those users to park. Checkpoint: no.
        """
        for node in nodes:
            await self._drain(node)

    async def open(self, options: NodeOptions, base: Settings) -> Node:
        """Open a node that lives as long as something uses it.

        Args:
            base: what holds where the options say nothing.

        Raises:
            UsageError, IoFailure: it cannot be opened.
        Waits: I/O. Checkpoint: no.
        """
        node = await self._opening.open_root(options, base=base)
        self._unused.append(node)
        return node

    async def insert(
        self, *, above: Node, filter: NodeOptions, implicit: bool = False, exclude: Iterable[Edge | Root] = ()
    ) -> Node:
        """Put a filter between `above` and its users.

        Args:
            above: the node to be filtered; `filter` must name it as its child.
            filter: options of the filter; without a `node-name` it gets a generated one.
            implicit: the user did not name it, so it is skipped where users see chains.
            exclude: users that stay where they are, besides those that do not follow.

        Returns:
            The filter's node. It lives as long as something uses it.

        Raises:
            UsageError: the filter cannot be opened.
        Waits: for the users of `above` to park, then I/O. Checkpoint: no.
        """
        await self._drain(above)
        node = await self._opening.open_root(filter, base=Settings(unmap=True))
        driver = node.driver
        assert isinstance(driver, FilterDriver) and node.children[driver.filtered] is above, (node, above)
        node.implicit = implicit
        self._move(above, node, exclude)
        return node

    async def drop(self, node: Node) -> None:
        """Take a filter away: its users use the filtered node again.

        Raises:
            UsageError: `node` is no filter.
        Waits: for the users of `node` to park. Checkpoint: no.
        """
        driver = node.driver
        if not isinstance(driver, FilterDriver):
            raise UsageError(f"Node '{node.name}' is not a filter")
        await self._drain(node)
        below = node.children[driver.filtered]
        self._move(node, below, ())
        self._unused.append(node)

    async def replace(self, old: Node, new: Node, *, exclude: Iterable[Edge | Root] = ()) -> None:
        """Let all users of `old` use `new`, except those below `new` and those that do not follow.

        Waits: for the users of both to park. Checkpoint: no.
        """
        await self._drain(old)
        await self._drain(new)
        self._move(old, new, exclude)
        self._unused.append(old)

    async def set_child(self, parent: Node, name: str, node: Node | None) -> None:
        """Let `parent` use another node at an edge such as `backing`, or none.

        Args:
            parent: an open node whose driver looks the edge up at each use.
            name: of the edge; it need not exist yet.
            node: what it is to lead to; None takes the edge away.

        Raises:
            UsageError: the edge is frozen, or a cycle would arise.
        Waits: for the users of `parent` to park. Checkpoint: no.
        """
        await self.set_children([(parent, name, node)])

    async def set_children(self, wanted: Iterable[tuple[Node, str, Node | None]]) -> None:
        """As `set_child` for several edges at once, so that nodes can change places. Raises, Waits: as `set_child`."""
        changed = [(parent, name, node) for parent, name, node in wanted if parent.children.get(name) is not node]
        for parent, _, _ in changed:
            await self._drain(parent)
        orders = {parent: list(parent.edges) for parent, _, _ in changed}
        for parent, name, _ in changed:
            if name in parent.edges:
                parent.edges[name].check_not_frozen()
                self._detach(parent.edges[name])
        for parent, name, node in changed:
            if node is not None:
                self._attach(parent, name, node)
                self._graph.arrange(parent, orders[parent])

    def _attach(self, parent: Node, name: str, node: Node) -> None:
        rights = Rights(*parent.driver.child_perms(name, *parent.rights))
        made = self._graph.attach(parent, name, node, rights)
        self._undo.append(lambda: self._forget(made))

    async def open_backing(self, parent: Node) -> None:
        """Open what the header of `parent` names as its backing file and hang it in; nothing if it names none.

        Raises:
            UsageError: it cannot be opened.
        Waits: for the users of `parent` to park, then I/O. Checkpoint: no.
        """
        await self._drain(parent)
        if await self._opening.open_backing(parent):
            made = parent.storage.edges["backing"]
            self._undo.append(lambda: self._forget(made))

    def _detach(self, edge: Edge) -> None:
        place = place_of(edge)
        self._graph.detach(edge)
        self._unused.append(edge.node)
        self._undo.append(lambda: self._graph.attach_again(edge, place))

    def _move(self, old: Node, new: Node, exclude: Iterable[Edge | Root]) -> None:
        """Let the users of `old` use `new`, in the same order.

        Those below `new` stay, or a cycle would arise: a filter over `old` is one, and so is the overlay on `old` that
        serves as such a filter's target (fleecing).
        """
        inside = set(drain.with_all_below(new))
        for parent in reversed(old.parents.copy()):
            stays = parent.parent in inside if isinstance(parent, Edge) else not parent.follows
            if not stays and parent not in exclude:
                if isinstance(parent, Edge):
                    parent.check_not_frozen()
                self._point(parent, new)

    async def _drain(self, node: Node) -> None:
        await self._drains.enter_async_context(self._graph.drained(node))

    def _point(self, parent: Edge | Root, node: Node) -> None:
        before, place = parent.node, place_of(parent)
        self._graph.point(parent, node)
        self._undo.append(lambda: self._graph.point(parent, before, place))

    def _forget(self, edge: Edge) -> None:
        self._graph.detach(edge)
