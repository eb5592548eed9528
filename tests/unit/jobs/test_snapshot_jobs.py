"""snapshot-save, -load and -delete on real images, with a machine of the program's own."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from blockjobs.base.errors import UsageError
from blockjobs.block.drivers.qcow2.header import read_header
from blockjobs.block.drivers.qcow2.records import read_snapshots
from blockjobs.block.internal_snapshots import Stage
from blockjobs.block.node import Node
from blockjobs.host import Host
from blockjobs.jobs.machine_state import ByteSource, CallbackMachine
from blockjobs.jobs.snapshot_group import marks, snapshots_of
from blockjobs.jobs.undoable_load import UNDO_NAME
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
        self.when_loading: Callable[[], None] = lambda: None

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
        self.when_loading()
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


def copy_of(tmp_path: Path, place: Path) -> None:
    """The images as a crash would leave them now."""
    place.mkdir()
    for name in "ab":
        (place / name).write_bytes((tmp_path / name).read_bytes())


async def content_of(place: Path, order: str, **options: bool) -> dict[str, bytes]:
    """What the disks show when they are opened in that order, for writing or not."""
    found = {}
    async with Host() as host:
        for name in order:
            node = await host.open(str(place / name), node_name=name, **options)
            async with host.access(node) as root:
                found[name] = await root.node.read(4096, 8)
    return found


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_a_crash_while_loading_is_taken_back_at_the_next_open(tmp_path: Path, order: str) -> None:
    async def work(world: World) -> None:
        await world.write(b"content1")
        assert await ended(await world.host.snapshot_save("one", world.nodes)) is None
        await world.write(b"content2")
        world.machine.when_loading = lambda: copy_of(tmp_path, tmp_path / "crash")
        assert await ended(await world.host.snapshot_load("one", world.nodes)) is None

    in_world(tmp_path, work)
    crashed, before = tmp_path / "crash", dict.fromkeys("ab", b"content2")
    assert asyncio.run(content_of(crashed, order, read_only=True)) == before
    assert [qcow2_snapshots(crashed / name) for name in "ab"] == [["one", UNDO_NAME]] * 2
    for _ in range(2):
        assert asyncio.run(content_of(crashed, order)) == before
        assert [qcow2_snapshots(crashed / name) for name in "ab"] == [["one"]] * 2


def test_an_image_whose_first_is_not_there_is_not_written(tmp_path: Path) -> None:
    async def work(world: World) -> None:
        await world.write(b"content1")
        assert await ended(await world.host.snapshot_save("one", world.nodes)) is None
        await world.write(b"content2")
        world.machine.when_loading = lambda: copy_of(tmp_path, tmp_path / "crash")
        assert await ended(await world.host.snapshot_load("one", world.nodes)) is None

    in_world(tmp_path, work)
    for name in "ab":
        (tmp_path / name).unlink()
    first, b = tmp_path / "crash" / "a", tmp_path / "crash" / "b"
    first.rename(tmp_path / "elsewhere")
    kept = b.read_bytes()
    with pytest.raises(UsageError, match=r"middle of a snapshot-load of several images, and only '.*/a' knows"):
        asyncio.run(content_of(tmp_path / "crash", "b"))
    assert asyncio.run(content_of(tmp_path / "crash", "b", read_only=True)) == {"b": b"content1"}
    assert b.read_bytes() == kept
    (tmp_path / "elsewhere").rename(first)
    assert asyncio.run(content_of(tmp_path / "crash", "b")) == {"b": b"content2"}
    assert asyncio.run(content_of(tmp_path / "crash", "a")) == {"a": b"content2"}


@pytest.mark.parametrize("stage", [Stage.SAVING, Stage.UNDO, Stage.DOOMED])
@pytest.mark.parametrize("decided", [False, True])
def test_what_a_crash_left_is_decided_by_the_first_image(tmp_path: Path, stage: Stage, decided: bool) -> None:
    async def work(world: World) -> None:
        await world.write(b"content1")
        prepared = marks(world.nodes, stage, "g1")
        for node, mark in zip(world.nodes, prepared, strict=True):
            made = await snapshots_of(node).create("x", date_ns=1, mark=mark)
            assert made.is_shown == (stage is Stage.DOOMED)
        if decided:
            decision = stage.decision
            assert decision is not None
            await snapshots_of(world.nodes[0]).mark(made.id, prepared[0].at(decision))
        await world.write(b"content2")

    in_world(tmp_path, work)

    async def opened(order: str) -> None:
        async with Host() as host:
            for name in order:
                node = await host.open(str(tmp_path / name), node_name=name)
                async with host.access(node) as root:
                    taken_back = stage is Stage.UNDO and not decided
                    assert await root.node.read(4096, 8) == (b"content1" if taken_back else b"content2")
                shown = [each.name for each in snapshots_of(node).entries if each.is_shown]
                if stage is Stage.DOOMED:
                    assert shown == ([] if decided else ["x"])
                else:
                    assert shown == (["x"] if decided and stage is Stage.SAVING else [])

    for order in ("b", "ab", "ba"):
        asyncio.run(opened(order))
    assert [len(qcow2_snapshots(tmp_path / name)) for name in "ab"] == (
        [1, 1] if (stage, decided) in ((Stage.SAVING, True), (Stage.DOOMED, False)) else [0, 0]
    )


def qcow2_snapshots(image: Path) -> list[str]:
    """The names in its snapshot table, also of those that are not shown."""

    async def read() -> list[str]:
        async with Host() as host:
            options = {"driver": "file", "filename": str(image), "node-name": "f", "read-only": True}
            file = await host.blockdev_add(options)
            header = await read_header(file, read_only=True)
            return [each.name.decode() for each in await read_snapshots(file, header)]

    return asyncio.run(read())


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
