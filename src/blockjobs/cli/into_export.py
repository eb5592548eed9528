"""Copying into an export that is there already, in place of making an image file."""

import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blockjobs.base.errors import UsageError
from blockjobs.cli.image_opts import Image
from blockjobs.cli.images import image_roots, open_image
from blockjobs.cli.running import new_host, run

if TYPE_CHECKING:
    from blockjobs.block.node import Node
    from blockjobs.host import Host


@dataclass(frozen=True, slots=True, kw_only=True)
class IntoExport:
    """One image whose content an NBD export gets. Used like `NewCopy`.

    Attributes:
        target: an URI.
        target_format: `raw`, or what the export holds already.
        changes_source: whether the source is opened for writing (its bitmaps change).
        roots: folders besides the source's own in which backing files may be.
    """

    source: Image
    target: str
    target_format: str
    changes_source: bool = False
    roots: Sequence[str] | None = None

    @property
    def place(self) -> str:
        """Where the copy goes, for messages."""
        return self.target

    def make(self, work: "Callable[[Host], Awaitable[int]]", *, as_json: bool) -> int:
        """Run `work`, which fills the target inside `opened`; returns the exit code.

        Raises:
            BlockjobsError, OSError: it failed; what the export holds then is neither the old nor the new.
        """
        code = run(lambda: self._hosted(work))
        if code and not as_json:
            print(f"blockjobs: cancelled, '{self.target}' is incomplete", file=sys.stderr)
        return code

    @asynccontextmanager
    async def opened(self, host: "Host") -> "AsyncIterator[tuple[Node, Node]]":
        """The nodes `source` and `target`; closed afterwards.

        Raises:
            UsageError: one of them cannot be opened, or their sizes differ.
        """
        source = await self.source.open_recording(host, name="source", changes=self.changes_source)
        target = await open_image(host, self.target, self.target_format, name="target", read_only=False)
        if source.length != target.length:
            raise UsageError(
                f"'{self.target}' has {target.length} bytes and '{self.source.given}' {source.length}: "
                "an export cannot be made to fit"
            )
        yield source, target
        await host.close_nodes(target, source)

    async def _hosted(self, work: "Callable[[Host], Awaitable[int]]") -> int:

        async with new_host(image_roots=image_roots(self.roots, *self.source.folder_of)) as host:
            return await work(host)
