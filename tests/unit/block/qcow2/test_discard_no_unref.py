"""`discard-no-unref`: clusters stay where they are, the file system gets the bytes, snapshots keep theirs."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from blockjobs.base.errors import UsageError
from blockjobs.base.span import Span
from blockjobs.block.drivers.qcow2.options import Qcow2Options, tuning_of
from blockjobs.block.node import Node
from blockjobs.block.vocabulary import Kind, ZeroMode
from blockjobs.host import Host
from blockjobs.wire.qcow2 import Autoclear, Header, Incompatible

SIZE = 1 << 20
CONTENT = b"data" * (SIZE // 4)
ERASERS: dict[str, Callable[[Node], Awaitable[None]]] = {
    "discard": lambda node: node.discard(Span(0, SIZE)),
    "zero": lambda node: node.zero(Span(0, SIZE), mode=ZeroMode.UNMAP),
}


def on_disk(path: Path) -> int:
    return path.stat().st_blocks * 512


async def places(node: Node) -> list[int]:
    """Where the bytes are in the image file, as our tables say."""
    segments = await node.driver.resolve(Span(0, SIZE))
    return [segment.child_at for segment in segments if segment.kind is Kind.DATA]


async def opened(host: Host, path: Path) -> Node:
    file = {"driver": "file", "filename": str(path), "discard": "unmap"}
    return await host.blockdev_add(
        {"node-name": "n", "driver": "qcow2", "discard": "unmap", "discard-no-unref": True, "file": file}
    )


@pytest.mark.parametrize("how", ERASERS)
@pytest.mark.parametrize("shape", [{}, {"extended_l2": True}])
def test_clusters_stay_and_their_bytes_go(tmp_path: Path, how: str, shape: dict[str, bool]) -> None:
    path = tmp_path / "i"

    async def run() -> None:
        async with Host() as host:
            await host.create_image(str(path), "qcow2", SIZE, **shape)
            node = await opened(host, path)
            async with host.access(node, write=True) as root:
                await root.node.write(0, CONTENT)
                await root.node.flush()
                before, full = await places(node), on_disk(path)
                await ERASERS[how](root.node)
                assert await root.node.read(0, SIZE) == bytes(SIZE)
                assert on_disk(path) <= full - SIZE + 65536
                await root.node.write(0, CONTENT)
                assert await places(node) == before
                assert await root.node.read(0, SIZE) == CONTENT
            await host.close_nodes(node)
            assert (await host.check_image({"driver": "file", "filename": str(path)})).is_clean

    asyncio.run(run())


@pytest.mark.parametrize("how", ERASERS)
def test_a_snapshot_keeps_its_bytes(tmp_path: Path, how: str) -> None:
    path = tmp_path / "i"

    async def run() -> None:
        async with Host() as host:
            await host.create_image(str(path), "qcow2", SIZE)
            node = await opened(host, path)
            snapshots = node.driver.internal_snapshots
            assert snapshots is not None
            async with host.access(node, write=True, resize=True) as root:
                await root.node.write(0, CONTENT)
                await snapshots.create("s", date_ns=0)
                await ERASERS[how](root.node)
                assert await root.node.read(0, SIZE) == bytes(SIZE)
                await snapshots.apply("1")
                assert await root.node.read(0, SIZE) == CONTENT
            await host.close_nodes(node)
            result = await host.check_image({"driver": "file", "filename": str(path)})
            assert not (result.corruptions or result.leaks), result.problems

    asyncio.run(run())


@pytest.mark.parametrize(
    ("header", "text"),
    [
        (Header(version=2), "discard-no-unref needs a qcow2 image with at least qemu 1.1 compatibility level"),
        (
            Header(incompatible=Incompatible.DATA_FILE, autoclear=Autoclear.DATA_FILE_RAW),
            "discard-no-unref cannot be used with data-file-raw: such a file has no clusters to keep",
        ),
    ],
)
def test_images_that_cannot(header: Header, text: str) -> None:
    with pytest.raises(UsageError) as caught:
        tuning_of(Qcow2Options(file="f", discard_no_unref=True), header)
    assert str(caught.value) == text
