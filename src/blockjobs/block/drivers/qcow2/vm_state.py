"""The vm state area: guest offsets past the end of the disk, from the first L1 entry on that the disk does not need.

A stream is written there in order, whole clusters at a time, and read back through the L1 table of a snapshot.
"""

import errno
from collections.abc import Sequence

from blockjobs.base.buffers import Buffer
from blockjobs.base.errors import IoFailure
from blockjobs.base.span import Span
from blockjobs.block.drivers.qcow2 import writes
from blockjobs.block.drivers.qcow2.entries import ALL_BITS, is_stored, runs_of
from blockjobs.block.drivers.qcow2.image import Image
from blockjobs.block.drivers.qcow2.resize import grow_l1
from blockjobs.block.encipherment import Encipherment
from blockjobs.wire.qcow2 import L1_BYTES_MAX
from blockjobs.wire.qcow2_tables import COMPRESSED, OFFSET, ZERO


def first_table(image: Image, disk_bytes: int) -> int:
    """Index of the L1 entry that the area of a disk of that length begins with."""
    return -(-disk_bytes // image.geometry.l2_span)


class Tail:
    """Writes a stream; keeps what does not fill a cluster yet."""

    def __init__(self) -> None:
        self._at = 0
        self._left = bytearray()

    def forget(self) -> None:
        """The stream is void."""
        self._at = 0
        self._left.clear()

    async def add(self, image: Image, encipherment: Encipherment | None, at: int, content: Buffer) -> None:
        """Append to the stream.

        Args:
            at: how much of the stream was there before; 0 begins a new one.

        Raises:
            IoFailure: no space, or it could not be written; the stream is void.
        Waits: I/O, commits. Checkpoint: no.
        """
        if at == 0:
            self.forget()
        if at != self._at + len(self._left):
            raise IoFailure(errno.ESPIPE, f"node '{image.geometry.name}' vm state")
        self._left += content
        whole = len(self._left) // image.geometry.cluster_size * image.geometry.cluster_size
        if whole:
            await self._put(image, encipherment, bytes(self._left[:whole]))
            del self._left[:whole]
            self._at += whole

    async def write(self, image: Image, encipherment: Encipherment | None) -> None:
        """The stream ends here: write what is left of it, and be ready for another. Raises and waits as `add`."""
        if self._left:
            size = image.geometry.cluster_size
            await self._put(image, encipherment, bytes(self._left).ljust(-(-len(self._left) // size) * size, b"\0"))
        self.forget()

    async def _put(self, image: Image, encipherment: Encipherment | None, content: bytes) -> None:
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
                part: Buffer = content[place.at - span.at : place.at - span.at + place.length]
                if encipherment is not None:
                    part = await image.offload.run(encipherment.encipher, place.child_at, part)
                await image.child(place.child).write(place.child_at, part)
        except BaseException:
            await writes.release(image, reservation)
            raise
        await writes.publish(image, reservation)


async def read(
    image: Image, encipherment: Encipherment | None, words: Sequence[int], disk_bytes: int, at: int, length: int
) -> bytes:
    """Bytes of the area of a snapshot with such an L1 table; what is not stored is zeroes.

    Args:
        words: the L1 table.
        disk_bytes: length of the disk in that snapshot.
        at: in the area.

    Raises:
        ImageCorrupt, IoFailure: tables or clusters could not be read.
    Waits: reads. Checkpoint: no.
    """
    geometry, content = image.geometry, bytearray(length)
    area = first_table(image, disk_bytes) * geometry.l2_span
    wanted = Span(area + at, length)
    for stretch in image.mapping.stretches(wanted):
        place = words[stretch.l1_index] & OFFSET if stretch.l1_index < len(words) else 0
        if not place:
            continue
        table = await image.mapping.l2.load(place)
        step = geometry.entry_words
        for run in runs_of(table.items[stretch.first * step : stretch.end * step], geometry):
            if run.word & (COMPRESSED | ZERO) or not is_stored(run, geometry) or run.bitmap not in (0, ALL_BITS):
                continue
            start = stretch.at + run.start * geometry.cluster_size
            here = Span(start, (run.end - run.start) * geometry.cluster_size).intersect(wanted)
            await _read_run(image, encipherment, run.offset + here.at - start, content, here, wanted.at)
    return bytes(content)


async def _read_run(
    image: Image, encipherment: Encipherment | None, host_at: int, content: bytearray, here: Span, origin: int
) -> None:
    first = 0 if encipherment is None else host_at % encipherment.unit
    last = 0 if encipherment is None else -(host_at + here.length) % encipherment.unit
    raw = bytearray(await image.child("file").read(host_at - first, first + here.length + last))
    if encipherment is not None:
        await image.offload.run(encipherment.decipher, host_at - first, memoryview(raw))
    content[here.at - origin : here.end - origin] = raw[first : first + here.length]
