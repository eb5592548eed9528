"""Making an image file from another: both are opened, and the new one gets its name once it is complete."""

import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from blockjobs.cli.image_opts import Image
from blockjobs.cli.images import image_roots, open_image
from blockjobs.cli.running import new_host, run
from blockjobs.cli.targets import Partial, mode_like

if TYPE_CHECKING:
    from blockjobs.block.node import Node
    from blockjobs.host import Host


@dataclass(frozen=True, slots=True, kw_only=True)
class NewCopy:
    """One image that becomes a copy of another.

    Attributes:
        options: of the new image, as arguments of `Host.create_image`.
        sync: with "top" the new image gets the source's backing file, unless `options` name another.
        changes_source: whether the source is opened for writing (its bitmaps change).
        roots: folders besides the source's own in which backing files may be.
        replace: an existing target is replaced.
        keep_partial: what was made is kept if the work fails.
        partial: the file while it is being made.
    """

    source: Image
    target: str
    target_format: str
    options: dict[str, Any]
    sync: str = "full"
    changes_source: bool = False
    roots: Sequence[str] | None = None
    replace: bool = False
    keep_partial: bool = False
    partial: Partial = field(init=False)

    def __post_init__(self) -> None:
        # Refuses what cannot end well before anything is opened.
        object.__setattr__(self, "partial", Partial(self.target, replace=self.replace, keep=self.keep_partial))

    @property
    def place(self) -> str:
        """Where the copy goes, for messages."""
        return self.partial.final

    def make(self, work: "Callable[[Host], Awaitable[int]]", *, as_json: bool) -> int:
        """Run `work`, which fills the target inside `opened`; returns the exit code.

        Raises:
            BlockjobsError, OSError: it failed; nothing new is left behind, except on request.
        """
        with self.partial as partial:
            code = run(lambda: self._hosted(work))
            if code == 0:
                partial.complete()
        if code and not as_json:
            print(f"blockjobs: cancelled, '{self.target}' was not made", file=sys.stderr)
        return code

    @asynccontextmanager
    async def opened(self, host: "Host") -> "AsyncIterator[tuple[Node, Node]]":
        """The nodes `source` and `target`, the latter new and empty; closed, and so on disk, afterwards.

        Raises:
            UsageError: one of them cannot be opened or made.
        """
        partial = self.partial
        source = await self.source.open_recording(host, name="source", changes=self.changes_source)
        partial.demand_other_than(host.open_files())
        await partial.demand_unused(host)
        # A copy must not be readable for more people than the original.
        partial.claim_name(mode=mode_like(self.source.folder_of))
        more: dict[str, Any] = {"backing": None} if self.target_format == "qcow2" else {}
        made = {**self.options, **self._backing(source)}
        await host.create_image(partial.path, self.target_format, source.length, durably=False, **made)
        target = await open_image(host, partial.path, self.target_format, name="target", read_only=False, **more)
        yield source, target
        await host.close_nodes(target, source)

    async def _hosted(self, work: "Callable[[Host], Awaitable[int]]") -> int:

        async with new_host(image_roots=image_roots(self.roots, *self.source.folder_of)) as host:
            return await work(host)

    def _backing(self, source: "Node") -> dict[str, str]:
        """A copy of the top layer only makes sense on top of the same backing image."""
        backing = source.backing if self.sync == "top" else None
        if backing is None or "backing_file" in self.options:
            return {}
        path = os.path.realpath(backing.filename)
        folder = os.path.dirname(self.partial.final)
        name = os.path.basename(path) if os.path.dirname(path) == folder else path
        return {"backing_file": name, "backing_fmt": backing.driver_name}
