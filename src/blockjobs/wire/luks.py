"""LUKS version 1: the header before an enciphered disk, and its eight key slots. No I/O, no cryptography.

The header says which cipher the disk has, and holds its key eight times at most, each enciphered under a passphrase of
its own. Limits: spec/durability.md §3.
"""

import struct
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Final, NamedTuple, Self

MAGIC: Final = b"LUKS\xba\xbe"
HEADER_BYTES: Final = 592
SECTOR: Final = 512
SLOTS: Final = 8
STRIPES: Final = 4000
DIGEST_BYTES: Final = 20
SALT_BYTES: Final = 32
SLOTS_AT: Final = 4096
"""Where the first slot's key material begins, and what the others are aligned to."""
KEY_BYTES_MAX: Final = 512
_ENABLED: Final = 0x00AC71F3
_DISABLED: Final = 0x0000DEAD
_FIXED: Final = struct.Struct(">6sH32s32s32sII20s32sI40s")
_SLOT: Final = struct.Struct(">II32sII")
SLOT_BYTES: Final = _SLOT.size


class KeySlot(NamedTuple):
    """One of the eight; places in sectors of 512 bytes from the header's beginning."""

    is_active: bool
    iterations: int
    salt: bytes
    material_sector: int
    stripes: int = STRIPES


@dataclass(frozen=True, slots=True, kw_only=True)
class LuksHeader:
    """A header.

    Attributes:
        cipher: aes, cast5, ...; mode: xts-plain64, cbc-essiv:sha256, ...; hash: sha256, ...
        payload_sector: where the disk begins, in sectors of 512 bytes.
        key_bytes: length of the disk's key.
        digest, digest_salt, digest_iterations: tell whether a key is the right one.
    """

    cipher: str
    mode: str
    hash: str
    payload_sector: int
    key_bytes: int
    digest: bytes
    digest_salt: bytes
    digest_iterations: int
    uuid: str
    slots: tuple[KeySlot, ...] = field(default=())

    @property
    def material_bytes(self) -> int:
        """Length of a slot's key material."""
        return self.key_bytes * STRIPES

    @classmethod
    def decode(cls, raw: bytes) -> Self:
        """Read and check a header.

        Raises:
            ValueError: it is none, or no writer would have made it.
        """
        if len(raw) < HEADER_BYTES or raw[:6] != MAGIC:
            raise ValueError("Volume is not in LUKS format")
        magic, version, cipher, mode, hash_, payload, key_bytes, digest, salt, iterations, uuid = _FIXED.unpack_from(
            raw
        )
        del magic
        if version != 1:
            raise ValueError(f"LUKS version {version} is not supported")
        slots = tuple(_slot(raw, number) for number in range(SLOTS))
        header = cls(
            cipher=_text(cipher, "cipher name"),
            mode=_text(mode, "cipher mode"),
            hash=_text(hash_, "hash algorithm"),
            payload_sector=payload,
            key_bytes=key_bytes,
            digest=digest,
            digest_salt=salt,
            digest_iterations=iterations,
            uuid=_text(uuid, "UUID"),
            slots=slots,
        )
        header._check()
        return header

    def _check(self) -> None:
        if not 0 < self.key_bytes <= KEY_BYTES_MAX:
            raise ValueError(f"LUKS key of {self.key_bytes} bytes is not supported")
        if not self.digest_iterations:
            raise ValueError("LUKS key digest without iterations")
        length = -(-self.material_bytes // SECTOR)
        places: list[tuple[int, int]] = []
        for number, slot in enumerate(self.slots):
            if slot.stripes != STRIPES:
                raise ValueError(f"Keyslot {number} is corrupted (stripes {slot.stripes} != {STRIPES})")
            if slot.material_sector < SLOTS_AT // SECTOR // 4:
                raise ValueError(f"Keyslot {number} is overlapping with the LUKS header")
            if slot.is_active and not slot.iterations:
                raise ValueError(f"Keyslot {number} iteration count is zero")
            if slot.material_sector + length > self.payload_sector:
                raise ValueError(f"Keyslot {number} is overlapping with the encrypted payload")
            places.append((slot.material_sector, number))
        places.sort()
        for (at, one), (after, other) in pairwise(places):
            if at + length > after:
                raise ValueError(f"Keyslots {one} and {other} are overlapping in the header")

    def encode(self) -> bytes:
        """The header's bytes."""
        fixed = _FIXED.pack(
            MAGIC,
            1,
            self.cipher.encode(),
            self.mode.encode(),
            self.hash.encode(),
            self.payload_sector,
            self.key_bytes,
            self.digest,
            self.digest_salt,
            self.digest_iterations,
            self.uuid.encode(),
        )
        return fixed + b"".join(encode_slot(slot) for slot in self.slots)

    def with_slot(self, number: int, slot: KeySlot) -> Self:
        """The same header with another slot of that number."""
        return replace(self, slots=(*self.slots[:number], slot, *self.slots[number + 1 :]))


def encode_slot(slot: KeySlot) -> bytes:
    """A slot's bytes, which lie at `slot_at` of the header."""
    state = _ENABLED if slot.is_active else _DISABLED
    return _SLOT.pack(state, slot.iterations, slot.salt, slot.material_sector, slot.stripes)


def slot_at(number: int) -> int:
    """Where a slot's bytes lie; none crosses a 512-byte border but those that span it, see `HEADER_BYTES`."""
    return _FIXED.size + number * SLOT_BYTES


def empty_slots(key_bytes: int) -> tuple[tuple[KeySlot, ...], int]:
    """The slots of a new header, and the sector at which its payload begins."""
    aligned = -(-key_bytes * STRIPES // SLOTS_AT) * SLOTS_AT // SECTOR
    first = SLOTS_AT // SECTOR
    slots = tuple(KeySlot(False, 0, bytes(SALT_BYTES), first + number * aligned) for number in range(SLOTS))
    return slots, first + SLOTS * aligned


def _slot(raw: bytes, number: int) -> KeySlot:
    state, iterations, salt, sector, stripes = _SLOT.unpack_from(raw, slot_at(number))
    if state not in (_ENABLED, _DISABLED):
        raise ValueError(f"Keyslot {number} state (active/disable) is corrupted")
    return KeySlot(state == _ENABLED, iterations, salt, sector, stripes)


def _text(raw: bytes, what: str) -> str:
    if b"\0" not in raw:
        raise ValueError(f"LUKS header {what} is not NUL terminated")
    text = raw.split(b"\0")[0]
    if not (text.isascii() and text.decode("ascii").isprintable()):
        raise ValueError(f"LUKS header {what} is not printable")
    return text.decode("ascii")
