"""snapshot-access: exactly the bytes of the instant, whatever guests do meanwhile; in virtual time, with latency."""

import asyncio
import errno
import random
from collections.abc import Awaitable, Callable

import pytest

from blockjobs.base.errors import IoFailure, PermissionConflict, UsageError
from blockjobs.base.span import Span
from blockjobs.base.units import KiB, MiB
from blockjobs.block.bitmap import DirtyBitmap
from blockjobs.block.claims import ALL, Perm
from blockjobs.block.drivers.copy_before_write import CopyBeforeWrite, CopyBeforeWriteOptions
from blockjobs.block.drivers.qcow2.create import NewImage
from blockjobs.block.node import Node
from blockjobs.block.node_bitmap import NodeBitmap
from blockjobs.block.objects import AnyObjectOptions, add_object
from blockjobs.block.vocabulary import Kind
from blockjobs.schema.command import convert
from blockjobs.testing.clock import run
from blockjobs.testing.faults import Fault, FaultPlan, FaultyMedium, Operation
from blockjobs.testing.little_host import LittleHost, make_disk

CLUSTER = 64 * KiB
SIZE = 1 * MiB
CONTENT = random.Random(3).randbytes(SIZE // 2) + bytes(SIZE // 2)

Scenario = Callable[[LittleHost, Node, Node], Awaitable[None]]


async def throttled(host: LittleHost, name: str, below: str, **limits: int) -> None:
    given = {"qom-type": "throttle-group", "id": name, "limits": {k.replace("_", "-"): v for k, v in limits.items()}}
    add_object(host.graph.objects, convert(given, AnyObjectOptions), host.clock)
    await host.add(driver="throttle", node_name=name, throttle_group=name, file=below, discard="unmap")


def with_view(
    scenario: Scenario, *, dirty: list[Span] | None = None, faults: FaultPlan | None = None, **members: object
) -> None:
    """A guest's node `cbw` over slow nodes, and the view `sa` of it, which somebody reads."""

    async def main() -> None:
        async with LittleHost() as host:
            await host.disk("source-disk", CONTENT)
            host.disks["target-disk"] = make_disk(SIZE)
            medium = FaultyMedium(host.disks["target-disk"], faults or FaultPlan())
            await host.disk("target-disk", b"", medium=medium)
            await throttled(host, "source", "source-disk", bps_total=8 * MiB)
            await throttled(host, "target", "target-disk", bps_total=4 * MiB)
            if dirty is not None:
                bitmap = NodeBitmap(map=DirtyBitmap(SIZE, 4 * KiB), name="b", enabled=False)
                for span in dirty:
                    bitmap.map.set(span)
                host.graph.node("source").attach_bitmap(bitmap)
                members["bitmap"] = {"node": "source", "name": "b"}
            cbw = await host.add(
                driver="copy-before-write", node_name="cbw", file="source", target="target", discard="unmap", **members
            )
            view = await host.add(driver="snapshot-access", node_name="sa", file="cbw", discard="unmap")
            guest = await host.guest(cbw)
            needs = Perm.CONSISTENT_READ | Perm.WRITE
            reader = await host.graph.claim("a reader", view, needs=needs, shares=ALL)
            await scenario(host, cbw, view)
            await host.graph.release(guest)
            await host.graph.release(reader)

    run(main())


async def fails(code: int, work: Awaitable[object]) -> None:
    with pytest.raises(IoFailure) as caught:
        await work
    assert caught.value.errno == code


@pytest.mark.parametrize("seed", range(8))
def test_a_reader_gets_the_bytes_of_the_instant_while_a_guest_writes(seed: int) -> None:
    async def scenario(host: LittleHost, cbw: Node, view: Node) -> None:
        chance = random.Random(seed)
        model = bytearray(CONTENT)
        copied = bytearray(SIZE)
        last: dict[int, asyncio.Task[None]] = {}

        async def guest(number: int) -> None:  # each has a part of the disk for itself, so that the model is sure
            part = SIZE // 4
            for _ in range(25):
                length = chance.choice((512, 3000, CLUSTER, 100_000))
                at = number * part + chance.randrange(part - length)
                if chance.random() < 0.3:
                    await cbw.zero(Span(at, length))
                    model[at : at + length] = bytes(length)
                else:
                    content = chance.randbytes(length)
                    await cbw.write(at, content)
                    model[at : at + length] = content
                await asyncio.sleep(chance.random() / 20)

        async def reader() -> None:
            pieces = list(Span(0, SIZE).split(chance.choice((4096, 48 * KiB, CLUSTER))))
            chance.shuffle(pieces)
            for piece in pieces:
                copied[piece.at : piece.end] = await view.read(piece.at, piece.length)

        async with asyncio.TaskGroup() as group:
            for number in range(4):
                group.create_task(guest(number))
            for _ in range(3):
                group.create_task(reader())
        assert copied == CONTENT
        assert await view.read(0, SIZE) == CONTENT
        assert await cbw.read(0, SIZE) == model
        assert not last

    with_view(scenario)


def test_a_write_waits_for_a_reader_of_the_same_bytes_and_for_no_other() -> None:
    async def scenario(host: LittleHost, cbw: Node, view: Node) -> None:
        driver = cbw.driver
        assert isinstance(driver, CopyBeforeWrite)
        async with driver.reads.shared(Span(0, CLUSTER)):
            await cbw.write(2 * CLUSTER, b"n" * CLUSTER)
            write = asyncio.ensure_future(cbw.write(100, b"n" * 100))
            await asyncio.sleep(10)
            assert not write.done()
            assert (await cbw.read(100, 100)) == CONTENT[100:200]
        await write
        assert (await cbw.read(100, 100)) == b"n" * 100
        assert await view.read(0, CLUSTER) == CONTENT[:CLUSTER]

    with_view(scenario)


def test_only_what_is_dirty_in_the_bitmap_belongs_to_the_view() -> None:
    async def scenario(host: LittleHost, cbw: Node, view: Node) -> None:
        assert await view.read(CLUSTER, CLUSTER) == CONTENT[CLUSTER : 2 * CLUSTER]
        assert await view.read(5 * CLUSTER + 100, 2 * CLUSTER - 100) == CONTENT[5 * CLUSTER + 100 : 7 * CLUSTER]
        for at, length in ((0, 1), (CLUSTER - 1, 2), (2 * CLUSTER - 1, 2), (8 * CLUSTER, CLUSTER), (0, SIZE)):
            await fails(errno.EACCES, view.read(at, length))
            await fails(errno.EACCES, view.status(Span(at, length)))
        await cbw.write(0, b"n" * SIZE)
        assert await view.read(CLUSTER, CLUSTER) == CONTENT[CLUSTER : 2 * CLUSTER]
        assert host.disks["target-disk"].pages.read(0, CLUSTER) == bytes(CLUSTER)  # not saved, as nobody may ask
        await fails(errno.EACCES, view.read(0, 1))

    with_view(scenario, dirty=[Span(CLUSTER + 5, 1), Span(6 * CLUSTER - 1, 2)])


def test_a_view_that_is_given_up_cannot_be_read() -> None:
    faults = FaultPlan()

    async def scenario(host: LittleHost, cbw: Node, view: Node) -> None:
        assert await view.read(0, CLUSTER) == CONTENT[:CLUSTER]
        faults.add(Fault(nth=1, operation=Operation.WRITE, times=9))
        await cbw.write(0, b"n")
        await fails(errno.EACCES, view.read(4 * CLUSTER, 10))
        await fails(errno.EACCES, view.block_status(Span(0, SIZE)))
        assert await cbw.read(0, 1) == b"n"

    with_view(scenario, faults=faults, on_cbw_error="break-snapshot")


@pytest.mark.parametrize("nth", range(1, 12))
@pytest.mark.parametrize("policy", ["break-guest-write", "break-snapshot"])
def test_the_nth_request_to_the_target_fails(nth: int, policy: str) -> None:
    faults = FaultPlan([Fault(nth=nth)])

    async def scenario(host: LittleHost, cbw: Node, view: Node) -> None:
        for at in (0, 3 * CLUSTER + 9, 100, 7 * CLUSTER):
            before = await cbw.read(at, 5000)
            try:
                await cbw.write(at, b"n" * 5000)
            except IoFailure:
                assert policy == "break-guest-write"
                assert await cbw.read(at, 5000) == before
            shown: object = None
            try:
                shown = await view.read(at // CLUSTER * CLUSTER, CLUSTER)
            except IoFailure as failure:
                shown = failure.errno
            lost = errno.EIO if policy == "break-guest-write" else errno.EACCES
            assert shown in (CONTENT[at // CLUSTER * CLUSTER :][:CLUSTER], errno.EIO, lost)
        driver = cbw.driver
        assert isinstance(driver, CopyBeforeWrite)
        if driver.broken is None:
            faults.cure()
            assert await view.read(0, SIZE) == CONTENT

    with_view(scenario, faults=faults, on_cbw_error=policy)


def test_what_the_reader_is_done_with_is_neither_saved_nor_kept() -> None:
    async def scenario(host: LittleHost, cbw: Node, view: Node) -> None:
        await cbw.write(0, b"n" * 2 * CLUSTER)
        assert host.disks["target-disk"].allocated_size() == 2 * CLUSTER
        await view.discard(Span(100, 4 * CLUSTER))  # three whole clusters
        assert host.disks["target-disk"].allocated_size() == CLUSTER
        assert await view.read(0, CLUSTER) == CONTENT[:CLUSTER]
        await fails(errno.EACCES, view.read(CLUSTER, 1))
        await fails(errno.EACCES, view.read(3 * CLUSTER, 1))
        assert await view.read(4 * CLUSTER, 10) == CONTENT[4 * CLUSTER :][:10]
        await cbw.write(2 * CLUSTER, b"n" * CLUSTER)
        assert host.disks["target-disk"].allocated_size() == CLUSTER

    with_view(scenario)


def test_writes_are_refused() -> None:
    async def scenario(host: LittleHost, cbw: Node, view: Node) -> None:
        await fails(errno.EOPNOTSUPP, view.write(0, b"x"))
        await fails(errno.EOPNOTSUPP, view.zero(Span(0, 512)))
        await view.flush()
        with pytest.raises(UsageError, match="Image format driver does not support resize"):
            await host.graph.resize(view, 2 * SIZE)

    with_view(scenario)


def test_block_status_is_that_of_where_the_bytes_are() -> None:
    async def scenario(host: LittleHost, cbw: Node, view: Node) -> None:
        def kinds(segments: list[object]) -> list[object]:
            return [(part.at, part.length, part.kind) for part in segments]

        half = SIZE // 2
        host.disks["source-disk"].zero(half, half, unmap=True)
        assert kinds(await view.block_status(Span(0, SIZE))) == [(0, half, Kind.DATA), (half, half, Kind.ZERO)]
        await cbw.write(0, bytes(SIZE))
        await cbw.write(half, b"n" * half)
        assert kinds(await view.block_status(Span(0, SIZE))) == [(0, half, Kind.DATA), (half, half, Kind.ZERO)]

    with_view(scenario)


def test_nobody_writes_past_the_filter_while_there_is_a_view() -> None:
    async def main() -> None:
        async with LittleHost() as host:
            await host.disk("source", CONTENT)
            await host.disk("target", SIZE)
            await host.add(driver="copy-before-write", node_name="cbw", file="source", target="target")
            source = host.graph.node("source")
            await host.graph.release(await host.guest(source))
            await host.add(driver="snapshot-access", node_name="sa", file="cbw")
            with pytest.raises(PermissionConflict):
                await host.guest(source)
            await host.graph.remove("sa")
            guest = await host.guest(source)
            with pytest.raises(PermissionConflict):
                await host.add(driver="snapshot-access", node_name="sa", file="cbw")
            await host.graph.release(guest)
            await host.add(driver="snapshot-access", node_name="sa", file="cbw")

    run(main())


def test_another_filter_above_does_not_change_the_view() -> None:
    async def scenario(host: LittleHost, cbw: Node, view: Node) -> None:
        await cbw.write(0, b"1" * CLUSTER)
        await host.disk("second", SIZE)
        async with host.graph.edit() as edit:
            described = CopyBeforeWriteOptions(node_name="cbw2", file="cbw", target="second")
            upper = await edit.insert(above=cbw, filter=described)
        assert view.children["file"] is upper
        await upper.write(0, b"2" * 2 * CLUSTER)
        assert await view.read(0, SIZE) == CONTENT
        async with host.graph.edit() as edit:
            await edit.drop(upper)
        assert view.children["file"] is cbw
        assert await view.read(0, SIZE) == CONTENT

    with_view(scenario)


def test_a_child_that_is_no_such_filter_can_be_opened_and_not_read() -> None:
    async def main() -> None:
        async with LittleHost() as host:
            await host.disk("disk", CONTENT)
            view = await host.add(driver="snapshot-access", node_name="sa", file="disk")
            reader = await host.graph.claim("a reader", view, needs=Perm.CONSISTENT_READ, shares=ALL)
            await fails(errno.EOPNOTSUPP, view.read(0, 1))
            await fails(errno.EOPNOTSUPP, view.block_status(Span(0, 512)))
            await host.graph.release(reader)

    run(main())


def test_a_fleecing_target_that_reads_what_it_lacks_from_the_source() -> None:
    async def main() -> None:
        async with LittleHost() as host:
            await host.disk("source", CONTENT)
            await host.qcow2("temporary", NewImage(size=SIZE), backing="source")
            cbw = await host.add(driver="copy-before-write", node_name="cbw", file="source", target="temporary")
            view = await host.add(driver="snapshot-access", node_name="sa", file="cbw")
            guest = await host.guest(cbw)
            await cbw.write(1000, b"n" * 200_000)
            temporary = host.graph.node("temporary")
            for node in (view, temporary):  # the older way is to read the target itself
                reader = await host.graph.claim("a reader", node, needs=Perm.CONSISTENT_READ, shares=ALL)
                assert await node.read(0, SIZE) == CONTENT
                await host.graph.release(reader)
            await host.graph.release(guest)

    run(main())


@pytest.mark.parametrize(
    ("bitmap", "text"),
    [
        ({"node": "nope", "name": "b"}, "Node 'nope' not found"),
        ({"node": "source", "name": "nope"}, "Dirty bitmap 'nope' not found"),
        ({"node": "source", "name": "broken"}, "Bitmap 'broken' is inconsistent and cannot be used"),
        (
            {"node": "target", "name": "b"},
            "Cannot create block-copy-state: Failed to merge bitmap 'b' to internal copy-bitmap: Bitmaps are of "
            "different sizes (destination size is 1048576, source size is 2097152) and can't be merged",
        ),
    ],
)
def test_bitmaps_that_are_refused(bitmap: dict[str, str], text: str) -> None:
    async def main() -> None:
        async with LittleHost() as host:
            source, target = await host.disk("source", SIZE), await host.disk("target", 2 * SIZE)
            source.attach_bitmap(NodeBitmap(map=DirtyBitmap(SIZE, 4096), name="broken", inconsistent=True))
            target.attach_bitmap(NodeBitmap(map=DirtyBitmap(2 * SIZE, 4096), name="b"))
            members = {"node_name": "cbw", "file": "source", "target": "target", "bitmap": bitmap}
            with pytest.raises(UsageError) as caught:
                await host.add(driver="copy-before-write", **members)
            assert str(caught.value) == text

    run(main())
