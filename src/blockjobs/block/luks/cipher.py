"""Disk ciphers: whole buffers at a time, so that no sector costs Python (docs/adr/0014-ciphers-by-buffers.md).

A block cipher in ECB mode does all blocks of a buffer in one call. What makes it a disk cipher (tweaks, chaining,
counters) is arithmetic on all sectors at once, with numpy. Buffers are taken in pieces that stay in the processor's
cache. A table of each mode and IV generator is in the registries below.
"""

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from blockjobs.base.buffers import Buffer
from blockjobs.base.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

SECTOR: Final = 512
PIECE: Final = 128 << 10
AES_KEYS: Final = (16, 24, 32)
CAST5_KEY: Final = 16
XTS_BLOCK: Final = 16
MODES: Final = ("ecb", "cbc", "xts", "ctr")
IVGENS: Final = ("plain", "plain64", "essiv")


class _Blocks:
    """A block cipher with its key: any number of blocks, each on its own."""

    def __init__(self, name: str, key: bytes) -> None:
        from cryptography.hazmat.primitives.ciphers import Cipher, modes

        self._cipher = Cipher(_algorithm(name, key), modes.ECB())
        self.bytes = 8 if name == "cast5" else 16

    def encipher(self, content: Buffer) -> bytes:
        return self._cipher.encryptor().update(memoryview(content))

    def decipher(self, content: Buffer) -> bytes:
        return self._cipher.decryptor().update(memoryview(content))


def _algorithm(name: str, key: bytes) -> Any:
    from cryptography.hazmat.primitives.ciphers import algorithms

    if name == "aes":
        return algorithms.AES(key)
    if name == "cast5":
        from cryptography.hazmat.decrepit.ciphers.algorithms import CAST5

        return CAST5(key)
    raise UsageError(f"Algorithm '{name}' not supported")


def key_bytes_of(name: str, bits: int, mode: str) -> int:
    """How long the key of a disk is: XTS has two."""
    del name
    return bits // 8 * (2 if mode == "xts" else 1)


class DiskCipher:
    """A `SectorCipher`.

    Args:
        name: aes or cast5.
        mode: `MODE-IVGEN[:HASH]`, as in a LUKS header.
        key: as long as the mode wants it.

    Raises:
        UsageError: such a cipher is not to be had, in QEMU's words where it has some.
    """

    def __init__(self, name: str, mode: str, key: bytes) -> None:
        kind, _, generator = mode.partition("-")
        generator, _, digest = generator.partition(":")
        if kind not in MODES:
            raise UsageError(f"Algorithm '{kind}' not supported")
        if generator not in IVGENS:
            raise UsageError(f"Algorithm '{generator}' not supported")
        own = key[: len(key) // 2] if kind == "xts" else key
        if name == "aes" and len(own) not in AES_KEYS:
            raise UsageError(f"No AES cipher with key size {len(own)} available")
        self._blocks = _Blocks(name, own)
        self._tweaks = _Blocks(name, key[len(own) :]) if kind == "xts" else None
        if kind == "xts" and self._blocks.bytes != XTS_BLOCK:
            raise UsageError(f"Unsupported cipher mode {kind}")
        self._essiv = _essiv(name, key, digest) if generator == "essiv" else None
        self._is_short = generator == "plain"
        encipher: dict[str, Callable[[int, Any], Any]] = {
            "ecb": lambda at, words: self._ecb(self._blocks.encipher, words),
            "cbc": self._cbc_encipher,
            "xts": lambda at, words: self._xts(self._blocks.encipher, at, words),
            "ctr": self._ctr,
        }
        decipher: dict[str, Callable[[int, Any], Any]] = {
            "ecb": lambda at, words: self._ecb(self._blocks.decipher, words),
            "cbc": self._cbc_decipher,
            "xts": lambda at, words: self._xts(self._blocks.decipher, at, words),
            "ctr": self._ctr,
        }
        self._encipher, self._decipher = encipher[kind], decipher[kind]

    @property
    def sector_bytes(self) -> int:
        """See `SectorCipher`."""
        return SECTOR

    def encipher(self, at: int, content: Buffer) -> Buffer:
        """See `SectorCipher`."""
        result = bytearray(len(content))
        self._all(self._encipher, at, memoryview(content).cast("B"), memoryview(result))
        return result

    def decipher(self, at: int, buffer: memoryview) -> None:
        """See `SectorCipher`."""
        self._all(self._decipher, at, buffer, buffer)

    def _all(self, work: Callable[[int, Any], Any], at: int, source: memoryview, target: memoryview) -> None:
        import numpy as np

        for start in range(0, len(source), PIECE):
            words = np.frombuffer(source[start : start + PIECE], dtype="<u8")
            done = work((at + start) // SECTOR, words)
            np.frombuffer(target[start : start + PIECE], dtype="<u8")[:] = done

    def _ivs(self, first: int, count: int) -> "np.ndarray[Any, Any]":
        """The IV of each sector, one row of words each."""
        import numpy as np

        numbers = np.arange(first, first + count, dtype="<u8")
        if self._is_short:
            numbers &= np.uint64(0xFFFF_FFFF)
        rows = np.zeros((count, self._blocks.bytes // 8), dtype="<u8")
        rows[:, 0] = numbers
        if self._essiv is not None:
            raw = np.frombuffer(self._essiv.encipher(rows.tobytes()), dtype="<u8")
            rows = raw.reshape(count, self._blocks.bytes // 8)
        return rows

    @staticmethod
    def _ecb(step: Callable[[Buffer], bytes], words: Any) -> Any:
        import numpy as np

        return np.frombuffer(step(words.view("u1").data), dtype="<u8")

    def _xts(self, step: Callable[[Buffer], bytes], first: int, words: Any) -> Any:
        import numpy as np

        tweaks = self._xts_tweaks(first, len(words) * 8 // SECTOR)
        done = np.frombuffer(step((words ^ tweaks).view("u1").data), dtype="<u8")
        return done ^ tweaks

    def _xts_tweaks(self, first: int, count: int) -> Any:
        """What each block is mixed with: the sector's number enciphered, times 2^j in GF(2^128) for block j."""
        import numpy as np

        assert self._tweaks is not None
        raw = np.frombuffer(self._tweaks.encipher(self._ivs(first, count).tobytes()), dtype="<u8")
        low, high = (raw.reshape(count, 2)[:, word : word + 1] for word in (0, 1))
        places = np.arange(SECTOR // 16, dtype="<u8")
        one, top = np.uint64(1), np.uint64(63) - places
        tweaks = np.empty((count, SECTOR // 16, 2), dtype="<u8")
        # The bits that leave at the top come in again as 1 + x + x^2 + x^7. A shift by 64 would be none.
        carry = (high >> one) >> top
        part = low << places
        for shift in (0, 1, 1, 5):
            carry <<= np.uint64(shift)
            part ^= carry
        tweaks[:, :, 0] = part
        tweaks[:, :, 1] = ((low >> one) >> top) | (high << places)
        return tweaks.reshape(-1)

    def _cbc_encipher(self, first: int, words: Any) -> Any:
        """Block by block, each of all sectors at once."""
        import numpy as np

        width = self._blocks.bytes // 8
        sectors = words.reshape(-1, SECTOR // self._blocks.bytes, width)
        done = np.empty_like(sectors)
        before = self._ivs(first, len(sectors))
        for number in range(sectors.shape[1]):
            mixed = np.ascontiguousarray(sectors[:, number] ^ before)
            before = np.frombuffer(self._blocks.encipher(mixed.view("u1").data), dtype="<u8").reshape(-1, width)
            done[:, number] = before
        return done.reshape(-1)

    def _cbc_decipher(self, first: int, words: Any) -> Any:
        import numpy as np

        width = self._blocks.bytes // 8
        sectors = words.reshape(-1, SECTOR // self._blocks.bytes, width)
        raw = np.frombuffer(self._blocks.decipher(words.view("u1").data), dtype="<u8")
        done = raw.reshape(sectors.shape).copy()
        done[:, 1:] ^= sectors[:, :-1]
        done[:, 0] ^= self._ivs(first, len(sectors))
        return done.reshape(-1)

    def _ctr(self, first: int, words: Any) -> Any:
        """The IV, as a number as long as a block, highest byte first, counts blocks; both directions are the same."""
        import numpy as np

        width, blocks = self._blocks.bytes // 8, SECTOR // self._blocks.bytes
        ivs = np.ascontiguousarray(self._ivs(first, len(words) * 8 // SECTOR)).view(">u8").reshape(-1, width)
        low = ivs[:, -1:].astype("u8")
        counted = low + np.arange(blocks, dtype="u8")
        counters = np.empty((len(ivs), blocks, width), dtype=">u8")
        counters[:, :, -1] = counted
        if width > 1:
            counters[:, :, 0] = ivs[:, :1].astype("u8") + (counted < low).astype("u8")
        stream = np.frombuffer(self._blocks.encipher(counters.view("u1").reshape(-1).data), dtype="<u8")
        return words ^ stream


def _essiv(name: str, key: bytes, digest: str) -> _Blocks:
    """The cipher that makes IVs: its key is a digest of the disk's, of both halves of one for XTS."""
    if digest not in hashlib.algorithms_available:
        raise UsageError(f"Algorithm '{digest}' not supported")
    salt = hashlib.new(digest, key).digest()
    if name == "aes" and len(salt) not in AES_KEYS:
        raise UsageError(f"No AES cipher with key size {len(salt)} available")
    if name == "cast5" and len(salt) != CAST5_KEY:
        raise UsageError("Cipher cast5-128 not supported with essiv")
    return _Blocks(name, salt)
