"""Holding changes back while a job moves the users of a node to another one (spec/jobs.md §3, §4).

A drain keeps those users still that can be told to be. A program that embeds a host writes when it likes, and an export
may come while a mirror is pending: what they send must not end on the side that is left behind. Requests that find the
gate shut wait before they count as under way, and go on at the node that has taken the place of theirs.
"""

import asyncio
from collections.abc import Iterable
from typing import TYPE_CHECKING

from blockjobs.base.quiesce import Quiescable

if TYPE_CHECKING:
    from blockjobs.block.node import Node


class Gate:
    """Open at first; shut at most once, and opened for good.

    Attributes:
        leads_to: where changes go on once the gate is open, for nodes that were replaced.
    """

    def __init__(self) -> None:
        self.leads_to: dict[Node, Node] = {}
        self._nodes: list[Node] = []
        self._newcomers: list[Quiescable] = []
        self._opened = asyncio.Event()

    def shut(self, nodes: "Iterable[Node]") -> None:
        """Let no change pass `nodes` from now on. Harmless when repeated."""
        for node in nodes:
            if node.gate is None and not self._opened.is_set():
                node.gate = self
                self._nodes.append(node)

    def join(self, user: Quiescable) -> None:
        """A user came to one of the nodes while the gate is shut: it is held like those that were there."""
        self._newcomers.append(user)
        user.quiesce_begin()

    def open(self) -> None:
        """Let everybody go on. Harmless when repeated."""
        self._opened.set()
        while self._nodes:
            self._nodes.pop().gate = None
        while self._newcomers:
            self._newcomers.pop().quiesce_end()

    async def passed(self, node: "Node") -> "Node":
        """Wait until the gate is open; returns where to go on. Waits: for the job. Checkpoint: no."""
        await self._opened.wait()
        return self.leads_to.get(node, node)
