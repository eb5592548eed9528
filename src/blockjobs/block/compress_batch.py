"""Compressed writing for the copy engine: clusters are deflated on all cores at once and stored in order."""

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from msgspec import Struct, field

from blockjobs.base.buffers import Buffer, aligned, is_zero, zeroes
from blockjobs.base.offload import Offload
from blockjobs.base.span import Span
from blockjobs.base.units import MiB
from blockjobs.block.driver import Compressor, FormatDriver
from blockjobs.block.medium import Medium
from blockjobs.block.vocabulary import Watch, ZeroMode

if TYPE_CHECKING:
    from blockjobs.block.node import Node

GROUP_BYTES: Final = 1 * MiB
"""Per trip to a worker (16 clusters of 64 KiB): enough to make the hop cheap, few enough to keep all cores busy."""
GROUPS_PER_CORE: Final = 8
"""In one batch: cores that end early find another group, and what a batch costs besides compression is spread."""


class Piece(NamedTuple):
    """Part of a group's bytes: on a medium, or already read; zeroes if neither is set."""

    length: int
    medium: Medium | None = None
    medium_at: int = 0
    content: Buffer | None = None


class Packed(NamedTuple):
    """One cluster after compression. Without `stream` it is stored plain; without both it is all zeroes."""

    at: int
    stream: bytes | None
    plain: bytes | None


def compress_group(
    pieces: Sequence[Piece], at: int, unit: int, compress: Compressor, idle: list[memoryview]
) -> list[Packed]:
    """Read the bytes of a group and compress each unit; runs in a worker.

    Args:
        pieces: together the group's bytes.
        at: where the group starts, a multiple of `unit`. A short last unit is padded with zeroes for the compressor.
        idle: buffers that no worker uses; one of them is borrowed. Fresh memory costs a page fault every 4 KiB.

    Raises:
        OSError: a medium could not be read.
    """
    length = sum(piece.length for piece in pieces)
    padded = -(-length // unit) * unit
    buffer = _borrow(idle, padded)
    try:
        _fill(buffer, pieces)
        buffer[length:padded] = zeroes(padded - length)
        return [
            _pack(buffer[start : start + unit], at + start, length - start, compress)
            for start in range(0, length, unit)
        ]
    finally:
        idle.append(buffer)


def _borrow(idle: list[memoryview], length: int) -> memoryview:
    try:
        buffer = idle.pop()
    except IndexError:
        return aligned(length)
    return buffer if len(buffer) >= length else aligned(length)


def _fill(buffer: memoryview, pieces: Sequence[Piece]) -> None:
    filled = 0
    for piece in pieces:
        room = buffer[filled : filled + piece.length]
        if piece.content is not None:
            room[:] = piece.content
        elif piece.medium is not None:
            piece.medium.read_into(piece.medium_at, room)
        else:
            room[:] = zeroes(piece.length)
        filled += piece.length


def _pack(content: memoryview, at: int, left: int, compress: Compressor) -> Packed:
    """One unit, of which `left` bytes count if they are fewer."""
    if is_zero(content):
        return Packed(at, None, None)
    stream = compress(content)
    return Packed(at, stream, bytes(content[:left]) if stream is None else None)


class CompressedWriter(Struct, kw_only=True, frozen=True):
    """How a target takes compressed clusters.

    Attributes:
        unit: bytes that are compressed together, the target's cluster size.
    """

    offload: Offload
    compress: Compressor
    unit: int
    _idle: list[memoryview] = field(default_factory=list)

    @property
    def group_bytes(self) -> int:
        """What one worker compresses at a time: whole units."""
        return max(self.unit, GROUP_BYTES)

    @property
    def batch_bytes_min(self) -> int:
        """The shortest batch: less would leave cores idle between two of them."""
        return 2 * self.offload.cores * self.group_bytes

    @property
    def batch_bytes_max(self) -> int:
        """The longest batch; two are in flight, so one is compressed while the other is stored."""
        return self.offload.cores * GROUPS_PER_CORE * self.group_bytes

    async def pack(self, at: int, pieces: Sequence[Piece]) -> list[Packed]:
        """Compress one group in a worker. Waits: for a worker, reads and the compressor. Checkpoint: no."""
        return await self.offload.run(compress_group, pieces, at, self.unit, self.compress, self._idle)

    async def store(self, target: "Node", packed: Sequence[Packed], known_zeroes: Sequence[Span]) -> None:
        """Write compressed clusters, ascending, so that all of them are visible or a failure is raised.

        Args:
            known_zeroes: parts of the target that read as zeroes already; zero clusters there are left alone.

        Raises:
            IoFailure: the target failed; any of the clusters may be stored or not.
        Waits: for earlier requests on the same bytes, writes. Checkpoint: no.
        """
        node, driver = compressing_driver(target)
        assert driver is not None, target.name
        streams = [(cluster.at, cluster.stream) for cluster in packed if cluster.stream is not None]
        if streams:
            hull = Span.between(streams[0][0], streams[-1][0] + self.unit)
            async with node.tracker.exclusive(hull):
                with node.recorded(hull):
                    await driver.write_compressed(streams)
        for cluster in packed:
            span = Span(cluster.at, min(self.unit, target.length - cluster.at))
            if cluster.plain is not None:
                await target.write(span.at, cluster.plain)
            elif cluster.stream is None and not any(known.contains(span) for known in known_zeroes):
                await target.zero(span, mode=ZeroMode.UNMAP)


async def pack_all(offload: Offload, compress: Compressor, at: int, content: Buffer, unit: int) -> list[Packed]:
    """Compress one request's bytes, in as many workers as there are groups. Waits: for the compressor. Checkpoint: no.

    Args:
        at: where the bytes start, a multiple of `unit`.
        unit: bytes that are compressed together.
    """
    idle: list[memoryview] = []
    view = memoryview(content)

    async def pack(group: Span) -> list[Packed]:
        pieces = [Piece(group.length, content=view[group.at - at : group.end - at])]
        return await offload.run(compress_group, pieces, group.at, unit, compress, idle)

    async with asyncio.TaskGroup() as all_groups:
        works = [all_groups.create_task(pack(group)) for group in Span(at, len(view)).split(max(unit, GROUP_BYTES))]
    return [cluster for work in works for cluster in work.result()]


def compressing_driver(node: "Node") -> "tuple[Node, FormatDriver | None]":
    """The format that would store compressed clusters for `node`, below filters that need not see them."""
    node = node.route(Watch.WRITE)
    return node, node.driver if isinstance(node.driver, FormatDriver) else None
