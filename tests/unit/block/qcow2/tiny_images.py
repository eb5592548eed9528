"""qcow2 images in memory, opened without a graph: for tests that look at single tables and single writes."""

import asyncio

from blockjobs.base.clock import SystemClock
from blockjobs.base.entropy import SeededEntropy
from blockjobs.base.offload import InlineOffload
from blockjobs.base.span import Span
from blockjobs.block.driver import OpenContext
from blockjobs.block.drivers.qcow2.create import NewImage, create_image
from blockjobs.block.drivers.qcow2.driver import Qcow2
from blockjobs.block.drivers.qcow2.options import Qcow2Options
from blockjobs.block.drivers.qcow2.reads import read_guest
from blockjobs.testing.child import MemoryChild
from blockjobs.wire.qcow2 import Header, Incompatible


async def new_file(**options):
    """A new image: by default 64 clusters of 4 KiB."""
    file = MemoryChild()
    await create_image(file, None, NewImage(**{"size": 1 << 18, "cluster_size": 4096} | options))
    file.log.clear()
    return file


async def reopen(file, *, read_only=False, children=None, **options):
    """The driver over `file`, as a graph would open it."""
    context = OpenContext(
        node_name="disk",
        read_only=read_only,
        offload=InlineOffload(),
        clock=SystemClock(),
        entropy=SeededEntropy(1),
        objects={},
    )
    return await Qcow2.open(Qcow2Options(file="file", **options), {"file": file, **(children or {})}, context)


async def new_disk(**options):
    """A new image and its driver."""
    file = await new_file(**options)
    return file, await reopen(file)


async def write(driver, span, content):
    """What a node does for a write: payload and fills, then publish."""
    reservation = await driver.reserve(span)
    for place in reservation.placements:
        part = content[place.at - span.at : place.at - span.at + place.length]
        await driver.children[place.child].write(place.child_at, part)
    for fill in reservation.fills:
        await driver.children[fill.child].write(
            fill.child_at, await read_guest(driver.image, Span(fill.at, fill.length))
        )
    await driver.publish(reservation)


def is_marked(file):
    """Whether the header says that the image is corrupt."""
    return bool(Header.decode_fields(bytes(file.content)).incompatible & Incompatible.CORRUPT)


def unmarked(file):
    """The file's bytes, with a header that does not say so."""
    raw = bytearray(file.content)
    raw[79] &= ~int(Incompatible.CORRUPT)
    return bytes(raw)


def in_loop(body):
    """Run a coroutine function to its end."""
    asyncio.run(body())
