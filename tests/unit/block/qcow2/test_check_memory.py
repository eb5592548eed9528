"""What a check costs does not follow what an image claims, nor how long its file is."""

import asyncio
import struct
import time
import tracemalloc

import numpy as np
import pytest

from blockjobs.base.errors import UsageError
from blockjobs.base.offload import InlineOffload
from blockjobs.base.units import MiB
from blockjobs.block.drivers.qcow2.check import check_image
from blockjobs.block.drivers.qcow2.create import NewImage, create_image
from blockjobs.testing.child import MemoryChild
from blockjobs.wire.qcow2_tables import COPIED

GROWTH_BYTES_MAX = 128 * MiB
BUSY_S_MAX = 20.0


class SparseFile(MemoryChild):
    """An image in a file of that length, of which only the start is stored."""

    def __init__(self, content, length):
        super().__init__(content)
        self._length = length

    @property
    def length(self):
        return self._length


def made(cluster_size, **options):
    file = MemoryChild()
    asyncio.run(create_image(file, None, NewImage(size=512 * cluster_size, cluster_size=cluster_size, **options)))
    return bytearray(file.content)


def padded(raw, size):
    return raw.ljust(-(-len(raw) // size) * size, b"\0")


def table(words):
    return np.asarray(words, np.uint64).astype(">u8").tobytes()


def with_many_tables(places, *, cluster_size=65536):
    """An image with an L1 table that names L2 tables at these places."""
    raw = padded(made(cluster_size), cluster_size)
    struct.pack_into(">I", raw, 36, len(places))
    struct.pack_into(">Q", raw, 40, len(raw))
    return raw + table(np.asarray(places, np.uint64) | np.uint64(COPIED))


def with_claims(blocks):
    """An image of the smallest clusters whose refcount table names that many blocks, all in the file."""
    size = 512
    raw = padded(made(size), size)
    struct.pack_into(">Q", raw, 48, len(raw))
    struct.pack_into(">I", raw, 56, blocks * 8 // size)
    return raw + table((np.arange(blocks, dtype=np.uint64) + 1) << np.uint64(20))


def measured(file):
    """What a check finds, or its error's text; the seconds it was busy; the most memory it had."""
    tracemalloc.start()
    began_s = time.process_time()
    try:
        found = asyncio.run(check_image(file, offload=InlineOffload()))
    except UsageError as error:
        found = str(error)
    busy_s, peak = time.process_time() - began_s, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return found, busy_s, peak


@pytest.mark.serial
def test_millions_of_tables_behind_the_end_of_the_file():
    count = 32 * MiB // 8
    raw = with_many_tables((np.arange(count) << 16) + (1 << 45))
    found, busy_s, peak = measured(SparseFile(raw, len(raw)))
    assert found.corruptions >= 2 * count
    assert busy_s < BUSY_S_MAX
    assert peak < GROWTH_BYTES_MAX


@pytest.mark.serial
def test_a_file_of_two_billion_clusters_with_tables_all_over_it():
    raw = with_many_tables((np.arange(2000) << 29) + (1 << 20), cluster_size=512)
    found, busy_s, peak = measured(SparseFile(raw, 1 << 40))
    clusters = 2000 + 2000 * 8 // 512 + 1  # of L2 tables, and of the L1 table
    assert (found.corruptions, found.leaks) == (2000 + clusters, 1), "flags, and refcounts that are missing"
    assert busy_s < BUSY_S_MAX
    assert peak < GROWTH_BYTES_MAX


@pytest.mark.serial
@pytest.mark.parametrize("length", [1 << 33, 1 << 37, 1 << 60])
def test_a_refcount_table_that_claims_much(length):
    found, busy_s, peak = measured(SparseFile(with_claims(MiB // 32), length))
    assert found.corruptions, "no block of these is free for what it is"
    assert busy_s < BUSY_S_MAX
    assert peak < GROWTH_BYTES_MAX
