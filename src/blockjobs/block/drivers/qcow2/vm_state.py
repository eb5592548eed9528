"""The vm state area: guest offsets past the end of the disk, from the first L1 entry on that the disk does not need.

A stream is written there in order, whole clusters at a time, and read back through the L1 table of a snapshot.
"""

import errno
from collections.abc import Sequence

from blockjobs.base.buffers import Buffer
from blockjobs.base.errors import IoFailure
from blockjobs.base.span import Span
from blockjobs.block.drivers.qcow2 import snapshot_tree, writes
from blockjobs.block.drivers.qcow2.entries import Segments
from blockjobs.block.drivers.qcow2.image import Image
from blockjobs.block.drivers.qcow2.resize import grow_l1
from blockjobs.block.vocabulary import Kind
from blockjobs.wire.qcow2 import L1_BYTES_MAX, SECTOR
from blockjobs.wire.qcow2_tables import OFFSET


def first_table(image: Image, disk_bytes: int) -> int:
    """Index of the L1 entry that the area of a disk of that length begins with."""
    return -(-disk_bytes // image.geometry.l2_span)


class Tail:
    """Writes a stream; keeps what does not fill a cluster yet."""

    def __init__(self) -> None:
        self._at = 0
        self._left = bytearray()
        self._disk_bytes = 0

    @property
    def length(self) -> int:
        """Bytes of the stream so far."""
        return self._at + len(self._left)

    def forget(self) -> None:
        """The stream is void."""
        self._at = 0
        self._left.clear()

    def check(self, image: Image, length: int) -> None:
        """Refuse to go on with a stream that is not there.

        Args:
            length: how much of it should be there at least.

        Raises:
            IoFailure: it is shorter, or the disk's length has changed meanwhile, which empties the area.
        """
        first = first_table(image, image.size)
        is_moved = self.length > 0 and image.size != self._disk_bytes
        is_gone = self._at > 0 and (is_moved or not image.mapping.l1.words[first] & OFFSET)
        if is_moved or is_gone or length > self.length:
            raise IoFailure(errno.ESPIPE, f"node '{image.geometry.name}' vm state")

    async def add(self, image: Image, at: int, content: Buffer) -> None:
        """Append to the stream.

        Args:
            at: how much of the stream was there before; 0 begins a new one.

        Raises:
            IoFailure: no space, or it could not be written; the stream is void.
        Waits: I/O, commits. Checkpoint: no.
        """
        if at == 0:
            self.forget()
            self._disk_bytes = image.size
        self.check(image, at)
        if at != self.length:
            raise IoFailure(errno.ESPIPE, f"node '{image.geometry.name}' vm state")
        self._left += content
        whole = len(self._left) // image.geometry.cluster_size * image.geometry.cluster_size
        if whole:
            await self._put(image, bytes(self._left[:whole]))
            del self._left[:whole]
            self._at += whole

    async def write(self, image: Image) -> None:
        """The stream ends here: write what is left of it, and be ready for another. Raises and waits as `add`."""
        if self._left:
            size = image.geometry.cluster_size
            await self._put(image, bytes(self._left).ljust(-(-len(self._left) // size) * size, b"\0"))
        self.forget()

    async def _put(self, image: Image, content: bytes) -> None:
        """Write whole clusters at the stream's place."""
        geometry = image.geometry
        span = Span(first_table(image, image.size) * geometry.l2_span + self._at, len(content))
        entries = -(-span.end // geometry.l2_span)
        if entries * 8 > L1_BYTES_MAX:
            raise IoFailure(errno.EFBIG, f"node '{geometry.name}' vm state")
        await grow_l1(image, entries)
        reservation = await writes.reserve(image, span)
        try:
            for place in reservation.placements:
                part = content[place.at - span.at : place.at - span.at + place.length]
                await image.store(place, part)
        except BaseException:
            await writes.release(image, reservation)
            raise
        await writes.publish(image, reservation)


async def read(image: Image, words: Sequence[int], disk_bytes: int, at: int, length: int) -> bytes:
    """Bytes of the area of a snapshot with such an L1 table; what is not stored is zeroes.

    Args:
        words: the L1 table.
        disk_bytes: length of the disk in that snapshot.
        at: in the area.

    Raises:
        ImageCorrupt, IoFailure: tables or clusters could not be read.
    Waits: reads. Checkpoint: no.
    """
    asked = Span(first_table(image, disk_bytes) * image.geometry.l2_span + at, length)
    wanted = asked.widen(SECTOR)
    content = memoryview(bytearray(wanted.length))
    segments = Segments(image.geometry)
    step = image.geometry.entry_words
    for stretch in image.mapping.stretches(wanted):
        word = words[stretch.l1_index] if stretch.l1_index < len(words) else 0
        if word & OFFSET:
            table = await image.mapping.l2.load(snapshot_tree.place_of(image, word))
            found = table.items[stretch.first * step : stretch.end * step]
            segments.add_table(found, stretch.at, wanted.at, wanted.end)
    for segment in segments.finish():
        part = content[segment.at - wanted.at : segment.at - wanted.at + segment.length]
        if segment.kind is Kind.DATA:
            await image.read_stored(segment, part)
        elif segment.kind is Kind.SPECIAL:
            from blockjobs.block.drivers.qcow2.streams import read_special

            await read_special(image, segment, part)
    return bytes(content[asked.at - wanted.at : asked.end - wanted.at])
