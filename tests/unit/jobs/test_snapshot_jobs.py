"""snapshot-save, -load and -delete on real images, with a machine of the program's own."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from blockjobs.base.errors import UsageError
from blockjobs.block.node import Node
from blockjobs.host import Host
from blockjobs.jobs.machine_state import ByteSource, CallbackMachine
from blockjobs.jobs.snapshot_group import snapshots_of
from blockjobs.lifecycle.handle import JobHandle

SIZE = 1 << 20


class Machine(CallbackMachine):
    """A machine whose memory is a few megabytes, and who can be told to fail."""

    def __init__(self) -> None:
        super().__init__(save=self.out, load=self.back, stop=self.halt, cont=self.go, is_running=lambda: self.runs)
        self.memory = b"memory 0 " * 300_000
        self.runs = True
        self.log: list[str] = []
        self.fails = ""
        self.dies = False

    async def out(self) -> AsyncIterator[bytes]:
        assert not self.runs
        if self.fails == "save":
            yield b"half of it"
            raise UsageError("no more")
        for start in range(0, len(self.memory), 700_001):
            yield self.memory[start : start + 700_001]

    async def back(self, source: ByteSource) -> None:
        assert not self.runs
        if self.fails == "load":
            raise UsageError("not that one")
        found = b""
        while piece := await source.read():
            found += piece
        assert len(found) == source.length
        self.memory = found

    async def halt(self) -> None:
        self.log.append("stop")
        self.runs = False

    async def go(self) -> None:
        self.log.append("cont")
        if self.dies:
            raise UsageError("it is dead")
        self.runs = True


class World:
    def __init__(self, host: Host, a: Node, b: Node, machine: Machine) -> None:
        self.host, self.nodes, self.machine = host, [a, b], machine

    async def write(self, content: bytes) -> None:
        for node in self.nodes:
            async with self.host.access(node, write=True) as root:
                await root.node.write(4096, content)
        self.machine.memory = content * 300_000

    async def shown(self) -> list[bytes]:
        found = [self.machine.memory[:8]]
        for node in self.nodes:
            async with self.host.access(node) as root:
                found.append(await root.node.read(4096, 8))
        return found

    def names(self) -> list[list[str]]:
        return [[each.name for each in snapshots_of(node).entries] for node in self.nodes]


async def ended(job: JobHandle) -> str | None:
    while job.status != "concluded":
        await asyncio.sleep(0.001)
    error = job.error
    job.dismiss()
    return error


def in_world(tmp_path: Path, work: Callable[[World], Awaitable[None]]) -> None:
    async def run() -> None:
        async with Host() as host:
            for name in "ab":
                await host.create_image(str(tmp_path / name), "qcow2", SIZE)
            a, b = [await host.open(str(tmp_path / name), node_name=name) for name in "ab"]
            machine = Machine()
            host.machine.without = machine
            await work(World(host, a, b, machine))
            assert machine.runs

    asyncio.run(run())


def test_machine_and_disks_go_back_together(tmp_path: Path) -> None:
    async def work(world: World) -> None:
        await world.write(b"content1")
        assert await ended(await world.host.snapshot_save("one", world.nodes)) is None
        await world.write(b"content2")
        assert await ended(await world.host.snapshot_save("two", world.nodes, vmstate=world.nodes[1])) is None
        await world.write(b"content3")
        assert await ended(await world.host.snapshot_load("one", world.nodes)) is None
        assert await world.shown() == [b"content1"] * 3
        assert await ended(await world.host.snapshot_load("two", world.nodes, vmstate=world.nodes[1])) is None
        assert await world.shown() == [b"content2"] * 3
        assert world.names() == [["one", "two"]] * 2
        assert world.machine.log == ["stop", "cont"] * 4
        assert await ended(await world.host.snapshot_delete("one", world.nodes)) is None
        assert await ended(await world.host.snapshot_delete("two", world.nodes)) is None
        assert world.names() == [[], []]

    in_world(tmp_path, work)


@pytest.mark.parametrize("fails", ["save", "load"])
def test_a_machine_that_fails_leaves_all_as_it_was(tmp_path: Path, fails: str) -> None:
    async def work(world: World) -> None:
        await world.write(b"content1")
        assert await ended(await world.host.snapshot_save("one", world.nodes)) is None
        await world.write(b"content2")
        world.machine.fails = fails
        start = world.host.snapshot_load("one", world.nodes) if fails == "load" else None
        error = await ended(await (start or world.host.snapshot_save("two", world.nodes)))
        assert error == ("not that one" if fails == "load" else "no more")
        assert await world.shown() == [b"content2"] * 3
        assert world.names() == [["one"]] * 2
        world.machine.fails = ""
        assert await ended(await world.host.snapshot_load("one", world.nodes)) is None
        assert await world.shown() == [b"content1"] * 3

    in_world(tmp_path, work)


@pytest.mark.parametrize("fails", ["save", "load"])
def test_of_two_errors_the_first_is_told(tmp_path: Path, fails: str) -> None:
    async def work(world: World) -> None:
        assert await ended(await world.host.snapshot_save("one", world.nodes)) is None
        world.machine.fails, world.machine.dies = fails, True
        start = world.host.snapshot_load("one", world.nodes) if fails == "load" else None
        error = await ended(await (start or world.host.snapshot_save("two", world.nodes)))
        assert error == ("not that one" if fails == "load" else "no more")
        assert world.names() == [["one"]] * 2
        world.machine.runs = True

    in_world(tmp_path, work)


def test_bitmaps_refuse_a_load(tmp_path: Path) -> None:
    async def work(world: World) -> None:
        assert await ended(await world.host.snapshot_save("one", world.nodes)) is None
        await world.host.add_bitmap(world.nodes[1], "daily")
        error = await ended(await world.host.snapshot_load("one", world.nodes))
        assert error == "Could not load snapshot 'one' on 'b': Device has active dirty bitmaps"

    in_world(tmp_path, work)


def test_what_a_crash_left_is_decided_by_the_first_image(tmp_path: Path) -> None:
    async def work(world: World) -> None:
        a, b = (snapshots_of(node) for node in world.nodes)
        await a.write_vm_state(0, b"state")
        first = await a.create("lost", date_ns=1, vm_state_bytes=5, group=b"g1")
        await b.create("lost", date_ns=1, group=b"g1")
        await a.write_vm_state(0, b"state")
        second = await a.create("kept", date_ns=1, vm_state_bytes=5, group=b"g2")
        await b.create("kept", date_ns=1, group=b"g2")
        await a.settle(second.id)
        assert "snapshots" not in world.nodes[1].driver.info()
        # A disk alone does not know.
        await ended(await world.host.snapshot_delete("x", world.nodes[1:]))
        assert [each.is_settled for each in b.entries] == [False, False]
        assert await ended(await world.host.snapshot_delete("x", world.nodes)) is None
        assert first.id not in [each.id for each in a.entries]
        assert world.names() == [["kept"]] * 2
        assert all(each.is_settled for each in b.entries)

    in_world(tmp_path, work)


def test_another_machines_state_is_refused(tmp_path: Path) -> None:
    async def work(world: World) -> None:
        await world.write(b"content1")
        assert await ended(await world.host.snapshot_save("one", world.nodes)) is None
        await world.write(b"content2")
        machine, world.host.machine.without = world.host.machine.without, Host().machine.without
        error = await ended(await world.host.snapshot_load("one", world.nodes))
        assert error == "The snapshot has the state of a machine, and there is no machine here"
        assert await world.shown() == [b"content2"] * 3
        world.host.machine.without = machine

    in_world(tmp_path, work)
