"""Snapshot tables that name what is not theirs: nothing of it is given away, whatever is done with the snapshot."""

import asyncio
import struct
from contextlib import suppress
from pathlib import Path

import pytest

from blockjobs.base.errors import BlockjobsError
from blockjobs.block.node import Node
from blockjobs.host import Host

CLUSTER = 4096
SIZE = 1 << 20


def name_in_snapshot(path: Path, place: int) -> None:
    """Let the last entry of the first snapshot's L2 table point at a place in the file."""
    raw = bytearray(path.read_bytes())
    table_at = struct.unpack_from(">Q", raw, 64)[0]
    l1_at = struct.unpack_from(">Q", raw, table_at)[0]
    l2_at = struct.unpack_from(">Q", raw, l1_at)[0] & 0x00FF_FFFF_FFFF_FE00
    struct.pack_into(">Q", raw, l2_at + CLUSTER - 8, place)
    path.write_bytes(raw)


def places(path: Path) -> dict[str, int]:
    raw = path.read_bytes()
    l1, refcounts = struct.unpack_from(">Q", raw, 40)[0], struct.unpack_from(">Q", raw, 48)[0]
    block = struct.unpack_from(">Q", raw, refcounts)[0]
    return {"L1 table": l1, "refcount table": refcounts, "refcount block": block}


@pytest.mark.parametrize("what", ["L1 table", "refcount table", "refcount block"])
@pytest.mark.parametrize("action", ["delete", "apply"])
def test_metadata_is_not_given_away(tmp_path: Path, what: str, action: str) -> None:
    path = tmp_path / "i.qcow2"
    content = b"content!" * 1024

    async def run() -> None:
        async with Host() as host:
            await host.create_image(str(path), "qcow2", SIZE, cluster_size=CLUSTER)
            node = await host.open(str(path))
            async with host.access(node, write=True) as root:
                await root.node.write(0, content)
                assert node.driver.internal_snapshots is not None
                await node.driver.internal_snapshots.create("s", date_ns=0)
                await root.node.write(0, content)
            await host.close_nodes(node)
            name_in_snapshot(path, places(path)[what])
            node = await host.open(str(path))
            async with host.access(node, write=True) as root:
                assert node.driver.internal_snapshots is not None
                with suppress(BlockjobsError):
                    await getattr(node.driver.internal_snapshots, action)("1")
                for at in range(0, SIZE // 2, 8192):
                    with suppress(BlockjobsError):
                        await root.node.write(at, content)
                assert await root.node.read(0, 8192) == content
            await host.close_nodes(node)
            result = await host.check_image({"driver": "file", "filename": str(path)})
            lost = [line for line in result.problems if "refcount=0" in line]
            assert not lost, lost

    asyncio.run(run())


async def used(host: Host, path: Path) -> Node:
    """A new image with some content, open."""
    await host.create_image(str(path), "qcow2", SIZE, cluster_size=CLUSTER)
    node = await host.open(str(path))
    async with host.access(node, write=True) as root:
        await root.node.write(0, b"content!" * 1024)
    return node


def name_in_disk(path: Path, place: int) -> None:
    """Let the first entry of the active L2 table claim a place in the file for its own."""
    raw = bytearray(path.read_bytes())
    l1_at = struct.unpack_from(">Q", raw, 40)[0]
    l2_at = struct.unpack_from(">Q", raw, l1_at)[0] & 0x00FF_FFFF_FFFF_FE00
    struct.pack_into(">Q", raw, l2_at, 1 << 63 | place)
    path.write_bytes(raw)


@pytest.mark.parametrize("what", ["snapshot table", "inactive L1 table"])
def test_a_guests_write_does_not_reach_the_tables_of_snapshots(tmp_path: Path, what: str) -> None:
    path = tmp_path / "i.qcow2"
    events: list[object] = []

    async def run() -> None:
        async with Host() as host:
            node = await used(host, path)
            async with host.access(node, write=True) as root:
                assert node.driver.internal_snapshots is not None
                await node.driver.internal_snapshots.create("s", date_ns=0)
                await root.node.write(0, b"content!" * 1024)
            await host.close_nodes(node)
            raw = path.read_bytes()
            table_at = struct.unpack_from(">Q", raw, 64)[0]
            place = table_at if what == "snapshot table" else struct.unpack_from(">Q", raw, table_at)[0]
            before = raw[place : place + CLUSTER]
            name_in_disk(path, place)
            with host.bus.listening(events.append):
                node = await host.open(str(path))
                async with host.access(node, write=True) as root:
                    with pytest.raises(BlockjobsError):
                        await root.node.write(0, b"y" * CLUSTER)
                await host.close_nodes(node)
            assert path.read_bytes()[place : place + CLUSTER] == before
            assert any(what in str(event) for event in events), events

    asyncio.run(run())


def test_tables_of_snapshots_are_guarded_from_their_making_to_their_end(tmp_path: Path) -> None:
    path = tmp_path / "i.qcow2"

    async def run() -> None:
        async with Host() as host:
            node = await used(host, path)
            async with host.access(node, write=True):
                snapshots = node.driver.internal_snapshots
                assert snapshots is not None
                guarded = snapshots.image.allocator.guarded
                before = set(guarded)
                for name in ("s", "t"):
                    await snapshots.create(name, date_ns=0)
                raw = path.read_bytes()
                table_at = struct.unpack_from(">Q", raw, 64)[0]
                assert {table_at // CLUSTER, struct.unpack_from(">Q", raw, table_at)[0] // CLUSTER} <= guarded
                for id in ("1", "2"):
                    await snapshots.delete(id)
                assert set(guarded) == before
            await host.close_nodes(node)

    asyncio.run(run())
