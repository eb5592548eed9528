"""Flushes of real files: how many syncs they share, what they promise, and what a failed one leaves (I7, I8)."""

import asyncio
import errno
import os
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from replay import blank

from blockjobs.base.errors import BlockjobsError, IoFailure
from blockjobs.block.drivers.qcow2.create import NewImage
from blockjobs.block.node import Node
from blockjobs.block.options import BlockdevOptions
from blockjobs.host import Host
from blockjobs.monitor.commands.graph import blockdev_reopen
from blockjobs.monitor.commands.nodes import blockdev_del
from blockjobs.schema.command import convert

KIB = 1 << 10
SIZE, CLUSTER = 1 << 20, 64 * KIB
SYNCS = {"raw": 1, "qcow2": 2, "data file": 2}
"""What a flush of a new cluster takes: payload and counts, then tables. In a data file nothing is counted."""


class Syncs:
    """Stands in for `os.fdatasync`.

    Attributes:
        log: what began and ended, and what tests add.
        failing_at: the number of the one that fails, from 0.
        gate: while it is clear they wait.
    """

    def __init__(self) -> None:
        self.log: list[str] = []
        self.failing_at = -1
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, _descriptor: int) -> None:
        number = self.count
        self.log.append("sync")
        assert self.gate.wait(10)
        if number == self.failing_at:
            raise OSError(errno.EIO, "lost")
        self.log.append("synced")

    @property
    def count(self) -> int:
        return self.log.count("sync")


@pytest.fixture
def syncs(monkeypatch: pytest.MonkeyPatch) -> Syncs:
    found = Syncs()
    monkeypatch.setattr(os, "fdatasync", found)
    return found


def described(kind: str, folder: Path, **options: object) -> dict[str, object]:
    file = {"driver": "file", "filename": str(folder / "disk"), "node-name": "file"}
    if kind == "raw":
        return {"driver": "raw", "node-name": "disk", "file": file, **options}
    found = {"driver": "qcow2", "node-name": "disk", "file": file, **options}
    if kind == "data file":
        found["data-file"] = {"driver": "file", "filename": str(folder / "data"), "node-name": "data"}
    return found


async def create(kind: str, folder: Path) -> None:
    if kind == "raw":
        (folder / "disk").write_bytes(bytes(SIZE))
        return
    image = NewImage(size=SIZE, cluster_size=CLUSTER, data_file_name="data" if kind == "data file" else None)
    for name, pages in (await blank(image)).items():
        pages.save(str(folder / name))


@asynccontextmanager
async def opened(kind: str, folder: Path) -> AsyncIterator[tuple[Host, Node]]:
    async with Host() as host:
        yield host, await host.blockdev_add(described(kind, folder))


async def reopened(host: Host, options: dict[str, object]) -> None:
    await blockdev_reopen(host, options=[convert(options, BlockdevOptions)])


async def reached(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("kind", SYNCS)
def test_many_flushes_share_the_syncs_of_one(kind: str, tmp_path: Path, syncs: Syncs) -> None:
    async def body() -> None:
        await create(kind, tmp_path)
        async with opened(kind, tmp_path) as (host, disk), host.access(disk, write=True) as root:
            await root.node.write(0, b"x")  # the first L2 table takes its place
            await root.node.flush()
            for repetition in range(1, 4):
                await root.node.write(repetition * CLUSTER, b"x" * CLUSTER)
                before = syncs.count
                await asyncio.gather(*(root.node.flush() for _ in range(50)))
                assert syncs.count - before == SYNCS[kind]
            before = syncs.count
            await asyncio.gather(*(root.node.flush() for _ in range(50)))
            assert syncs.count == before, "nothing was written"

    asyncio.run(body())


@pytest.mark.parametrize("kind", SYNCS)
def test_a_flush_is_not_acknowledged_by_syncs_that_began_before_its_data(
    kind: str, tmp_path: Path, syncs: Syncs
) -> None:
    async def flush(node: Node, name: str) -> None:
        await node.flush()
        syncs.log.append(name)

    async def body() -> None:
        await create(kind, tmp_path)
        async with opened(kind, tmp_path) as (host, disk), host.access(disk, write=True) as root:
            await root.node.write(0, b"x")
            await root.node.flush()
            await root.node.write(CLUSTER, b"x" * CLUSTER)
            syncs.log.clear()
            syncs.gate.clear()
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(flush(root.node, "first"))
                await reached(lambda: syncs.count > 0)
                await root.node.write(2 * CLUSTER, b"y" * CLUSTER)
                syncs.log.append("written")
                tasks.create_task(flush(root.node, "later"))
                await asyncio.sleep(0.01)
                syncs.gate.set()
        since = syncs.log[syncs.log.index("written") : syncs.log.index("later")]
        until = since.index("first")  # the syncs up to here are of the first flush
        assert since[until:].count("sync") == since[until:].count("synced") == SYNCS[kind]

    asyncio.run(body())


@pytest.mark.parametrize(("kind", "nth"), [(kind, nth) for kind, count in SYNCS.items() for nth in range(count)])
def test_a_failed_sync_poisons_until_the_file_is_opened_anew(kind: str, nth: int, tmp_path: Path, syncs: Syncs) -> None:
    """Reads show what was written, and writes go on; nothing is called durable any more, and no reopening hides it."""

    async def poisoned(host: Host, disk: Node) -> None:
        async with host.access(disk, write=True) as root:
            await root.node.write(0, b"kept")
            await root.node.flush()
            await root.node.write(CLUSTER, b"x" * CLUSTER)
            syncs.failing_at = syncs.count + nth
            before = syncs.count
            for _ in range(3):
                with pytest.raises(IoFailure):
                    await root.node.flush()
            tried = syncs.count
            await root.node.write(2 * CLUSTER, b"late")
            with pytest.raises(IoFailure):
                await root.node.write(3 * CLUSTER, b"late", fua=True)
            with pytest.raises(IoFailure):
                await root.node.flush()
            assert await root.node.read(CLUSTER, 1) == b"x"
            assert await root.node.read(2 * CLUSTER, 4) == b"late"
            assert tried - before <= SYNCS[kind] + 2, "the file that failed is never synced again"

    async def body() -> None:
        await create(kind, tmp_path)
        async with opened(kind, tmp_path) as (host, disk):
            await poisoned(host, disk)
            file = {"driver": "file", "node-name": "file", "filename": str(tmp_path / "disk")}
            with pytest.raises(IoFailure):
                await reopened(host, {**described(kind, tmp_path), "read-only": True})
            for options in (described(kind, tmp_path), file, {**file, "cache": {"direct": True}}):
                with suppress(BlockjobsError):
                    await reopened(host, options)
                async with host.access(disk, write=True) as root:
                    with pytest.raises(IoFailure):
                        await root.node.flush()
            with suppress(IoFailure):  # a format tells of what is lost
                await blockdev_del(host, node_name="disk")
            assert not host.graph.nodes()
            again = await host.blockdev_add(described(kind, tmp_path))
            async with host.access(again, write=True) as root:
                await root.node.write(CLUSTER, b"anew")
                await root.node.flush()
                assert await root.node.read(0, 4) == b"kept"

    asyncio.run(body())
