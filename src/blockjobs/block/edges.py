"""Edges of the graph and the rights on them: single steps, for those who put whole changes together.

Steps are made between two awaits; `refresh_rights` must follow before anybody else looks.
"""

from collections.abc import Sequence

from blockjobs.base.errors import UsageError
from blockjobs.block import drain
from blockjobs.block.claims import Rights, Solution, solve
from blockjobs.block.node import Node
from blockjobs.block.options import NodeOptions
from blockjobs.block.settings import Settings
from blockjobs.block.users import Edge, Place, Root


class Edges:
    """What a graph knows about who uses whom.

    Attributes:
        generation: grows with every change of edges, rights, or what filters watch; routes are cached under it.
    """

    def __init__(self) -> None:
        self.generation = 0
        self._unsettled: set[Node] = set()
        self._untidy: set[Node] = set()

    def attach(self, parent: Node, name: str, child: Node, rights: Rights) -> Edge:
        """Add an edge; `refresh_rights` must follow.

        Raises:
            UsageError: it would close a cycle.
        """
        if child is parent or parent in drain.with_all_below(child):
            raise UsageError(f"Making '{child.name}' a {name} child of '{parent.name}' would create a cycle")
        edge = Edge(name, parent, child, rights)
        parent.edges[name] = edge
        parent.children[name] = child
        child.parents.insert(0, edge)
        self._unsettled |= {parent, child}
        self.routes_changed()
        return edge

    def detach(self, edge: Edge) -> Node:
        """Remove an edge; returns the node it pointed to."""
        del edge.parent.edges[edge.name]
        del edge.parent.children[edge.name]
        edge.node.parents.remove(edge)
        self._unsettled.add(edge.node)
        self.routes_changed()
        return edge.node

    def attach_again(self, edge: Edge, place: Place) -> None:
        """Undo `detach`, at the place where the edge was; `refresh_rights` must follow."""
        parent = edge.parent
        parent.edges[edge.name] = edge
        parent.children[edge.name] = edge.node
        self.arrange(parent, place.siblings)
        self._enter(edge, place)
        self._unsettled |= {parent, edge.node}
        self.routes_changed()

    def arrange(self, parent: Node, names: Sequence[str]) -> None:
        """Put a node's edges in this order, and others behind them; those that it does not have are passed over."""
        for name in [*names, *(name for name in parent.edges if name not in names)]:
            if name in parent.edges:
                parent.edges[name] = parent.edges.pop(name)
                parent.children[name] = parent.children.pop(name)

    def set_options(self, node: Node, options: NodeOptions, settings: Settings) -> None:
        """The node is told something else; `refresh_rights` must follow."""
        node.options, node.settings = options, settings
        self._unsettled.add(node)
        self.routes_changed()

    def point(self, parent: Edge | Root, node: Node, place: Place | None = None) -> None:
        """Let a user use another node, as its newest user or at its former place; `refresh_rights` must follow."""
        parent.node.parents.remove(parent)
        self._unsettled |= {parent.node, node}
        parent.node = node
        self._enter(parent, place)
        if isinstance(parent, Edge):
            parent.parent.children[parent.name] = node
        self.routes_changed()

    @staticmethod
    def _enter(user: Edge | Root, place: Place | None) -> None:
        users = user.node.parents
        older = users[:1] if place is None else [other for other in place.older if other in users]
        users.insert(users.index(older[0]) if older else len(users), user)

    def opened(self, node: Node) -> None:
        """The node has its driver now, which knows what rights it needs below; `refresh_rights` must follow."""
        node.is_open = True
        self._unsettled.add(node)
        self.routes_changed()

    def routes_changed(self) -> None:
        """Edges, rights, or what a filter watches, changed: cached routes are void."""
        self.generation += 1

    def refresh_rights(self) -> None:
        """Derive all rights anew after a change of edges and let the drivers' locks follow.

        Raises:
            PermissionConflict, UsageError: the rights do not fit together, or a lock is not to be had; all rights and
                locks are as before.
        """
        if not self._unsettled:
            return
        solution = solve(self._unsettled)
        self._take_locks(solution)
        self._unsettled.clear()
        for node, rights in solution.nodes.items():
            assert isinstance(node, Node)
            if node.is_open and node.driver.tidies and node.rights != rights:
                self._untidy.add(node)
            node.rights = rights
        self.routes_changed()
        for claim, rights in solution.claims.items():
            assert isinstance(claim, Edge)
            claim.rights = rights

    async def tidy(self) -> None:
        """Let drivers follow up changes of rights with I/O (`Driver.tidy`). Waits: for that. Checkpoint: no."""
        while self._untidy:
            node = self._untidy.pop()
            if node.is_open:
                await node.driver.tidy()
                self._unsettled.add(node)
                self.refresh_rights()

    def _take_locks(self, solution: Solution) -> None:
        done: list[Node] = []
        try:
            for node, rights in solution.nodes.items():
                assert isinstance(node, Node)
                if node.is_open and node.rights != rights:
                    node.driver.permissions_changed(*rights)
                    done.append(node)
        except UsageError:
            for node in reversed(done):
                node.driver.permissions_changed(*node.rights)
            raise
