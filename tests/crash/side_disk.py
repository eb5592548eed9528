"""A side file on a simulated disk: its name is a sector that says where the content is, written after the content."""

import struct
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import cast

from replay import graph_over

from blockjobs.block.claims import ALL, Perm
from blockjobs.block.driver import OpenContext
from blockjobs.block.drivers.raw import Raw
from blockjobs.block.medium import Medium
from blockjobs.block.node import Node
from blockjobs.block.opener import open_context
from blockjobs.block.options import BlockdevOptions
from blockjobs.schema.command import convert
from blockjobs.testing.disk import SECTOR

_NAME = struct.Struct(">QQ")


class SideDisk:
    """See `side_file.SideFile`. The image never looks changed: only the in-use mark protects."""

    name = "side"

    def __init__(self, medium: Medium) -> None:
        self._medium = medium

    def _where(self) -> tuple[int, int]:
        sector = bytearray(SECTOR)
        self._medium.read_into(0, memoryview(sector))
        at, length = _NAME.unpack_from(sector)
        return at, length

    def read(self, length_max: int) -> bytes | None:
        at, length = self._where()
        assert length <= length_max
        content = bytearray(length)
        self._medium.read_into(at, memoryview(content))
        return bytes(content) if at else None

    def replace(self, content: bytes) -> None:
        at = max(SECTOR, -(-self._medium.size() // SECTOR) * SECTOR)  # a new file takes new blocks
        self._medium.write(at, content)
        self._medium.sync()
        self._name(at, len(content))

    def remove(self) -> None:
        self._name(0, 0)

    def _name(self, at: int, length: int) -> None:
        self._medium.write(0, _NAME.pack(at, length).ljust(SECTOR, b"\0"))
        self._medium.sync()

    def image_state(self) -> list[int]:
        return [0, 0, 0, 0]


@asynccontextmanager
async def opened_raw(
    media: Mapping[str, Medium], options: Mapping[str, object], *, read_only: bool
) -> AsyncIterator[Node]:
    """A raw node over the medium `disk` with its bitmaps on `side`, used by somebody; closed at the end."""
    del options
    async with graph_over({"disk": media["disk"]}, read_only=read_only) as graph:
        described = {"driver": "raw", "node-name": "image", "file": "disk", "read-only": read_only, "discard": "unmap"}
        node = await graph.open(convert(described, BlockdevOptions))
        raw = cast("Raw", node.driver)
        context: OpenContext = open_context(node, node.settings)
        raw.keep_bitmaps(SideDisk(media["side"]), context)
        assert raw.bitmap_store is not None
        await raw.bitmap_store.load(node.bitmaps)
        needs = Perm.CONSISTENT_READ if read_only else Perm.CONSISTENT_READ | Perm.WRITE | Perm.RESIZE
        user = await graph.claim("a guest", node, needs=needs, shares=ALL)
        yield node
        await graph.release(user)
