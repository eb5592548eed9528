"""Every state that a power cut may leave of a qcow2 image is whole, keeps what was flushed, and shows nothing foreign.

The images are random runs of one seed each in the suite; `CRASH_SEEDS=200 pytest tests/crash` goes on for longer.
"""

import asyncio
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from replay import SEEDS, Guest, blank, opened, own_errors, qemu_errors, shown

from blockjobs.base.span import Span
from blockjobs.block.driver import FormatDriver, ZeroMode
from blockjobs.block.drivers.qcow2.create import NewImage
from blockjobs.block.node import Node
from blockjobs.testing.crash import CrashState, RecordingMedium, WriteLog, crash_states
from blockjobs.testing.disk import Act, Change, Pages, SimDisk

KIB, MIB = 1 << 10, 1 << 20
QEMU_SAMPLE = 25
"""States per run that qemu-img looks at too: it takes 20 ms each, our own check much less."""


@dataclass(frozen=True)
class Setup:
    """An image for a run; `unit` is the length in bytes that its writes are around."""

    image: NewImage
    backing: bool = False
    unit: int = 4 * KIB
    steps: int = 40

    @property
    def options(self) -> dict[str, object]:
        found: dict[str, object] = {"file": "disk"}
        if self.backing:
            found["backing"] = {"driver": "raw", "file": "base"}
        if self.image.data_file_name:
            found["data-file"] = "data"
        return found


SETUPS = {
    "64k": Setup(NewImage(size=4 * MIB), unit=64 * KIB),
    "4k": Setup(NewImage(size=MIB, cluster_size=4 * KIB)),
    "512, refcounts of 64 bits": Setup(NewImage(size=2 * MIB, cluster_size=512, refcount_bits=64), unit=16 * KIB),
    "refcounts of 1 bit": Setup(NewImage(size=MIB, cluster_size=4 * KIB, refcount_bits=1)),
    "version 2": Setup(NewImage(size=MIB, cluster_size=4 * KIB, is_v2=True)),
    "backing": Setup(NewImage(size=MIB, cluster_size=4 * KIB), backing=True),
    "extended L2": Setup(NewImage(size=2 * MIB, cluster_size=32 * KIB, extended_l2=True)),
    "extended L2, backing": Setup(NewImage(size=2 * MIB, cluster_size=16 * KIB, extended_l2=True), backing=True),
    "data file": Setup(NewImage(size=MIB, cluster_size=4 * KIB, data_file_name="image.data")),
    "zstd": Setup(NewImage(size=MIB, cluster_size=4 * KIB, zstd=True)),
}


async def compressed(node: Node, at: int, content: bytes) -> None:
    """Store whole clusters compressed; those that do not shrink as they are."""
    driver = node.driver
    assert isinstance(driver, FormatDriver)
    compress = driver.compressor("fast")
    assert compress is not None
    size = node.cluster_size
    assert size is not None
    packed, plain = [], []
    for start in range(0, len(content), size):
        piece = content[start : start + size]
        stream = compress(piece)
        if stream is None:
            plain.append((at + start, piece))
        else:
            packed.append((at + start, stream))
    async with node.tracker.exclusive(Span(at, len(content))):
        if packed:
            await driver.write_compressed(packed)
    for start, piece in plain:
        await node.write(start, piece)


class Workload:
    """What a guest might do, in random order."""

    def __init__(self, guest: Guest, node: Node, setup: Setup, chance: random.Random) -> None:
        self.guest, self.node, self.setup, self.chance = guest, node, setup, chance

    def place(self, *, align: int) -> tuple[int, int]:
        """A run of the disk: sectors, units, or many units; some places are hit again and again."""
        unit = self.setup.unit
        hot = self.chance.random() < 0.5
        bound = min(self.setup.image.size, 16 * unit) if hot else self.setup.image.size
        length = self.chance.choice((512, 3 * 512, unit // 2, unit, 3 * unit, 10 * unit))
        length = max(align, length // align * align)
        at = self.chance.randrange(max(1, (bound - length) // align + 1)) * align
        return at, min(length, self.setup.image.size - at)

    def content(self, length: int) -> bytes:
        mark = self.chance.randbytes(8)
        return (mark * (length // 8 + 1))[:length]

    async def step(self) -> None:
        node, guest = self.node, self.guest
        match self.chance.choice(
            ("write", "write", "write", "write", "zero", "discard", "compressed", "flush", "flush")
        ):
            case "write":
                at, length = self.place(align=512)
                content = self.content(length)
                await guest.change(at, content, lambda: node.write(at, content))
            case "zero":
                at, length = self.place(align=512)
                mode = self.chance.choice((ZeroMode.UNMAP, ZeroMode.KEEP))
                await guest.change(at, bytes(length), lambda: node.zero(Span(at, length), mode=mode))
            case "discard":
                at, length = self.place(align=self.setup.unit)
                await guest.discard(at, length, node)
            case "compressed" if not self.setup.image.data_file_name:
                size = node.cluster_size
                assert size is not None
                at, length = self.place(align=size)
                content = self.content(length)
                await guest.change(at, content, lambda: compressed(node, at, content))
            case _:
                await guest.flush(node.flush)


def record(setup: Setup, seed: int) -> tuple[Guest, dict[str, Pages]]:
    """Run a workload; returns who did it and the disks as they were before."""

    async def run() -> tuple[Guest, dict[str, Pages]]:
        chance = random.Random(seed)
        start = await blank(setup.image, backing=setup.backing, seed=seed)
        log = WriteLog()
        media = {name: RecordingMedium(SimDisk(pages), log, name) for name, pages in start.items()}
        guest = Guest(log, await shown(start, setup.options))
        async with opened(media, setup.options) as node:
            workload = Workload(guest, node, setup, chance)
            for _ in range(setup.steps):
                await workload.step()
            assert await node.read(0, node.length) == guest.now()
        return guest, start

    return asyncio.run(run())


def states_of(guest: Guest, start: dict[str, Pages], seed: int) -> list[CrashState]:
    return list(crash_states(guest.log, start, seed=seed))


async def complaint(state: CrashState, guest: Guest, setup: Setup) -> str:
    """What is wrong with a crash state; empty if nothing."""
    if errors := await own_errors(state.images):
        return f"{state.story}: {errors}"
    try:
        content = await shown(state.images, setup.options)
    except Exception as error:
        return f"{state.story}: cannot be read: {error!r}"
    if lies := guest.lies(content, state.issued):
        return f"{state.story}: sectors {lies[:10]} show neither what was promised nor what was written later"
    return ""


@pytest.mark.parametrize("name", SETUPS)
def test_random_runs(name: str, tmp_path: Path) -> None:
    setup = SETUPS[name]
    for seed in range(SEEDS):
        guest, start = record(setup, seed)
        states = states_of(guest, start, seed)
        assert len(states) > 50

        async def judge(seed: int = seed, states: list[CrashState] = states, guest: Guest = guest) -> None:
            for state in states:
                assert not (wrong := await complaint(state, guest, setup)), f"seed {seed}, {wrong}"

        asyncio.run(judge())
        if shutil.which("qemu-img"):
            for state in random.Random(seed).sample(states, min(QEMU_SAMPLE, len(states))):
                errors = qemu_errors(state.images["disk"], tmp_path, data_file=state.images.get("data"))
                assert not errors, f"seed {seed}, {state.story}: {errors}"


def test_the_replay_finds_missing_syncs() -> None:
    """The tool itself: without the syncs inside a commit, or with a flush that never syncs, states must be bad."""
    setup = SETUPS["4k"]
    guest, start = record(setup, 1)
    syncs = [index for index, change in enumerate(guest.log.changes) if change.act is Act.SYNC]
    for index in syncs[:-1]:
        guest.log.changes[index] = Change(Act.MARK, label="a sync that was skipped")

    async def count_bad() -> int:
        bad = 0
        for state in crash_states(guest.log, start, seed=1, samples=60):
            bad += bool(await complaint(state, guest, setup))
        return bad

    assert asyncio.run(count_bad()) > 10
