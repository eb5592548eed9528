"""Persistent bitmaps in images in memory: stored, loaded, marked in use, and never believed after a crash."""

import asyncio
import errno
import hashlib
import random
import struct
from collections.abc import Callable
from typing import Any

import pytest

from blockjobs.base.errors import BlockjobsError, IoFailure, UsageError
from blockjobs.base.offload import InlineOffload
from blockjobs.base.span import Span
from blockjobs.base.units import KiB, MiB
from blockjobs.block import bitmap_store
from blockjobs.block.bitmaps import (
    BlockDirtyBitmapAdd,
    BlockDirtyBitmapMerge,
    add_bitmap,
    bitmap_at,
    bitmap_sha256,
    enable_bitmap,
    merge_bitmaps,
    remove_bitmap,
)
from blockjobs.block.drivers.qcow2 import bitmap_tables
from blockjobs.block.drivers.qcow2.check import check_image
from blockjobs.block.drivers.qcow2.create import NewImage
from blockjobs.block.drivers.qcow2.header import read_header
from blockjobs.block.drivers.qcow2.records import read_bitmaps
from blockjobs.block.info import dirty_infos
from blockjobs.block.node import Node
from blockjobs.block.node_bitmap import NodeBitmap
from blockjobs.jobs import bitmap_actions  # noqa: F401  registers them
from blockjobs.jobs.transaction import TransactionAction, run_transaction
from blockjobs.schema.command import convert
from blockjobs.testing.child import MemoryChild
from blockjobs.testing.clock import run
from blockjobs.testing.disk import SimDisk
from blockjobs.testing.faults import Fault, FaultyMedium, Operation
from blockjobs.testing.little_host import LittleHost
from blockjobs.wire.qcow2 import Autoclear, HostAt
from blockjobs.wire.qcow2_tables import BITMAP_AUTO, BITMAP_IN_USE, BitmapEntry

SIZE = 1 * MiB
CLUSTER = 4 * KiB


async def image(host: LittleHost, disk: SimDisk | None = None, **options: Any) -> Node:
    return await host.qcow2("q", NewImage(**{"size": SIZE, "cluster_size": CLUSTER} | options), medium=disk)


async def add(host: LittleHost, name: str = "b", **members: Any) -> NodeBitmap:
    wanted = BlockDirtyBitmapAdd(node="q", name=name, **{"persistent": True, "granularity": 512} | members)
    return (await add_bitmap(host.graph, wanted))[1]


def content_of(disk: SimDisk) -> bytes:
    content = bytearray(disk.size())
    disk.read_into(0, memoryview(content))
    return bytes(content)


async def close(host: LittleHost) -> SimDisk:
    """Close the image; returns its disk."""
    disk = host.disks["q-file"]
    await host.graph.remove("q")
    await check_clean(host)
    await host.graph.remove("q-file")
    return disk


async def check_clean(host: LittleHost, leaks: int | None = 0) -> None:
    found = await check_image(host.graph.node("q-file"), offload=InlineOffload())
    assert found.corruptions == 0 and found.check_errors == 0, found.problems
    assert leaks is None or found.leaks == leaks, found.problems


async def reopen(host: LittleHost, **members: Any) -> Node:
    disk = await close(host)
    host.disks["q-file"] = disk
    await host.graph.open_medium(disk, "q-file")
    return await host.add(driver="qcow2", node_name="q", file="q-file", discard="unmap", **members)


async def flags(host: LittleHost) -> dict[bytes, int]:
    """Of the directory in the file."""
    file = host.graph.node("q-file")
    return {entry.name: entry.flags for entry in await read_bitmaps(file, await read_header(file, read_only=True))}


async def guest_write(host: LittleHost, *spans: Span) -> None:
    guest = await host.guest(host.graph.node("q"))
    try:
        for span in spans:
            await guest.node.write(span.at, b"g" * span.length)
    finally:
        await host.graph.release(guest)


def scenario(body: Callable[[LittleHost], Any]) -> None:
    async def main() -> None:
        async with LittleHost() as host:
            await body(host)

    run(main())


def runs(bitmap: NodeBitmap) -> list[Span]:
    return list(bitmap.map.runs())


@pytest.mark.parametrize("granularity", [512, 4096, 65536, 64 * MiB])
@pytest.mark.parametrize("content", ["clean", "full", "scattered"])
def test_content_survives_closing(granularity: int, content: str) -> None:
    async def body(host: LittleHost) -> None:
        await image(host, size=64 * MiB + 512)
        bitmap = await add(host, granularity=granularity)
        if content == "full":
            bitmap.map.set_all()
        elif content == "scattered":
            for at in random.Random(1).sample(range(128 * 1024), 2000):
                bitmap.map.set(Span(at * 512, 512))
        expected = bitmap_sha256(bitmap)
        await reopen(host)
        _, loaded = bitmap_at(host.graph, "q", "b")
        assert bitmap_sha256(loaded) == expected
        assert (loaded.persistent, loaded.enabled, loaded.readonly, loaded.inconsistent) == (True, True, False, False)

    scenario(body)


def test_stored_bitmaps_are_marked_durably_before_the_first_write_and_stored_at_close() -> None:
    async def body(host: LittleHost) -> None:
        await image(host)
        await add(host)
        await add(host, "off", disabled=True)
        await reopen(host)
        assert await flags(host) == {b"off": 0, b"b": BITMAP_AUTO}
        disk = host.disks["q-file"]
        guest = await host.guest(host.graph.node("q"))
        order: list[str] = []
        real_write, real_sync = disk.write, disk.sync
        disk.write = lambda at, content: (order.append("G" if content[:1] == b"g" else "M"), real_write(at, content))[1]
        disk.sync = lambda: (order.append("S"), real_sync())[1]
        await guest.node.write(0, b"g" * CLUSTER)
        await host.graph.release(guest)
        assert order == ["M", "S", "G"]
        assert await flags(host) == {b"off": BITMAP_IN_USE, b"b": BITMAP_IN_USE | BITMAP_AUTO}
        await reopen(host)
        assert await flags(host) == {b"off": 0, b"b": BITMAP_AUTO}
        assert runs(bitmap_at(host.graph, "q", "b")[1]) == [Span(0, CLUSTER)]
        assert runs(bitmap_at(host.graph, "q", "off")[1]) == []
        assert not bitmap_at(host.graph, "q", "off")[1].enabled

    scenario(body)


def test_an_image_that_is_only_opened_is_not_written() -> None:
    async def body(host: LittleHost) -> None:
        await image(host)
        await add(host)
        disk = await close(host)
        before = hashlib.sha256(content_of(disk)).digest()
        host.disks["q-file"] = disk
        await image(host, disk)
        await close(host)
        assert hashlib.sha256(content_of(disk)).digest() == before

    scenario(body)


def test_a_bitmap_in_use_at_open_is_inconsistent_and_can_only_be_removed() -> None:
    async def body(host: LittleHost) -> None:
        await image(host)
        await add(host)
        await add(host, "other")
        await reopen(host)
        await guest_write(host, Span(0, 512))
        crashed = SimDisk()
        crashed.write(0, content_of(host.disks["q-file"]))
        await close(host)
        host.disks["q-file"] = crashed
        node = await image(host, crashed)
        _, bitmap = bitmap_at(host.graph, "q", "b")
        assert [(each.name, each.inconsistent, each.recording, each.count) for each in dirty_infos(node)] == [
            ("b", True, False, 0),
            ("other", True, False, 0),
        ]
        await guest_write(host, Span(0, 512))
        for refused in (enable_bitmap(node, bitmap, True), merge_bitmaps(host.graph, MERGE_B_INTO_B)):
            with pytest.raises(UsageError, match="Bitmap 'b' is inconsistent and cannot be used"):
                await refused
        await remove_bitmap(node, bitmap)
        assert await flags(host) == {b"other": BITMAP_IN_USE | BITMAP_AUTO}
        await reopen(host)
        assert bitmap_at(host.graph, "q", "other")[1].inconsistent
        await remove_bitmap(*bitmap_at(host.graph, "q", "other"))
        header = await read_header(host.graph.node("q-file"), read_only=True)
        assert header.bitmaps is None and not header.autoclear & Autoclear.BITMAPS
        await reopen(host)
        assert host.graph.node("q").bitmaps == []

    scenario(body)


MERGE_B_INTO_B = BlockDirtyBitmapMerge(node="q", target="b", bitmaps=["b"])


@pytest.mark.parametrize("change", ["merge", "enable"])
def test_a_bitmap_that_is_changed_without_a_write_is_marked_first(change: str) -> None:
    async def body(host: LittleHost) -> None:
        await image(host)
        await add(host, disabled=True)
        await reopen(host)
        node, bitmap = bitmap_at(host.graph, "q", "b")
        if change == "merge":
            source = await add(host, "memory", persistent=False)
            source.map.set(Span(0, 512))
            await merge_bitmaps(host.graph, BlockDirtyBitmapMerge(node="q", target="b", bitmaps=["memory"]))
        else:
            await enable_bitmap(node, bitmap, True)
        assert (await flags(host))[b"b"] & BITMAP_IN_USE
        await reopen(host)
        _, bitmap = bitmap_at(host.graph, "q", "b")
        assert (runs(bitmap), bitmap.enabled) == ([Span(0, 512)] if change == "merge" else [], change == "enable")

    scenario(body)


def test_a_bitmap_that_only_became_cleaner_is_stored_too() -> None:
    async def body(host: LittleHost) -> None:
        await image(host)
        (await add(host)).map.set_all()
        await reopen(host)
        _, bitmap = bitmap_at(host.graph, "q", "b")
        bitmap.freeze()
        bitmap.abdicate()
        await reopen(host)
        assert runs(bitmap_at(host.graph, "q", "b")[1]) == []

    scenario(body)


def test_read_only_images_have_readonly_bitmaps_and_switching_stores_and_loads() -> None:
    async def body(host: LittleHost) -> None:
        await image(host)
        await add(host)
        node = await reopen(host)
        await guest_write(host, Span(0, 512))
        await host.graph.set_read_only(node, read_only=True)
        assert await flags(host) == {b"b": BITMAP_AUTO}
        node, bitmap = bitmap_at(host.graph, "q", "b")
        with pytest.raises(UsageError, match="Bitmap 'b' is readonly and cannot be modified"):
            await remove_bitmap(node, bitmap)
        await host.graph.set_read_only(node, read_only=False)
        assert bitmap_at(host.graph, "q", "b")[1] is bitmap and not bitmap.readonly
        await guest_write(host, Span(SIZE - 512, 512))
        assert await flags(host) == {b"b": BITMAP_IN_USE | BITMAP_AUTO}
        await reopen(host, read_only=True)
        _, bitmap = bitmap_at(host.graph, "q", "b")
        assert bitmap.readonly and runs(bitmap) == [Span(0, 512), Span(SIZE - 512, 512)]

    scenario(body)


def test_a_frozen_bitmap_is_stored_with_what_its_successor_recorded() -> None:
    async def body(host: LittleHost) -> None:
        node = await image(host)
        bitmap = await add(host)
        await guest_write(host, Span(0, 512))
        bitmap.freeze()
        await guest_write(host, Span(4096, 512))
        await host.graph.set_read_only(node, read_only=True)
        bitmap.reclaim()
        await reopen(host)
        assert runs(bitmap_at(host.graph, "q", "b")[1]) == [Span(0, 512), Span(4096, 512)]

    scenario(body)


@pytest.mark.parametrize("length", [SIZE // 2, 2 * SIZE, SIZE + 512])
def test_bitmaps_follow_the_length_of_the_disk(length: int) -> None:
    async def body(host: LittleHost) -> None:
        node = await image(host)
        await add(host)
        node = await reopen(host)
        await guest_write(host, Span(0, 512), Span(SIZE - 512, 512))
        await host.graph.resize(node, length)
        await reopen(host)
        _, bitmap = bitmap_at(host.graph, "q", "b")
        assert bitmap.map.length == length
        expected = {SIZE // 2: [Span(0, 512)]}.get(length, [Span(0, 512), Span(SIZE - 512, 512)])
        assert runs(bitmap)[: len(expected)] == expected

    scenario(body)


def test_nothing_leaks_when_bitmaps_come_and_go() -> None:
    async def body(host: LittleHost) -> None:
        await image(host, cluster_size=512)
        rng = random.Random(7)
        for _ in range(8):
            for name in rng.sample("abcde", 2):
                known = [each.name for each in host.graph.node("q").bitmaps]
                if name in known:
                    await remove_bitmap(*bitmap_at(host.graph, "q", name))
                else:
                    await add(host, name, granularity=512 << rng.randrange(4))
            at = rng.randrange(SIZE // 512) * 512
            await guest_write(host, Span(at, 512))
            await reopen(host)
            assert all(each.map.any(Span(at, 1)) for each in host.graph.node("q").bitmaps)

    scenario(body)


def test_removal_in_a_transaction_takes_effect_at_its_end() -> None:
    async def body(host: LittleHost) -> None:
        await image(host)
        await add(host)
        await reopen(host)
        remove = convert({"type": "block-dirty-bitmap-remove", "data": {"node": "q", "name": "b"}}, TransactionAction)
        abort = convert({"type": "abort", "data": {}}, TransactionAction)
        with pytest.raises(UsageError):
            await run_transaction(host, [remove, abort])
        assert await flags(host) == {b"b": BITMAP_AUTO}
        await run_transaction(host, [remove])
        assert await flags(host) == {}
        await reopen(host)
        assert host.graph.node("q").bitmaps == []

    scenario(body)


# --- failures


@pytest.mark.parametrize("operation", [Operation.WRITE, Operation.SYNC])
def test_whatever_fails_while_storing_leaves_nothing_that_looks_valid(operation: Operation) -> None:
    """The n-th write or sync fails, for every n: afterwards the bitmap is right or not believed."""
    outcomes = set()

    async def attempt(number: int) -> bool:
        async with LittleHost() as host:
            await image(host)
            await add(host)
            disk = await close(host)
            faulty = FaultyMedium(disk, [Fault(operation=operation, nth=number)])
            await host.graph.open_medium(faulty, "q-file")
            await host.add(driver="qcow2", node_name="q", file="q-file")
            failed = False
            for step in (guest_write(host, Span(0, 512)), host.graph.remove("q")):
                try:
                    await step
                except BlockjobsError:
                    failed = True
            await check_clean(host, leaks=None)
            await host.graph.remove("q-file")
            host.disks["q-file"] = disk
            node = await image(host, disk)
            _, bitmap = bitmap_at(host.graph, "q", "b")
            wrote = any(await node.read(0, 512))
            assert bitmap.inconsistent or bitmap.map.any(Span(0, 512)) or not wrote
            outcomes.add((failed, bitmap.inconsistent))
            return failed

    number = 1
    while run(attempt(number)):
        number += 1
    assert number > 3 and (True, True) in outcomes and (False, False) in outcomes


def test_a_write_is_refused_if_the_mark_cannot_be_set() -> None:
    async def body(host: LittleHost) -> None:
        await image(host)
        await add(host)
        disk = await close(host)
        await host.graph.open_medium(FaultyMedium(disk, [Fault(operation=Operation.SYNC, nth=1)]), "q-file")
        await host.add(driver="qcow2", node_name="q", file="q-file")
        guest = await host.guest(host.graph.node("q"))
        before = content_of(disk)
        with pytest.raises(IoFailure):
            await guest.node.write(0, b"g" * 512)
        assert b"g" * 512 not in content_of(disk) and content_of(disk) != before
        await host.graph.release(guest)
        with pytest.raises(BlockjobsError):
            await host.graph.remove("q")
        assert await flags(host) == {b"b": BITMAP_AUTO | BITMAP_IN_USE}

    scenario(body)


# --- images made to harm


def crafted(change: Callable[[bytearray, int, int, int], None]) -> Callable[[LittleHost], Any]:
    """An image with a bitmap `b` whose bytes `change` has spoilt: (content, extension, directory, table)."""

    async def prepare(host: LittleHost) -> None:
        await image(host)
        (await add(host)).map.set(Span(0, 512))
        disk = await close(host)
        content = bytearray(content_of(disk))
        at = content.index(struct.pack(">II", 0x23852875, 24))
        directory = struct.unpack_from(">Q", content, at + 24)[0]
        change(content, at + 8, directory, struct.unpack_from(">Q", content, directory)[0])
        disk.write(0, bytes(content))
        host.disks["q-file"] = disk
        await image(host, disk)

    return prepare


def put(form: str, *values: int, offset: int = 0, where: str) -> Callable[[bytearray, int, int, int], None]:
    def change(content: bytearray, extension: int, directory: int, table: int) -> None:
        at = {"extension": extension, "directory": directory, "table": table}[where] + offset
        struct.pack_into(form, content, at, *values)

    return change


CONSTRAINTS = "Bitmap 'b' doesn't satisfy the constraints"
REFUSED = {
    "unknown flag": (put(">I", 10, offset=12, where="directory"), CONSTRAINTS),
    "flag without extra data": (put(">I", 6, offset=12, where="directory"), CONSTRAINTS),
    "unknown type": (put(">B", 2, offset=16, where="directory"), CONSTRAINTS),
    "granularity 256": (put(">B", 8, offset=17, where="directory"), CONSTRAINTS),
    "granularity 4G": (put(">B", 32, offset=17, where="directory"), CONSTRAINTS),
    "no table": (put(">I", 0, offset=8, where="directory"), CONSTRAINTS),
    "crooked table": (put(">Q", CLUSTER + 512, where="directory"), CONSTRAINTS),
    "table of another length": (put(">I", 2, offset=8, where="directory"), "Could not read bitmap 'b' from image"),
    "table outside": (put(">Q", 1 << 40, where="directory"), "beyond the end of the file"),
    "reserved bits": (put(">Q", 2, where="table"), "Could not read bitmap_table table from image for bitmap 'b'"),
    "bits outside": (put(">Q", 1 << 40, where="table"), "beyond the end of the file"),
    "directory outside": (put(">Q", 1 << 40, offset=16, where="extension"), "Broken bitmap directory"),
    "two instead of one": (put(">I", 2, where="extension"), "Broken bitmap directory"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_directories_that_qemu_refuses_are_refused(kind: str) -> None:
    change, text = REFUSED[kind]

    async def body(host: LittleHost) -> None:
        with pytest.raises(UsageError, match=text):
            await crafted(change)(host)
        assert [node.name for node in host.graph.nodes()] == ["q-file"]

    scenario(body)


def test_small_images_that_describe_huge_bitmaps_cost_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(host: LittleHost) -> None:
        await image(host)
        await add(host, "one")
        await add(host, "two")
        disk = await close(host)
        host.disks["q-file"] = disk
        monkeypatch.setattr(bitmap_store, "LOADED_BYTES_MAX", 2 * SIZE // 512 // 8)
        await image(host, disk)
        with pytest.raises(UsageError, match=r"Can't make bitmap 'three' persistent in 'q': .* of memory"):
            await add(host, "three")
        host.disks["q-file"] = disk = await close(host)
        monkeypatch.setattr(bitmap_store, "LOADED_BYTES_MAX", 2 * SIZE // 512 // 8 - 1)
        with pytest.raises(UsageError, match="of memory"):
            await image(host, disk)

    scenario(body)


def test_what_cannot_be_stored_is_refused_at_once() -> None:
    async def body(host: LittleHost) -> None:
        await host.qcow2("q", NewImage(size=1 << 50, cluster_size=64 * KiB))
        with pytest.raises(UsageError, match="Can't make bitmap 'b' persistent in 'q': Too much space will be occup"):
            await add(host, granularity=65536)
        await host.graph.remove("q")
        await host.graph.remove("q-file")
        await image(host, is_v2=True)
        with pytest.raises(UsageError, match="Cannot store dirty bitmaps in qcow2 v2 files"):
            await add(host)
        await host.disk("d", 1 * MiB)
        with pytest.raises(UsageError, match="Can't store persistent bitmaps to d: Operation not supported"):
            await add_bitmap(host.graph, BlockDirtyBitmapAdd(node="d", name="b", persistent=True))

    scenario(body)


def test_no_space_for_the_new_directory_leaves_the_marked_one() -> None:
    async def body(host: LittleHost) -> None:
        await image(host)
        await add(host)
        disk = await close(host)
        await host.graph.open_medium(
            FaultyMedium(disk, [Fault(operation=Operation.WRITE, nth=3, errno=errno.ENOSPC)]), "q-file"
        )
        await host.add(driver="qcow2", node_name="q", file="q-file")
        await guest_write(host, Span(0, 512))
        with pytest.raises(IoFailure):
            await host.graph.remove("q")
        assert await flags(host) == {b"b": BITMAP_AUTO | BITMAP_IN_USE}
        await check_clean(host, leaks=None)

    scenario(body)


@pytest.mark.parametrize("table_at", [0, CLUSTER])
def test_a_name_that_is_not_printable_is_escaped_in_errors(table_at: int) -> None:
    entry = BitmapEntry(table_at=HostAt(table_at), table_entries=1, flags=0, granularity_bits=12, name=b"\x1b[2J\xe8")

    async def body() -> None:
        bitmap_tables.check_entry(entry, CLUSTER)
        await bitmap_tables.read_table(MemoryChild(bytes(CLUSTER) + b"\1" * CLUSTER), entry, CLUSTER)

    with pytest.raises(UsageError) as caught:
        asyncio.run(body())
    assert str(caught.value).isprintable()
    assert "'\\x1b[2J\\udce8'" in str(caught.value)
