"""Filters on real files, judged by qemu-img: what compress stores, and what preallocate leaves."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

import disks
import pytest

from blockjobs.base.span import Span
from blockjobs.host import Host

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.qemu

MIB = 1 << 20


@pytest.mark.parametrize("options", ["", "compression_type=zstd", "extended_l2=on", "cluster_size=4k"])
def test_what_compress_stores(options: str, tmp_path: Path) -> None:
    disks.make(tmp_path, "disk.qcow2", size="4M", options=options)
    model = bytearray(4 * MIB)

    async def main() -> None:
        async with Host() as host:
            file = {"driver": "qcow2", "file": {"driver": "file", "filename": str(tmp_path / "disk.qcow2")}}
            node = await host.blockdev_add({"driver": "compress", "node-name": "c", "file": file})
            chance = random.Random(1)
            async with host.access(node, write=True):
                for step in range(60):
                    length = chance.choice((512, 10_000, 65536, 300_000))
                    at = chance.randrange(4 * MIB - length)
                    content = chance.randbytes(length) if step % 7 == 6 else bytes([step + 1]) * length
                    model[at : at + length] = content
                    await node.write(at, content)
                assert await node.read(0, 4 * MIB) == model

    asyncio.run(main())
    (tmp_path / "model.raw").write_bytes(model)
    assert disks.check_exit_code(tmp_path / "disk.qcow2") == 0
    assert disks.same_content(tmp_path, "disk.qcow2", "qcow2", "model.raw", "raw")
    assert disks.compressed_clusters(tmp_path / "disk.qcow2") > 10


def test_what_preallocate_leaves(tmp_path: Path) -> None:
    disks.make(tmp_path, "disk.qcow2", size="64M")
    sizes: list[tuple[int, int]] = []

    def size() -> tuple[int, int]:
        status = (tmp_path / "disk.qcow2").stat()
        return status.st_size, status.st_blocks * 512

    async def main() -> None:
        async with Host() as host:
            file = {"driver": "preallocate", "file": {"driver": "file", "filename": str(tmp_path / "disk.qcow2")}}
            node = await host.blockdev_add({"driver": "qcow2", "node-name": "q", "file": file})
            async with host.access(node, write=True):
                for at in range(0, 8 * MIB, 65536):
                    await node.write(at, b"x" * 65536)
                await node.zero(Span(MIB, MIB))
                sizes.append(size())
        sizes.append(size())

    asyncio.run(main())
    (grown, allocated), (end, _) = sizes
    assert grown >= 128 * MIB
    assert allocated >= 128 * MIB  # in truth, not as a hole
    assert end < 10 * MIB
    assert disks.check_exit_code(tmp_path / "disk.qcow2") == 0
    (tmp_path / "model.raw").write_bytes((b"x" * MIB + bytes(MIB) + b"x" * 6 * MIB).ljust(64 * MIB, b"\0"))
    assert disks.same_content(tmp_path, "disk.qcow2", "qcow2", "model.raw", "raw")
