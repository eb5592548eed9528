"""The file beside a raw image that holds its dirty bitmaps (docs/adr/0010-side-file.md).

    offset  bytes
    0       8      `BLKJBMAP`
    8       4      version, 1
    12      4      length of the directory
    16      8      length of the bits
    24      32     SHA-256 of all that follows
    56             directory: JSON, see `Directory`
    then           bits of one bitmap after the other, least significant first, each padded to whole bytes

All integers are big endian, lengths in bytes. The file is only ever replaced as a whole.
"""

import hashlib
import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

import msgspec

MAGIC: Final = b"BLKJBMAP"
VERSION: Final = 1
DIRECTORY_BYTES_MAX: Final = 64 << 20
_HEADER: Final = struct.Struct(">8sIIQ32s")


class SideBitmap(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, rename="kebab"):
    """One bitmap.

    Attributes:
        granularity: bytes a bit.
        length: bytes of the disk that it covers.
        enabled: it records changes.
        inconsistent: it was in use when it was last heard of; it has no bits here.
        stored: bytes of its bits in the file.
    """

    name: str
    granularity: int
    length: int
    enabled: bool
    inconsistent: bool = False
    stored: int = 0


class Directory(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, rename="kebab"):
    """What the file says about the image and its bitmaps.

    Attributes:
        image: what the image was like when this was written: the bitmaps say nothing about any other.
        in_use: somebody changes the image, so no bitmap can be believed.
    """

    image: list[int]
    in_use: bool
    bitmaps: list[SideBitmap]


class SideContent(NamedTuple):
    """All of a side file; `bits` has one item for each bitmap."""

    directory: Directory
    bits: list[bytes]


def encode(directory: Directory, bits: Sequence[bytes]) -> bytes:
    """The whole file."""
    text = msgspec.json.encode(directory)
    assert len(text) <= DIRECTORY_BYTES_MAX
    content = text + b"".join(bits)
    checksum = hashlib.sha256(content).digest()
    return _HEADER.pack(MAGIC, VERSION, len(text), len(content) - len(text), checksum) + content


def decode(raw: bytes) -> SideContent:
    """The inverse of `encode`.

    Raises:
        ValueError: it is no such file, or not as it was written.
    """
    if len(raw) < _HEADER.size or raw[:8] != MAGIC:
        raise ValueError("it is not a bitmap file")
    _, version, text_bytes, bits_bytes, checksum = _HEADER.unpack_from(raw)
    if version != VERSION:
        raise ValueError(f"version {version} is not known")
    content = memoryview(raw)[_HEADER.size :]
    if len(content) != text_bytes + bits_bytes or hashlib.sha256(content).digest() != checksum:
        raise ValueError("it is damaged")
    try:
        directory = msgspec.json.decode(content[:text_bytes], type=Directory)
    except msgspec.MsgspecError as error:
        raise ValueError(f"its directory makes no sense: {error}") from None
    bits: list[bytes] = []
    at = text_bytes
    for bitmap in directory.bitmaps:
        end = at + bitmap.stored
        if not at <= end <= len(content):
            raise ValueError("it is damaged")
        bits.append(bytes(content[at:end]))
        at = end
    return SideContent(directory, bits)
