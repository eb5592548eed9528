"""From passphrase to key: PBKDF2, and the splitting of a key over so many sectors that erasing any loses all of it."""

import hashlib
import struct
from collections.abc import Callable
from typing import Final

from blockjobs.base.errors import UsageError
from blockjobs.wire.luks import STRIPES

ITERATIONS_MIN: Final = 1000
ITERATIONS_MAX: Final = 300_000_000
"""About a minute of work: more is an attack, or at least no way to open a disk (spec/durability.md §3)."""
MEASURED_NS: Final = 50_000_000
HASHES: Final = ("md5", "sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160")


def check_hash(name: str) -> None:
    """Refuse a digest that is not to be had.

    Raises:
        UsageError: it is so.
    """
    if name not in HASHES or name not in hashlib.algorithms_available:
        raise UsageError(f"Algorithm '{name}' not supported")


def derive(hash_: str, passphrase: bytes, salt: bytes, iterations: int, length: int) -> bytes:
    """PBKDF2. Blocks, for seconds perhaps.

    Raises:
        UsageError: so many iterations that it would never end.
    """
    check_hash(hash_)
    if iterations > ITERATIONS_MAX:
        raise UsageError(f"PBKDF iterations {iterations} are more than this program does ({ITERATIONS_MAX})")
    return hashlib.pbkdf2_hmac(hash_, passphrase, salt, iterations, length)


def iterations_per_s(hash_: str, length: int, now_ns: Callable[[], int]) -> int:
    """How many iterations this machine does in a second. Blocks for a tenth of that.

    Args:
        now_ns: a clock.
    """
    check_hash(hash_)
    count = ITERATIONS_MIN
    while True:
        began = now_ns()
        derive(hash_, b"a passphrase", bytes(32), count, length)
        took = now_ns() - began
        if took >= MEASURED_NS or count >= 1 << 24:
            return max(ITERATIONS_MIN, count * 10**9 // max(1, took))
        count *= 4


def split(hash_: str, key: bytes, noise: bytes) -> bytes:
    """A key spread over STRIPES times its length.

    Args:
        noise: random bytes for all stripes but the last.
    """
    length = len(key)
    assert len(noise) == length * (STRIPES - 1)
    mixed = _mix(hash_, noise, length)
    last = (int.from_bytes(mixed, "big") ^ int.from_bytes(key, "big")).to_bytes(length, "big")
    return noise + last


def merge(hash_: str, material: bytes, length: int) -> bytes:
    """The inverse of `split`."""
    mixed = _mix(hash_, material[: length * (STRIPES - 1)], length)
    last = material[length * (STRIPES - 1) : length * STRIPES]
    return (int.from_bytes(mixed, "big") ^ int.from_bytes(last, "big")).to_bytes(length, "big")


def _mix(hash_: str, stripes: bytes, length: int) -> bytes:
    state = bytes(length)
    for start in range(0, len(stripes), length):
        number = int.from_bytes(state, "big") ^ int.from_bytes(stripes[start : start + length], "big")
        state = _diffuse(hash_, number.to_bytes(length, "big"))
    return state


def _diffuse(hash_: str, state: bytes) -> bytes:
    size = hashlib.new(hash_).digest_size
    pieces = [
        hashlib.new(hash_, struct.pack(">I", number) + state[start : start + size]).digest()
        for number, start in enumerate(range(0, len(state), size))
    ]
    return b"".join(pieces)[: len(state)]
