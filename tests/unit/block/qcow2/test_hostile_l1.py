"""L1 tables that name one L2 table again and again: a check says so in time, and a repair leaves the image alone."""

import asyncio
import struct
import time
import tracemalloc
from array import array

import pytest

from blockjobs.base.errors import ImageCorrupt, UsageError
from blockjobs.base.offload import InlineOffload
from blockjobs.base.units import KiB, MiB
from blockjobs.block.claims import Perm
from blockjobs.block.drivers.qcow2.check import check_image
from blockjobs.block.drivers.qcow2.check_walk import REPEATED_BYTES_MAX
from blockjobs.block.drivers.qcow2.create import NewImage, create_image
from blockjobs.block.drivers.qcow2.repair import repair_image, repair_leaks
from blockjobs.host import Host
from blockjobs.testing.child import MemoryChild
from blockjobs.wire.qcow2_tables import COPIED, encode_table

CLUSTER = 64 * KiB
BUSY_S_MAX = 20.0
"""Processor time: ten times what it takes. With each table counted on its own it would be minutes."""


def naming_one_table(entries):
    """An image with an L1 table of that length at its end, each entry of which names the same L2 table."""
    file = MemoryChild()
    asyncio.run(create_image(file, None, NewImage(size=MiB, cluster_size=CLUSTER)))
    at = -(-len(file.content) // CLUSTER) * CLUSTER
    l1_at = at + CLUSTER
    raw = bytes(file.content).ljust(l1_at, b"\0") + encode_table(array("Q", [COPIED | at]) * entries)
    raw = bytearray(raw.ljust(-(-len(raw) // CLUSTER) * CLUSTER, b"\0"))
    struct.pack_into(">I", raw, 36, entries)
    struct.pack_into(">Q", raw, 40, l1_at)
    return bytes(raw)


def checked(raw):
    return asyncio.run(check_image(MemoryChild(raw), offload=InlineOffload()))


def test_an_l1_table_of_greatest_length_that_names_one_table_is_checked_in_time():
    raw = naming_one_table(32 * MiB // 8)
    began_s = time.process_time()
    found = checked(raw)
    assert time.process_time() - began_s < BUSY_S_MAX
    assert any("4194303 entries for L2 tables that it names already" in line for line in found.problems)


@pytest.mark.parametrize("repair", [repair_image, repair_leaks])
def test_it_is_not_repaired(repair):
    file = MemoryChild(naming_one_table(REPEATED_BYTES_MAX // CLUSTER + 2))
    before = bytes(file.content)
    with pytest.raises(UsageError, match="Cannot repair the image without its L1 table at 0x"):
        asyncio.run(repair(file, offload=InlineOffload()))
    assert bytes(file.content) == before


def test_a_few_repeats_are_counted_one_by_one():
    found = checked(naming_one_table(5))
    assert not any("names already" in line for line in found.problems)
    assert not found.tally.unread
    assert any("reference=5" in line for line in found.problems)


def naming_places_behind_the_end():
    """An image with an L1 table of greatest length, each entry of which names another place behind the file's end."""
    entries = 32 * MiB // 8
    raw = bytearray(naming_one_table(entries))
    [l1_at] = struct.unpack_from(">Q", raw, 40)
    places = range(1 << 42, (1 << 42) + entries * CLUSTER, CLUSTER)
    raw[l1_at : l1_at + entries * 8] = encode_table(array("Q", [COPIED | at for at in places]))
    struct.pack_into(">Q", raw, 24, entries // 64 * CLUSTER * CLUSTER // 8)
    return bytes(raw)


async def look_at(host, path):
    await host.image_info({"driver": "file", "filename": path})


async def map_all(host, path):
    node = await host.open(path, read_only=True)
    async with host.access(node):
        with pytest.raises(ImageCorrupt, match="lies beyond the end of the file"):
            await anext(host.map(node))


async def write_to(host, path):
    node = await host.open(path)
    root = await host.graph.claim("guest", node, needs=Perm.CONSISTENT_READ | Perm.WRITE, shares=Perm(0))
    with pytest.raises(ImageCorrupt, match="lies beyond the end of the file"):
        await node.write(0, b"x" * CLUSTER)
    await host.graph.release(root)


@pytest.mark.serial
@pytest.mark.parametrize("use", [look_at, map_all, write_to])
def test_millions_of_tables_behind_the_end_cost_whoever_opens_the_image_little(tmp_path, use):
    path = tmp_path / "t.qcow2"
    image = naming_places_behind_the_end()

    async def run():
        async with Host() as host:
            await use(host, str(path))

    path.write_bytes(image)
    began_s = time.process_time()
    asyncio.run(run())
    busy_s = time.process_time() - began_s
    path.write_bytes(image)  # a write has marked it
    tracemalloc.start()
    asyncio.run(run())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert busy_s < 2.0
    assert peak < 128 * MiB
