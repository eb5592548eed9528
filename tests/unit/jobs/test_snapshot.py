"""External snapshots under a writing guest: which bytes are in which layer, one instant, and rollback."""

import asyncio
import json
import random
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from blockjobs.base.errors import BlockjobsError, IoFailure, UsageError
from blockjobs.block.claims import ALL, Perm
from blockjobs.block.drivers.qcow2.create import NewImage
from blockjobs.block.node import Node
from blockjobs.block.users import Root
from blockjobs.jobs.snapshot import BlockdevSnapshot, BlockdevSnapshotSync, SnapshotAction, SnapshotSyncAction
from blockjobs.jobs.transaction import AbortAction, Action, run_transaction
from blockjobs.testing.clock import run
from blockjobs.testing.disk import Pages
from blockjobs.testing.faults import Fault
from blockjobs.testing.host import SimHost

K = 1024
SIZE = 1024 * K


class Guest:
    """Writes to a node at random, several requests at once, and knows what the node must read as."""

    def __init__(self, seed: int) -> None:
        self.model = bytearray(SIZE)
        self.frozen: bytes | None = None
        self.root: Root
        self._chance = random.Random(seed)
        self._stops, self._busy, self._over = 0, 0, False
        self._changed = asyncio.Condition()
        self._tasks: list[asyncio.Task[None]] = []

    async def begin(self, host: SimHost, node: Node) -> None:
        needs = Perm.CONSISTENT_READ | Perm.WRITE
        self.root = await host.graph.claim("an unnamed block device", node, needs, ALL & ~Perm.RESIZE, user=self)
        self._tasks = [asyncio.get_running_loop().create_task(self._write(index)) for index in range(4)]

    async def end(self) -> None:
        self._over = True
        for task in self._tasks:
            await task

    async def _write(self, lane: int) -> None:
        """Each lane has sectors of its own, as the outcome of overlapping writes would be open."""
        while not self._over:
            while self._stops:
                await asyncio.sleep(0.001)
            at = self._chance.randrange(SIZE // 4 // 512) * 2048 + lane * 512
            content = self._chance.randbytes(512)
            self._busy += 1
            await self.root.node.write(at, content)
            self.model[at : at + 512] = content
            self._busy -= 1
            await asyncio.sleep(self._chance.random() * 0.01)

    def quiesce_begin(self) -> None:
        self._stops += 1

    def is_quiet(self) -> bool:
        return not self._busy

    async def quiet(self) -> None:
        while self._busy:
            await asyncio.sleep(0.001)
        self.frozen = bytes(self.model)

    def quiesce_end(self) -> None:
        self.frozen = bytes(self.model)
        self._stops -= 1


def in_host(body: Callable[[SimHost], Awaitable[None]], seed: int) -> None:
    async def main() -> None:
        async with SimHost(seed, latency_s_max=0.02) as host:
            await body(host)

    run(main())


async def pair(host: SimHost, name: str) -> Node:
    """A disk, and an overlay for it that nobody uses yet."""
    node = await host.image(name, NewImage(size=SIZE))
    await host.image(f"{name}-overlay", NewImage(size=SIZE))
    return node


def snapshot(name: str) -> Action:
    return SnapshotAction(data=BlockdevSnapshot(node=name, overlay=f"{name}-overlay"))


def state_of(host: SimHost) -> list[object]:
    return [
        (
            node.name,
            node.read_only,
            node.rights,
            list(node.children.items()),
            [(parent.holder, parent.rights) for parent in node.parents],
        )
        for node in host.graph.nodes()
    ]


@pytest.mark.parametrize("seed", range(12))
def test_each_write_is_in_the_layer_of_its_time(seed: int) -> None:
    async def body(host: SimHost) -> None:
        nodes = [await pair(host, name) for name in ("a", "b")]
        guests = [Guest(seed * 2 + number) for number in range(2)]
        for guest, node in zip(guests, nodes, strict=True):
            await guest.begin(host, node)
        await asyncio.sleep(random.Random(seed).random())
        await run_transaction(host, [snapshot("a"), snapshot("b")])
        instants = [guest.frozen for guest in guests]
        await asyncio.sleep(0.5)
        for guest in guests:
            await guest.end()
        for name, guest, node, instant in zip("ab", guests, nodes, instants, strict=True):
            overlay = host.graph.node(f"{name}-overlay")
            assert guest.root.node is overlay and overlay.children["backing"] is node and node.read_only
            assert await node.read(0, SIZE) == instant  # nothing lost, and nothing came later
            assert await overlay.read(0, SIZE) == guest.model
            assert guest.model != instant

    in_host(body, seed)


@pytest.mark.parametrize("seed", range(6))
def test_a_transaction_that_fails_has_never_been(seed: int) -> None:
    async def body(host: SimHost) -> None:
        nodes = [await pair(host, name) for name in ("a", "b")]
        guests = [Guest(seed * 2 + number) for number in range(2)]
        for guest, node in zip(guests, nodes, strict=True):
            await guest.begin(host, node)
        before = state_of(host)
        await asyncio.sleep(random.Random(seed).random())
        with pytest.raises(UsageError, match="Transaction aborted using Abort action"):
            await run_transaction(host, [snapshot("a"), snapshot("b"), AbortAction(data=AbortAction.Abort())])
        assert state_of(host) == before
        await asyncio.sleep(0.2)
        for guest, node in zip(guests, nodes, strict=True):
            await guest.end()
            assert await node.read(0, SIZE) == guest.model
            assert await host.graph.node(f"{node.name}-overlay").read(0, SIZE) == bytes(SIZE)

    in_host(body, seed)


@pytest.mark.parametrize("disk", ["a-file", "a-overlay-file"])
def test_a_failure_at_any_request_leaves_all_as_it_was(disk: str) -> None:
    nth, over = 1, False
    while not over:
        over = attempt(disk, nth)
        nth += 1
    assert nth > (3 if disk == "a-file" else 1)  # the node is flushed; an overlay is not touched


def attempt(disk: str, nth: int) -> bool:
    """Fail the n-th request of a snapshot; returns whether there was no such request."""
    done = poisoned = False

    async def body(host: SimHost) -> None:
        nonlocal done, poisoned
        node = await pair(host, "a")
        guest = Guest(1)
        await guest.begin(host, node)
        await asyncio.sleep(0.2)
        async with host.graph.drained(None):
            before = state_of(host)
            host.faults[disk].add(Fault(nth=nth))
            try:
                await run_transaction(host, [snapshot("a")])
            except BlockjobsError:
                assert state_of(host) == before
            else:
                done = True
            host.faults[disk].cure()
        await guest.end()
        assert await guest.root.node.read(0, SIZE) == guest.model
        poisoned = bool(host.faults[disk].failed_syncs)

    try:
        in_host(body, 3)
    except IoFailure:  # a disk whose sync has failed once cannot be closed well
        assert poisoned
    return done


@pytest.mark.parametrize("used", [False, True])
def test_an_overlay_that_was_made_lives_as_long_as_it_is_used(used: bool, tmp_path: Path) -> None:
    made = str(tmp_path / "overlay.qcow2")
    wanted = BlockdevSnapshotSync(node_name="a", snapshot_file=made, snapshot_node_name="n")

    async def body(host: SimHost) -> None:
        node = await host.image("a", NewImage(size=SIZE))
        if used:
            guest = await host.graph.claim("x", node, Perm.CONSISTENT_READ | Perm.WRITE, ALL)
        await run_transaction(host, [SnapshotSyncAction(data=wanted)])
        assert node.read_only
        assert any(each.name == "n" for each in host.graph.nodes()) is used
        if used:
            await guest.node.write(0, b"new")
            await host.graph.release(guest)
        assert [each.name for each in host.graph.nodes()] == ["a", "a-file"]
        image = await host.blockdev_add(
            {"driver": "qcow2", "node-name": "n", "file": {"driver": "file", "filename": made}, "backing": "a"}
        )
        assert await image.read(0, 3) == (b"new" if used else bytes(3))
        assert await node.read(0, 3) == bytes(3)

    in_host(body, 0)


def test_a_frozen_link_is_not_moved() -> None:
    async def body(host: SimHost) -> None:
        node = await pair(host, "a")
        above = await host.blockdev_add({"driver": "raw", "node-name": "above", "file": "a"})
        before = state_of(host)
        above.edges["file"].freeze("somebody")
        with pytest.raises(UsageError, match="Cannot change frozen 'file' link from 'above' to 'a'"):
            await run_transaction(host, [snapshot("a")])
        assert state_of(host) == before
        above.edges["file"].thaw("somebody")
        await run_transaction(host, [snapshot("a")])
        assert above.children["file"].backing is node

    in_host(body, 0)


def test_data_of_the_node_is_durable() -> None:
    async def body(host: SimHost) -> None:
        node = await pair(host, "a")
        guest = await host.graph.claim("x", node, Perm.CONSISTENT_READ | Perm.WRITE, ALL)
        await guest.node.write(0, b"flushed by nobody yet")
        await run_transaction(host, [snapshot("a")])
        disk = host.disks["a-file"]
        disk.cut_power(1)
        survivor = await host.image("again", Pages(bytes(read_all(disk))))
        assert await survivor.read(0, 21) == b"flushed by nobody yet"

    in_host(body, 0)


def read_all(disk: object) -> bytearray:
    content = bytearray(disk.size())
    disk.read_into(0, memoryview(content))
    return content


@pytest.mark.qemu
def test_an_overlay_elsewhere_finds_its_backing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("elsewhere").mkdir()
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "a.img", "1M"], check=True)

    async def body(host: SimHost) -> None:
        file = {"driver": "file", "filename": "a.img"}
        await host.blockdev_add({"driver": "qcow2", "node-name": "a", "file": file})
        same = BlockdevSnapshotSync(node_name="a", snapshot_file="a.img", snapshot_node_name="n")
        with pytest.raises(UsageError, match="Trying to create an image with the same filename as the backing file"):
            await run_transaction(host, [SnapshotSyncAction(data=same)])
        for name in ("beside.img", "elsewhere/n.img"):
            wanted = BlockdevSnapshotSync(node_name="a", snapshot_file=name, snapshot_node_name="n")
            await run_transaction(host, [SnapshotSyncAction(data=wanted)])

    in_host(body, 0)
    for name, backing in (("beside.img", "a.img"), ("elsewhere/n.img", str(tmp_path / "a.img"))):
        told = subprocess.run(["qemu-img", "info", "--backing-chain", "--output=json", name], capture_output=True)
        assert json.loads(told.stdout)[0]["backing-filename"] == backing
