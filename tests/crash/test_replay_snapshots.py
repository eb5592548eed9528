"""Internal snapshots under power cuts and failing requests: disk and snapshots are old or new, never between."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass

import pytest
from replay import SEEDS, blank, graph_over, opened
from workload import KIB

from blockjobs.base.errors import BlockjobsError
from blockjobs.block.drivers.qcow2 import transaction
from blockjobs.block.drivers.qcow2.check import check_image
from blockjobs.block.drivers.qcow2.create import NewImage
from blockjobs.block.internal_snapshots import GroupMark, InternalSnapshots, Stage
from blockjobs.block.node import Node
from blockjobs.testing.crash import CrashState, RecordingMedium, WriteLog, crash_states
from blockjobs.testing.disk import Pages, SimDisk
from blockjobs.testing.faults import Fault, FaultPlan, FaultyMedium, Operation

SIZE = 96 * KIB
IMAGES = {
    "4k": NewImage(size=SIZE, cluster_size=4 * KIB),
    "refcounts of 64 bits": NewImage(size=SIZE, cluster_size=512, refcount_bits=64),
    "extended L2": NewImage(size=SIZE, cluster_size=16 * KIB, extended_l2=True),
    "version 2": NewImage(size=SIZE, cluster_size=4 * KIB, is_v2=True),
}
MUCH_STATE = random.Random(5).randbytes(70_000)
STATE = MUCH_STATE[:5000]


@dataclass(frozen=True)
class World:
    """What a disk and its snapshots hold: contents by id."""

    content: bytes
    kept: tuple[tuple[str, bytes], ...] = ()

    def with_write(self, at: int, content: bytes) -> "World":
        return World(self.content[:at] + content + self.content[at + len(content) :], self.kept)


def snapshots_of(node: Node) -> InternalSnapshots:
    found = node.driver.internal_snapshots
    assert found is not None
    return found


async def write(node: Node, world: World) -> World:
    content = random.Random(len(world.kept)).randbytes(9 * KIB)
    await node.write(2 * KIB, content)
    await node.flush()
    return world.with_write(2 * KIB, content)


async def compress(node: Node, world: World) -> World:
    content = b"compress" * (2 * KIB)
    await node.write(32 * KIB, content, compressed=True)
    await node.flush()
    return world.with_write(32 * KIB, content)


async def create(node: Node, world: World) -> World:
    snapshots = snapshots_of(node)
    await snapshots.write_vm_state(0, STATE)
    made = await snapshots.create("s", date_ns=10**18 + 5, vm_state_bytes=len(STATE))
    return World(world.content, (*world.kept, (made.id, world.content)))


async def apply(node: Node, world: World) -> World:
    if not world.kept:
        return world
    id, content = world.kept[0]
    await snapshots_of(node).apply(id)
    return World(content, world.kept)


async def delete(node: Node, world: World) -> World:
    if not world.kept:
        return world
    await snapshots_of(node).delete(world.kept[0][0])
    return World(world.content, world.kept[1:])


async def save(node: Node, world: World) -> World:
    """As `create`, with machine state that several L2 tables map in an image of small clusters."""
    await snapshots_of(node).write_vm_state(0, MUCH_STATE)
    made = await snapshots_of(node).create("s", date_ns=0, vm_state_bytes=len(MUCH_STATE))
    return World(world.content, (*world.kept, (made.id, world.content)))


async def grow(node: Node, world: World) -> World:
    """The disk becomes longer where machine state has been left."""
    await snapshots_of(node).write_vm_state(0, MUCH_STATE)
    await node.flush()
    length = len(world.content) + 40 * KIB
    await node.resize(length)
    return World(world.content.ljust(length, b"\0"), world.kept)


async def settle(node: Node, world: World) -> World:
    """A snapshot of a group, which is one like any other then."""
    mark = GroupMark(stage=Stage.SAVING, group="group", is_first=True, peers=())
    made = await snapshots_of(node).create("s", date_ns=0, mark=mark)
    await snapshots_of(node).mark(made.id, mark.at(Stage.SAVED))
    [*_, last] = snapshots_of(node).entries
    assert last.is_shown
    return World(world.content, (*world.kept, (made.id, world.content)))


Step = Callable[[Node, World], Awaitable[World]]
STEPS: dict[str, Step] = {step.__name__: step for step in (write, compress, create, apply, delete)}
ALL_STEPS: dict[str, Step] = STEPS | {"save": save, "grow": grow, "settle": settle}


async def start_of(image: NewImage) -> tuple[dict[str, Pages], World]:
    """An image with some clusters and one snapshot, after which it was written again."""
    start = await blank(image)
    disks = {name: SimDisk(pages) for name, pages in start.items()}
    world = World(bytes(SIZE))
    async with opened(disks, {"file": "disk"}) as node:
        first = random.Random(1).randbytes(40 * KIB)
        await node.write(0, first)
        world = await create(node, world.with_write(0, first))
        await node.write(20 * KIB, first[: 8 * KIB])
        world = world.with_write(20 * KIB, first[: 8 * KIB])
    return {name: disk.pages for name, disk in disks.items()}, world


async def wrong_with(images: dict[str, Pages], *, strict: bool) -> str:
    """What a check finds but leaks; flags that do no harm are only counted if `strict`."""
    async with graph_over({"disk": SimDisk(images["disk"])}, read_only=True) as graph:
        result = await check_image(graph.node("disk"), offload=graph.offload)
    found = [line for line in result.problems if line.startswith("ERROR")]
    return "; ".join(line for line in found if strict or "OFLAG_COPIED" not in line)


async def seen(images: dict[str, Pages]) -> World:
    """What somebody finds who opens the image for writing, and applies each snapshot in turn."""
    disks = {name: SimDisk(pages) for name, pages in images.items()}
    async with opened(disks, {"file": "disk"}) as node:
        content = await node.read(0, node.length)
        kept = []
        for each in list(snapshots_of(node).entries):
            state = await snapshots_of(node).read_vm_state(each.id, 0, each.vm_state_bytes)
            assert state == MUCH_STATE[: each.vm_state_bytes]
            await snapshots_of(node).apply(each.id)
            kept.append((each.id, await node.read(0, node.length)))
    assert not (wrong := await wrong_with({name: disk.pages for name, disk in disks.items()}, strict=False)), wrong
    return World(content, tuple(kept))


def is_between(found: World, before: World, after: World) -> bool:
    """Whether a crash while `before` became `after` may leave this: writes may be there in part, the rest may not."""
    if found.kept not in (before.kept, after.kept):
        return False
    if found.content in (before.content, after.content):
        return True
    if len({len(world.content) for world in (found, before, after)}) > 1:
        return False
    return before.kept == after.kept and all(
        found.content[at : at + 512] in (before.content[at : at + 512], after.content[at : at + 512])
        for at in range(0, SIZE, 512)
    )


async def judge(image: NewImage, steps: tuple[str, ...], samples: int) -> None:
    start, world = await start_of(image)
    log = WriteLog()
    media = {name: RecordingMedium(SimDisk(pages), log, name) for name, pages in start.items()}
    history = [(log.mark("start"), world)]
    async with opened(media, {"file": "disk"}) as node:
        for name in steps:
            world = await ALL_STEPS[name](node, world)
            history.append((log.mark(name), world))
    for state in crash_states(log, start, seed=0, exhaustive_up_to=4, samples=samples):
        await check_state(state, history, steps)


async def check_state(state: CrashState, history: list[tuple[int, World]], steps: tuple[str, ...]) -> None:
    place = max(index for index, (at, _) in enumerate(history) if at < state.issued or index == 0)
    before, after = history[place][1], history[min(place + 1, len(history) - 1)][1]
    assert not (wrong := await wrong_with(state.images, strict=False)), f"{steps} {state.story}: {wrong}"
    found = await seen(state.images)
    applied = "apply" in steps and before.content != after.content and found.content not in (
        before.content, after.content)  # fmt: skip
    assert is_between(found, before, after), f"{steps} {state.story}: neither before nor after {place}"
    assert not applied or steps[place] != "apply", f"{steps} {state.story}: half applied"


MORE = {
    "4k": IMAGES["4k"],
    "extended L2": IMAGES["extended L2"],
    "lazy refcounts": NewImage(size=SIZE, cluster_size=4 * KIB, lazy_refcounts=True),
    # The vm state area begins right at the end of the disk, and an L2 table maps 32 KiB.
    "512": NewImage(size=SIZE, cluster_size=512),
}


@pytest.mark.parametrize("early", [False, True], ids=["", "many commits"])
@pytest.mark.parametrize("name", MORE)
@pytest.mark.parametrize("step", ["create", "apply", "delete", "save", "grow", "settle"])
def test_power_cuts_of_single_steps(name: str, step: str, early: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`early`: a commit is made wherever one may be made, as in images with millions of clusters."""
    if early:
        monkeypatch.setattr(transaction, "PENDING_FREES_MAX", 0)
    asyncio.run(judge(MORE[name], (step,), samples=4 if SEEDS == 1 else 20))


KINDS = {
    "a write": Fault(nth=0, operation=Operation.WRITE),
    "a read": Fault(nth=0, operation=Operation.READ),
    "a sync": Fault(nth=0, operation=Operation.SYNC),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", ["create", "apply", "delete"])
def test_a_failing_request(step: str, kind: str) -> None:
    """The step has an error and nothing has changed, or it is done; and after reopening a second try succeeds."""

    async def once(nth: int) -> bool:
        start, before = await start_of(IMAGES["4k"])
        plan = FaultPlan()
        async with opened({name: SimDisk(pages.copy()) for name, pages in start.items()}, {"file": "disk"}) as node:
            done = await STEPS[step](node, before)
        disks = {name: SimDisk(pages) for name, pages in start.items()}
        media = {name: FaultyMedium(disk, plan) for name, disk in disks.items()}
        failed = False
        with suppress(BlockjobsError):
            async with opened(media, {"file": "disk"}) as node:
                assert await node.read(0, SIZE) == before.content
                fault = KINDS[kind]
                plan.add(Fault(nth=nth, operation=fault.operation))
                try:
                    await STEPS[step](node, before)
                except BlockjobsError:
                    failed = True
                    content = await node.read(0, SIZE)
                    kept = tuple(each.id for each in snapshots_of(node).entries)
                    assert (content, kept) == (before.content, tuple(id for id, _ in before.kept)), (step, kind, nth)
        images = {name: disk.pages for name, disk in disks.items()}
        found = await seen(images)
        # A disk that has failed a sync tells nothing more; what it has then is the old or the new.
        unsure = kind == "a sync"
        assert found == done or (failed and found == before), (step, kind, nth)
        assert found == before or not failed or unsure, (step, kind, nth)
        if found == before:
            async with opened({name: SimDisk(pages) for name, pages in images.items()}, {"file": "disk"}) as node:
                assert await STEPS[step](node, before) == done
        return plan.hits > 0

    async def at_every_place() -> None:
        for nth in range(1, 200):
            if not await once(nth):
                assert nth > 1
                return
        raise AssertionError("never ends")

    asyncio.run(at_every_place())


def test_a_count_that_does_not_fit() -> None:
    async def run() -> None:
        image = NewImage(size=SIZE, cluster_size=4 * KIB, refcount_bits=1)
        disks = {name: SimDisk(pages) for name, pages in (await blank(image)).items()}
        async with opened(disks, {"file": "disk"}) as node:
            await node.write(0, b"x" * 20 * KIB)
            with pytest.raises(OSError, match="Numerical result out of range"):
                await snapshots_of(node).create("s", date_ns=0)
            assert not snapshots_of(node).entries
            assert await node.read(0, 20 * KIB) == b"x" * 20 * KIB
        assert not await wrong_with({name: disk.pages for name, disk in disks.items()}, strict=True)

    asyncio.run(run())
