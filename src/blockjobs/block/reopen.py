"""What a reopen changes: a node's options and settings, and those of the children that inherit from it."""

from collections.abc import Iterable

from msgspec import Struct
from msgspec.structs import replace

from blockjobs.base.errors import UsageError
from blockjobs.block.claims import parents_first
from blockjobs.block.node import Node
from blockjobs.block.options import NodeOptions
from blockjobs.block.settings import Settings, settings_for_child, settings_of


class Change(Struct, frozen=True, kw_only=True):
    """What one open node is to be from now on."""

    node: Node
    options: NodeOptions
    settings: Settings


def read_only_changes(node: Node, *, read_only: bool) -> list[Change]:
    """What makes a node read-only or writable, whatever its options say.

    Raises:
        UsageError: it neither takes nor looks at locks, so it must not write.
    """
    if node.settings.force_share and not read_only:
        raise UsageError("force-share=on can only be used with read-only images")
    return with_heirs(node, node.options, replace(node.settings, read_only=read_only))


def with_heirs(node: Node, options: NodeOptions, settings: Settings) -> list[Change]:
    """The change of a node, and what follows for the children that were described inside it.

    Backing images are left alone: nobody writes to them, whatever the overlay is.
    """
    changes = [Change(node=node, options=options, settings=settings)]
    for edge, child in node.children.items():
        if child.heir_of is node and edge != "backing":
            changes += with_heirs(child, child.options, settings_of(child.options, settings_for_child(settings, edge)))
    return changes


def in_order(changes: Iterable[Change]) -> list[Change]:
    """Parents before children: what they hold back must be written while their children can still be written to."""
    by_node = {change.node: change for change in changes}
    return [by_node[node] for node in parents_first(by_node) if isinstance(node, Node) and node in by_node]
