import asyncio
import errno
import random
import zlib

import pytest

from blockjobs.base.offload import InlineOffload
from blockjobs.base.span import Span
from blockjobs.base.units import KiB, MiB
from blockjobs.block import execute
from blockjobs.block.claims import ALL, Perm
from blockjobs.block.compress_batch import CompressedWriter, Packed, Piece, compress_group, compressing_driver
from blockjobs.block.copier import BlockCopy, copy_cluster_size
from blockjobs.block.drivers.qcow2.create import NewImage
from blockjobs.block.flight import CopyFailed
from blockjobs.block.node import Node
from blockjobs.testing.clock import run
from blockjobs.testing.disk import SimDisk
from blockjobs.testing.faults import Fault, FaultyMedium, Operation
from blockjobs.testing.little_host import LittleHost, make_disk

SIZE = 1 * MiB
CLUSTER = 64 * KiB
CONTENT = random.Random(4).randbytes(SIZE)


async def make_copier(host: LittleHost, source: str = "source", target: str = "target") -> BlockCopy:
    nodes = host.graph.node(source), host.graph.node(target)
    await host.graph.claim("a copy", nodes[0], needs=Perm.CONSISTENT_READ, shares=ALL)
    await host.graph.claim("a copy", nodes[1], needs=Perm.WRITE, shares=ALL)
    copier = BlockCopy(
        source=lambda: nodes[0],
        target=lambda: nodes[1],
        offload=host.graph.offload,
        clock=host.clock,
        cluster_size=copy_cluster_size(nodes[1].cluster_size),
    )
    copier.dirty.set_all()
    return copier


async def release_all(host: LittleHost) -> None:
    for node in host.graph.nodes():
        for root in [each for each in node.parents if hasattr(each, "user")]:
            await host.graph.release(root)


def compressing(target: Node) -> CompressedWriter:
    _, driver = compressing_driver(target)
    compress = driver.compressor("default") if driver else None
    assert compress is not None
    return CompressedWriter(offload=target.graph.offload, compress=compress, unit=CLUSTER)


async def copy_all(copier: BlockCopy) -> int:
    batches = 0
    while (flight := copier.take()) is not None:
        await copier.move(await copier.prepare(flight))
        batches += 1
    return batches


def test_a_flight_is_nobody_elses_and_a_shortened_one_gives_the_rest_back() -> None:
    async def main() -> None:
        async with LittleHost() as host:
            await host.disk("source", CONTENT)
            await host.disk("target", SIZE)
            copier = await make_copier(host)
            flight = copier.take()
            assert flight is not None and flight.span == Span(0, SIZE)
            assert copier.take() is None
            assert len(host.graph.node("target").in_flight) == 1
            batch = await copier.prepare(flight, moved_max=3 * CLUSTER)
            assert flight.span == Span(0, 3 * CLUSTER) and batch.moved_bytes == 3 * CLUSTER
            assert list(copier.dirty.runs()) == [Span.between(3 * CLUSTER, SIZE)]
            await copier.move(batch)
            assert not len(host.graph.node("target").in_flight)
            assert host.disks["target"].pages.read(0, 3 * CLUSTER) == CONTENT[: 3 * CLUSTER]
            await release_all(host)

    run(main())


def test_less_than_a_cluster_is_never_moved() -> None:
    async def main() -> None:
        async with LittleHost() as host:
            await host.disk("source", CONTENT)
            await host.disk("target", SIZE)
            copier = await make_copier(host)
            flight = copier.take(length_max=1)
            assert flight is not None and flight.span == Span(0, CLUSTER)
            await copier.move(await copier.prepare(flight, moved_max=1))
            assert not copier.dirty.any(Span(0, CLUSTER))
            await release_all(host)

    run(main())


def test_what_arrived_and_what_did_not_is_told_apart() -> None:
    async def main() -> None:
        async with LittleHost() as host:
            await host.disk("source", CONTENT)
            # The plain copy fails at once; through the doors the second of four chunks fails.
            faults = [Fault(nth=number, operation=Operation.WRITE, errno=errno.ENOSPC) for number in (1, 3)]
            host.disks["target"] = make_disk(SIZE)
            await host.disk("target", b"", medium=FaultyMedium(host.disks["target"], faults))
            copier = await make_copier(host)
            copier.chunk_bytes_max, copier.chunks_in_flight_max = SIZE // 4, 1
            arrived: list[int] = []
            copier.on_arrived = arrived.append
            flight = copier.take()
            assert flight is not None
            with pytest.raises(CopyFailed) as failed:
                await copier.move(await copier.prepare(flight))
            assert (failed.value.errno, failed.value.reading) == (errno.ENOSPC, False)
            assert arrived == [SIZE // 4]
            assert list(copier.dirty.runs()) == [Span.between(SIZE // 4, SIZE)]
            assert await copy_all(copier) == 1
            assert host.disks["target"].pages.read(0, SIZE) == CONTENT
            assert sum(arrived) == SIZE
            await release_all(host)

    run(main())


def test_an_unreadable_source_is_blamed_for_reading() -> None:
    async def main() -> None:
        async with LittleHost() as host:
            faulty = FaultyMedium(make_disk(CONTENT), [Fault(nth=1, operation=Operation.READ, times=9)])
            await host.disk("source", b"", medium=faulty)
            await host.disk("target", SIZE)
            copier = await make_copier(host)
            flight = copier.take()
            assert flight is not None
            with pytest.raises(CopyFailed) as failed:
                await copier.move(await copier.prepare(flight))
            assert failed.value.reading
            assert copier.dirty.dirty_bytes() == SIZE
            await release_all(host)

    run(main())


def test_a_plan_that_fails_loses_nothing_and_holds_nothing() -> None:
    async def main() -> None:
        async with LittleHost() as host:
            faulty = FaultyMedium(make_disk(CONTENT), [Fault(nth=1, operation=Operation.STATUS)])
            await host.disk("source", b"", medium=faulty)
            target = await host.disk("target", SIZE)
            copier = await make_copier(host)
            flight = copier.take()
            assert flight is not None
            with pytest.raises(CopyFailed) as failed:
                await copier.prepare(flight)
            assert failed.value.reading and flight.landed.is_set()
            assert copier.dirty.dirty_bytes() == SIZE
            assert not len(target.in_flight)
            await copy_all(copier)
            await release_all(host)

    run(main())


@pytest.mark.parametrize("cluster_size", [512, 64 * KiB, 2 * MiB])
def test_a_qcow2_target_gets_data_in_place_and_zeroes_by_metadata(cluster_size: int) -> None:
    async def main() -> None:
        async with LittleHost() as host:
            content = bytearray(3 * SIZE)
            content[:CLUSTER] = CONTENT[:CLUSTER]
            content[SIZE + 5 : SIZE + 4005] = CONTENT[:4000]
            source = SimDisk()
            source.truncate(3 * SIZE)
            source.write(0, CONTENT[:CLUSTER])
            source.write(SIZE + 5, CONTENT[:4000])
            await host.disk("source", b"", medium=source)
            target = await host.qcow2("target", NewImage(size=3 * SIZE, cluster_size=cluster_size))
            copier = await make_copier(host)
            await copy_all(copier)
            assert await target.read(0, 3 * SIZE) == content
            reference = max(cluster_size, 4096)
            assert host.disks["target-file"].allocated_size() < 12 * reference + 4 * CLUSTER
            await release_all(host)

    run(main())


def test_zeroes_hide_the_backing_file_that_a_target_gets_later() -> None:
    async def main() -> None:
        async with LittleHost() as host:
            await host.disk("source", SIZE)
            image = NewImage(size=SIZE, backing_file="later", backing_format="raw")
            target = await host.qcow2("target", image)
            await copy_all(await make_copier(host))
            await release_all(host)
            await host.graph.remove("target")
            await host.graph.remove("target-file")
            await host.disk("old", b"\xff" * SIZE)
            target = await host.qcow2("again", image, backing="old", medium=host.disks["target-file"])
            assert await target.read(0, SIZE) == bytes(SIZE)

    run(main())


def test_a_guests_write_waits_for_the_flight_of_its_cluster() -> None:
    async def main() -> None:
        async with LittleHost() as host:
            await host.disk("source", CONTENT)
            await host.disk("target", SIZE)
            copier = await make_copier(host)
            flight = copier.take()
            assert flight is not None
            order: list[str] = []

            async def guest() -> None:
                await copier.copy_before_write(Span(5 * CLUSTER, 10))
                order.append("guest")

            async with asyncio.TaskGroup() as group:
                group.create_task(guest())
                await asyncio.sleep(1)
                order.append("moved")
                await copier.move(await copier.prepare(flight))
            assert order == ["moved", "guest"]
            await release_all(host)

    run(main())


def every_fourth(copier: BlockCopy) -> None:
    copier.dirty.clear(Span(0, SIZE))
    for at in range(0, SIZE, 4 * CLUSTER):
        copier.dirty.set(Span(at, 1))


@pytest.mark.parametrize("format", ["raw", "qcow2", "compressed", "discarding"])
def test_scattered_clusters_are_one_batch_and_nothing_between_is_touched(format: str) -> None:
    async def main() -> None:
        async with LittleHost() as host:
            source = await host.disk("source", CONTENT)
            if format in ("qcow2", "compressed"):
                target = await host.qcow2("target", NewImage(size=SIZE))
            else:
                target = await host.disk("target", SIZE)
            copier = await make_copier(host)
            if format == "compressed":
                copier.compressed = compressing(target)
            every_fourth(copier)
            arrived: list[int] = []
            copier.on_arrived = arrived.append
            writer = await host.graph.claim("a user", source, needs=Perm.WRITE, shares=ALL)
            flight = copier.take()
            assert flight is not None
            await copier.move(await copier.prepare(flight), discard_source=format == "discarding")
            assert copier.take() is None and arrived == [SIZE // 4]
            shown, left = await target.read(0, SIZE), await source.read(0, SIZE)
            for at in range(0, SIZE, CLUSTER):
                here, none = CONTENT[at : at + CLUSTER], bytes(CLUSTER)
                is_copied = at % (4 * CLUSTER) == 0
                assert shown[at : at + CLUSTER] == (here if is_copied else none)
                is_gone = is_copied and format == "discarding"
                assert left[at : at + CLUSTER] == (none if is_gone else here)
            await host.graph.release(writer)
            await release_all(host)

    run(main())


def test_a_guest_between_the_parts_of_a_flight_does_not_wait_for_it() -> None:
    async def main() -> None:
        async with LittleHost() as host:
            await host.disk("source", CONTENT)
            await host.disk("target", SIZE)
            copier = await make_copier(host)
            every_fourth(copier)
            flight = copier.take()
            assert flight is not None and len(flight.parts) == SIZE // CLUSTER // 4
            for at in range(0, SIZE, CLUSTER):
                for span in (Span(at, 1), Span(at + CLUSTER - 1, 1)):
                    guest = asyncio.ensure_future(copier.copy_before_write(span))
                    await asyncio.sleep(1)
                    assert guest.done() == (at % (4 * CLUSTER) != 0)
                    guest.cancel()
            assert flight.copies_any(Span(CLUSTER, 3 * CLUSTER + 1)) and not flight.copies_any(Span(CLUSTER, CLUSTER))
            await copier.move(await copier.prepare(flight))
            await release_all(host)

    run(main())


def test_what_a_batch_left_that_ended_early_is_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "STRIDE_BYTES", CLUSTER)

    async def main() -> None:
        async with LittleHost() as host:
            await host.disk("source", CONTENT)
            await host.disk("target", SIZE)
            copier = await make_copier(host)
            every_fourth(copier)
            flight = copier.take()
            assert flight is not None
            answers = iter([True, True])
            left = await copier.move(await copier.prepare(flight), goes_on=lambda: next(answers, False))
            assert len(left) == SIZE // CLUSTER // 4 - 1
            assert await copy_all(copier) == 1
            await release_all(host)

    run(main())


def test_a_group_is_read_compressed_and_padded() -> None:
    disk = SimDisk(b"a" * 1000)

    def compress(content: object) -> bytes | None:
        assert isinstance(content, memoryview) and len(content) == 512
        return None if bytes(content[:1]) == b"b" else zlib.compress(content)

    pieces = [Piece(512, disk, 0), Piece(512), Piece(600, content=b"b" * 600)]
    packed = compress_group(pieces, 2048, 512, compress, [memoryview(bytearray(b"x" * 8192))])
    assert packed == [
        Packed(2048, zlib.compress(b"a" * 512), None),
        Packed(2560, None, None),
        Packed(3072, None, b"b" * 512),
        Packed(3584, None, b"b" * 88),
    ]


@pytest.mark.parametrize("zstd", [False, True])
def test_compressed_clusters_read_back(zstd: bool) -> None:
    async def main() -> None:
        async with LittleHost(offload=InlineOffload()) as host:
            half = CONTENT[: SIZE // 2]
            content = half + bytes(SIZE // 4) + b"abcd" * (SIZE // 16) + b"tail" * 128
            await host.disk("source", content)
            target = await host.qcow2("target", NewImage(size=len(content), zstd=zstd))
            copier = await make_copier(host)
            copier.compressed = compressing(target)
            await copy_all(copier)
            await target.flush()
            assert await target.read(0, len(content)) == content
            assert host.disks["target-file"].allocated_size() < SIZE // 2 + 8 * CLUSTER
            await release_all(host)

    run(main())
