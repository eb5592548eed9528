import asyncio
from array import array

import pytest

from blockjobs.base.errors import IoFailure
from blockjobs.block.drivers.qcow2.tables import TableCache
from blockjobs.wire.qcow2_tables import decode_refcounts, decode_table, encode_refcounts, encode_table

SIZE = 512


class Reader:
    """Serves tables whose words all are their number; can be held up."""

    def __init__(self):
        self.reads = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.fails = False

    async def __call__(self, at, length):
        self.reads.append((at, length))
        await self.gate.wait()
        if self.fails:
            raise IoFailure(5)
        tables = range(at // SIZE, (at + length) // SIZE)
        return b"".join(encode_table(array("Q", [number]) * (SIZE // 8)) for number in tables)


def cache_of(reader, tables=4):
    return TableCache(
        table_bytes=SIZE,
        item_bits=64,
        budget_bytes=tables * SIZE,
        decode=decode_table,
        encode=encode_table,
        read=reader,
    )


def in_loop(body):
    async def main():
        reader = Reader()
        await body(reader, cache_of(reader))

    asyncio.run(main())


def test_those_who_want_the_same_table_share_one_read():
    async def body(reader, cache):
        async with asyncio.TaskGroup() as tasks:
            loads = [tasks.create_task(cache.load(SIZE * 7)) for _ in range(5)]
        assert reader.reads == [(SIZE * 7, SIZE)]
        assert {load.result() for load in loads} == {cache.peek(SIZE * 7)}

    in_loop(body)


def test_a_failed_read_fails_all_who_waited_and_may_be_tried_again():
    async def body(reader, cache):
        reader.gate.clear()
        reader.fails = True
        loads = []
        async with asyncio.TaskGroup() as tasks:

            async def one():
                with pytest.raises(IoFailure):
                    await cache.load(0)
                loads.append(None)

            for _ in range(3):
                tasks.create_task(one())
            await asyncio.sleep(0)
            reader.gate.set()
        assert len(loads) == 3
        reader.fails = False
        assert (await cache.load(0)).items[0] == 0

    in_loop(body)


def test_prefetch_reads_neighbours_together():
    async def body(reader, cache):
        cache.budget_bytes = 100 * SIZE
        await cache.load(SIZE * 3)
        reader.reads.clear()
        await cache.prefetch([SIZE * number for number in (9, 1, 2, 3, 4, 5)])
        assert sorted(reader.reads) == [(SIZE, 2 * SIZE), (4 * SIZE, 2 * SIZE), (9 * SIZE, SIZE)]
        assert [cache.peek(SIZE * number).items[3] for number in (1, 2, 3, 4, 5, 9)] == [1, 2, 3, 4, 5, 9]

    in_loop(body)


def test_prefetch_reads_all_at_the_same_time_and_fails_as_one():
    async def body(reader, cache):
        reader.gate.clear()
        places = [SIZE * number for number in (1, 3, 5)]
        prefetching = asyncio.create_task(cache.prefetch(places))
        for _ in range(3):
            await asyncio.sleep(0)
        assert reader.reads == [(at, SIZE) for at in places]
        reader.fails = True
        reader.gate.set()
        with pytest.raises(IoFailure):
            await prefetching
        reader.fails = False
        await cache.prefetch(places)
        assert [cache.peek(at).items[0] for at in places] == [1, 3, 5]

    in_loop(body)


def test_only_what_the_file_has_is_thrown_out():
    async def body(reader, cache):
        kept = {}
        kept["dirty"] = await cache.load(SIZE)
        cache.touch(kept["dirty"], 0, 1)
        kept["pinned"] = await cache.load(2 * SIZE)
        kept["pinned"].pins += 1
        kept["new"] = cache.create(3 * SIZE, array("Q", bytes(SIZE)))
        kept["on its way"] = await cache.load(4 * SIZE)
        cache.touch(kept["on its way"], 3, 4)
        pieces = [piece for piece in cache.take_dirty() if piece.table is kept["on its way"]]
        cache.touch(kept["dirty"], 0, 1)
        for number in range(10, 60):
            await cache.load(number * SIZE)
        for name, table in kept.items():
            assert cache.peek(table.at) is table, name
        cache.settle(pieces)
        for number in range(10, 60):
            await cache.load(number * SIZE)
        assert cache.peek(4 * SIZE) is None

    in_loop(body)


def test_what_nobody_looks_up_for_a_round_goes_if_the_file_has_it():
    async def body(reader, cache):
        dirty, used, idle = [await cache.load(number * SIZE) for number in (1, 2, 3)]
        cache.touch(dirty, 0, 1)
        assert cache.drop_unused()
        assert cache.memory_bytes == 3 * SIZE
        cache.peek(used.at)
        assert cache.drop_unused()
        assert cache.memory_bytes == 2 * SIZE
        assert cache.peek(idle.at) is None
        assert not cache.drop_unused(), "the dirty one must stay"
        assert (cache.peek(dirty.at), cache.peek(used.at)) == (dirty, None)
        told = []
        cache.has_more = lambda: told.append(cache.drop_unused())
        cache.settle(cache.take_dirty())
        assert told == [True]

    in_loop(body)


def test_items_narrower_than_a_byte_are_paid_for_as_they_lie_in_memory():
    async def body(reader, cache):
        counts = TableCache(
            table_bytes=SIZE,
            item_bits=1,
            budget_bytes=3 * SIZE * 8,
            decode=lambda raw: decode_refcounts(raw, 1),
            encode=lambda items: encode_refcounts(items, 1),
            read=reader,
        )
        for number in range(9):
            table = await counts.load(number * SIZE)
        assert counts.memory_bytes == 3 * len(table.items) * table.items.itemsize == counts.budget_bytes
        counts.touch(table, 0, 1)
        assert counts.dirty_bytes == SIZE * 8

    in_loop(body)


def test_bytes_that_arrive_too_late_do_not_replace_a_newer_table():
    async def body(reader, cache):
        reader.gate.clear()
        async with asyncio.TaskGroup() as tasks:
            late = tasks.create_task(cache.load(SIZE))
            await asyncio.sleep(0)
            newer = cache.create(SIZE, array("Q", bytes(SIZE)))
            reader.gate.set()
        assert late.result() is newer
        assert cache.peek(SIZE) is newer

    in_loop(body)


def test_copies_are_whole_sectors_and_come_back_when_a_commit_fails():
    async def body(reader, cache):
        cache.table_bytes = 4096
        table = cache.create(8192, array("Q", bytes(4096)))
        cache.settle(cache.take_dirty())
        table.is_new = False
        table.items[70] = 1
        cache.touch(table, 70, 71)
        table.items[130] = 2
        cache.touch(table, 130, 131)
        [piece] = cache.take_dirty()
        assert (piece.at, len(piece.content)) == (8192 + 512, 1024)
        assert not table.is_dirty
        assert not table.is_evictable
        table.items[0] = 9
        cache.touch(table, 0, 1)
        cache.give_back([piece])
        [piece] = cache.take_dirty()
        assert (piece.at, len(piece.content)) == (8192, 1536)
        assert decode_table(piece.content)[130] == 2

    in_loop(body)
