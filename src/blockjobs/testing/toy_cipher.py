"""A cipher for tests: no secret is safe with it, but every byte depends on its place and the key."""

from dataclasses import dataclass
from hashlib import blake2b

from blockjobs.base.buffers import Buffer

SECTOR = 512


@dataclass(frozen=True)
class ToyCipher:
    """See `SectorCipher`. It insists on whole sectors."""

    key: int

    @property
    def sector_bytes(self) -> int:
        """See `SectorCipher`."""
        return SECTOR

    def encipher(self, at: int, content: Buffer) -> bytes:
        """See `SectorCipher`."""
        length = len(content)
        assert at >= 0 and (at | length) % SECTOR == 0, (at, length)
        pad = b"".join(self._pad(place) for place in range(at, at + length, SECTOR))
        return (int.from_bytes(content) ^ int.from_bytes(pad)).to_bytes(length)

    def decipher(self, at: int, buffer: memoryview) -> None:
        """See `SectorCipher`."""
        buffer[:] = self.encipher(at, buffer)

    def _pad(self, at: int) -> bytes:
        return blake2b(b"%d" % at, key=b"%d" % self.key).digest() * (SECTOR // 64)
