import asyncio
import errno
import random

import pytest

from blockjobs.base.errors import IoFailure, UsageError
from blockjobs.base.span import Span
from blockjobs.base.units import KiB, MiB
from blockjobs.block.claims import ALL, Perm
from blockjobs.block.driver import FormatDriver
from blockjobs.block.drivers.qcow2.create import NewImage
from blockjobs.block.node import Node
from blockjobs.block.users import Root
from blockjobs.block.vocabulary import Kind
from blockjobs.testing.clock import run
from blockjobs.testing.disk import Pages
from blockjobs.testing.faults import Fault, Operation
from blockjobs.testing.host import SimHost

SIZE = 1 * MiB
CONTENT = random.Random(5).randbytes(512 * KiB) + bytes(512 * KiB)


async def overlay_on(host: SimHost, *, is_v2: bool = False) -> Node:
    """`top` over the raw `base`."""
    base = await host.disk("base", Pages(CONTENT[: SIZE // 2]))
    host.disks["base"].truncate(SIZE)
    image = NewImage(size=SIZE, is_v2=is_v2, backing_file="base", backing_format="raw")
    return await host.image("top", image, backing=base.name)


async def reader(host: SimHost, node: Node, needs: Perm = Perm.CONSISTENT_READ) -> Root:
    return await host.graph.claim("a reader", node, needs=needs, shares=ALL)


async def kinds(node: Node) -> list[tuple[int, Kind]]:
    """(length, kind) of the runs of an image's own layer."""
    driver = node.driver
    assert isinstance(driver, FormatDriver)
    return [(segment.length, segment.kind) for segment in await driver.resolve(Span(0, node.length))]


def test_what_is_read_is_taken_in_whole_clusters_and_zeroes_stay_sparse() -> None:
    async def scenario() -> None:
        async with SimHost() as host:
            top = await overlay_on(host)
            cor = await host.blockdev_add({"driver": "copy-on-read", "node-name": "cor", "file": "top"})
            user = await reader(host, cor)
            assert await user.node.read(100, 10) == CONTENT[100:110]
            assert await user.node.read(SIZE - 10, 10) == bytes(10)
            assert await kinds(top) == [
                (64 * KiB, Kind.DATA),
                (SIZE - 128 * KiB, Kind.BACKING),
                (64 * KiB, Kind.ZERO),
            ]
            await host.graph.release(user)

    run(scenario())


def test_old_images_without_zero_clusters_get_stored_zeroes() -> None:
    async def scenario() -> None:
        async with SimHost() as host:
            top = await overlay_on(host, is_v2=True)
            cor = await host.blockdev_add({"driver": "copy-on-read", "node-name": "cor", "file": "top"})
            user = await reader(host, cor)
            assert await user.node.read(0, SIZE) == CONTENT
            assert await kinds(top) == [(SIZE, Kind.DATA)]
            await host.graph.release(user)

    run(scenario())


def test_nothing_is_taken_from_below_the_bottom() -> None:
    async def scenario() -> None:
        async with SimHost() as host:
            base = await host.image("base", NewImage(size=SIZE))
            middle = await host.image("middle", NewImage(size=SIZE), backing="base")
            top = await host.image("top", NewImage(size=SIZE), backing="middle")
            async with host.access(base, write=True) as writer:
                await writer.node.write(0, b"b" * SIZE)
            async with host.access(middle, write=True) as writer:
                await writer.node.write(64 * KiB, b"m" * 64 * KiB)
            options = {"driver": "copy-on-read", "node-name": "cor", "file": "top", "bottom": "middle"}
            cor = await host.blockdev_add(options)
            user = await reader(host, cor)
            assert await user.node.read(0, SIZE) == b"b" * 64 * KiB + b"m" * 64 * KiB + b"b" * (SIZE - 128 * KiB)
            assert [kind for _, kind in await kinds(top)] == [Kind.BACKING, Kind.DATA, Kind.BACKING]
            await host.graph.release(user)

    run(scenario())


def test_a_read_whose_copy_cannot_be_written_fails() -> None:
    async def scenario() -> None:
        async with SimHost() as host:
            await overlay_on(host)
            cor = await host.blockdev_add({"driver": "copy-on-read", "node-name": "cor", "file": "top"})
            user = await reader(host, cor)
            host.faults["top-file"].add(Fault(nth=1, times=99, operation=Operation.WRITE, errno=errno.ENOSPC))
            with pytest.raises(IoFailure) as failure:
                await user.node.read(0, 512)
            assert failure.value.errno == errno.ENOSPC
            host.faults["top-file"].cure()
            assert await user.node.read(0, 512) == CONTENT[:512]
            await host.graph.release(user)

    run(scenario())


def test_a_writer_beside_readers_is_never_overwritten() -> None:
    async def scenario(seed: int) -> None:
        chance = random.Random(seed)
        async with SimHost(seed, latency_s_max=0.01) as host:
            top = await overlay_on(host)
            cor = await host.blockdev_add({"driver": "copy-on-read", "node-name": "cor", "file": "top"})
            user = await reader(host, cor, Perm.CONSISTENT_READ | Perm.WRITE)
            model = bytearray(CONTENT)

            async def write() -> None:
                for _ in range(20):
                    at, content = chance.randrange(SIZE - 4096), chance.randbytes(chance.randrange(1, 4096))
                    await user.node.write(at, content)
                    model[at : at + len(content)] = content
                    at = chance.randrange(SIZE - 8192)
                    assert await user.node.read(at, 8192) == model[at : at + 8192]

            async def read() -> None:
                for _ in range(20):
                    await user.node.read(chance.randrange(SIZE - 200_000), 200_000)

            async with asyncio.TaskGroup() as group:
                group.create_task(write())
                group.create_task(read())
                group.create_task(read())
            await user.node.read(0, SIZE)
            assert Kind.BACKING not in [kind for _, kind in await kinds(top)]
            await host.graph.release(user)
            async with host.access(top) as alone:
                assert await alone.node.read(0, SIZE) == model

    for seed in range(5):
        run(scenario(seed))


def test_options_that_make_no_sense() -> None:
    async def scenario() -> None:
        async with SimHost() as host:
            await overlay_on(host)
            add = {"driver": "copy-on-read", "node-name": "cor", "file": "top"}
            with pytest.raises(UsageError, match="Bottom node 'nope' not found"):
                await host.blockdev_add({**add, "bottom": "nope"})
            await host.disk("other", Pages(CONTENT))
            with pytest.raises(UsageError, match="not in the chain"):
                await host.blockdev_add({**add, "bottom": "other"})
            await host.graph.set_read_only(host.graph.node("top"), read_only=True)
            with pytest.raises(UsageError, match="Block node is read-only"):
                await host.blockdev_add(add)
            assert [node.name for node in host.graph.nodes()] == ["other", "top", "top-file", "base"]

    run(scenario())
