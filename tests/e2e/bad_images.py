"""Images that somebody broke, by accident or to harm: each is a sound qcow2 image with one thing wrong."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import disks

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CLUSTER = 65536

# Byte offsets of the header's members.
VERSION, BACKING_AT, BACKING_LENGTH, CLUSTER_BITS, SIZE, CRYPT = 4, 8, 16, 20, 24, 32
L1_SIZE, L1_AT, REFTABLE_AT, REFTABLE_CLUSTERS, SNAPSHOTS, SNAPSHOTS_AT = 36, 40, 48, 56, 60, 64
INCOMPATIBLE, REFCOUNT_ORDER, HEADER_LENGTH, COMPRESSION = 72, 96, 100, 104


def u8(value: int) -> bytes:
    return struct.pack(">B", value)


def u32(value: int) -> bytes:
    return struct.pack(">I", value)


def u64(value: int) -> bytes:
    return struct.pack(">Q", value)


@dataclass(frozen=True)
class Bad:
    """One broken image."""

    name: str
    spoil: Callable[[Path], None]
    """Breaks the image at this path, which holds 1 MiB of data."""
    complaint: str
    """What the error must say; empty where any one error will do."""
    shows: str = "open"
    """When it must be noticed: on `open`, on `read`, or on `either` of them."""
    ours_only: bool = False
    """QEMU hangs or takes it for good: only our daemon is asked."""


def patch(at: int, content: bytes) -> Callable[[Path], None]:
    """Overwrite bytes of the file."""

    def spoil(image: Path) -> None:
        with open(image, "r+b") as file:
            file.seek(at)
            file.write(content)

    return spoil


def cut(length: int) -> Callable[[Path], None]:
    """Truncate the file."""
    return lambda image: os.truncate(image, length)


def at_table(field: int, entry: bytes) -> Callable[[Path], None]:
    """Overwrite the first entry of the L1 table (`field` L1_AT) or of the first L2 table (`field` -1)."""

    def spoil(image: Path) -> None:
        with open(image, "r+b") as file:
            file.seek(L1_AT)
            l1_at = int.from_bytes(file.read(8))
            file.seek(l1_at)
            l2_at = int.from_bytes(file.read(8)) & 0x00FF_FFFF_FFFF_FE00
            file.seek(l1_at if field == L1_AT else l2_at)
            file.write(entry)

    return spoil


def backed_by(name: str, fmt: str = "qcow2") -> Callable[[Path], None]:
    """Point the image at a backing file, whether it exists or not."""

    def spoil(image: Path) -> None:
        disks.run("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", name, "-F", fmt, image.name, cwd=image.parent)

    return spoil


def pair(image: Path) -> None:
    """Two images that back each other."""
    other = disks.make(image.parent, "other.qcow2", size="1M")
    backed_by(image.name)(other)
    backed_by(other.name)(image)


def chain(image: Path) -> None:
    """A chain of 300 images: no loop, but no sane disk."""
    plain = disks.make(image.parent, "link0.qcow2", size="1M").read_bytes()
    names = [f"link{number}.qcow2" for number in range(300)]
    for name, below in zip(names[1:], names, strict=False):
        link = image.parent / name
        link.write_bytes(plain)
        _name_backing_file(link, below)
    backed_by(names[-1])(image)


def _name_backing_file(image: Path, below: str) -> None:
    # Behind the header's fixed part and its extensions there is room up to the end of the first cluster.
    patch(CLUSTER - 1024, below.encode())(image)
    patch(BACKING_AT, u64(CLUSTER - 1024) + u32(len(below)))(image)
    header_length = int.from_bytes(image.read_bytes()[HEADER_LENGTH : HEADER_LENGTH + 4])
    patch(header_length, u32(0xE2792ACA) + u32(5) + b"qcow2\0\0\0" + bytes(8))(image)


def fifo(image: Path) -> None:
    """A backing file that nobody writes to: opening it blocks whoever is careless."""
    os.mkfifo(image.parent / "fifo")
    backed_by("fifo", "raw")(image)


def compressed(then: Callable[[Path, int], None]) -> Callable[[Path], None]:
    """Compress the image, then break it; `then` gets the offset of the first compressed cluster's bytes."""

    def spoil(image: Path) -> None:
        words = ["convert", "-c", "-f", "qcow2", "-O", "qcow2", image.name, "compressed"]
        disks.run("qemu-img", *words, cwd=image.parent)
        os.replace(image.parent / "compressed", image)
        content = image.read_bytes()
        l1_at = int.from_bytes(content[L1_AT : L1_AT + 8])
        l2_at = int.from_bytes(content[l1_at : l1_at + 8]) & 0x00FF_FFFF_FFFF_FE00
        entry = int.from_bytes(content[l2_at : l2_at + 8])
        assert entry >> 62 & 1, "the first cluster is not compressed"
        then(image, entry & (1 << 62 - (16 - 8)) - 1)

    return spoil


BAD_IMAGES = [
    Bad("wrong-magic", patch(0, b"JUNK"), "Image is not in qcow2 format"),
    Bad("empty", cut(0), "Image is not in qcow2 format"),
    Bad("half-a-header", cut(40), "qcow2 header too short"),
    Bad("version-9", patch(VERSION, u32(9)), "Unsupported qcow2 version 9"),
    Bad("version-1", patch(VERSION, u32(1)), "Unsupported qcow2 version 1"),
    Bad("unknown-feature", patch(INCOMPATIBLE, u64(1 << 40)), "Unsupported qcow2 feature(s): Unknown incompatible"),
    Bad("tiny-clusters", patch(CLUSTER_BITS, u32(3)), "Unsupported cluster size: 2^3"),
    Bad("vast-clusters", patch(CLUSTER_BITS, u32(60)), "Unsupported cluster size: 2^60"),
    Bad("vast-size", patch(SIZE, u64((1 << 63) - 512)), "Image is too big"),
    Bad("negative-size", patch(SIZE, u64((1 << 64) - 512)), ""),
    Bad("vast-l1", patch(L1_SIZE, u32(0x7FFF_FFFF)), "Active L1 table too large"),
    Bad("short-l1", patch(L1_SIZE, u32(0)), "L1 table is too small"),
    Bad("crooked-l1", patch(L1_AT, u64(0x12345)), "Active L1 table offset invalid"),
    Bad("l1-beyond-the-file", patch(L1_AT, u64(1 << 50)), "", shows="either", ours_only=True),
    Bad("l2-beyond-the-file", at_table(L1_AT, u64(1 << 63 | 1 << 50)), "", shows="either", ours_only=True),
    Bad("no-reftable", patch(REFTABLE_CLUSTERS, u32(0)), "Image does not contain a reference count table"),
    Bad("vast-reftable", patch(REFTABLE_CLUSTERS, u32(0xFFFF_FFFF)), "Reference count table too large"),
    Bad("crooked-reftable", patch(REFTABLE_AT, u64(0x12345)), "Reference count table offset invalid"),
    Bad("wide-refcounts", patch(REFCOUNT_ORDER, u32(9)), "Reference count entry width too large"),
    Bad("short-header", patch(HEADER_LENGTH, u32(80)), "qcow2 header too short"),
    Bad("vast-header", patch(HEADER_LENGTH, u32(1 << 30)), "qcow2 header exceeds cluster size"),
    Bad("vast-backing-name", patch(BACKING_AT, u64(1024) + u32(5000)), "Backing file name too long"),
    Bad("far-backing-name", patch(BACKING_AT, u64(1 << 40) + u32(10)), "Invalid backing file offset"),
    Bad("unknown-cipher", patch(CRYPT, u32(7)), "Unsupported encryption method 7"),
    Bad("many-snapshots", patch(SNAPSHOTS, u32(0x7FFF_FFFF)), "Snapshot table too large"),
    Bad("crooked-snapshots", patch(SNAPSHOTS, u32(1) + u64(0x12345)), "Snapshot table offset invalid"),
    Bad("vast-extension", patch(112, u32(0x12345678) + u32(0x7FFF_FFFF)), "Header extension too large"),
    Bad("no-data-file", patch(INCOMPATIBLE, u64(4)), "'data-file' is required for this image"),
    Bad("unknown-compression", patch(INCOMPATIBLE, u64(8)), "Compression type incompatible feature bit"),
    Bad("missing-backing", backed_by("missing.qcow2"), "missing.qcow2"),
    Bad("directory-backing", backed_by(".", "raw"), "to be a regular file"),
    Bad("fifo-backing", fifo, "fifo", ours_only=True),
    Bad("backs-itself", lambda image: backed_by(image.name)(image), "", ours_only=True),
    Bad("pair", pair, "", ours_only=True),
    Bad("chain-of-300", chain, "", ours_only=True),
    Bad("crooked-l2", at_table(L1_AT, u64(1 << 63 | 0x5_0200)), "Input/output error", shows="read"),
    Bad("crooked-cluster", at_table(-1, u64(1 << 63 | 0x5_0200)), "Input/output error", shows="read"),
    Bad("truncated-compressed", compressed(lambda image, at: cut(at + 20)(image)), "Input/output error", shows="read"),
    Bad("junk-compressed", compressed(lambda image, at: patch(at, b"\xff" * 60)(image)), "Input/output", shows="read"),
    Bad("compressed-far-away", at_table(-1, u64(1 << 62 | 1 << 50)), "Input/output error", shows="read"),
]
