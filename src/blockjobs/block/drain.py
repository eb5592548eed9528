"""Bringing a part of the graph to rest (design §1.5)."""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final

from blockjobs.base.quiesce import Quiescable
from blockjobs.block.gate import Gate
from blockjobs.block.node import Node
from blockjobs.block.users import Edge, Root

log = logging.getLogger(__name__)

DRAIN_S_MAX: Final = 5.0
"""A drain that lasts longer names in the log what it waits for: guests stand still meanwhile."""


def with_all_above(node: Node) -> list[Node]:
    """The node and every node that uses it, however indirectly; in breadth-first order."""
    found = {node: None}
    queue = [node]
    for current in queue:
        for parent in current.parents:
            if isinstance(parent, Edge) and parent.parent not in found:
                found[parent.parent] = None
                queue.append(parent.parent)
    return list(found)


def with_all_below(*nodes: Node) -> list[Node]:
    """The nodes and every node they use, however indirectly; in breadth-first order."""
    found = dict.fromkeys(nodes)
    queue = list(found)
    for current in queue:
        for child in current.children.values():
            if child not in found:
                found[child] = None
                queue.append(child)
    return list(found)


@asynccontextmanager
async def quiesced(
    nodes: Sequence[Node], *, apart_from: Quiescable | None = None, gate: Gate | None = None
) -> AsyncIterator[None]:
    """Hold the users of `nodes` still and wait until no request is under way there.

    The users and drivers that are told at the beginning are told again at the end, whatever happened to the graph.

    Args:
        nodes: what is to be at rest.
        apart_from: a user that is not told, because it is the one that asks.
        gate: shut once the users are quiet, so that nobody else begins a change either. The caller opens it.
    """
    # Also below: a throttle there may hold back the very requests that are waited for.
    below = with_all_below(*nodes)
    drivers = [node.driver for node in below if node.is_open]
    users = [user for user in _users(nodes) if user is not apart_from]
    for driver in drivers:
        driver.drain_begin()
    for user in users:
        user.quiesce_begin()
    try:
        await _wait_until_quiet(nodes, users, gate)
        yield
    finally:
        for user in reversed(users):
            user.quiesce_end()
        for driver in reversed(drivers):
            driver.drain_end()


def _users(nodes: Sequence[Node]) -> list[Quiescable]:
    found: dict[int, Quiescable] = {}  # by identity: a user need not be hashable
    for node in nodes:
        for parent in node.parents:
            if isinstance(parent, Root) and parent.user is not None:
                found.setdefault(id(parent.user), parent.user)
    return list(found.values())


async def _wait_until_quiet(nodes: Sequence[Node], users: list[Quiescable], gate: Gate | None) -> None:
    alarm = asyncio.get_running_loop().call_later(DRAIN_S_MAX, _complain, nodes, users)
    try:
        while True:
            noisy = next((user for user in users if not user.is_quiet()), None)
            if noisy is not None:
                await noisy.quiet()
                continue
            if gate is not None:
                gate.shut(nodes)
            busy = next((node for node in nodes if len(node.in_flight)), None)
            if busy is None:
                return
            await busy.in_flight.empty()
    finally:
        alarm.cancel()


def _complain(nodes: Sequence[Node], users: list[Quiescable]) -> None:
    for node in nodes:
        if (oldest := node.in_flight.oldest) is not None:
            log.warning("a drain has waited for %g s: node '%s' is busy with %s", DRAIN_S_MAX, node.name, oldest)
            return
    noisy = next((user for user in users if not user.is_quiet()), None)
    log.warning("a drain has waited for %g s: %r does not park", DRAIN_S_MAX, noisy)
