"""Guests of a live disk: several connections with requests of their own, held by drains as an export is."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from live_model import SECTOR, Model, first_difference

from blockjobs.base.errors import IoFailure
from blockjobs.base.span import Span
from blockjobs.block.claims import ALL, Perm
from blockjobs.block.node import Node
from blockjobs.block.quick import read_now, write_now
from blockjobs.block.users import Root
from blockjobs.testing.host import SimHost

AT_ONCE: Counter[str] = Counter()
"""How many requests went the short way."""
STRIPE = 2 * SECTOR
"""Neighbouring stripes belong to different connections, so that they meet in clusters."""


def write_at_once(node: Node, at: int, content: memoryview) -> bool:
    done = write_now(node, at, content)
    AT_ONCE["write"] += done
    return done


def read_at_once(node: Node, at: int, content: bytearray) -> bool:
    done = read_now(node, at, memoryview(content))
    AT_ONCE["read"] += done
    return done


class Gate:
    """Lets requests through unless a drain holds it; what an export is to the graph."""

    def __init__(self) -> None:
        self._held = self._active = 0
        self._changed = asyncio.Event()

    @property
    def is_at_rest(self) -> bool:
        """Held, and nothing is under way: the disk cannot change."""
        return self._held > 0 and not self._active

    def quiesce_begin(self) -> None:
        self._held += 1

    def is_quiet(self) -> bool:
        return not self._active

    async def quiet(self) -> None:
        await self._until(self.is_quiet)

    def quiesce_end(self) -> None:
        self._held -= 1
        self._notify()

    async def __aenter__(self) -> None:
        await self._until(lambda: not self._held)
        self._active += 1

    async def __aexit__(self, *_: object) -> None:
        self._active -= 1
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._changed.wait()


class Door:
    """How a connection reaches the disk: through a root that follows filters and pivots."""

    def __init__(self) -> None:
        self.gate = Gate()
        self.root: Root | None = None

    async def attach(self, host: SimHost, node: Node) -> None:
        """Become a user of the node."""
        needs = Perm.CONSISTENT_READ | Perm.WRITE
        self.root = await host.graph.claim("a guest", node, needs=needs, shares=ALL, user=self.gate)

    async def detach(self, host: SimHost) -> None:
        """Leave it."""
        assert self.root is not None
        await host.graph.release(self.root)

    @property
    def is_at_rest(self) -> bool:
        """Held by a drain, with nothing under way."""
        return self.gate.is_at_rest

    async def read(self, at: int, length: int) -> bytes:
        async with self.gate:
            content = bytearray(length)
            return bytes(content) if read_at_once(self.node, at, content) else await self.node.read(at, length)

    async def write(self, at: int, content: bytes, *, fua: bool) -> None:
        async with self.gate:
            if fua or not write_at_once(self.node, at, memoryview(content)):
                await self.node.write(at, content, fua=fua)

    async def zero(self, span: Span) -> None:
        async with self.gate:
            await self.node.zero(span)

    async def discard(self, span: Span) -> None:
        async with self.gate:
            await self.node.discard(span)

    async def flush(self) -> None:
        async with self.gate:
            await self.node.flush()

    @property
    def node(self) -> Node:
        """Where requests go now."""
        assert self.root is not None
        return self.root.node


@dataclass
class Connection:
    """One connection: it changes sectors that are its own, so that what it wrote last is what must be there."""

    door: Door
    model: Model
    chance: random.Random
    lane: int
    lanes: int

    async def live(self, is_over: Callable[[], bool]) -> None:
        """Do requests until told that it is over."""
        while not is_over():
            await self.request()
            await asyncio.sleep(self.chance.random() ** 2 * 0.03)

    async def request(self) -> None:
        match self.chance.choice(("write",) * 6 + ("fua", "zero", "discard", "flush", "read", "read")):
            case "read":
                await self._read()
            case "flush":
                await self._flush()
            case kind:
                await self._change(kind)

    async def _read(self) -> None:
        span = self._pick()
        try:
            shown = await self.door.read(span.at, span.length)
        except IoFailure:
            return
        expected = bytes(self.model.content[span.at : span.end])
        assert shown == expected, f"read at {span}: sector {first_difference(shown, expected)} of it is wrong"

    async def _flush(self) -> None:
        mark = self.model.flush_begin()
        try:
            await self.door.flush()
        except IoFailure:
            return
        self.model.flush_end(mark)

    async def _change(self, kind: str) -> None:
        span = self._pick()
        new = bytes(span.length) if kind in ("zero", "discard") else self.chance.randbytes(span.length)
        changes = self.model.begin(span.at, new)
        try:
            match kind:
                case "zero":
                    await self.door.zero(span)
                case "discard":
                    await self.door.discard(span)
                    new = await self._look(span)
                case _:
                    await self.door.write(span.at, new, fua=kind == "fua")
        except IoFailure:
            new = await self._look_back(span, new)
        self.model.end(changes, span.at, new)

    async def _look(self, span: Span) -> bytes:
        """What is there now; read errors are for other requests to meet."""
        while True:
            try:
                return await self.door.read(span.at, span.length)
            except IoFailure:
                await asyncio.sleep(0.01)

    async def _look_back(self, span: Span, new: bytes) -> bytes:
        """A request failed: each sector is as it was, or new."""
        shown = await self._look(span)
        for start in range(0, span.length, SECTOR):
            old = self.model.content[span.at + start : span.at + start + SECTOR]
            assert shown[start : start + SECTOR] in (old, new[start : start + SECTOR]), "a failed request left rubbish"
        return shown

    def _pick(self) -> Span:
        """One half of the disk is stripes in turn, the other long runs, one for each connection."""
        size = len(self.model.content)
        half = size // 2 // (STRIPE * self.lanes) * STRIPE * self.lanes
        if self.chance.random() < 0.7:
            at = (self.chance.randrange(half // STRIPE // self.lanes) * self.lanes + self.lane) * STRIPE
            first = self.chance.randrange(STRIPE // SECTOR)
            return Span(at + first * SECTOR, self.chance.randrange(1, STRIPE // SECTOR - first + 1) * SECTOR)
        own = (size - half) // self.lanes // SECTOR
        first = self.chance.randrange(own)
        count = min(own - first, self.chance.choice((1, 7, 64, 200)))
        return Span(half + (self.lane * own + first) * SECTOR, count * SECTOR)
