"""Dirty bitmaps of nodes record every change, through every door and past the doors."""

import pytest

from blockjobs.base.errors import UsageError
from blockjobs.base.span import Span
from blockjobs.base.units import KiB, MiB
from blockjobs.block.bitmap import DirtyBitmap
from blockjobs.block.drivers.qcow2.create import NewImage
from blockjobs.block.node import Node
from blockjobs.block.node_bitmap import NodeBitmap
from blockjobs.block.placing import Placing
from blockjobs.testing.clock import run
from blockjobs.testing.little_host import LittleHost

GRANULARITY = 64 * KiB


def bitmap_of(node: Node, **members: object) -> NodeBitmap:
    bitmap = NodeBitmap(map=DirtyBitmap(node.length, GRANULARITY), name="b", **members)
    node.attach_bitmap(bitmap)
    return bitmap


def dirty(bitmap: NodeBitmap) -> list[tuple[int, int]]:
    return [(span.at // GRANULARITY, span.length // GRANULARITY) for span in bitmap.map.runs()]


@pytest.mark.parametrize("level", ["top", "filter", "file"])
def test_every_kind_of_change_is_recorded_at_every_level(level: str) -> None:
    async def scenario() -> None:
        async with LittleHost() as host:
            file = await host.disk("file", 1 * MiB)
            await host.add(driver="blkdebug", node_name="filter", image="file", discard="unmap")
            top = await host.add(driver="raw", node_name="top", file="filter", discard="unmap")
            bitmap = bitmap_of({"top": top, "filter": host.graph.node("filter"), "file": file}[level])
            guest = await host.guest(top)
            await guest.node.write(0, b"x")
            await guest.node.zero(Span(2 * GRANULARITY, GRANULARITY))
            await guest.node.discard(Span(4 * GRANULARITY, GRANULARITY))
            await guest.node.read(8 * GRANULARITY, 1)
            assert dirty(bitmap) == [(0, 1), (2, 1), (4, 1)]
            await host.graph.release(guest)

    run(scenario())


def test_copies_that_pass_by_the_doors_are_recorded() -> None:
    async def scenario() -> None:
        async with LittleHost() as host:
            image = await host.qcow2("image", NewImage(size=1 * MiB))
            bitmap = bitmap_of(image)
            guest = await host.guest(image)
            placing = Placing()
            assert await placing.reserve(image, [Span(GRANULARITY, GRANULARITY)])
            assert dirty(bitmap) == []
            await placing.publish()
            assert dirty(bitmap) == [(1, 1)]
            await host.graph.release(guest)

    run(scenario())


def test_a_file_that_grows_below_an_image_is_recorded_as_a_whole() -> None:
    async def scenario() -> None:
        async with LittleHost() as host:
            image = await host.qcow2("image", NewImage(size=1 * MiB))
            file = host.graph.node("image-file")
            bitmap = bitmap_of(file)
            guest = await host.guest(image)
            before = file.length
            await guest.node.write(0, b"x" * GRANULARITY)
            assert bitmap.map.length == file.length > before and bitmap.map.any(Span.between(before, file.length))
            placing = Placing()
            assert await placing.reserve(image, [Span(GRANULARITY, GRANULARITY)])
            [place] = placing.placed
            place.medium.write(place.medium_at, b"y" * GRANULARITY)
            await placing.publish()
            assert bitmap.map.any(Span(place.medium_at, GRANULARITY))
            await host.graph.release(guest)

    run(scenario())


def test_a_frozen_bitmap_keeps_its_content_until_it_abdicates_or_is_reclaimed() -> None:
    for end, expected in (("abdicate", [(3, 1)]), ("reclaim", [(0, 1), (3, 1)])):
        bitmap = NodeBitmap(map=DirtyBitmap(1 * MiB, GRANULARITY), name="b")
        bitmap.record(Span(0, 1))
        bitmap.freeze()
        bitmap.record(Span(3 * GRANULARITY, 1))
        assert dirty(bitmap) == [(0, 1)]
        with pytest.raises(UsageError, match="Bitmap 'b' is currently in use by another operation and cannot be used"):
            bitmap.check()
        getattr(bitmap, end)()
        assert dirty(bitmap) == expected
        bitmap.check()


def test_a_disabled_bitmap_records_nothing_even_while_frozen() -> None:
    bitmap = NodeBitmap(map=DirtyBitmap(1 * MiB, GRANULARITY), name="b", enabled=False)
    bitmap.record(Span(0, 1))
    bitmap.freeze()
    bitmap.record(Span(0, 1))
    bitmap.abdicate()
    assert dirty(bitmap) == []


def test_resizing_a_node_resizes_its_bitmaps() -> None:
    async def scenario() -> None:
        async with LittleHost() as host:
            image = await host.qcow2("image", NewImage(size=1 * MiB))
            bitmap = bitmap_of(image)
            bitmap.map.set_all()
            await host.graph.resize(image, 3 * MiB)
            assert dirty(bitmap) == [(0, 16)]
            await host.graph.resize(image, 128 * KiB)
            assert dirty(bitmap) == [(0, 2)]

    run(scenario())
