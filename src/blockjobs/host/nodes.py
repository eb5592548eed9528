"""The part of a host that has nodes and no jobs: its ports, its life, and the opening and making of images."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Self

from blockjobs.base.bus import Bus
from blockjobs.base.clock import Clock, SystemClock
from blockjobs.base.entropy import Entropy, SystemEntropy
from blockjobs.base.errors import UsageError
from blockjobs.base.offload import Offload, ThreadOffload
from blockjobs.block.claims import ALL, Perm
from blockjobs.block.graph import Graph
from blockjobs.block.node import Node
from blockjobs.block.objects import Objects, object_options
from blockjobs.block.options import BlockdevOptions
from blockjobs.block.policy import OpenPolicy
from blockjobs.block.users import Root
from blockjobs.schema.command import convert

# A type of objects that is made of more than disks, so that the registry of objects cannot name it itself.
object_options.homes.know({"machine-state": "blockjobs.jobs.machine_state"})


class Nodes:
    """Nodes and events of one program. See `ImageHost` and `Host`.

    Attributes:
        graph: the nodes.
        bus: events, as structs.
        objects: throttle groups and secrets by id.
        clock, offload: the ports it was given.
    """

    def __init__(
        self,
        *,
        clock: Clock | None = None,
        offload: Offload | None = None,
        entropy: Entropy | None = None,
        image_roots: Sequence[str] = (),
    ) -> None:
        """See the class.

        Args:
            clock: virtual in tests (`blockjobs.testing.clock`).
            offload: where blocking calls run; threads by default.
            entropy: seeded in simulation.
            image_roots: directories that images may name backing files in; by default their own.
        """
        self.clock = clock or SystemClock()
        self.offload = offload or ThreadOffload()
        self.bus = Bus()
        self.objects = Objects()
        self.graph = Graph(
            clock=self.clock,
            offload=self.offload,
            entropy=entropy or SystemEntropy(),
            bus=self.bus,
            policy=OpenPolicy(tuple(image_roots)),
            objects=self.objects,
        )
        self._names = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close all images and stop the workers."""
        try:
            await self.graph.close()
        finally:
            self.offload.close()

    async def open(
        self, filename: str, *, format: str = "qcow2", node_name: str | None = None, read_only: bool = False
    ) -> Node:
        """Open an image file with its backing chain.

        Args:
            filename: path of the file.
            format: qcow2 or raw; never guessed, since a guest may write any header to its disk.
            node_name: how to call it; generated if not given.
            read_only: nobody may write; other programs may then read it too.

        Raises:
            UsageError: it cannot be opened as told; nothing is open.
        """
        if node_name is None:
            node_name = f"node{self._names}"
            self._names += 1
        file = {"driver": "file", "filename": filename}
        options = {"driver": format, "node-name": node_name, "read-only": read_only, "file": file}
        if format == "raw" or not read_only:
            options["discard"] = "unmap"
        return await self.blockdev_add(options)

    async def blockdev_add(self, options: dict[str, Any]) -> Node:
        """Open a node described as for QMP's `blockdev-add`.

        Raises:
            UsageError: in QEMU's words; nothing is open.
        """
        return await self.graph.open(convert(options, BlockdevOptions))

    async def create_image(
        self, filename: str, format: str, length: int, *, durably: bool = True, **options: Any
    ) -> None:
        """Make an image file; the options are those of `blockdev-create` (`backing_file`, `cluster_size`, ...).

        Args:
            filename: a file that is there already and that nobody uses is overwritten.
            format: qcow2, raw or luks.
            length: virtual size in bytes.
            durably: it is on disk on return; else whoever uses it says when it must be.
            options: members of the format's creation options, with underscores for dashes.

        Raises:
            UsageError: wrong options, or the file is in use or cannot be made; a new file is not left behind.
            IoFailure: it cannot be written.
        """
        members = {name.replace("_", "-"): value for name, value in options.items() if value is not None}
        if format not in ("qcow2", "raw", "luks"):
            raise UsageError(f"Unknown format '{format}': use qcow2, raw or luks")
        await new_image(self.graph, filename, format, {"size": length, **members}, durably=durably)

    async def close_nodes(self, *nodes: Node) -> None:
        """Close images opened here, in this order; what nothing else uses goes with them.

        Raises:
            UsageError: something uses a node.
        """
        for node in nodes:
            await self.graph.remove(node.name)

    @asynccontextmanager
    async def access(self, node: Node, *, write: bool = False, resize: bool = False) -> AsyncIterator[Root]:
        """Hold the rights to read (and write) `node` inside the block.

        Yields:
            The hold, whose `.node` is where to read and write: a job may put a filter above `node` meanwhile, and
            whoever went on writing to `node` itself would pass by a running backup.

        Raises:
            PermissionConflict: another user does not share them.
        """
        needs = Perm.CONSISTENT_READ | (Perm.WRITE if write else Perm(0)) | (Perm.RESIZE if resize else Perm(0))
        root = await self.graph.claim("this program", node, needs=needs, shares=ALL)
        try:
            yield root
        finally:
            await self.graph.release(root)


async def new_image(graph: Graph, filename: str, format: str, members: dict[str, Any], *, durably: bool = True) -> None:
    """Make a file and, for a format with metadata, the image in it."""
    from blockjobs.jobs.create_image import create_image
    from blockjobs.jobs.create_options import BlockdevCreateOptions

    layout = {"driver": "file", "filename": filename, "size": members["size"] if format == "raw" else 0}
    if format == "raw":
        layout |= {name: value for name, value in members.items() if name != "size"}
    await create_image(graph, convert(layout, BlockdevCreateOptions), durably=durably)
    if format != "raw":
        cache = {"direct": False, "no-flush": not durably}
        file = {"driver": "file", "filename": filename, "cache": cache}
        await create_image(graph, convert({"driver": format, "file": file, **members}, BlockdevCreateOptions))
