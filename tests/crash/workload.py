"""What a guest might do to a qcow2 image, in random order, and the images that it is done to."""

import asyncio
import random
from dataclasses import dataclass, field
from pathlib import Path

from replay import SEEDS, Guest, blank, opened, shown, with_snapshot

from blockjobs.base.span import Span
from blockjobs.block.drivers.qcow2.create import NewImage
from blockjobs.block.node import Node
from blockjobs.block.vocabulary import ZeroMode
from blockjobs.testing.crash import CrashState, RecordingMedium, WriteLog, crash_states
from blockjobs.testing.disk import Pages, SimDisk

KIB, MIB = 1 << 10, 1 << 20
STATES_MAX = 24


@dataclass(frozen=True)
class Setup:
    """An image for a run.

    Attributes:
        unit: bytes that its writes are around.
        at_once: how many requests are under way at a time.
        grows_to: greatest length, for runs with resizes.
        tuning: options of the qcow2 node.
    """

    image: NewImage
    backing: bool = False
    unit: int = 4 * KIB
    steps: int = 32
    at_once: int = 1
    grows_to: int = 0
    tuning: dict[str, object] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, object]:
        found: dict[str, object] = {"file": "disk", **self.tuning}
        if self.backing:
            found["backing"] = {"driver": "raw", "file": "base"}
        if self.image.data_file_name:
            found["data-file"] = "data"
        return found


SMALL = NewImage(size=MIB, cluster_size=4 * KIB)
TINY_CACHES: dict[str, object] = {"l2-cache-size": KIB, "refcount-cache-size": 2 * KIB}
AHEAD = {"driver": "preallocate", "file": "disk", "prealloc-size": 64 * KIB, "prealloc-align": 4 * KIB}

SETUPS = {
    "64k": Setup(NewImage(size=2 * MIB), unit=64 * KIB),
    "4k": Setup(SMALL),
    "at once": Setup(SMALL, at_once=4),
    "512, refcounts of 64 bits": Setup(NewImage(size=2 * MIB, cluster_size=512, refcount_bits=64), unit=16 * KIB),
    "tiny caches": Setup(NewImage(size=2 * MIB, cluster_size=512), unit=8 * KIB, tuning=TINY_CACHES),
    "refcounts of 1 bit": Setup(NewImage(size=MIB, cluster_size=4 * KIB, refcount_bits=1)),
    "version 2": Setup(NewImage(size=MIB, cluster_size=4 * KIB, is_v2=True)),
    "backing": Setup(SMALL, backing=True),
    "extended L2": Setup(NewImage(size=2 * MIB, cluster_size=32 * KIB, extended_l2=True)),
    "extended L2, backing": Setup(NewImage(size=2 * MIB, cluster_size=16 * KIB, extended_l2=True), backing=True),
    "data file": Setup(NewImage(size=MIB, cluster_size=4 * KIB, data_file_name="data"), at_once=2),
    "raw data file": Setup(NewImage(size=MIB, cluster_size=4 * KIB, data_file_name="data", data_file_raw=True)),
    "zstd": Setup(NewImage(size=MIB, cluster_size=4 * KIB, zstd=True)),
    "preallocated ahead": Setup(SMALL, tuning={"file": AHEAD}),
    "resizes, preallocated ahead": Setup(
        NewImage(size=MIB, cluster_size=512), unit=8 * KIB, grows_to=3 * MIB, tuning={"file": AHEAD}
    ),
    "resizes": Setup(NewImage(size=MIB, cluster_size=512), backing=True, unit=8 * KIB, grows_to=3 * MIB),
}


class Workload:
    """Random requests by one guest."""

    def __init__(self, guest: Guest, node: Node, setup: Setup, chance: random.Random) -> None:
        self.guest, self.node, self.setup, self.chance = guest, node, setup, chance

    def place(self, *, align: int) -> tuple[int, int]:
        """A run of the disk: sectors, units, or many units; some places are hit again and again."""
        unit, end = self.setup.unit, self.node.length // align * align
        bound = min(end, 16 * unit) if self.chance.random() < 0.5 else end
        length = self.chance.choice((512, 3 * 512, unit // 2, unit, 3 * unit, 10 * unit))
        length = min(max(align, length // align * align), bound)
        return self.chance.randrange((bound - length) // align + 1) * align, length

    def content(self, length: int) -> bytes:
        mark = self.chance.randbytes(8)
        return (mark * (length // 8 + 1))[:length]

    async def run(self, steps: int | None = None) -> None:
        """All steps, or so many, several at a time if the setup says so."""
        for _ in range(0, steps or self.setup.steps, self.setup.at_once):
            async with asyncio.TaskGroup() as tasks:
                for _ in range(self.setup.at_once):
                    tasks.create_task(self.step())

    async def step(self) -> None:
        """One random request."""
        node, guest, chance = self.node, self.guest, self.chance
        kinds = ["write", "write", "write", "write", "zero", "zero", "flush", "flush"]
        if self.setup.at_once == 1:
            kinds.append("discard")
        if not self.setup.image.data_file_name:
            kinds.append("compressed")
        if self.setup.grows_to:
            kinds.append("resize")
        match chance.choice(kinds):
            case "write":
                at, length = self.place(align=512)
                content = self.content(length)
                await guest.change(at, content, lambda: node.write(at, content))
            case "zero":
                at, length = self.place(align=512)
                mode = chance.choice((ZeroMode.UNMAP, ZeroMode.KEEP))
                await guest.change(at, bytes(length), lambda: node.zero(Span(at, length), mode=mode))
            case "discard":
                at, length = self.place(align=self.setup.unit)
                await guest.discard(at, length, node)
            case "compressed":
                at, length = self.place(align=512)
                content = self.content(length)
                await guest.change(at, content, lambda: node.write(at, content, compressed=True))
            case "resize":
                await guest.resize(chance.randrange(1, self.setup.grows_to // 512 + 1) * 512, node)
            case "flush":
                await guest.flush(node.flush)


def record(setup: Setup, seed: int, *, snapshot_in: Path | None = None) -> tuple[Guest, dict[str, Pages]]:
    """Run a workload; returns who did it, and the disks as they were before.

    Args:
        snapshot_in: a folder for qemu-img, if the image is to have a snapshot.
    """

    async def run() -> tuple[Guest, dict[str, Pages]]:
        start = await blank(setup.image, backing=setup.backing, seed=seed)
        if snapshot_in is not None:
            start = await with_snapshot(start, setup.options, snapshot_in)
        log = WriteLog()
        media = {name: RecordingMedium(SimDisk(pages), log, name) for name, pages in start.items()}
        content = await shown(start, setup.options)
        whole = content.ljust(max(setup.grows_to, len(content)), b"\0")
        guest = Guest(log, whole, len(content), behind=whole if setup.backing else b"")
        async with opened(media, setup.options) as node:
            await Workload(guest, node, setup, random.Random(seed)).run()
            content = await node.read(0, node.length)
            assert content.ljust(len(guest.start), b"\0") == guest.now()
        return guest, start

    return asyncio.run(run())


def states_of(
    log: WriteLog, start: dict[str, Pages], seed: int, *, least: int = 50, most: int = STATES_MAX
) -> list[CrashState]:
    """The crash states of a run that are looked at: with BLOCKJOBS_CRASH_SEEDS all, in the suite a sample."""
    states = list(crash_states(log, start, seed=seed))
    assert len(states) >= least
    if SEEDS == 1 and len(states) > most:
        return random.Random(seed).sample(states, most)
    return states
