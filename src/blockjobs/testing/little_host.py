"""A host for tests of jobs: a graph over disks in memory, an engine, and a list of all events, in virtual time."""

from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

from blockjobs.base.bus import Bus
from blockjobs.base.entropy import SeededEntropy
from blockjobs.base.offload import InlineOffload, Offload
from blockjobs.block.claims import ALL, Perm
from blockjobs.block.drivers.qcow2.create import NewImage, create_image
from blockjobs.block.graph import Graph
from blockjobs.block.medium import Medium
from blockjobs.block.node import Node
from blockjobs.block.options import BlockdevOptions
from blockjobs.block.users import Root
from blockjobs.lifecycle.engine import Engine
from blockjobs.schema.command import convert
from blockjobs.testing.child import MemoryChild
from blockjobs.testing.clock import VirtualClock
from blockjobs.testing.disk import SimDisk


class LittleHost:
    """What jobs need of a host: `async with LittleHost() as host:` inside `blockjobs.testing.clock.run`.

    Attributes:
        events: everything published, in order.
        disks: media in memory by node name.
    """

    def __init__(self, *, seed: int = 0, offload: Offload | None = None) -> None:
        self.clock, self.bus = VirtualClock(), Bus()
        self.graph = Graph(
            clock=self.clock, offload=offload or InlineOffload(), entropy=SeededEntropy(seed), bus=self.bus
        )
        self.jobs = Engine(self.clock, self.bus)
        self.events: list[object] = []
        self.disks: dict[str, SimDisk] = {}
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        self._stack.push_async_callback(self.graph.close)
        self._stack.enter_context(self.bus.listening(self.events.append))
        await self._stack.enter_async_context(self.jobs)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.__aexit__(kind, error, trace)

    async def disk(self, name: str, content: bytes | int, *, medium: Medium | None = None, unmap: bool = True) -> Node:
        """A `file` node over memory.

        Args:
            content: its bytes, or how many zeroes.
            medium: what to use instead, for instance the disk with faults around it.
        """
        if medium is None:
            medium = self.disks[name] = make_disk(content)
        return await self.graph.open_medium(medium, name, unmap=unmap)

    async def add(self, **members: object) -> Node:
        """`blockdev-add`; underscores in names become hyphens."""
        plain = {name.replace("_", "-"): value for name, value in members.items()}
        return await self.graph.open(convert(plain, BlockdevOptions))

    async def qcow2(
        self, name: str, image: NewImage, *, backing: str | None = None, medium: Medium | None = None
    ) -> Node:
        """A new image in memory, opened; its file node is `<name>-file`, that of its data file `<name>-data`.

        Args:
            image: what to make.
            backing: the node to read what the image does not hold from.
            medium: holds the image already.
        """
        has_data_file = image.data_file_name is not None
        if medium is None:
            made, data = MemoryChild(), MemoryChild()
            await create_image(made, data if has_data_file else None, image)
            medium = self.disks[f"{name}-file"] = make_disk(bytes(made.content))
            if has_data_file:
                await self.disk(f"{name}-data", bytes(data.content))
        await self.graph.open_medium(medium, f"{name}-file")
        others = {"data_file": f"{name}-data"} if has_data_file else {}
        options = {"driver": "qcow2", "node_name": name, "file": f"{name}-file", "backing": backing, "discard": "unmap"}
        return await self.add(**options, **others)

    async def guest(self, node: Node) -> Root:
        """A reader and writer of `node` that follows filters, as an export is."""
        needs = Perm.CONSISTENT_READ | Perm.WRITE
        return await self.graph.claim("a guest", node, needs=needs, shares=ALL)


def make_disk(content: bytes | int) -> SimDisk:
    """A simulated disk of these bytes, or of so many zeroes."""
    disk = SimDisk()
    if isinstance(content, int):
        disk.truncate(content)
    else:
        disk.write(0, content)
    disk.sync()
    return disk
