"""L1 tables that name one L2 table again and again: a check says so in time, and a repair leaves the image alone."""

import asyncio
import struct
import time
from array import array

import pytest

from blockjobs.base.errors import UsageError
from blockjobs.base.offload import InlineOffload
from blockjobs.base.units import KiB, MiB
from blockjobs.block.drivers.qcow2.check import check_image
from blockjobs.block.drivers.qcow2.check_walk import REPEATED_BYTES_MAX
from blockjobs.block.drivers.qcow2.create import NewImage, create_image
from blockjobs.block.drivers.qcow2.repair import repair_image, repair_leaks
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
