"""`blockjobs convert`: an image becomes one of another format, or several become one, as jobs in this process."""

import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from blockjobs.base.errors import BlockjobsError, UsageError
from blockjobs.base.span import Span
from blockjobs.block.nbd_uri import is_export
from blockjobs.cli.convert_options import Converting
from blockjobs.cli.following import Faults, follow
from blockjobs.cli.formats import format_for_new
from blockjobs.cli.image_options import parse_options
from blockjobs.cli.image_opts import Image, given_image, given_images
from blockjobs.cli.images import image_roots, named, open_image
from blockjobs.cli.progress import BarView, NoView, View
from blockjobs.cli.running import new_host, run
from blockjobs.cli.targets import Partial, mode_like

if TYPE_CHECKING:
    from blockjobs.block.node import Node
    from blockjobs.host import Host

ROUND_BYTES = 512
"""A disk that is put behind another begins at a whole sector."""


def convert(
    sources: Sequence[str], target: str, converting: Converting, *, part: Callable[[int], Span] | None = None
) -> int:
    """Carry out a conversion; returns the exit code.

    An existing target that is no export is replaced once the new image is complete and on disk.

    Args:
        sources: paths or NBD URIs; the target is all of them, one behind the other.
        target: path or NBD URI.
        converting: how.
        part: which part of a source to copy, by its length; all of it if None.

    Raises:
        BlockjobsError, OSError: it failed; the target is as before, unless it was written in place.
    """
    images = given_images(sources, converting.format, image_opts=converting.image_opts)
    place = None
    if converting.target_image_opts:
        place = given_image(target, converting.target_format, image_opts=True)
    known = format_for_new(target, converting.target_format) if place is None else place.format
    converting.demand_sense(len(sources), known)
    view: View = BarView("convert") if converting.progress and not converting.quiet else NoView()
    if converting.in_place or is_export(target):
        code = run(lambda: _Conversion(images, target, place, known, converting, None, part).make(view))
        if code:
            print(f"blockjobs: cancelled, '{target}' is incomplete", file=sys.stderr)
        return code
    with Partial(target, replace=True) as partial:
        code = run(lambda: _Conversion(images, target, place, known, converting, partial, part).make(view))
        if code == 0:
            partial.complete()
    if code:
        print(f"blockjobs: cancelled, '{target}' was not made", file=sys.stderr)
    return code


@dataclass(frozen=True, slots=True)
class _Conversion:
    """One run. `partial` is the new image, None if the target is there already; `place` is the target if it was
    described by options.
    """

    images: Sequence[Image]
    target: str
    place: Image | None
    target_format: str
    how: Converting
    partial: Partial | None
    part: Callable[[int], Span] | None

    async def make(self, view: View) -> int:
        """Do it in a host of its own."""
        from blockjobs.base.collector import relax_collector

        relax_collector()
        async with (
            new_host(image_roots=image_roots(self.how.image_root, *self._files())) as host,
            self._sources(host) as sources,
        ):
            length = sum(_rounded(node.length) for node in sources[:-1]) + (sources[-1].length if sources else 0)
            if self.partial is not None:
                await self._make_target(host, self.partial, length)
            target = await self._open_target(host)
            if target.length < length:
                raise UsageError(f"'{self.target}' has {target.length} bytes, and {length} are to be copied there")
            with view:
                at = 0
                for index, source in enumerate(sources):
                    async with _window(
                        host, target, at, source.length, is_needed=target.length != source.length
                    ) as place:
                        await self._copy(host, self.images[index].given, source, place, view)
                    at += _rounded(source.length)
            if self.how.bitmaps:
                await _copy_bitmaps(host, sources[0], target, skip_broken=self.how.skip_broken_bitmaps)
            await host.close_nodes(target)
        return 0

    def _files(self) -> list[str]:
        return [file for image in self.images for file in image.folder_of]

    @asynccontextmanager
    async def _sources(self, host: "Host") -> "AsyncIterator[list[Node]]":
        """The open source nodes; closed afterwards."""
        more: dict[str, Any] = {"force-share": True} if self.how.force_share else {}
        if self.how.direct_source:
            more["cache"] = {"direct": True}
        nodes: list[Node] = []
        opened: list[Node] = []
        for index, image in enumerate(self.images):
            node = await image.open_snapshot(host, self.how.snapshot, name=f"source{index}", **more)
            opened.append(node)
            part = Span(0, node.length) if self.part is None else self.part(node.length)
            if part != Span(0, node.length):
                if not part.length:
                    continue
                options = {"driver": "raw", "node-name": f"part{index}", "file": node.name, "read-only": True}
                node = await host.blockdev_add(options | {"offset": part.at, "size": part.length})
                opened.insert(0, node)
            nodes.append(node)
        yield nodes
        await host.close_nodes(*opened)

    async def _make_target(self, host: "Host", partial: Partial, length: int) -> None:
        partial.demand_other_than(host.open_files())
        await partial.demand_unused(host)
        # A copy must not be readable for more people than the original.
        partial.claim_name(mode=mode_like(self._files()))
        members = parse_options(self.how.options or (), self.target_format)
        if self.how.backing is not None:
            members |= {"backing_file": self.how.backing, "backing_fmt": self.how.backing_format}
        if "data_file" in members:
            members["data_file"] = {"driver": "file", "filename": members["data_file"]}
        await host.create_image(partial.path, self.target_format, length, **members)

    async def _open_target(self, host: "Host") -> "Node":
        more: dict[str, Any] = {"detect-zeroes": "unmap"} if self.how.sparse else {}
        path = self.target if self.partial is None else self.partial.path
        if self.how.direct_target:
            more["cache"] = {"direct": True}
        if self.target_format == "qcow2" and not self.how.in_place:
            more["backing"] = None
        if self.place is not None:
            return await self.place.open(host, name="target", read_only=False, **more)
        return await open_image(host, path, self.target_format, name="target", read_only=False, **more)

    async def _copy(self, host: "Host", path: str, source: "Node", place: "Node", view: View) -> None:
        """Run one job to its end.

        Raises:
            BlockjobsError: it failed.
        """
        faults = Faults(path, self.target)
        async with AsyncExitStack() as stack:
            stack.enter_context(host.bus.listening(faults.note))
            try:
                job = await host.backup(
                    source,
                    place,
                    id="convert",
                    sync="top" if self.how.backing is not None else "full",
                    compress=self.how.compress,
                    level=self.how.level,
                    speed_bytes_per_s=self.how.rate,
                )
            except UsageError as error:
                raise named(path, error) from error
            outcome = await follow(job, view, faults)
        if outcome.error is not None:
            raise BlockjobsError(f"convert of '{path}' failed: '{faults.where}': {outcome.error}")


def _rounded(length: int) -> int:
    return -(-length // ROUND_BYTES) * ROUND_BYTES


@asynccontextmanager
async def _window(host: "Host", target: "Node", at: int, length: int, *, is_needed: bool) -> "AsyncIterator[Node]":
    """The part of the target that one source fills."""
    if not is_needed:
        yield target
        return
    options = {"driver": "raw", "node-name": "window", "file": target.name, "offset": at, "size": length}
    node = await host.blockdev_add(options | {"discard": "unmap", "detect-zeroes": target.settings.detect_zeroes.value})
    yield node
    await host.close_nodes(node)


async def _copy_bitmaps(host: "Host", source: "Node", target: "Node", *, skip_broken: bool) -> None:
    """Give the target what the source's persistent bitmaps have recorded.

    Raises:
        UsageError: one of them is inconsistent, and those are not to be left out.
    """
    for bitmap in reversed(host.bitmaps(source)):
        if bitmap.name is None or not bitmap.persistent:
            continue
        if bitmap.inconsistent:
            if skip_broken:
                print(f"blockjobs: Skipping inconsistent bitmap '{bitmap.name}'", file=sys.stderr)
                continue
            raise UsageError(
                f"bitmap '{bitmap.name}' is inconsistent: leave such out with --skip-broken-bitmaps, "
                "or take it out of the image with `blockjobs bitmap remove`"
            )
        await host.add_bitmap(
            target, bitmap.name, granularity=bitmap.granularity, persistent=True, enabled=bitmap.recording
        )
        await host.merge_bitmaps(target, bitmap.name, [(source, bitmap.name)])
