"""Opening what a person names on the command line: files, block devices and NBD exports, with errors that name them."""

import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from blockjobs.base.errors import BlockjobsError, UsageError
from blockjobs.block.nbd_uri import export_options, is_export
from blockjobs.cli.formats import local_name
from blockjobs.wire.qcow2 import CRYPT_AES, CRYPT_LUKS

if TYPE_CHECKING:
    from blockjobs.block.node import Node
    from blockjobs.host import ImageHost

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
    path = local_name(path)
    is_device = False
    with suppress(OSError):
        is_device = stat.S_ISBLK(os.stat(path).st_mode)
    return {"driver": "host_device" if is_device else "file", "filename": path}


def cache_options(mode: str) -> dict[str, Any]:
    """Options of a node for a cache mode of qemu-img: all but "unsafe" make what is written durable at the end."""
    direct, no_flush = mode in ("none", "directsync"), mode == "unsafe"
    return {"cache": {"direct": direct, "no-flush": no_flush}} if direct or no_flush else {}


def bitmap_file(path: str, format: str) -> dict[str, str]:
    """The option of a node by which a raw image file keeps dirty bitmaps beside it; nothing for other images."""
    return {} if format != "raw" or is_export(path) else {"bitmap-file": path + BITMAPS_SUFFIX}


def key_options(host: "ImageHost", path: str, format: str) -> dict[str, Any]:
    """Options that open an enciphered image: the one secret of the command line is its key, or the one called `key`.

    Raises:
        UsageError: it needs a key, and which of several is not said.
    """
    kind = encryption_of(path) if format == "qcow2" else "luks" if format == "luks" else None
    if kind is None or is_export(path):
        return {}
    from blockjobs.block.objects import Secret

    secrets = [name for name, each in host.objects.items() if isinstance(each, Secret)]
    key = "key" if "key" in secrets else secrets[0] if len(secrets) == 1 else None
    if key is None:
        how = "call the one that opens it 'key'" if secrets else "give its passphrase with --object secret,id=key,file="
        raise UsageError(f"'{path}' is enciphered: {how}")
    return {"key-secret": key} if format == "luks" else {"encrypt": {"format": kind, "key-secret": key}}


def encryption_of(path: str) -> str | None:
    """How a qcow2 header says that the disk is enciphered (bytes 32 to 35): aes, luks, or not at all."""
    with suppress(OSError), open(path, "rb") as file:
        return {CRYPT_AES: "aes", CRYPT_LUKS: "luks"}.get(int.from_bytes(file.read(36)[32:36], "big"))
    return None


async def open_image(
    host: "ImageHost", path: str, format: str, *, name: str, read_only: bool = True, **more: Any
) -> "Node":
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
    options = image_defaults(host, path, format, read_only=read_only) | more
    options |= {"driver": format, "node-name": name, "file": file_options(path)}
    return await open_described(host, path, options)


def image_defaults(host: "ImageHost", path: str, format: str, *, read_only: bool) -> dict[str, Any]:
    """What a node of an image is told if the user says nothing else: its key, its bitmaps, discards pass.

    Raises:
        UsageError: it needs a key, and there is none or more than one.
    """
    options = {"read-only": read_only, "discard": "unmap", **key_options(host, path, format)}
    if not read_only and os.path.exists(path + BITMAPS_SUFFIX):
        options |= bitmap_file(path, format)
    return options


async def open_described(host: "ImageHost", path: str, options: dict[str, Any]) -> "Node":
    """Open a node; an error names the file. Raises UsageError."""
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
