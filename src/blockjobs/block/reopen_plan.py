"""`blockdev-reopen`: from new options for open nodes to what has to change, all or nothing (spec/block-layer.md §1).

An option that is left out goes back to its default. Most options of drivers are fixed, so that leaving one out that was
given is an error too.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec import UNSET

from blockjobs.base.errors import UsageError
from blockjobs.block.chain import below_implicit
from blockjobs.block.driver import FormatDriver
from blockjobs.block.node import Node
from blockjobs.block.options import NodeOptions, Reference, references, tag_of
from blockjobs.block.reopen import Change, with_heirs
from blockjobs.block.settings import Settings, settings_for_child, settings_of

if TYPE_CHECKING:
    from blockjobs.block.graph import Graph

_MOVABLE: Final = frozenset({"file", "backing"})
"""Edges that may lead to another node afterwards."""


@dataclass(slots=True)
class Plan:
    """What is to be done: nodes with their new options and settings, and edges with the nodes they are to lead to."""

    changes: list[Change] = field(default_factory=list)
    edges: list[tuple[Node, str, Node | None]] = field(default_factory=list)


async def reopen(graph: "Graph", wanted: Sequence[NodeOptions]) -> None:
    """Give open nodes new options: all of them, or none.

    Args:
        wanted: for each node its complete description.

    Raises:
        UsageError: in QEMU's words; nothing changed.
        IoFailure: what was only in memory could not be written; nothing changed.
    Waits: for the users of the nodes to park, then I/O. Checkpoint: no.
    """
    plan = Plan()
    for options in wanted:
        _plan_root(graph, options, plan)
    async with graph.edit() as edit:
        await edit.reopen(plan.changes)
        await edit.set_children(plan.edges)


def _plan_root(graph: "Graph", options: NodeOptions, plan: Plan) -> None:
    name = options.node_name
    if name is None:
        raise UsageError("node-name not specified")
    node = next((node for node in graph.nodes() if node.name == name), None)
    if node is None:
        raise UsageError(f"Failed to find node with node-name='{name}'")
    _plan_node(graph, node, options, Settings(), plan)


def _plan_node(graph: "Graph", node: Node, options: NodeOptions, inherited: Settings, plan: Plan) -> None:
    _check_not_reset(node, options)
    if tag_of(options) != node.driver_name:
        raise UsageError("Cannot change the option 'driver'")
    if options.node_name not in (None, node.name):
        raise UsageError("Cannot change the option 'node-name'")
    if options.force_share not in (None, node.options.force_share):
        raise UsageError("Cannot change the option 'force-share'")
    settings = settings_of(options, inherited)
    if node.driver.reopenable is None:
        raise UsageError(
            f"Block format '{node.driver_name}' used by node '{node.name}' does not support reopening files"
        )
    given = dict(references(options))
    if "backing" not in given and (node.children.get("backing") or _names_backing(node)):
        raise UsageError(f"backing is missing for '{node.name}'")
    below = {edge: _plan_edge(graph, node, edge, reference, settings, plan) for edge, reference in given.items()}
    _check_fixed(node, options)
    plan.changes.append(Change(node=node, options=options, settings=settings))
    for edge, child in node.children.items():
        # What was described inside the node, and is only named now, still does what the node is told.
        if isinstance(given.get(edge), str) and below[edge] is child and child.heir_of is node and edge != "backing":
            plan.changes += with_heirs(child, child.options, settings_of(child.options, _for(settings, edge)))


def _for(settings: Settings, edge: str) -> Settings:
    return settings_for_child(settings, edge)


def _plan_edge(
    graph: "Graph", node: Node, edge: str, reference: Reference, settings: Settings, plan: Plan
) -> Node | None:
    """Where `edge` is to lead; notes what must change for that."""
    before = node.children.get(edge)
    if isinstance(reference, NodeOptions):
        if before is None or before.heir_of is not node:
            raise UsageError(f"Cannot change the option '{edge}.driver'")
        _plan_node(graph, before, reference, settings_for_child(settings, edge), plan)
        return before
    after = None if reference is None else graph.node(reference)
    if edge == "backing" and before is not None and before.implicit and after is not before:
        if after is not below_implicit(before):
            raise UsageError(f"Cannot replace implicit backing child of {node.name}")
        return before
    if after is not before:
        if edge not in _MOVABLE:
            raise UsageError(f"Cannot change the option '{edge}'")
        plan.edges.append((node, edge, after))
    return after


def _names_backing(node: Node) -> bool:
    driver = node.driver
    return isinstance(driver, FormatDriver) and any(child.name == "backing" for child in driver.implied_children())


def _check_fixed(node: Node, options: NodeOptions) -> None:
    """Options that a reopen cannot change are as they were.

    Raises:
        UsageError: in QEMU's words.
    """
    before = dict(_own(node.options))
    for name, value in _own(options):
        if name not in (node.driver.reopenable or ()) and before.get(name) != value:
            raise UsageError(f"Cannot change the option '{name}'")


def _check_not_reset(node: Node, options: NodeOptions) -> None:
    after = dict(_own(options))
    for name, _ in _own(node.options):
        if name not in (node.driver.reopenable or ()) and name not in after:
            raise UsageError(f"Option '{name}' cannot be reset to its default value")


def _own(options: NodeOptions) -> Iterator[tuple[str, Any]]:
    """(wire name, value) of what was given of the driver's own options, children aside, and of `force-share`."""
    children = {edge.partition(".")[0] for edge, _ in references(options)}
    for each in _fields(type(options)):
        value = getattr(options, each.name)
        if value is not None and value is not UNSET and each.encode_name not in children:
            yield each.encode_name, value


def _fields(kind: type[NodeOptions]) -> Iterable[msgspec.structs.FieldInfo]:
    base = {each.name for each in msgspec.structs.fields(NodeOptions)} - {"force_share"}
    return (each for each in msgspec.structs.fields(kind) if each.name not in base)
