"""`blockjobs bitmap`: dirty bitmaps in image files that nobody uses, in the manner of `qemu-img bitmap`."""

import json
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from blockjobs.base.errors import UsageError
from blockjobs.base.text import printable
from blockjobs.base.units import format_bytes
from blockjobs.cli.image_opts import Image, given_image
from blockjobs.cli.images import BITMAPS_SUFFIX
from blockjobs.cli.running import run_on_images

if TYPE_CHECKING:
    from blockjobs.block.node import Node
    from blockjobs.cli.arguments import Existing
    from blockjobs.host import ImageHost


async def _open(
    host: "ImageHost", image: Image, bitmap_file: str | None, *, name: str, read_only: bool = False
) -> "Node":
    if image.format == "qcow2" and bitmap_file is not None:
        raise UsageError(f"'{image.given}': a qcow2 image keeps its bitmaps itself: leave --bitmap-file out")
    if image.format != "qcow2" and not (bitmap_file or image.path):
        raise UsageError(f"'{image.given}': say with --bitmap-file where its bitmaps are")
    # What is below does not matter: nothing of the disk is read or written.
    more: dict[str, Any] = (
        {"backing": None} if image.format == "qcow2" else {"bitmap-file": bitmap_file or image.path + BITMAPS_SUFFIX}
    )
    return await image.open(host, name=name, read_only=read_only, **more)


def _change(
    given: str, existing: "Existing", bitmap_file: str | None, work: Callable[["ImageHost", "Node"], Awaitable[str]]
) -> int:
    """Open an image, do `work`, and say what it returns once everything is on disk."""
    image = given_image(given, existing.format, image_opts=existing.image_opts)

    async def hosted(host: "ImageHost") -> int:
        node = await _open(host, image, bitmap_file, name="image")
        try:
            said = await work(host, node)
        except UsageError as error:
            raise image.named(error) from error
        await host.close_nodes(node)
        print(printable(said))
        return 0

    return run_on_images(hosted)


def show(image: str, *, existing: "Existing", bitmap_file: str | None, as_json: bool) -> int:
    """Print the bitmaps of an image; returns the exit code.

    Raises:
        BlockjobsError: it cannot be read, or somebody writes to it.
    """
    named = given_image(image, existing.format, image_opts=existing.image_opts)

    async def work(host: "ImageHost") -> int:
        node = await _open(host, named, bitmap_file, name="image", read_only=True)
        found: list[dict[str, Any]] = [msgspec.to_builtins(each) for each in host.bitmaps(node)]
        if as_json:
            print(json.dumps(found, indent=4))
        elif not found:
            print(f"'{image}' has no bitmaps")
        else:
            print(f"{'Dirty':>12} {'Granularity':>12}  {'State':<13} Name")
            for each in found:
                dirty = "unknown" if each.get("inconsistent") else format_bytes(each["count"])
                granularity = format_bytes(each["granularity"])
                print(f"{dirty:>12} {granularity:>12}  {_state(each):<13} {printable(each['name'])}")
        return 0

    return run_on_images(work)


def _state(bitmap: dict[str, Any]) -> str:
    if bitmap.get("inconsistent"):
        return "inconsistent"
    return "recording" if bitmap["recording"] else "disabled"


def add(
    image: str, name: str, *, granularity: int | None, disabled: bool, existing: "Existing", bitmap_file: str | None
) -> int:
    """Give an image a bitmap; returns the exit code. Raises BlockjobsError: it is as before."""

    async def work(host: "ImageHost", node: "Node") -> str:
        await host.add_bitmap(node, name, granularity=granularity, persistent=True, enabled=not disabled)
        made = host.bitmaps(node)[0]
        return f"Added bitmap '{name}' to '{image}': {format_bytes(made.granularity)} a bit"

    return _change(image, existing, bitmap_file, work)


def remove(image: str, name: str, *, existing: "Existing", bitmap_file: str | None) -> int:
    """Take a bitmap away; returns the exit code. Raises BlockjobsError: it may still be there."""

    async def work(host: "ImageHost", node: "Node") -> str:
        await host.remove_bitmap(node, name)
        return f"Removed bitmap '{name}' from '{image}'"

    return _change(image, existing, bitmap_file, work)


def clear(image: str, name: str, *, existing: "Existing", bitmap_file: str | None) -> int:
    """Make a bitmap clean; returns the exit code. Raises BlockjobsError: it is as before."""

    async def work(host: "ImageHost", node: "Node") -> str:
        host.clear_bitmap(node, name)
        return f"Bitmap '{name}' of '{image}' is clean"

    return _change(image, existing, bitmap_file, work)


def enable(image: str, name: str, enabled: bool, *, existing: "Existing", bitmap_file: str | None) -> int:
    """Begin or stop to record; returns the exit code. Raises BlockjobsError: it is as before."""

    async def work(host: "ImageHost", node: "Node") -> str:
        await host.enable_bitmap(node, name, enabled)
        return f"Bitmap '{name}' of '{image}' {'records' if enabled else 'does not record any more'}"

    return _change(image, existing, bitmap_file, work)


def merge(
    image: str,
    target: str,
    sources: Sequence[str],
    *,
    source_image: str | None,
    source_format: str | None,
    existing: "Existing",
    bitmap_file: str | None,
) -> int:
    """Join bitmaps; returns the exit code. Raises BlockjobsError: the target is as before."""

    async def work(host: "ImageHost", node: "Node") -> str:
        other = node
        if source_image is not None:
            other = await _open(host, given_image(source_image, source_format), None, name="source", read_only=True)
        await host.merge_bitmaps(node, target, [(other, name) for name in sources])
        return f"Merged {len(sources)} bitmap{'s' if len(sources) > 1 else ''} into '{target}' of '{image}'"

    return _change(image, existing, bitmap_file, work)
