"""Who may do what with a node: rights that users take and share, and the solver over them (spec/block-layer.md §3)."""

from collections.abc import Iterable, Mapping, Sequence
from enum import IntFlag
from typing import Final, NamedTuple, Protocol, TypeVar

from msgspec import Struct

from blockjobs.base.errors import PermissionConflict, UsageError


class Perm(IntFlag):
    """The four rights on an edge of the graph; bit numbers are those of QEMU's file locks (spec/block-layer.md §4)."""

    CONSISTENT_READ = 1
    WRITE = 2
    WRITE_UNCHANGED = 4
    RESIZE = 8


ALL: Final = Perm.CONSISTENT_READ | Perm.WRITE | Perm.WRITE_UNCHANGED | Perm.RESIZE
NONE: Final = Perm(0)
CHANGES: Final = Perm.WRITE | Perm.WRITE_UNCHANGED

_NAMES: Final = {
    Perm.CONSISTENT_READ: "consistent read",
    Perm.WRITE: "write",
    Perm.WRITE_UNCHANGED: "write unchanged",
    Perm.RESIZE: "resize",
}


def permission_names(perms: Perm) -> str:
    """The rights as error messages list them."""
    return ", ".join(text for perm, text in _NAMES.items() if perm in perms)


class Rights(NamedTuple):
    """What is taken and what others are allowed to take."""

    needs: Perm
    shares: Perm


class Claim(Protocol):
    """An edge of the graph seen from the node it points to: one user of the node with its rights."""

    @property
    def holder(self) -> str:
        """The user as messages name it."""
        ...

    @property
    def rights(self) -> Rights:
        """What the user has now."""
        ...


class Vertex(Protocol):
    """A node as the solver sees it."""

    @property
    def name(self) -> str:
        """For messages."""
        ...

    @property
    def read_only(self) -> bool:
        """Whether nobody may write."""
        ...

    @property
    def refusal_to_write(self) -> str:
        """What a user that wants to change a read-only node is told."""
        ...

    @property
    def claims(self) -> Sequence[Claim]:
        """The users, newest first."""
        ...

    @property
    def below(self) -> Mapping[str, tuple["Vertex", Claim]]:
        """Nodes this one uses and its claim on each, by edge name."""
        ...

    def child_rights(self, edge: str, needs: Perm, shares: Perm) -> Rights:
        """What the driver takes and shares on `edge` when its own users take `needs` and share `shares`."""
        ...


V = TypeVar("V", bound=Vertex)


class Solution(Struct, frozen=True):
    """Rights that fit together.

    Attributes:
        nodes: sum over the users of each node, by node.
        claims: rights of the claims that are edges, by claim; those of roots are fixed by the user.
    """

    nodes: dict[Vertex, Rights]
    claims: dict[Claim, Rights]


def solve(vertices: Iterable[Vertex]) -> Solution:
    """Derive the rights of edges from those of the roots and check every pair of users.

    Pure: nothing in the graph is changed.

    Args:
        vertices: nodes whose users or edges changed; only they and what is below them is looked at, since rights
            never depend on what lies below.

    Raises:
        PermissionConflict: one user takes what another does not share.
        UsageError: somebody would write to a read-only node.
    """
    solution = Solution({}, {})
    for vertex in parents_first(vertices):
        held = [(claim, solution.claims.get(claim, claim.rights)) for claim in vertex.claims]
        _check_pairs(vertex.name, held)
        total = total_rights(rights for _, rights in held)
        if vertex.read_only and total.needs & CHANGES:
            raise UsageError(vertex.refusal_to_write)
        solution.nodes[vertex] = total
        for edge, (_, claim) in vertex.below.items():
            solution.claims[claim] = vertex.child_rights(edge, *total)
    return solution


def total_rights(rights: Iterable[Rights]) -> Rights:
    """What a set of users takes together, and what all of them share."""
    needs, shares = NONE, ALL
    for taken, shared in rights:
        needs |= taken
        shares &= shared
    return Rights(needs, shares)


def _check_pairs(node: str, held: list[tuple[Claim, Rights]]) -> None:
    for denier, denied in held:
        if denied.shares == ALL:
            continue
        for taker, taken in held:
            missing = taken.needs & ~denied.shares
            if missing and taker is not denier:
                raise PermissionConflict(node, permission_names(missing), taker.holder, denier.holder)


def parents_first(vertices: Iterable[Vertex]) -> list[Vertex]:
    """Topological order: every node after all nodes that use it. Iterative, as chains may be long."""
    order: list[Vertex] = []
    seen: set[Vertex] = set()
    for start in vertices:
        stack = [(start, iter(()) if start in seen else iter(start.below.values()))]
        if start in seen:
            continue
        seen.add(start)
        while stack:
            vertex, children = stack[-1]
            for child, _ in children:
                if child not in seen:
                    seen.add(child)
                    stack.append((child, iter(child.below.values())))
                    break
            else:
                order.append(vertex)
                stack.pop()
    order.reverse()
    return order
