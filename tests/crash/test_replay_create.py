"""A power cut while an image is made: what is there afterwards is the old image, no image, or the new empty one."""

import asyncio
import random
import shutil
from pathlib import Path

import pytest
from replay import blank, graph_over, opened, own_errors, qemu_errors, shown
from workload import states_of

from blockjobs.base.errors import UsageError
from blockjobs.block.claims import ALL, Perm
from blockjobs.block.drivers.file_create import PreallocMode
from blockjobs.block.drivers.qcow2.create import NewImage, create_image
from blockjobs.testing.crash import RecordingMedium, WriteLog
from blockjobs.testing.disk import Pages, SimDisk

KIB, MIB = 1 << 10, 1 << 20
IMAGES = {
    "plain": NewImage(size=8 * MIB),
    "small clusters": NewImage(size=8 * MIB, cluster_size=512, refcount_bits=64),
    "backing file": NewImage(size=8 * MIB, cluster_size=4 * KIB, backing_file="base.raw", backing_format="raw"),
    "preallocated metadata": NewImage(size=4 * MIB, cluster_size=4 * KIB, preallocation=PreallocMode.METADATA),
    "preallocated": NewImage(size=MIB, cluster_size=4 * KIB, preallocation=PreallocMode.FULL),
}
RESULTS = {"old", "none", "new"}


async def old_image() -> Pages:
    """An image with content, in the place where the new one is to be."""
    start = await blank(NewImage(size=2 * MIB, cluster_size=4 * KIB))
    disks = {"disk": SimDisk(start["disk"])}
    async with opened(disks, {"file": "disk"}) as node:
        await node.write(0, random.Random(1).randbytes(MIB))
    return disks["disk"].pages


async def record(image: NewImage, before: Pages) -> WriteLog:
    log = WriteLog()
    async with graph_over({"disk": RecordingMedium(SimDisk(before), log)}) as graph:
        file = graph.node("disk")
        user = await graph.claim("a test", file, needs=Perm.WRITE | Perm.RESIZE | Perm.CONSISTENT_READ, shares=ALL)
        await create_image(file, None, image)
        log.mark("created")
        await graph.release(user)
    return log


async def result(images: dict[str, Pages], image: NewImage, before: Pages) -> str:
    """Which image a crash state holds."""
    try:
        errors = await own_errors(images)
    except UsageError as refused:
        return "none" if "not in qcow2 format" in str(refused) else str(refused)
    if errors:
        return errors
    content = await shown(images, {"file": "disk", "backing": None})
    if content == bytes(image.size):
        return "new"
    return "old" if content == await shown({"disk": before}, {"file": "disk"}) else "neither the old nor the new image"


@pytest.mark.parametrize("is_over_old", [False, True], ids=["fresh", "over an old image"])
@pytest.mark.parametrize("name", IMAGES)
def test_create(name: str, is_over_old: bool, tmp_path: Path) -> None:
    image = IMAGES[name]

    async def judge() -> list[dict[str, Pages]]:
        before = await old_image() if is_over_old else Pages()
        log = await record(image, before)
        found, valid = set(), []
        for state in states_of(log, {"disk": before}, seed=1, least=5):
            outcome = await result(state.images, image, before)
            assert outcome in RESULTS, f"{state.story}: {outcome}"
            if any(label == "created" for _, label in log.marks(state.issued)):
                assert outcome == "new", state.story
            found.add(outcome)
            if outcome == "new":
                valid.append(state.images)
        assert found == (RESULTS if is_over_old else RESULTS - {"old"})
        return valid

    valid = asyncio.run(judge())
    if shutil.which("qemu-img"):
        for images in valid[:3]:
            assert not (errors := qemu_errors({**images, "base.raw": Pages(bytes(512))}, tmp_path)), errors
