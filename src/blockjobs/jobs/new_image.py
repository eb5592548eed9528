"""Image files that commands make on the way: overlays, and the targets of `drive-` commands."""

import os
from enum import StrEnum
from typing import Any

from blockjobs.base.errors import UsageError
from blockjobs.block.driver import FormatDriver
from blockjobs.block.graph import Graph
from blockjobs.block.nbd_uri import export_options, is_export
from blockjobs.block.node import Node
from blockjobs.block.options import driver_named
from blockjobs.jobs.create_image import create_image
from blockjobs.jobs.create_options import BlockdevCreateOptions
from blockjobs.schema.command import convert


class NewImageMode(StrEnum):
    """Whether a target file is made or found."""

    EXISTING = "existing"
    ABSOLUTE_PATHS = "absolute-paths"


def refuse_protocols(filename: str) -> None:
    """Make sure that a name is that of a file.

    Raises:
        UsageError: it begins with a protocol, as `nbd:`.
    """
    protocol, colon, _ = filename.partition(":")
    if colon and "/" not in protocol:
        raise UsageError(f"Unknown protocol '{protocol}'")  # hardly a file of that name


def target_file(filename: str, *, is_new: bool) -> dict[str, Any]:
    """Options of the node below a target: a file, or an export, which must be there already.

    Raises:
        UsageError: no such name, or an export that is to be made.
    """
    if not is_export(filename):
        refuse_protocols(filename)
        return {"driver": "file", "filename": filename}
    if is_new:
        raise UsageError(f"Could not create '{filename}': an export must be there already, with mode=existing")
    return export_options(filename)


def refuse_unknown(format_name: str) -> None:
    """Make sure that images of a format can be made.

    Raises:
        UsageError: there is no such format.
    """
    driver = driver_named(format_name)
    if driver is None:
        raise UsageError(f"Unknown file format '{format_name}'")
    if not issubclass(driver, FormatDriver):
        raise UsageError(f"Format driver '{format_name}' does not support image creation")


async def make_image(graph: Graph, filename: str, format_name: str, size: int, backing: Node | None) -> None:
    """Make a file, and the image in it if the format has metadata.

    Args:
        size: virtual length in bytes.
        backing: a node that the header names as backing file, with its format. A relative name counts from the new
            file's directory, so it becomes an absolute one where it would mean another file there (QEMU writes it as
            it is, and the image cannot be opened).

    Raises:
        UsageError: the file or the image cannot be made; the file may be there.
    Waits: I/O. Checkpoint: no.
    """
    bare = format_name == "raw"
    if bare and backing is not None:
        raise UsageError(f"Backing file not supported for file format '{format_name}'")
    if backing is not None and backing.filename == filename:
        raise UsageError("Error: Trying to create an image with the same filename as the backing file")
    described: dict[str, object] = {"driver": "file", "filename": filename, "size": size if bare else 0}
    await create_image(graph, convert(described, BlockdevCreateOptions))
    if bare:
        return
    described = {"driver": format_name, "file": {"driver": "file", "filename": filename}, "size": size}
    if backing is not None:
        described |= {"backing-file": _name_for(filename, backing.filename), "backing-fmt": format_of(backing)}
    await create_image(graph, convert(described, BlockdevCreateOptions))


def format_of(node: Node) -> str:
    """The format to give in headers; what has none is raw."""
    return node.storage.driver_name if isinstance(node.storage.driver, FormatDriver) else "raw"


def _name_for(filename: str, backing: str) -> str:
    """The name for a backing file in the header of the image `filename`."""
    if backing.startswith("json:") or "://" in backing or os.path.isabs(backing):
        return backing
    seen_from_there = os.path.join(os.path.dirname(filename), backing)
    return backing if os.path.realpath(seen_from_there) == os.path.realpath(backing) else os.path.abspath(backing)
