"""Disk ciphers against the library's own modes, sector by sector, and against published vectors."""

import random

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from blockjobs.base.errors import UsageError
from blockjobs.block.luks.cipher import PIECE, SECTOR, DiskCipher
from blockjobs.block.luks.key_material import merge, split
from blockjobs.wire.luks import STRIPES

KEY = random.Random(1).randbytes(64)


def by_sectors(mode: str, key: bytes, first: int, content: bytes) -> bytes:
    """The slow way."""
    done = b""
    for number in range(first, first + len(content) // SECTOR):
        start = (number - first) * SECTOR
        iv = number.to_bytes(16, "little")
        if mode == "xts-plain":
            iv = (number & 0xFFFF_FFFF).to_bytes(16, "little")
        kinds = {"xts": modes.XTS, "cbc": modes.CBC, "ctr": modes.CTR}
        kind = mode.split("-", maxsplit=1)[0]
        chosen = modes.ECB() if kind == "ecb" else kinds[kind](iv)
        done += Cipher(algorithms.AES(key), chosen).encryptor().update(content[start : start + SECTOR])
    return done


@pytest.mark.parametrize(
    ("mode", "length"), [("xts-plain64", 64), ("xts-plain", 32), ("cbc-plain64", 24), ("ecb-plain64", 16),
                         ("ctr-plain64", 32)]
)  # fmt: skip
@settings(max_examples=20, deadline=None)
@given(first=st.integers(0, 1 << 40) | st.integers((1 << 32) - 3, (1 << 32) + 3), count=st.integers(1, 9))
def test_as_the_library_does_it(mode: str, length: int, first: int, count: int) -> None:
    content = random.Random(count).randbytes(count * SECTOR)
    cipher = DiskCipher("aes", mode, KEY[:length])
    expected = by_sectors(mode, KEY[:length], first, content)
    assert bytes(cipher.encipher(first * SECTOR, content)) == expected
    buffer = bytearray(expected)
    cipher.decipher(first * SECTOR, memoryview(buffer))
    assert buffer == content


@settings(max_examples=20, deadline=None)
@given(first=st.integers(0, 1 << 40) | st.integers((1 << 32) - 3, (1 << 32) + 3), count=st.integers(1, 4))
def test_a_counter_is_as_long_as_a_short_block(first: int, count: int) -> None:
    content = random.Random(count).randbytes(count * SECTOR)
    blocks = DiskCipher("cast5", "ecb-plain64", KEY[:16])
    expected = b""
    for number in range(first, first + count):
        start = int.from_bytes(number.to_bytes(8, "little"))
        counters = b"".join(((start + each) % (1 << 64)).to_bytes(8) for each in range(SECTOR // 8))
        stream = int.from_bytes(blocks.encipher(0, counters))
        here = content[(number - first) * SECTOR : (number - first + 1) * SECTOR]
        expected += (stream ^ int.from_bytes(here)).to_bytes(SECTOR)
    assert bytes(DiskCipher("cast5", "ctr-plain64", KEY[:16]).encipher(first * SECTOR, content)) == expected


@pytest.mark.parametrize("mode", ["xts-plain64", "cbc-essiv:sha256", "ctr-essiv:sha256", "ecb-plain64"])
def test_pieces_do_not_show(mode: str) -> None:
    content = random.Random(2).randbytes(2 * PIECE + 3 * SECTOR)
    cipher = DiskCipher("aes", mode, KEY if mode.startswith("xts") else KEY[:32])
    whole = bytes(cipher.encipher(7 * SECTOR, content))
    parts = b"".join(
        bytes(cipher.encipher(7 * SECTOR + at, content[at : at + SECTOR])) for at in range(0, len(content), SECTOR)
    )
    assert whole == parts


def test_published_xts_vector() -> None:
    """IEEE 1619-2007, vector 4, which has a data unit of 512 bytes: the beginning of its ciphertext."""
    key = bytes.fromhex("2718281828459045235360287471352631415926535897932384626433832795")
    content = bytes(range(256)) * 2
    done = bytes(DiskCipher("aes", "xts-plain64", key).encipher(0, content))
    assert done[:16].hex() == "27a7479befa1d476489f308cd4cfa6e2"
    assert len(done) == 512


@pytest.mark.parametrize(
    ("name", "mode", "length", "text"),
    [
        ("serpent", "xts-plain64", 64, "Algorithm 'serpent' not supported"),
        ("aes", "cbc-essiv:sha1", 32, "No AES cipher with key size 20 available"),
        ("aes", "xts-plain64", 40, "No AES cipher with key size 20 available"),
        ("aes", "lrw-plain64", 32, "Algorithm 'lrw' not supported"),
        ("aes", "cbc-benbi", 32, "Algorithm 'benbi' not supported"),
        ("cast5", "xts-plain64", 32, "Unsupported cipher mode xts"),
    ],
)
def test_refusals(name: str, mode: str, length: int, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        DiskCipher(name, mode, KEY[:length])


@pytest.mark.parametrize("digest", ["sha1", "sha256", "sha512"])
@pytest.mark.parametrize("length", [16, 32, 64])
def test_a_split_key_comes_back(digest: str, length: int) -> None:
    key, noise = KEY[:length], random.Random(3).randbytes(length * (STRIPES - 1))
    material = split(digest, key, noise)
    assert len(material) == length * STRIPES
    assert merge(digest, material, length) == key
    spoiled = bytearray(material)
    spoiled[5] ^= 1
    assert merge(digest, bytes(spoiled), length) != key
