"""Frozen views of disks in use, on real files with real threads: pulled by a reader, pushed by a job."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

import disks
import pytest

from blockjobs.base.span import Span
from blockjobs.block.claims import ALL, Perm
from blockjobs.host import Host

if TYPE_CHECKING:
    from pathlib import Path

    from blockjobs.block.node import Node

pytestmark = pytest.mark.qemu

MIB = 1 << 20
LENGTH = 16 * MIB


class Guest:
    """Writes all over a disk until it is told to stop, and stands still while that is drained, as an export does."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.drains = 0
        self.busy = False

    def quiesce_begin(self) -> None:
        self.drains += 1

    def quiesce_end(self) -> None:
        self.drains -= 1

    def is_quiet(self) -> bool:
        return not self.busy

    async def quiet(self) -> None:
        while self.busy:
            await asyncio.sleep(0.001)

    async def live(self, host: Host, node: Node, done: asyncio.Event) -> None:
        needs = Perm.CONSISTENT_READ | Perm.WRITE
        user = await host.graph.claim("a guest", node, needs=needs, shares=ALL, user=self)
        while not done.is_set():
            await asyncio.sleep(0.001)
            if not self.drains:
                self.busy = True
                await self.request(user.node)
                self.busy = False
        await host.graph.release(user)

    async def request(self, node: Node) -> None:
        chance = self.chance
        length = chance.choice((512, 4096, 100_000, MIB))
        at = chance.randrange(LENGTH - length)
        if chance.random() < 0.2:
            await node.zero(Span(at, length))
        else:
            await node.write(at, (chance.randbytes(16) * (length // 16 + 1))[:length])


async def fleecing(host: Host, directory: Path, **members: object) -> tuple[Node, Node]:
    """The disk as guests use it, and its frozen view; what they overwrite is kept in a temporary overlay."""
    await host.open(str(directory / "disk.qcow2"), node_name="disk")
    file = {"driver": "file", "filename": str(directory / "temporary.qcow2")}
    await host.blockdev_add({"driver": "qcow2", "node-name": "temporary", "file": file, "backing": "disk"})
    top = await host.blockdev_add(
        {"driver": "copy-before-write", "node-name": "top", "file": "disk", "target": "temporary", **members}
    )
    view = await host.blockdev_add(
        {"driver": "snapshot-access", "node-name": "view", "file": "top", "discard": "unmap"}
    )
    return top, view


def prepare(directory: Path) -> bytes:
    """A disk with something on it; returns that."""
    disks.make_full(directory, "disk.qcow2", mib=LENGTH // MIB)
    disks.make(directory, "temporary.qcow2", size=str(LENGTH))
    disks.make(directory, "target.qcow2", size=str(LENGTH))
    disks.run("qemu-img", "convert", "-O", "raw", "disk.qcow2", "before.raw", cwd=directory)
    return (directory / "before.raw").read_bytes()


def test_a_reader_pulls_the_first_moment(tmp_path: Path) -> None:
    before = prepare(tmp_path)

    async def main() -> None:
        async with Host() as host:
            top, view = await fleecing(host, tmp_path)
            done = asyncio.Event()
            pulled = bytearray(LENGTH)

            async def pull() -> None:
                for piece in Span(0, LENGTH).split(200_000):
                    pulled[piece.at : piece.end] = await view.read(piece.at, piece.length)
                done.set()

            async with host.access(top), host.access(view):
                async with asyncio.TaskGroup() as tasks:
                    for seed in range(3):
                        tasks.create_task(Guest(seed).live(host, top, done))
                    tasks.create_task(pull())
                assert await view.read(0, LENGTH) == before
                assert await top.read(0, LENGTH) != before
            assert pulled == before

    asyncio.run(main())
    assert disks.check_exit_code(tmp_path / "disk.qcow2") == 0
    assert disks.check_exit_code(tmp_path / "temporary.qcow2") == 0


@pytest.mark.parametrize("options", [{}, {"compress": True}, {"discard_source": True}])
def test_a_job_pushes_the_first_moment(options: dict[str, object], tmp_path: Path) -> None:
    prepare(tmp_path)

    async def main() -> None:
        async with Host() as host:
            top, view = await fleecing(host, tmp_path)
            target = await host.open(str(tmp_path / "target.qcow2"), node_name="target")
            done = asyncio.Event()

            async def push() -> None:
                job = await host.backup(view, target, **options)
                outcome = await job.outcome()
                assert outcome.error is None, outcome
                done.set()

            async with asyncio.TaskGroup() as tasks:
                for seed in range(3):
                    tasks.create_task(Guest(seed).live(host, top, done))
                tasks.create_task(push())

    asyncio.run(main())
    assert disks.same_content(tmp_path, "before.raw", "raw", "target.qcow2", "qcow2")
    for name in ("disk", "temporary", "target"):
        assert disks.check_exit_code(tmp_path / f"{name}.qcow2") == 0
