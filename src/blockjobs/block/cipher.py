"""What enciphered images need of a cipher: whole sectors, each at its place."""

from typing import Protocol

from blockjobs.base.buffers import Buffer


class SectorCipher(Protocol):
    """A disk cipher with its key. Blocking, and safe to call in any worker thread; calls may overlap in time.

    `at` and all lengths are in bytes and multiples of `sector_bytes`; the tweak of a sector is made of `at`.
    """

    @property
    def sector_bytes(self) -> int:
        """The unit that is enciphered on its own: 512 for LUKS version 1."""
        ...

    def encipher(self, at: int, content: Buffer) -> Buffer:
        """What `content` is on the disk. The argument is left alone."""
        ...

    def decipher(self, at: int, buffer: memoryview) -> None:
        """Turn what was read from the disk into what it means, in place."""
        ...
