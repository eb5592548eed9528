"""Looking at images: what their headers say, whether they are sound, where their bytes are, how they differ."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from blockjobs.block.claims import Perm
from blockjobs.block.drivers.file import File
from blockjobs.block.node import Node
from blockjobs.host.nodes import Nodes
from blockjobs.schema.command import convert

if TYPE_CHECKING:
    from blockjobs.block.chain_map import MapRun
    from blockjobs.block.drivers.qcow2.check import CheckResult
    from blockjobs.block.info import ImageInfo
    from blockjobs.jobs.measure import Measured

T = TypeVar("T")


class Looks(Nodes):
    """The part of `Host` that looks at images; a repair is the only thing here that changes one."""

    def open_files(self) -> set[tuple[int, int]]:
        """(device, inode) of every file behind an open node, so that nobody replaces one of them."""
        drivers_open = [node.driver for node in self.graph.nodes()]
        return {driver.identity for driver in drivers_open if isinstance(driver, File) and driver.identity}

    async def image_info(self, file: dict[str, Any], *, format: str = "qcow2") -> "ImageInfo":
        """What an image's own headers say. It may be in use; nothing that it names is opened.

        Args:
            file: options of the node that holds it (`{"driver": "file", "filename": ...}`).
            format: qcow2 or raw.

        Raises:
            UsageError: it cannot be opened.
            IoFailure: it cannot be read.
        """
        from blockjobs.block.inspect import inspect_image

        return await inspect_image(self.graph, file, format)

    async def check_image(self, file: dict[str, Any]) -> "CheckResult":
        """Check the metadata of a qcow2 image that nobody writes to.

        Args:
            file: options of the node that holds it.

        Raises:
            UsageError: it cannot be opened, is in use by a writer, or makes too little sense.
            IoFailure: it cannot be read.
        """
        from blockjobs.block.drivers.qcow2.check import check_image

        async with self._alone_with(file, repair=False) as node:
            return await check_image(node, offload=self.offload)

    async def repair_image(self, file: dict[str, Any], *, leaks_only: bool = False) -> "CheckResult":
        """Rebuild the reference counts of a qcow2 image that nobody uses; returns what a check finds afterwards.

        Args:
            file: options of the node that holds it.
            leaks_only: give wasted space back and leave everything else as it is.

        Raises:
            UsageError: it cannot be opened, is in use, or is beyond repair; nothing was changed.
            IoFailure: it cannot be read or written; its reference counts are the old ones or the new ones.
        """
        from blockjobs.block.drivers.qcow2.repair import repair_image, repair_leaks

        async with self._alone_with(file, repair=True) as node:
            return await (repair_leaks if leaks_only else repair_image)(node, offload=self.offload)

    @asynccontextmanager
    async def _alone_with(self, file: dict[str, Any], *, repair: bool) -> AsyncIterator[Node]:
        """A file that nobody else writes to, or uses at all during a repair."""
        node = await self.blockdev_add({**file, "read-only": not repair, "node-name": "checked-file"})
        try:
            needs, shares = Perm.CONSISTENT_READ, Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED
            if repair:
                needs, shares = Perm.CONSISTENT_READ | Perm.WRITE | Perm.RESIZE, Perm(0)
            root = await self.graph.claim("check", node, needs=needs, shares=shares)
            try:
                yield node
            finally:
                await self.graph.release(root)
        finally:
            await self.close_nodes(node)

    async def measure(self, format: str, length: int, *, source: Node | None = None, **options: Any) -> "Measured":
        """How large a new image would be; nothing is made.

        Args:
            format: qcow2, raw or luks.
            length: virtual size in bytes.
            source: what is to be copied there, without what its filters would change; None for an empty disk.
            options: as for `create_image`.

        Raises:
            UsageError: there can be no such image.
            IoFailure, ImageCorrupt: the source's metadata could not be read.
        """
        from blockjobs.jobs.create_options import BlockdevCreateOptions
        from blockjobs.jobs.measure import measure

        plain = {name.replace("_", "-"): value for name, value in options.items() if value is not None}
        if format == "raw":
            described = {"driver": "file", "filename": "", "size": length, **plain}
        else:
            nowhere = {"driver": "file", "filename": ""}
            described = {"driver": format, "size": length, "file": nowhere, **plain}
        wanted = convert(described, BlockdevCreateOptions)
        if source is None:
            return await measure(self.objects, wanted, None)
        async with self.access(source):
            return await measure(self.objects, wanted, source)

    def map(self, node: Node) -> "AsyncIterator[MapRun]":
        """Where each run of `node` is stored; use it inside `access`. Raises and waits as `map_chain`."""
        from blockjobs.block.chain_map import map_chain

        return map_chain(node)

    def map_in_batches(self, node: Node) -> "AsyncIterator[list[MapRun]]":
        """The same, many runs at a time and at least one. Raises and waits as `map_chain`."""
        from blockjobs.block.chain_map import map_in_batches

        return map_in_batches(node)

    async def first_difference(
        self, one: Node, other: Node, *, advance: Callable[[int], None] = lambda count: None
    ) -> int | None:
        """Offset of the first byte in which two nodes differ, None if there is none.

        Args:
            one, other: what lies past the end of the shorter one counts as zero.
            advance: told how many more bytes are dealt with.

        Raises:
            IoFailure, ImageCorrupt: one of them could not be read.
            PermissionConflict: another user does not let them be read.
        """
        from blockjobs.block.compare import first_difference

        async with self.access(one), self.access(other):
            return await first_difference(one, other, advance=advance)
