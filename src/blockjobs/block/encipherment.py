"""A cipher at its place in a child, and media that read and write through it.

Whoever moves bytes for a format that enciphers asks `Encipherment.placed` for what holds at their place, and takes
media from its `over`, or calls its `encipher` and `decipher` himself in a worker. A copy between two such media
deciphers and enciphers again: ciphertext is never copied, since it means nothing under another key or elsewhere.
"""

from collections.abc import Iterator, Sequence
from typing import Final

from blockjobs.base.buffers import Buffer, aligned, zeroes
from blockjobs.base.units import KiB, MiB
from blockjobs.block.cipher import SectorCipher
from blockjobs.block.medium import Allocation, Medium

PIECE_BYTES: Final = 1 * MiB
"""What is enciphered and written at a time: it stays in the processor's cache meanwhile."""
IN_LOOP_BYTES_MAX: Final = 32 * KiB
"""More than this takes longer to encipher than a hop to a worker."""
MEDIA_MAX: Final = 8
"""Media that are remembered: an image has one or two at a time."""
PLACES_MAX: Final = 4096
"""Distances between a disk and its child that are remembered: runs of one distance can be joined."""


class Encipherment:
    """What a format has that enciphers: the bytes of its child are `cipher`'s, and tweaks count from `origin`.

    Attributes:
        origin: the offset in the child that the cipher calls 0; a multiple of the unit. None if tweaks count from the
            beginning of the disk: then each run has an origin of its own, and only what `placed` returns can be used.
    """

    def __init__(self, cipher: SectorCipher, origin: int | None) -> None:
        assert origin is None or origin % cipher.sector_bytes == 0, origin
        self.cipher, self.origin = cipher, origin
        self._over: dict[Medium, CipheredMedium] = {}
        self._placed: dict[int, Encipherment] = {}

    def placed(self, at: int, child_at: int) -> "Encipherment":
        """What enciphers a run that is at `at` of the disk and lies at `child_at` of the child.

        Runs of one distance get the same object, so that they can be joined.
        """
        if self.origin is not None:
            return self
        origin = child_at - at
        known = self._placed.get(origin)
        if known is None:
            if len(self._placed) >= PLACES_MAX:
                self._placed.clear()
            known = self._placed[origin] = Encipherment(self.cipher, origin)
        return known

    @property
    def unit(self) -> int:
        """Bytes of the child that are enciphered on their own."""
        return self.cipher.sector_bytes

    def fits(self, at: int, length: int) -> bool:
        """Whether a run consists of whole units. `at` counts in the child, or in the format: both are aligned alike."""
        return (at | length) % self.unit == 0

    def encipher(self, at: int, content: Buffer) -> Buffer:
        """What is to be written at `at` of the child. Blocks."""
        assert self.origin is not None
        return self.cipher.encipher(at - self.origin, content)

    def decipher(self, at: int, buffer: memoryview) -> None:
        """Turn what was read at `at` of the child into what it means, in place. Blocks."""
        assert self.origin is not None
        self.cipher.decipher(at - self.origin, buffer)

    def over(self, medium: Medium) -> Medium:
        """The same medium, read and written through the cipher: one object for one medium, so that runs are joined."""
        assert self.origin is not None
        known = self._over.get(medium)
        if known is None:
            if len(self._over) >= MEDIA_MAX:
                self._over.clear()  # most of them were closed by reopening
            known = self._over[medium] = CipheredMedium(medium, self)
        return known


class CipheredMedium(Medium):
    """What a medium holds, deciphered. Runs are whole units of the cipher.

    It knows no holes: a hole of the medium below reads as anything but zeroes.
    """

    def __init__(self, medium: Medium, encipherment: Encipherment) -> None:
        self.medium, self._encipherment = medium, encipherment

    def read_cached(self, at: int, buffer: memoryview) -> bool:
        """See `Medium`."""
        if len(buffer) > IN_LOOP_BYTES_MAX or not self.medium.read_cached(at, buffer):
            return False
        self._encipherment.decipher(at, buffer)
        return True

    def write_cached(self, at: int, contents: Sequence[Buffer]) -> bool:
        """See `Medium`."""
        if sum(len(content) for content in contents) > IN_LOOP_BYTES_MAX:
            return False
        return self.medium.write_cached(at, self._enciphered(at, contents))

    def read_into(self, at: int, buffer: memoryview) -> None:
        """See `Medium`."""
        self.medium.read_into(at, buffer)
        self._encipherment.decipher(at, buffer)

    def write(self, at: int, content: Buffer) -> None:
        """See `Medium`."""
        self.medium.write(at, self._encipherment.encipher(at, content))

    def writev(self, at: int, contents: list[Buffer]) -> None:
        """See `Medium`."""
        self.medium.writev(at, self._enciphered(at, contents))

    def _enciphered(self, at: int, contents: Sequence[Buffer]) -> list[Buffer]:
        enciphered: list[Buffer] = []
        for content in contents:
            enciphered.append(self._encipherment.encipher(at, content))
            at += len(content)
        return enciphered

    def zero(self, at: int, length: int, *, unmap: bool) -> None:
        """See `Medium`; zeroes are bytes like any others here."""
        del unmap
        for start in range(at, at + length, PIECE_BYTES):
            self.write(start, zeroes(min(PIECE_BYTES, at + length - start)))

    def discard(self, at: int, length: int) -> None:
        """See `Medium`: what is given back would not read as zeroes, so nothing is."""

    def preallocate(self, at: int, length: int) -> None:
        """See `Medium`."""
        self.medium.preallocate(at, length)

    def copy_from(self, source: Medium, source_at: int, at: int, length: int) -> None:
        """See `Medium`."""
        self.gather_from(source, [(source_at, length)], at)

    def gather_from(self, source: Medium, pieces: Sequence[tuple[int, int]], at: int) -> None:
        """See `Medium`. The pieces are put together in memory, however short they are, and enciphered together."""
        room = aligned(min(PIECE_BYTES, sum(length for _, length in pieces)))
        filled = 0
        for source_at, length in _cut(pieces, len(room)):
            source.read_into(source_at, room[filled : filled + length])
            filled += length
            if filled == len(room):
                self.write(at, room)
                at, filled = at + filled, 0
        if filled:
            self.write(at, room[:filled])

    def allocations(self, at: int, length: int) -> list[Allocation]:
        """See `Medium`: all of it is data."""
        return [Allocation(at, length, True)]

    def sync(self) -> None:
        """See `Medium`."""
        self.medium.sync()

    def truncate(self, length: int) -> None:
        """See `Medium`; what is new reads as anything."""
        self.medium.truncate(length)

    def size(self) -> int:
        """See `Medium`."""
        return self.medium.size()

    def allocated_size(self) -> int:
        """See `Medium`; as if there were no holes, since they are of no use to anybody here."""
        return self.medium.size()

    def close(self) -> None:
        """See `Medium`: the medium below belongs to somebody else."""


def _cut(pieces: Sequence[tuple[int, int]], room: int) -> Iterator[tuple[int, int]]:
    """The pieces, cut so that they fill buffers of `room` bytes one after another exactly."""
    free = room
    for at, length in pieces:
        while length:
            part = min(length, free)
            yield at, part
            at, length = at + part, length - part
            free = free - part or room
