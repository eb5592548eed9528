"""The header of an enciphered disk: made, opened with a passphrase, and its key slots changed.

The header lies at a place in a node: at the beginning for a `luks` node, in clusters of its own in a qcow2 image. What
takes seconds runs in workers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from blockjobs.base.clock import Clock
from blockjobs.base.entropy import Entropy
from blockjobs.base.errors import UsageError
from blockjobs.base.offload import Offload
from blockjobs.block.driver import Child
from blockjobs.block.luks import key_material
from blockjobs.block.luks.cipher import DiskCipher, key_bytes_of
from blockjobs.block.luks.names import (
    QCryptoCipherAlgorithm,
    QCryptoCipherMode,
    QCryptoHashAlgorithm,
    QCryptoIVGenAlgorithm,
)
from blockjobs.block.objects import Secret
from blockjobs.wire.luks import (
    DIGEST_BYTES,
    HEADER_BYTES,
    SALT_BYTES,
    SECTOR,
    STRIPES,
    KeySlot,
    LuksHeader,
    empty_slots,
    encode_slot,
    slot_at,
)

ITER_TIME_MS: Final = 2000
CIPHERS: Final = {
    "aes-128": ("aes", 128),
    "aes-192": ("aes", 192),
    "aes-256": ("aes", 256),
    "cast5-128": ("cast5", 128),
}
"""QAPI's names: the header's name, and the bits of the key."""
_NAMES: Final[Mapping[str, type[StrEnum]]] = {
    "cipher-alg": QCryptoCipherAlgorithm,
    "cipher-mode": QCryptoCipherMode,
    "ivgen-alg": QCryptoIVGenAlgorithm,
    "ivgen-hash-alg": QCryptoHashAlgorithm,
    "hash-alg": QCryptoHashAlgorithm,
}
NO_SUCH_KEY: Final = "Invalid password, cannot unlock any keyslot"


@dataclass(frozen=True, slots=True, kw_only=True)
class Means:
    """What work on headers needs of the program around it."""

    offload: Offload
    clock: Clock
    entropy: Entropy

    def random(self, length: int) -> bytes:
        """Bytes that nobody can guess."""
        return self.entropy.below(1 << 8 * length).to_bytes(length, "big")


@dataclass(frozen=True, slots=True, kw_only=True)
class NewVolume:
    """What a new header is to say; names are QAPI's."""

    cipher_alg: str = "aes-256"
    cipher_mode: str = "xts"
    ivgen_alg: str = "plain64"
    ivgen_hash_alg: str | None = None
    hash_alg: str = "sha256"
    iter_time_ms: int = ITER_TIME_MS

    def mode(self) -> str:
        """As a header spells it."""
        digest = self.ivgen_hash_alg or ("sha256" if self.ivgen_alg == "essiv" else None)
        return f"{self.cipher_mode}-{self.ivgen_alg}{':' + digest if digest else ''}"

    def key_bytes(self) -> int:
        """Length of the disk's key.

        Raises:
            UsageError: there is no such cipher here.
        """
        if self.cipher_alg not in CIPHERS:
            raise UsageError(f"Algorithm '{self.cipher_alg}' not supported")
        return key_bytes_of(*CIPHERS[self.cipher_alg], self.cipher_mode)

    def payload_bytes(self) -> int:
        """How much lies before the disk."""
        return empty_slots(self.key_bytes())[1] * SECTOR


def secret_of(objects: Mapping[str, object], name: str | None, parameter: str) -> bytes:
    """The content of a secret.

    Args:
        parameter: the option that names it, for messages.

    Raises:
        UsageError: in QEMU's words.
    """
    if name is None:
        raise UsageError(f"Parameter '{parameter}' is required for cipher")
    secret = objects.get(name)
    if secret is None:
        raise UsageError(f"No secret with id '{name}'")
    if not isinstance(secret, Secret):
        raise UsageError(f"Object with id '{name}' is not a secret")
    return secret.content


async def read_header(file: Child, at: int) -> LuksHeader:
    """Read and check the header at a place.

    Raises:
        UsageError: it is none, or broken.
        IoFailure: it could not be read.
    Waits: a read. Checkpoint: no.
    """
    raw = await file.read(at, max(0, min(HEADER_BYTES, file.length - at)))
    try:
        header = LuksHeader.decode(raw)
    except ValueError as error:
        raise UsageError(str(error)) from None
    _check_names(header)
    return header


def _check_names(header: LuksHeader) -> None:
    """Raises UsageError for names that QAPI has no words for; ciphers that only this program lacks may be looked at."""
    shown = info_of(header)
    for member, known in _NAMES.items():
        if member in shown and shown[member] not in list(known):
            raise UsageError(f"Algorithm '{shown[member]}' not supported")


async def new_header(wanted: NewVolume, passphrase: bytes, means: Means) -> tuple[bytes, DiskCipher]:
    """All bytes before the disk, with one key slot, and the disk's cipher.

    Raises:
        UsageError: there is no such cipher or digest here.
    Waits: for about `iter_time_ms` in a worker. Checkpoint: no.
    """
    key = means.random(wanted.key_bytes())
    name = CIPHERS[wanted.cipher_alg][0]
    cipher = DiskCipher(name, wanted.mode(), key)
    rate = await means.offload.run(key_material.iterations_per_s, wanted.hash_alg, len(key), means.clock.now_ns)
    salt = means.random(SALT_BYTES)
    iterations = max(key_material.ITERATIONS_MIN, rate * wanted.iter_time_ms // 1000 // 8)
    slots, payload = empty_slots(len(key))
    header = LuksHeader(
        cipher=name,
        mode=wanted.mode(),
        hash=wanted.hash_alg,
        payload_sector=payload,
        key_bytes=len(key),
        digest=await means.offload.run(key_material.derive, wanted.hash_alg, key, salt, iterations, DIGEST_BYTES),
        digest_salt=salt,
        digest_iterations=iterations,
        uuid=_uuid(means),
        slots=slots,
    )
    slot, material = await make_slot(header, 0, key, passphrase, wanted.iter_time_ms, means)
    raw = bytearray(payload * SECTOR)
    raw[:HEADER_BYTES] = header.with_slot(0, slot).encode()
    place = slot.material_sector * SECTOR
    raw[place : place + len(material)] = material
    return bytes(raw), cipher


def _uuid(means: Means) -> str:
    digits = means.random(16).hex()
    return (
        f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-{'89ab'[int(digits[16], 16) % 4]}{digits[17:20]}-{digits[20:]}"
    )


async def make_slot(
    header: LuksHeader, number: int, key: bytes, passphrase: bytes, iter_time_ms: int, means: Means
) -> tuple[KeySlot, bytes]:
    """An active slot with the disk's key under a passphrase, and its key material.

    Raises:
        UsageError: the header's cipher or digest is not to be had here.
    Waits: for about `iter_time_ms` in a worker. Checkpoint: no.
    """
    rate = await means.offload.run(key_material.iterations_per_s, header.hash, len(key), means.clock.now_ns)
    iterations = min(
        max(key_material.ITERATIONS_MIN, rate * iter_time_ms // 1000), key_material.ITERATIONS_MAX, (1 << 32) - 1
    )
    salt, noise = means.random(SALT_BYTES), means.random(len(key) * (STRIPES - 1))
    slot = KeySlot(True, iterations, salt, header.slots[number].material_sector)
    return slot, await means.offload.run(_seal, header, slot, key, passphrase, noise)


def _seal(header: LuksHeader, slot: KeySlot, key: bytes, passphrase: bytes, noise: bytes) -> bytes:
    own = key_material.derive(header.hash, passphrase, slot.salt, slot.iterations, len(key))
    material = key_material.split(header.hash, key, noise)
    padded = material.ljust(-(-len(material) // SECTOR) * SECTOR, b"\0")
    return bytes(DiskCipher(header.cipher, header.mode, own).encipher(0, padded))


async def unlock(file: Child, at: int, header: LuksHeader, passphrase: bytes, means: Means) -> bytes:
    """The disk's key.

    Raises:
        UsageError: no slot has that passphrase.
        IoFailure: a slot could not be read.
    Waits: reads, and seconds of work for each active slot. Checkpoint: no.
    """
    for number, slot in enumerate(header.slots):
        if slot.is_active and (key := await open_slot(file, at, header, number, passphrase, means)) is not None:
            return key
    raise UsageError(NO_SUCH_KEY)


async def open_slot(
    file: Child, at: int, header: LuksHeader, number: int, passphrase: bytes, means: Means
) -> bytes | None:
    """The disk's key if an active slot has that passphrase. Raises and waits as `unlock`."""
    slot = header.slots[number]
    length = -(-header.material_bytes // SECTOR) * SECTOR
    material = await file.read(at + slot.material_sector * SECTOR, length)
    return await means.offload.run(_open, header, slot, material, passphrase)


def _open(header: LuksHeader, slot: KeySlot, material: bytes, passphrase: bytes) -> bytes | None:
    own = key_material.derive(header.hash, passphrase, slot.salt, slot.iterations, header.key_bytes)
    plain = bytearray(material)
    DiskCipher(header.cipher, header.mode, own).decipher(0, memoryview(plain))
    key = key_material.merge(header.hash, bytes(plain), header.key_bytes)
    digest = key_material.derive(header.hash, key, header.digest_salt, header.digest_iterations, DIGEST_BYTES)
    return key if digest == header.digest else None


async def write_slot(file: Child, at: int, header: LuksHeader, number: int, slot: KeySlot, material: bytes) -> None:
    """Make a slot active: its key material ▷ the slot ▷ (spec/durability.md §1, Amend).

    Raises:
        IoFailure: the slot is as before, or active.
    Waits: writes and flushes. Checkpoint: no.
    """
    await file.write(at + slot.material_sector * SECTOR, material)
    await file.flush()
    await _put_slot(file, at, number, slot, slot)


async def erase_slot(file: Child, at: int, header: LuksHeader, number: int, noise: bytes) -> LuksHeader:
    """Make a slot inactive ▷ overwrite its key material ▷, so that nobody ever opens it again.

    Args:
        noise: what overwrites the material; as long as that.

    Returns:
        The header then.

    Raises:
        IoFailure: the slot is as before, or inactive with its material perhaps still there.
    Waits: writes and flushes. Checkpoint: no.
    """
    old = header.slots[number]
    changed = header.with_slot(number, KeySlot(False, 0, bytes(SALT_BYTES), old.material_sector))
    await _put_slot(file, at, number, old, changed.slots[number])
    await file.write(at + old.material_sector * SECTOR, noise)
    await file.flush()
    return changed


async def _put_slot(file: Child, at: int, number: int, active: KeySlot, slot: KeySlot) -> None:
    """Write one slot; one that spans two sectors in two steps, so that no tear makes it a wrong active one.

    Args:
        active: what it says while it is active, before or afterwards: both sectors change only while it is not.
    """
    place = slot_at(number)
    if place // SECTOR != (place + len(encode_slot(slot)) - 1) // SECTOR:
        await file.write(at + place, encode_slot(active._replace(is_active=False)))
        await file.flush()
    await file.write(at + place, encode_slot(slot))
    await file.flush()


def info_of(header: LuksHeader) -> dict[str, object]:
    """Members of QAPI's QCryptoBlockInfoLUKS but the format."""
    mode, _, generator = header.mode.partition("-")
    generator, _, digest = generator.partition(":")
    bits = header.key_bytes * 8 // (2 if mode == "xts" else 1)
    slots: list[dict[str, object]] = []
    for slot in header.slots:
        shown: dict[str, object] = {"active": slot.is_active, "key-offset": slot.material_sector * SECTOR}
        if slot.is_active:
            shown |= {"iters": slot.iterations, "stripes": slot.stripes}
        slots.append(shown)
    members: dict[str, object] = {
        "cipher-alg": f"{header.cipher}-{bits}",
        "cipher-mode": mode,
        "ivgen-alg": generator,
        "hash-alg": header.hash,
        "payload-offset": header.payload_sector * SECTOR,
        "master-key-iters": header.digest_iterations,
        "uuid": header.uuid,
        "slots": slots,
    }
    if generator == "essiv":
        members["ivgen-hash-alg"] = digest
    return members
