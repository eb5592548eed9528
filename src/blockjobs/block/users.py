"""Who uses a node: edges of the graph, users from outside, and reasons to refuse operations."""

from typing import TYPE_CHECKING, NamedTuple

from msgspec import Struct

from blockjobs.base.errors import UsageError
from blockjobs.base.quiesce import Quiescable
from blockjobs.block.claims import Rights

if TYPE_CHECKING:
    from blockjobs.block.node import Node


class Place(NamedTuple):
    """Where a user stands among those of its node, and where an edge stands among those of its parent.

    Attributes:
        older: the users behind it, the nearest first.
        siblings: the names of the parent's edges, in order.
    """

    older: "list[Edge | Root]"
    siblings: list[str]


def place_of(user: "Edge | Root") -> Place:
    """For `Graph.attach_again` and `Graph.point`."""
    users = user.node.parents
    return Place(users[users.index(user) + 1 :], list(user.parent.edges) if isinstance(user, Edge) else [])


class Edge:
    """A node's use of another: an edge of the graph, seen as a claim on the node below.

    Attributes:
        name: `file`, `backing`, ...
        parent: who uses.
        node: who is used; changed by graph edits only.
        rights: taken and shared; derived by the solver.
    """

    def __init__(self, name: str, parent: "Node", node: "Node", rights: Rights) -> None:
        self.name, self.parent, self.node, self.rights = name, parent, node, rights
        self._frozen_by: list[object] = []

    def freeze(self, owner: object) -> None:
        """Nobody may let the parent use another node here, until `thaw(owner)`: a job relies on the chain."""
        self._frozen_by.append(owner)

    def thaw(self, owner: object) -> None:
        """End all that `owner` froze."""
        self._frozen_by = [other for other in self._frozen_by if other is not owner]

    def check_not_frozen(self) -> None:
        """Refuse to change where the edge leads while somebody relies on it.

        Raises:
            UsageError: in QEMU's words.
        """
        if self._frozen_by:
            raise UsageError(f"Cannot change frozen '{self.name}' link from '{self.parent.name}' to '{self.node.name}'")

    @property
    def holder(self) -> str:
        """As `Claim`."""
        return f"node '{self.parent.name}' (uses node '{self.node.name}' as '{self.name}' child)"


class Root:
    """A use from outside the graph: an export, a job. Its rights are fixed by the user.

    Attributes:
        node: follows graph edits: a filter inserted above the node becomes this node.
        user: told about drains; None for one that does no requests on its own.
        follows: False for a job's own hold on a node, which stays where it is when filters come and go.
        serial: grows from one to the next.
    """

    def __init__(
        self,
        name: str,
        node: "Node",
        rights: Rights,
        *,
        owner: str,
        user: Quiescable | None,
        follows: bool,
        serial: int,
    ) -> None:
        self.name, self.node, self.rights = name, node, rights
        self.owner, self.user, self.follows, self.serial = owner, user, follows, serial

    @property
    def holder(self) -> str:
        """As `Claim`."""
        return f"{self.owner} (uses node '{self.node.name}' as '{self.name}' child)"

    @property
    def is_backend(self) -> bool:
        """Whether QEMU would have a BlockBackend here, which blockdev-del has words of its own for."""
        return self.name == "root"


class Blocker(Struct, frozen=True):
    """Why operations on a node are refused.

    Attributes:
        reason: completes `Node 'x' is busy: ...`.
        owner: who put it there, for removal.
    """

    reason: str
    owner: object
