"""`blockjobs rebase`: another backing file for an overlay."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from blockjobs.base.errors import BlockjobsError, UsageError
from blockjobs.block.driver import FormatDriver
from blockjobs.block.rebase import keep_differences
from blockjobs.cli.formats import format_of, local_name
from blockjobs.cli.image_opts import Image
from blockjobs.cli.images import cache_options, image_roots, open_image
from blockjobs.cli.progress import BarView, NoView, View
from blockjobs.cli.running import run_in_host

if TYPE_CHECKING:
    from blockjobs.block.node import Node
    from blockjobs.host import Host


def rebase(
    image: Image,
    backing: str | None,
    *,
    backing_format: str | None,
    unsafe: bool,
    cache: str,
    source_cache: str,
    force_share: bool,
    progress: bool,
    roots: Sequence[str] | None,
) -> int:
    """Let an image that nobody uses lie on another one; returns the exit code.

    Args:
        image: the overlay.
        backing: what its header is to name; relative names count from its folder. Empty: nothing (None too).
        backing_format: its format; by default what its name and content agree on.
        unsafe: change the name only, for a backing file that was moved or renamed; it need not be there.
        cache, source_cache: cache modes of qemu-img, for the image and for the new backing file.
        force_share: the new backing file may be in use by a writer.
        progress: show a bar.
        roots: folders besides the images' own in which backing files may be.

    Raises:
        BlockjobsError: it failed; the image reads as before.
    """
    if backing is None and not unsafe:
        raise UsageError("Must specify backing file (-b) or use unsafe mode (-u)")
    backing = backing or ""
    if not unsafe:
        backing = local_name(backing)
    if image.format != "qcow2":
        raise UsageError(f"'{image.given}' is {image.format}, a format without backing files")
    place = os.path.join(os.path.dirname(image.path), backing) if backing else ""
    if backing and backing_format is None and unsafe and not os.path.exists(place):
        raise UsageError("-u: the format of a backing file that is not there must be said: add -F qcow2 or -F raw")
    known = format_of(place, backing_format) if backing else None
    more = cache_options(source_cache) | ({"force-share": True} if force_share else {})

    async def work(host: "Host") -> int:
        chain = {"backing": None} if unsafe else {}
        top = await image.open(host, name="image", read_only=False, **chain, **cache_options(cache))
        view: View = BarView("rebase") if progress and not unsafe else NoView()
        try:
            async with host.access(top, write=True):
                if not unsafe:
                    with view:
                        await _keep(host, top, place, known, view, **more)
                await _name(top, backing, known)
        except (UsageError, OSError) as error:
            raise image.named(UsageError(str(error))) from error
        await host.close_nodes(top)
        return 0

    return run_in_host(work, image_roots=image_roots(roots, *image.folder_of, *([place] if place else [])))


async def _keep(host: "Host", top: "Node", place: str, format: str | None, view: View, **more: Any) -> None:
    """Copy what the image would lose, and make it durable."""
    new = None if format is None else await open_image(host, place, format, name="new-backing", **more)
    done, total = 0, top.length

    def advance(count: int) -> None:
        nonlocal done
        done += count
        view.show("", done, total)

    if new is None:
        await keep_differences(top, top.backing, None, advance=advance)
    else:
        async with host.access(new):
            await keep_differences(top, top.backing, new, advance=advance)
        await host.close_nodes(new)
    await top.flush()


async def _name(top: "Node", backing: str, format: str | None) -> None:
    driver = top.driver
    assert isinstance(driver, FormatDriver), "qcow2"
    try:
        await driver.name_backing_file(backing or None, format)
    except BlockjobsError as error:
        raise UsageError(f"Could not change the backing file to '{backing}': {error}") from error
