"""Chains of images: finding one in them, and what headers are to say about the next."""

import os
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

from blockjobs.base.errors import UsageError
from blockjobs.block.driver import FilterDriver, FormatDriver, ProtocolDriver
from blockjobs.block.filenames import backing_is_overridden, combine, full_backing_filename
from blockjobs.block.users import Edge

if TYPE_CHECKING:
    from blockjobs.block.node import Node


def edge_below(node: "Node") -> Edge | None:
    """The edge to what a node shows where it has nothing of its own: below a filter, or the backing image."""
    return node.edges.get(node.driver.filtered if isinstance(node.driver, FilterDriver) else "backing")


def chain_of(node: "Node") -> "Iterator[Node]":
    """The node and all that it shows something of: filters and images, from the top down."""
    current: Node | None = node
    while current is not None:
        yield current
        edge = edge_below(current)
        current = None if edge is None else edge.node


def images_of(node: "Node") -> "list[Node]":
    """The same without the filters."""
    return [each for each in chain_of(node) if not isinstance(each.driver, FilterDriver)]


def edges_between(top: "Node", bottom: "Node") -> list[Edge]:
    """The edges that lead from `top` down to `bottom`, which is in its chain."""
    edges: list[Edge] = []
    for node in chain_of(top):
        if node is bottom:
            return edges
        edge = edge_below(node)
        assert edge is not None, (top, bottom)
        edges.append(edge)
    raise AssertionError(f"{bottom} is not below {top}")


def goes_by(image: "Node", filename: str) -> bool:
    """Whether a file name means this image: its own name, or that of the file it is in if options make its own long."""
    node = image.storage
    names = {image.filename, node.filename} | ({node.children["file"].filename} if "file" in node.children else set())
    return filename in names or os.path.abspath(filename) in {os.path.abspath(name) for name in names}


def named_in_chain(device: "Node", filename: str) -> "Node | None":
    """The backing image of `device` that a file name means: its own name, or what an overlay's header calls it."""
    wanted = {filename, os.path.abspath(filename)}
    images = images_of(device)
    for overlay, image in pairwise(images):
        names: set[str | None] = set()
        if isinstance(overlay.driver, FormatDriver):
            for implied in overlay.driver.implied_children():
                if implied.name == "backing":
                    names |= {implied.filename, full_backing_filename(overlay, implied.filename)}
        if goes_by(image, filename) or wanted & names:
            return image
    return None


def header_names(overlay: "Node", base: "Node", *, given: str | None, mask_protocol: bool) -> tuple[str, str]:
    """What the header of `overlay` is to say about its backing image.

    Args:
        given: the name that the user wants there.
        mask_protocol: call an image without a format `raw`, not by its protocol (QEMU 9.0).

    Returns:
        File name and format. A relative name counts from our working directory, in a header from the overlay's: what
        is written leads to the same file.
    """
    image = base.storage
    masked = mask_protocol and isinstance(image.driver, ProtocolDriver)
    filename = image.filename
    if filename.startswith("json:") and backing_is_overridden(image) and "file" in image.children:
        # Nobody could open the chain again by such a name: no header's options are believed. The file says what it can.
        filename = image.children["file"].filename
    return given or _name_from(overlay, filename), "raw" if masked else image.driver_name


def _name_from(overlay: "Node", filename: str) -> str:
    if os.path.isabs(filename) or filename.startswith("json:") or "://" in filename:
        return filename
    try:
        directory = os.path.dirname(combine(overlay, "name"))
    except UsageError:
        return filename
    relative = os.path.relpath(filename, directory or ".")
    # A way up would lead elsewhere where directories are links.
    return os.path.abspath(filename) if relative.startswith("..") else relative


def named_backing(overlay: "Node") -> tuple[str | None, str | None]:
    """The backing file and its format, as the header of an image names them."""
    driver = overlay.driver
    if isinstance(driver, FormatDriver):
        for implied in driver.implied_children():
            if implied.name == "backing":
                return implied.filename, implied.format
    return None, None


def below_implicit(node: "Node") -> "Node":
    """The node itself, or what is below implicit filters: those are passed over where users see chains."""
    while node.implicit and isinstance(node.driver, FilterDriver):
        node = node.children[node.driver.filtered]
    return node


def overlays_of(node: "Node") -> "list[Node]":
    """The images whose backing image is `node`, filters in between passed over."""
    overlays: list[Node] = []
    for parent in node.parents:
        if isinstance(parent, Edge):
            above = parent.parent
            if isinstance(above.driver, FilterDriver):
                overlays += overlays_of(above) if parent.name == above.driver.filtered else []
            elif parent.name == "backing":
                overlays.append(above)
    return overlays
