"""`blockjobs convert`: an image becomes one of another format, or several become one, as jobs in this process."""

import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

from msgspec import Struct

from blockjobs.base.errors import BlockjobsError, UsageError
from blockjobs.base.span import Span
from blockjobs.block.nbd_uri import is_export
from blockjobs.cli.convert_options import Converting
from blockjobs.cli.following import Faults, follow
from blockjobs.cli.formats import format_for_new
from blockjobs.cli.image_options import data_file_as_node, parse_options
from blockjobs.cli.image_opts import Image, given_image, given_images, is_description
from blockjobs.cli.images import cache_options, image_roots, named, open_image
from blockjobs.cli.progress import BarView, NoView, View
from blockjobs.cli.running import new_host, run
from blockjobs.cli.targets import Partial, mode_like

if TYPE_CHECKING:
    from blockjobs.block.node import Node
    from blockjobs.host import Host

ROUND_BYTES: Final = 512
"""A disk that is put behind another begins at a whole sector."""
REST_BYTES: Final = 1 << 20


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
    if converting.target_image_opts or (converting.in_place and is_description(target)):
        place = given_image(target, converting.target_format, image_opts=converting.target_image_opts)
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
            partial.complete(durably=converting.cache != "unsafe")
    if code:
        print(f"blockjobs: cancelled, '{target}' was not made", file=sys.stderr)
    return code


class _Piece(Struct, frozen=True):
    """Bytes `span` of `node`, which fill `length` bytes of the target: zeroes follow where that is more."""

    given: str
    node: "Node"
    span: Span
    length: int


class _Conversion(Struct, frozen=True):
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
            self._pieces(host) as pieces,
        ):
            length = sum(piece.length for piece in pieces)
            if self.partial is not None:
                await self._make_target(host, self.partial, length)
            target = await self._open_target(host)
            if target.length < length:
                raise UsageError(f"'{self.target}' has {target.length} bytes, and {length} are to be copied there")
            with view:
                at = 0
                for piece in pieces:
                    await self._fill(host, target, at, piece, view)
                    at += piece.length
            if self.how.bitmaps:
                await _copy_bitmaps(host, pieces[0].node, target, skip_broken=self.how.skip_broken_bitmaps)
            await host.close_nodes(target)
        return 0

    def _files(self) -> list[str]:
        return [file for image in self.images for file in image.folder_of]

    @asynccontextmanager
    async def _pieces(self, host: "Host") -> "AsyncIterator[list[_Piece]]":
        """What the target is made of, one behind the other; the sources are closed afterwards."""
        more = cache_options(self.how.source_cache) | ({"force-share": True} if self.how.force_share else {})
        pieces: list[_Piece] = []
        for index, image in enumerate(self.images):
            node, length = await image.open_snapshot(host, self.how.snapshot, name=f"source{index}", **more)
            if length < node.length:
                print(
                    f"blockjobs: warning: '{image.given}' is shorter than the snapshot was: bytes from {length} on "
                    "are left out (to have them too, apply the snapshot to a copy of the image)",
                    file=sys.stderr,
                )
            if self.how.salvage:
                node = await self._salvaged(host, node)
            span = Span(0, length) if self.part is None else self.part(length)
            pieces.append(_Piece(image.given, node, span.intersect(Span(0, node.length)), _rounded(span.length)))
        yield pieces
        await host.close_nodes(*(piece.node for piece in pieces))

    async def _salvaged(self, host: "Host", node: "Node") -> "Node":
        """A node that reads zeroes where `node` cannot be read, and says so."""
        from blockjobs.block.drivers.salvage import Salvage, SalvageOptions

        options = SalvageOptions(node_name=f"{node.name}-salvaged", file=node.name, read_only=True)
        above = await host.graph.open(options)
        driver = above.driver
        assert isinstance(driver, Salvage)
        if not self.how.quiet:
            driver.on_loss = _warn_of_loss
        return above

    async def _make_target(self, host: "Host", partial: Partial, length: int) -> None:
        partial.demand_other_than(host.open_files())
        await partial.demand_unused(host)
        # A copy must not be readable for more people than the original.
        mode = mode_like(self._files())
        partial.claim_name(mode=mode)
        members = parse_options(self.how.options or (), self.target_format)
        if self.how.backing is not None:
            members |= {"backing_file": self.how.backing, "backing_fmt": self.how.backing_format}
        if "data_file" in members:
            partial.claim_data_file(members["data_file"], mode=mode)
        await host.create_image(partial.path, self.target_format, length, durably=False, **data_file_as_node(members))

    async def _open_target(self, host: "Host") -> "Node":
        more: dict[str, Any] = cache_options(self.how.cache)
        if self.how.sparse != 0:
            more["detect-zeroes"] = "unmap"
        path = self.target if self.partial is None else self.partial.path
        if self.target_format == "qcow2" and not self.how.in_place:
            more["backing"] = None
        if self.place is not None:
            return await self.place.open(host, name="target", read_only=False, **more)
        return await open_image(host, path, self.target_format, name="target", read_only=False, **more)

    async def _fill(self, host: "Host", target: "Node", at: int, piece: _Piece, view: View) -> None:
        """Copy a piece: whole sectors by a job, what is left byte by byte."""
        span = piece.span
        # Only whole sectors of the source can be a window of it, and be enciphered.
        whole = 0 if span.at % ROUND_BYTES else span.length // ROUND_BYTES * ROUND_BYTES
        if whole:
            async with (
                _window(host, piece.node, "part", Span(span.at, whole)) as source,
                _window(host, target, "window", Span(at, whole)) as place,
            ):
                await self._copy(host, piece.given, source, place, view)
        rest, end = Span.between(span.at + whole, span.end), Span.between(at + span.length, at + piece.length)
        if rest or end:
            async with host.access(piece.node), host.access(target, write=True) as root:
                for part in rest.split(REST_BYTES):
                    await root.node.write(at + part.at - span.at, await piece.node.read(part.at, part.length))
                if end:
                    await root.node.zero(end)
                await root.node.flush()

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


def _warn_of_loss(at: int, reason: str) -> None:
    print(f"blockjobs: warning: error while reading offset {at}: {reason}", file=sys.stderr)


def _rounded(length: int) -> int:
    return -(-length // ROUND_BYTES) * ROUND_BYTES


@asynccontextmanager
async def _window(host: "Host", node: "Node", name: str, span: Span) -> "AsyncIterator[Node]":
    """A part of a node, as a node; the node itself if the part is all of it."""
    if span == Span(0, node.length):
        yield node
        return
    options: dict[str, Any] = {"driver": "raw", "node-name": name, "file": node.name}
    options |= {"offset": span.at, "size": span.length, "read-only": node.read_only}
    window = await host.blockdev_add(options | {"discard": "unmap", "detect-zeroes": node.settings.detect_zeroes.value})
    yield window
    await host.close_nodes(window)


async def _copy_bitmaps(host: "Host", source: "Node", target: "Node", *, skip_broken: bool) -> None:
    """Give the target what the source's persistent bitmaps have recorded.

    Raises:
        UsageError: one of them is inconsistent, and those are not to be left out.
    """
    for bitmap in host.bitmaps(source):
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
