"""Opening what a person names on the command line: files, block devices and NBD exports, with errors that name them."""

import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from blockjobs.base.errors import BlockjobsError, UsageError
from blockjobs.block.nbd_uri import export_options, is_export

if TYPE_CHECKING:
    from blockjobs.block.node import Node
    from blockjobs.host import Host

BITMAPS_SUFFIX: Final = ".bitmaps"
"""The bitmaps of a raw image are in a file of its name with this behind."""


def image_roots(given: Sequence[str] | None, *images: str) -> tuple[str, ...]:
    """Folders in which images may name backing files: their own, and those that the user allows besides.

    Raises:
        UsageError: one of them is no folder.
    """
    for folder in given or ():
        if not os.path.isdir(folder):
            raise UsageError(f"--image-root: '{folder}' is no folder")
    own = (os.path.dirname(image) or "." for image in images if not is_export(image))
    return (*given, *own) if given else ()


def file_options(path: str) -> dict[str, Any]:
    """Options of the node that holds an image; block devices and exports are told from files.

    Raises:
        UsageError: an URI that makes no sense.
    """
    if is_export(path):
        try:
            return export_options(path)
        except UsageError as error:
            usage = "nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH"
            raise UsageError(f"'{path}': {error}: write {usage}") from error
    if path.partition("://")[0] in ("nbds", "nbds+tcp", "nbds+unix"):
        raise UsageError(f"'{path}': connections with TLS need credentials, which an URI cannot hold: use a server")
    is_device = False
    with suppress(OSError):
        is_device = stat.S_ISBLK(os.stat(path).st_mode)
    return {"driver": "host_device" if is_device else "file", "filename": path}


def bitmap_file(path: str, format: str) -> dict[str, str]:
    """The option of a node by which a raw image file keeps dirty bitmaps beside it; nothing for other images."""
    return {} if format != "raw" or is_export(path) else {"bitmap-file": path + BITMAPS_SUFFIX}


async def open_image(host: "Host", path: str, format: str, *, name: str, read_only: bool = True, **more: Any) -> "Node":
    """Open an image with its backing chain. Bitmaps beside it record what is written.

    Args:
        host: where.
        path: of the image.
        format: qcow2 or raw.
        name: of the node.
        read_only: whether nobody may write.
        more: further options of the node.

    Raises:
        UsageError: it cannot be opened; the text names the file.
    """
    options = {"driver": format, "node-name": name, "read-only": read_only, "discard": "unmap", **more}
    if not read_only and os.path.exists(path + BITMAPS_SUFFIX):
        options = bitmap_file(path, format) | options
    options["file"] = file_options(path)
    try:
        return await host.blockdev_add(options)
    except UsageError as error:
        raise named(path, error) from error


def named(path: str, error: BlockjobsError) -> UsageError:
    """The same error with the file in front where its text does not mention it, and advice on locks."""
    text = str(error)
    if "lock" in text and text.startswith("Failed to get"):
        text = f"{text}: another program is using the image"
    return UsageError(text if path in text else f"'{path}': {text}")
