"""The whole graph as `x-debug-query-block-graph` lists it: nodes, their users, and who uses whom how."""

from collections.abc import Iterator
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from blockjobs.block.claims import Perm, Rights
from blockjobs.block.users import Root
from blockjobs.schema.types import Record

if TYPE_CHECKING:
    from blockjobs.block.graph import Graph
    from blockjobs.block.node import Node

_JOB: Final = " job '"
"""How jobs call themselves as owners of claims: `mirror job 'id'`."""


class XDbgBlockGraphNodeType(StrEnum):
    """What a vertex is: an export's or job's own backend, a job, or a node."""

    BLOCK_BACKEND = "block-backend"
    BLOCK_JOB = "block-job"
    BLOCK_DRIVER = "block-driver"


class BlockPermission(StrEnum):
    """The rights on an edge."""

    CONSISTENT_READ = "consistent-read"
    WRITE = "write"
    WRITE_UNCHANGED = "write-unchanged"
    RESIZE = "resize"


class XDbgBlockGraphNode(Record, kw_only=True, frozen=True):
    """A vertex."""

    id: int
    type: XDbgBlockGraphNodeType
    name: str


class XDbgBlockGraphEdge(Record, kw_only=True, frozen=True):
    """A use."""

    parent: int
    child: int
    name: str
    perm: list[BlockPermission]
    shared_perm: list[BlockPermission]


class XDbgBlockGraph(Record, kw_only=True, frozen=True):
    """The graph."""

    nodes: list[XDbgBlockGraphNode]
    edges: list[XDbgBlockGraphEdge]


_PERMS: Final = {
    Perm.RESIZE: BlockPermission.RESIZE,
    Perm.WRITE_UNCHANGED: BlockPermission.WRITE_UNCHANGED,
    Perm.WRITE: BlockPermission.WRITE,
    Perm.CONSISTENT_READ: BlockPermission.CONSISTENT_READ,
}


class _Listing:
    """Numbers whatever it meets, users before what they use, in QEMU's order; the lists show the last one first."""

    def __init__(self) -> None:
        self.nodes: list[XDbgBlockGraphNode] = []
        self.edges: list[XDbgBlockGraphEdge] = []
        self._ids: dict[object, int] = {}

    def id_of(self, thing: object) -> int:
        return self._ids.setdefault(thing, len(self._ids) + 1)

    def add(self, thing: object, kind: XDbgBlockGraphNodeType, name: str) -> None:
        self.nodes.append(XDbgBlockGraphNode(id=self.id_of(thing), type=kind, name=name))

    def use(self, parent: object, child: object, name: str, rights: Rights) -> None:
        self.edges.append(
            XDbgBlockGraphEdge(
                parent=self.id_of(parent),
                child=self.id_of(child),
                name=name,
                perm=[word for perm, word in _PERMS.items() if perm in rights.needs],
                shared_perm=[word for perm, word in _PERMS.items() if perm in rights.shares],
            )
        )

    def result(self) -> XDbgBlockGraph:
        return XDbgBlockGraph(nodes=self.nodes[::-1], edges=self.edges[::-1])


def list_graph(graph: "Graph") -> XDbgBlockGraph:
    """List everything: backends, then jobs, then nodes, each kind from the oldest on."""
    listing = _Listing()
    oldest_first = graph.nodes()[::-1]
    roots = sorted(_roots(oldest_first), key=lambda root: root.serial)
    for root in roots:
        if root.is_backend:
            listing.add(root, XDbgBlockGraphNodeType.BLOCK_BACKEND, "")
            listing.use(root, root.node, root.name, root.rights)
    jobs: dict[str, list[Root]] = {}
    for root in roots:
        if not root.is_backend:
            jobs.setdefault(root.owner, []).append(root)
    for owner, held in jobs.items():
        name = owner.removesuffix("'").rpartition(_JOB)[2]
        listing.add(owner, XDbgBlockGraphNodeType.BLOCK_JOB, name)
        for root in reversed(held):
            listing.use(owner, root.node, root.name, root.rights)
    for node in oldest_first:
        listing.add(node, XDbgBlockGraphNodeType.BLOCK_DRIVER, node.name)
        for name, edge in reversed(node.edges.items()):
            listing.use(node, edge.node, name, edge.rights)
    return listing.result()


def _roots(nodes: "list[Node]") -> Iterator[Root]:
    for node in nodes:
        yield from (parent for parent in node.parents if isinstance(parent, Root))
