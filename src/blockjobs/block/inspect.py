"""Describing an image by its own headers alone: no file that it names is opened (spec/durability.md §2)."""

from typing import TYPE_CHECKING, Any

import msgspec

from blockjobs.base.errors import UsageError
from blockjobs.block.drivers.qcow2.header import read_header
from blockjobs.block.info import ImageInfo, image_info
from blockjobs.block.options import BlockdevOptions
from blockjobs.schema.command import convert

if TYPE_CHECKING:
    from blockjobs.block.graph import Graph

_FILE: str = "inspected-file"
_IMAGE: str = "inspected"


async def inspect_image(graph: "Graph", file: dict[str, Any], format: str) -> ImageInfo:
    """Read an image's headers. It may be in use: nothing is locked, and nothing is changed.

    Args:
        graph: where nodes are opened for a moment.
        file: options of the node that holds the image.
        format: qcow2, luks or raw.

    Raises:
        UsageError: the image cannot be opened; nothing stays open.
        IoFailure: its headers cannot be read.
    Waits: reads of headers. Checkpoint: no.
    """
    unlocked = {"read-only": True, "force-share": True}
    opened = [await graph.open(convert({**file, **unlocked, "node-name": _FILE}, BlockdevOptions))]
    filename = opened[0].filename
    try:
        options = {"driver": format, "node-name": _IMAGE, "file": _FILE, **unlocked}
        if format == "qcow2":
            header = await read_header(opened[0], read_only=True, for_check=True)
            options["backing"] = None
            if header.has_data_file:
                # Stands in for the data file, whose name the image has chosen.
                options["data-file"] = {"driver": "null-co", "size": header.size}
        opened.append(await graph.open(convert(options, BlockdevOptions), looks_only=True))
        described = image_info(opened[1])
    except UsageError as error:
        raise UsageError(f"Could not open '{filename}': {error}") from error
    finally:
        for node in reversed(opened):
            await graph.remove(node.name)
    return msgspec.structs.replace(described, filename=filename)
