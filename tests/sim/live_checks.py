"""What must be true of disks afterwards, and after a power cut at any instant."""

from collections.abc import Mapping

from live_model import Allowed

from blockjobs.base.offload import InlineOffload
from blockjobs.block.drivers.qcow2.check import check_image
from blockjobs.testing.child import MemoryChild
from blockjobs.testing.disk import Pages
from blockjobs.testing.host import SimHost

QCOW2_MAGIC = b"QFI\xfb"


async def errors_of(pages: Pages) -> list[str]:
    """What our check finds in an image, leaks aside; a disk that holds none has no errors."""
    content = pages.read(0, pages.size)
    if content[:4] != QCOW2_MAGIC:
        return []
    result = await check_image(MemoryChild(content), offload=InlineOffload())
    return result.problems if result.corruptions or result.check_errors else []


def backing_named(pages: Pages) -> str | None:
    """The file that an image's header names as its backing file."""
    if pages.read(0, 4) != QCOW2_MAGIC:
        return None
    at, length = int.from_bytes(pages.read(8, 8), "big"), int.from_bytes(pages.read(16, 4), "big")
    return pages.read(at, length).decode() if at else None


async def shown_by(disks: Mapping[str, Pages], file: str) -> bytes:
    """What the chain that ends in `file` reads as, by what the headers say, in a world of its own."""
    async with SimHost() as later:
        node = await _open(later, disks, file)
        async with later.access(node):
            return await node.read(0, node.length)


async def _open(later: SimHost, disks: Mapping[str, Pages], file: str):
    if disks[file].read(0, 4) != QCOW2_MAGIC:
        return await later.disk(file, disks[file], read_only=True)
    named = backing_named(disks[file])
    backing = None if named is None else (await _open(later, disks, named)).name
    return await later.image(file.removesuffix("-file"), disks[file], backing=backing)


async def check_power_cut(disks: Mapping[str, Pages], file: str, allowed: Allowed) -> None:
    """The live disk's image and all below it have no errors, and hold what was promised."""
    at: str | None = file
    while at is not None:
        assert not (errors := await errors_of(disks[at])), (at, errors)
        at = backing_named(disks[at])
    allowed.demand(await shown_by(disks, file))
