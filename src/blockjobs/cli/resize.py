"""`blockjobs resize`: another length for the disk that an image shows."""

import asyncio
from typing import TYPE_CHECKING, Final, Literal

from blockjobs.base.buffers import zeroes
from blockjobs.base.errors import BlockjobsError, IoFailure, UsageError
from blockjobs.base.span import Span
from blockjobs.base.units import MiB, parse_size
from blockjobs.block.vocabulary import ZeroMode
from blockjobs.cli.image_opts import Image
from blockjobs.cli.running import run_on_images

if TYPE_CHECKING:
    from blockjobs.block.node import Node
    from blockjobs.host import ImageHost

Preallocation = Literal["off", "metadata", "falloc", "full"]
_PIECE_BYTES: Final = 1 * MiB


def resize(image: Image, size: str, *, shrink: bool, preallocation: Preallocation, quiet: bool) -> int:
    """Change the length of an image that nobody uses; returns the exit code.

    Args:
        image: which.
        size: the new length, or with a sign the difference.
        shrink: data at the end may be deleted.
        preallocation: "full" writes zeroes to what is new, "falloc" only takes the space, "metadata" has qcow2 images
            note where it will be.
        quiet: say nothing.

    Raises:
        BlockjobsError: it failed; the length is as before, or the text says so.
    """
    sign = size[:1] if size[:1] in ("+", "-") else ""
    try:
        amount = parse_size(size.removeprefix(sign))
    except ValueError as error:
        raise UsageError(f"SIZE: {error}") from error

    if (preallocation == "metadata" and image.format != "qcow2") or (
        preallocation == "falloc" and image.format not in ("raw", "qcow2")
    ):
        raise UsageError(f"Unsupported preallocation mode: {preallocation}")

    async def work(host: "ImageHost") -> int:
        # Backing files do not matter, and might not be there.
        alone = {"backing": None} if image.format == "qcow2" and image.options is None else {}
        node = await image.open(host, name="image", read_only=False, **alone)
        before = node.length
        length = {"": amount, "+": before + amount, "-": before - amount}[sign]
        _check(before, length, shrink=shrink, preallocation=preallocation)
        try:
            if preallocation == "off" or length <= before:
                await host.graph.resize(node, length)
            else:
                await _grow(host, node, length, preallocation)
        except UsageError as error:
            raise image.named(error) from error
        await host.close_nodes(node)
        if not quiet:
            print("Image resized.")
        return 0

    return run_on_images(work)


def _check(before: int, length: int, *, shrink: bool, preallocation: Preallocation) -> None:
    """Raises UsageError, in qemu-img's words."""
    if length <= 0:
        raise UsageError("New image size must be positive")
    if length < before and preallocation != "off":
        raise UsageError("Preallocation can only be used for growing images")
    if length < before and not shrink:
        raise UsageError(
            "Use the --shrink option to perform a shrink operation: it deletes all data beyond the new end"
        )


async def _grow(host: "ImageHost", node: "Node", length: int, how: Preallocation) -> None:
    """Make a disk longer, and have the space for that; if it is cancelled, the disk is as before.

    Raises:
        UsageError: there is none, or it could not be taken: the disk is as before, or the text says that it is not.
        ImageCorrupt: the disk may be longer.
    """
    from blockjobs.block.drivers.qcow2.driver import Qcow2

    before = node.length
    image = node.driver if isinstance(node.driver, Qcow2) else None
    file_bytes = 0 if image is None else image.children["file"].length
    try:
        if image is not None:
            async with host.access(node, write=True) as root, host.graph.drained(root.node):
                await image.take_room(length, with_data=how != "metadata")
        await host.graph.resize(node, length)
        await _fill(host, node, Span.between(before, length), how)
        if image is not None:
            async with host.access(node, write=True) as root, host.graph.drained(root.node):
                await image.leave_room(file_bytes)
    except (IoFailure, asyncio.CancelledError) as error:
        text = f"Could not preallocate new data: {error}"
        try:
            if node.length != before:
                await host.graph.resize(node, before)
            if image is not None:
                async with host.access(node, write=True) as root, host.graph.drained(root.node):
                    await image.leave_room(file_bytes)
        except BlockjobsError as second:
            raise UsageError(f"{text}; the disk has its new length, as it could not be shortened: {second}") from error
        if isinstance(error, IoFailure):
            raise UsageError(f"{text}; the disk is as before") from error
        raise


async def _fill(host: "ImageHost", node: "Node", span: Span, how: Preallocation) -> None:
    """Take the space of what is new, so that no later write needs any."""
    from blockjobs.block.drivers.qcow2.driver import Qcow2

    async with host.access(node, write=True) as root:
        driver = root.node.driver
        if how != "full" and isinstance(driver, Qcow2):
            async with host.graph.drained(root.node):
                await driver.preallocate(span, ZeroMode.KEEP if how == "falloc" else ZeroMode.UNMAP)
        elif how == "falloc":
            await root.node.zero(span, mode=ZeroMode.KEEP)
        else:
            for piece in span.split(_PIECE_BYTES):
                await root.node.write(piece.at, zeroes(piece.length))
        await root.node.flush()
