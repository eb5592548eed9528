"""What a write does that would hit an L2 table of a snapshot: the same as in QEMU, in the same words."""

import asyncio
import re
import struct
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from blockjobs.base.errors import BlockjobsError
from blockjobs.block.events import BlockImageCorrupted
from blockjobs.host import Host

pytestmark = pytest.mark.qemu

SIZE = 4096
COPIED, OFFSET, CORRUPT = 1 << 63, 0x00FF_FFFF_FFFF_FE00, 2
CHECKS: dict[str, object] = {
    "overlap-check=all": "all",
    "overlap-check.inactive-l2=on": {"inactive-l2": True},
    "overlap-check.template=none,overlap-check.inactive-l2=on": {"template": "none", "inactive-l2": True},
    "overlap-check.template=all,overlap-check.inactive-l2=off": {"template": "all", "inactive-l2": False},
    "overlap-check=cached": "cached",
}


def word(raw: bytes, at: int) -> int:
    found: int = struct.unpack_from(">Q", raw, at)[0]
    return found


def free(raw: bytearray, l1: int, inactive: int) -> None:
    block = word(raw, word(raw, 48))
    struct.pack_into(">H", raw, block + inactive // SIZE * 2, 0)


def used_twice(raw: bytearray, l1: int, inactive: int) -> None:
    struct.pack_into(">Q", raw, l1, COPIED | inactive)


def in_disk(raw: bytearray, l1: int, inactive: int) -> None:
    struct.pack_into(">Q", raw, word(raw, l1) & OFFSET, COPIED | inactive)


def on_refcounts(raw: bytearray, l1: int, inactive: int) -> None:
    snapshot_l1 = word(raw, word(raw, 64))
    struct.pack_into(">Q", raw, snapshot_l1, word(raw, word(raw, 48)))


def spoiled(path: Path, spoil: Callable[[bytearray, int, int], None]) -> None:
    """An image with a snapshot whose L2 table `spoil` has something else use too."""
    for words in (
        ["qemu-img", "create", "-q", "-f", "qcow2", "-o", f"cluster_size={SIZE}", path, "1M"],
        ["qemu-io", "-c", "write 0 64k", path],
        ["qemu-img", "snapshot", "-c", "s", path],
        ["qemu-io", "-c", "write 0 64k", path],
    ):
        subprocess.run([str(each) for each in words], check=True, capture_output=True)
    raw = bytearray(path.read_bytes())
    spoil(raw, word(raw, 40), word(raw, word(raw, word(raw, 64))) & OFFSET)
    path.write_bytes(raw)


async def ours(path: Path, checks: object, at: int) -> list[str]:
    """What the events say of a write."""
    events: list[object] = []
    async with Host() as host:
        with host.bus.listening(events.append):
            file = {"driver": "file", "filename": str(path)}
            node = await host.blockdev_add({"driver": "qcow2", "node-name": "n", "overlap-check": checks, "file": file})
            async with host.access(node, write=True) as root:
                with suppress(BlockjobsError):
                    await root.node.write(at, b"y" * SIZE)
            await host.close_nodes(node)
    return [event.msg for event in events if isinstance(event, BlockImageCorrupted) and event.fatal]


@pytest.mark.parametrize("checks", CHECKS)
@pytest.mark.parametrize(
    ("spoil", "at"), [(in_disk, 0), (free, 1 << 17), (used_twice, 1 << 17), (on_refcounts, 1 << 17)]
)
def test_both_refuse_the_same_writes(
    checks: str, spoil: Callable[[bytearray, int, int], None], at: int, tmp_path: Path
) -> None:
    path = tmp_path / "disk"
    spoiled(path, spoil)
    before = path.read_bytes()
    said = asyncio.run(ours(path, CHECKS[checks], at))
    marked = path.read_bytes()[79] & CORRUPT
    path.write_bytes(before)
    words = ["qemu-io", "--image-opts", f"driver=qcow2,file.driver=file,file.filename={path},{checks}"]
    done = subprocess.run([*words, "-c", f"write {at} {SIZE}"], capture_output=True, text=True, check=False)
    theirs = re.findall(r"Marking image as corrupt: (.*); further corruption", done.stderr)
    assert (said, marked) == (theirs, path.read_bytes()[79] & CORRUPT)
    assert bool(said) == ("failed" in done.stdout) == (checks in list(CHECKS)[:3])
