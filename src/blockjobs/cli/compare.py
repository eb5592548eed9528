"""`blockjobs compare`: do two images read the same? Words and exit codes are those of `qemu-img compare`."""

import json
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from blockjobs.cli import render
from blockjobs.cli.image_opts import given_image
from blockjobs.cli.images import cache_options, image_roots
from blockjobs.cli.progress import BarView, NoView, View
from blockjobs.cli.running import run_on_images

if TYPE_CHECKING:
    from blockjobs.block.chain_map import MapRun
    from blockjobs.block.node import Node
    from blockjobs.host import ImageHost

IDENTICAL, DIFFERENT = 0, 1


class _Status(NamedTuple):
    """What --strict wants to be the same too."""

    present: bool
    zero: bool
    is_data: bool
    compressed: bool
    is_last: bool


def compare(
    one: str,
    other: str,
    *,
    format: str | None,
    other_format: str | None,
    image_opts: bool,
    strict: bool,
    cache: str,
    force_share: bool,
    progress: bool,
    quiet: bool,
    as_json: bool,
    roots: Sequence[str] | None,
) -> int:
    """Say whether two images read the same; returns `qemu-img compare`'s exit code.

    Args:
        strict: lengths must be the same, and what is allocated, stored or known to be zero.
        cache: a cache mode of qemu-img.

    Raises:
        BlockjobsError: one of them could not be read.
    """
    images = (
        given_image(one, format, image_opts=image_opts),
        given_image(other, other_format, image_opts=image_opts),
    )

    async def work(host: "ImageHost") -> int:
        more = cache_options(cache) | ({"force-share": True} if force_share else {})
        first = await images[0].open(host, name="one", **more)
        second = await images[1].open(host, name="other", **more)
        same_size = first.length == second.length
        found = status = None
        if same_size or not strict:
            found = await _search(host, first, second, BarView("compare") if progress and not quiet else NoView())
        if strict and same_size:
            status = await _status_difference(host, first, second)
            # Of both, whatever comes first is told.
            if status is not None and (found is None or status <= found):
                found = None
            else:
                status = None
        is_same = found is None and status is None and (same_size or not strict)
        if as_json:
            shown = {"identical": is_same, "same-size": same_size, "first-difference": found}
            print(json.dumps(shown | ({"first-status-difference": status} if strict else {})))
        elif not quiet:
            print("\n".join(render.compare_lines(found, status, same_size=same_size, strict=strict)))
        return IDENTICAL if is_same else DIFFERENT

    folders = [folder for image in images for folder in image.folder_of]
    return run_on_images(work, image_roots=image_roots(roots, *folders))


async def _search(host: "ImageHost", first: "Node", second: "Node", view: View) -> int | None:
    total, done = max(first.length, second.length), 0
    with view:

        def advance(count: int) -> None:
            nonlocal done
            done += count
            view.show("", done, total)

        return await host.first_difference(first, second, advance=advance)


async def _status_difference(host: "ImageHost", first: "Node", second: "Node") -> int | None:
    """Where one image is stored in another way than the other of the same length; None if nowhere."""
    async with host.access(first), host.access(second):
        ours, theirs = _statuses(host.map(first), first.length), _statuses(host.map(second), first.length)
        at = our_end = their_end = 0
        our_status = their_status = None
        while at < first.length:
            if at == our_end:
                our_end, our_status = await anext(ours)
            if at == their_end:
                their_end, their_status = await anext(theirs)
            if our_status != their_status:
                return at
            at = min(our_end, their_end)
    return None


async def _statuses(runs: "AsyncIterator[MapRun]", length: int) -> AsyncIterator[tuple[int, _Status]]:
    """Where each run ends, and its status. qemu-img also minds whether the end of the disk ends it."""
    async for each in runs:
        end = each.at + each.length
        yield end, _Status(each.present, each.zero, each.is_data, each.compressed, end == length)
