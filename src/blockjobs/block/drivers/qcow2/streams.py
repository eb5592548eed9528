"""Reading compressed clusters: for requests, group by group, and as a medium for workers that copy.

To be loaded only when there are some, since the libraries come with it.
"""

import asyncio
import errno
import os
from bisect import bisect_right
from collections.abc import Sequence
from operator import attrgetter
from typing import Final, NamedTuple

from blockjobs.base.buffers import Buffer, aligned
from blockjobs.base.errors import IoFailure
from blockjobs.block.drivers.qcow2.compress import Inflate, inflater
from blockjobs.block.drivers.qcow2.entries import CompressedRun
from blockjobs.block.drivers.qcow2.image import Image
from blockjobs.block.medium import Allocation, Medium
from blockjobs.block.vocabulary import Segment
from blockjobs.wire.qcow2_tables import unpack_compressed

GROUP_CLUSTERS: Final = 16
"""So many clusters are read at once, and inflated in one trip to a worker."""
GAP_BYTES_MAX: Final = 64 << 10
"""Streams of a group this close to each other are read in one go."""
ZEROES_SHRINK_MIN: Final = 128
"""A cluster of zeroes becomes at most one part of so many, and a sector: by zlib's fixed codes 1 of 156, else less."""

_AT: Final = attrgetter("at")


class _Stream(NamedTuple):
    """A compressed cluster: where its bytes are in the file, and what part of it goes where in a buffer."""

    at: int
    length: int
    skip: int
    into: int
    wanted: int


def _streams_of(
    run: CompressedRun, at: int, length: int, cluster_bits: int, file_length: int, into: int = 0
) -> list[_Stream] | None:
    """What to read and inflate for some bytes of a run of compressed clusters.

    Args:
        at, length: on the disk, inside the run.
        into: where they go in the buffer.

    Returns:
        None if a stream lies behind the end of the file.
    """
    size, end = 1 << cluster_bits, at + length
    streams: list[_Stream] = []
    for number in range((at - run.at) // size, (end - 1 - run.at) // size + 1):
        stream_at, stream_length = unpack_compressed(run.words[number], cluster_bits)
        start = run.at + number * size
        first, last = max(start, at), min(start + size, end)
        if stream_at >= file_length:
            return None
        stream_length = min(stream_length, file_length - stream_at)
        streams.append(_Stream(stream_at, stream_length, first - start, into + first - at, last - first))
    return streams


def _groups(streams: list[_Stream]) -> list[list[_Stream]]:
    return [streams[first : first + GROUP_CLUSTERS] for first in range(0, len(streams), GROUP_CLUSTERS)]


def _reads_of(streams: list[_Stream]) -> list[tuple[int, int, list[_Stream]]]:
    """What to read at once for a group: place, length, and the streams in it."""
    lowest = min(stream.at for stream in streams)
    highest = max(stream.at + stream.length for stream in streams)
    if highest - lowest <= sum(stream.length for stream in streams) + GAP_BYTES_MAX:
        return [(lowest, highest - lowest, streams)]
    return [(stream.at, stream.length, [stream]) for stream in streams]


def _inflate_all(inflate: Inflate, raw: memoryview, base: int, streams: list[_Stream], buffer: memoryview) -> bool:
    """In a worker: fill the buffer's parts; False if a stream is no good.

    Args:
        raw: bytes of the file from `base` on.
    """
    for stream in streams:
        content = inflate(raw[stream.at - base : stream.at - base + stream.length])
        if content is None:
            return False
        part = memoryview(content)[stream.skip : stream.skip + stream.wanted]
        buffer[stream.into : stream.into + stream.wanted] = part
    return True


async def read_special(image: Image, segment: Segment, buffer: memoryview) -> None:
    """See `FormatDriver.read_special`.

    Raises:
        IoFailure: the file could not be read, or a stream is no good (EIO).
    Waits: reads and workers. Checkpoint: no.
    """
    run = segment.token
    assert isinstance(run, CompressedRun)
    length = image.child("file").length
    streams = _streams_of(run, segment.at, segment.length, image.geometry.cluster_bits, length)
    if streams is None:
        raise _bad_stream(image, segment)
    groups = _groups(streams)
    if len(groups) == 1:
        await _read_group(image, segment, groups[0], buffer)
        return
    width = image.offload.cores
    for start in range(0, len(groups), width):
        try:
            async with asyncio.TaskGroup() as tasks:
                for group in groups[start : start + width]:
                    tasks.create_task(_read_group(image, segment, group, buffer))
        except* IoFailure as failures:
            failure = failures.exceptions[0]
            raise IoFailure(getattr(failure, "errno", errno.EIO), getattr(failure, "where", "")) from failure


async def _read_group(image: Image, segment: Segment, group: list[_Stream], buffer: memoryview) -> None:
    file = image.child("file")
    file.debug_event("read_compressed")
    inflate = _inflate_of(image)
    for base, length, streams in _reads_of(group):
        raw = await file.read(base, length)
        if not await image.offload.run(_inflate_all, inflate, memoryview(raw), base, streams, buffer):
            raise _bad_stream(image, segment)


def unpacked(image: Image, segments: Sequence[Segment], file: Medium) -> Medium:
    """See `Unpacked`."""
    runs = [segment.token for segment in segments if isinstance(segment.token, CompressedRun)]
    assert len(runs) == len(segments)
    return InflatedMedium(file, runs, image.geometry.cluster_bits, _inflate_of(image))


def _inflate_of(image: Image) -> Inflate:
    return inflater(image.header.compression_type, image.geometry.cluster_size)


def _bad_stream(image: Image, segment: Segment) -> IoFailure:
    return IoFailure(errno.EIO, f"node '{image.geometry.name}' compressed clusters at {segment.at:#x}")


class InflatedMedium(Medium):
    """Compressed clusters as plain bytes, at their places on the disk; for reading.

    Args:
        file: where the streams are.
        runs: L2 entries, ascending, which nobody changes as long as this is used.
    """

    def __init__(self, file: Medium, runs: list[CompressedRun], cluster_bits: int, inflate: Inflate) -> None:
        self._file, self._runs, self._cluster_bits, self._inflate = file, runs, cluster_bits, inflate
        self._rooms: list[memoryview] = []  # fresh memory costs a page fault every four KiB

    def read_into(self, at: int, buffer: memoryview) -> None:
        """See `Medium`.

        Raises:
            OSError: EIO if a stream is no good, else what the file said.
        """
        self.read_many_into([(at, len(buffer))], buffer)

    def read_many_into(self, reads: Sequence[tuple[int, int]], buffer: memoryview) -> None:
        """See `Medium`: streams that lie together are read at once. Raises as `read_into`."""
        streams = self._streams(reads)
        if streams is None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        try:
            room = self._rooms.pop()
        except IndexError:
            room = memoryview(b"")
        for base, length, some in (read for group in _groups(streams) for read in _reads_of(group)):
            if length > len(room):
                room = aligned(length)
            self._file.read_into(base, room[:length])
            if not _inflate_all(self._inflate, room[:length], base, some, buffer):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        self._rooms.append(room)

    def _streams(self, reads: Sequence[tuple[int, int]]) -> list[_Stream] | None:
        """What is to be inflated for these bytes; None if some of it lies behind the end of the file."""
        file_length = self._file.size()
        streams: list[_Stream] = []
        into = 0
        for at, length in reads:
            run = self._runs[bisect_right(self._runs, at, key=_AT) - 1]
            found = _streams_of(run, at, length, self._cluster_bits, file_length, into)
            if found is None:
                return None
            streams += found
            into += length
        return streams

    def is_surely_data(self, at: int, length: int) -> bool:
        """See `Medium`: zeroes would have become shorter."""
        shortest = (1 << self._cluster_bits) // ZEROES_SHRINK_MIN + 512
        return any(stream.length > shortest for stream in self._streams([(at, length)]) or ())

    def allocations(self, at: int, length: int) -> list[Allocation]:
        """See `Medium`: all of it is data."""
        return [Allocation(at, length, True)]

    def size(self) -> int:
        """See `Medium`."""
        last = self._runs[-1]
        return last.at + (len(last.words) << self._cluster_bits)

    def allocated_size(self) -> int:
        """See `Medium`."""
        return self.size()

    def read_ahead(self, pieces: Sequence[tuple[int, int]]) -> None:
        """See `Medium`."""
        streams = self._streams(pieces) or []
        reads = [(base, length) for group in _groups(streams) for base, length, _ in _reads_of(group)]
        if reads:
            self._file.read_ahead(reads)

    def close(self) -> None:
        """See `Medium`: the file belongs to somebody else."""

    def write(self, at: int, content: Buffer) -> None:
        """Nobody changes anything here."""
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def writev(self, at: int, contents: list[Buffer]) -> None:
        """As `write`."""
        self.write(at, b"")

    def zero(self, at: int, length: int, *, unmap: bool) -> None:
        """As `write`."""
        self.write(at, b"")

    def discard(self, at: int, length: int) -> None:
        """As `write`."""
        self.write(at, b"")

    def copy_from(self, source: Medium, source_at: int, at: int, length: int) -> None:
        """As `write`."""
        self.write(at, b"")

    def sync(self) -> None:
        """See `Medium`: nothing was written."""

    def truncate(self, length: int) -> None:
        """As `write`."""
        self.write(length, b"")
