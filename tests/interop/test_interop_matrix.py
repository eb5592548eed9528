"""Images of every kind, made by one program and then changed by both in turns, are the same to both.

After each turn, both programs' checks must be silent, and both must read what a byte array says. Every two features
that can meet do so in one of the kinds; BLOCKJOBS_INTEROP_SEEDS asks for so many long stories of random kinds.
"""

import asyncio
import os
import random
from pathlib import Path

import pytest
from disk_model import BASE_NAMES, GRANULARITY, NOISE, Disk, Step
from image_kinds import AXES, KIB, Kind, all_pairs, covering_kinds, pairs_of, random_kind
from programs import Ours, Theirs

from blockjobs.host import Host

pytestmark = pytest.mark.qemu

SEEDS = int(os.environ.get("BLOCKJOBS_INTEROP_SEEDS", "6"))
KINDS = covering_kinds()
STEPS_IN_TURN = 5


class Story:
    """One image in a folder, both programs, and what they must see."""

    def __init__(self, folder: Path, kind: Kind, seed: int, host: Host) -> None:
        self.kind, self.chance = kind, random.Random(seed)
        self.folder = folder
        self.ours, self.theirs = Ours(folder, kind, host), Theirs(folder, kind)
        self.below = b""

    async def create(self) -> None:
        """Make the image, and the one below it: shorter or longer than the disk."""
        kind = self.kind
        if kind.backing:
            length = self.chance.choice([100 * KIB + 512, kind.size // 512 * 512, kind.size + 200 * KIB])
            self.below = (NOISE * (length // len(NOISE) + 1))[:length]
            raw = self.folder / "base.raw"
            raw.write_bytes(self.below)
            self.theirs.run("qemu-img", "convert", "-f", "raw", "-O", kind.backing, "base.raw", "base")
        if kind.maker == "ours":
            await self.ours.create(BASE_NAMES[0])
        else:
            self.theirs.create(BASE_NAMES[0])
        content = bytearray(self.below[: kind.size].ljust(kind.size, b"\0"))
        self.disk = Disk(kind, content)
        if kind.has_unknown_content:  # but both must find the same
            content[:] = await self.ours.shown()
        await self.judge()

    def first_steps(self) -> list[str]:
        """What every image goes through, by either program."""
        kinds = ["add bitmap"] * self.kind.bitmaps + ["write", "write", "zero"]
        kinds += ["compressed"] * self.disk.takes_streams + ["snapshot"] * self.kind.snapshots
        return [*kinds, "write", "unmap"]

    async def turn(self, program: str, kinds: list[str | None]) -> None:
        """Play so many steps, None for any, on the image and the byte array; then judge."""
        pending: list[Step] = []
        for kind in kinds:
            step = self.disk.step(kind, self.chance) if kind else self.disk.random_step(self.chance)
            pending.append(step)
            end = len(self.disk.content)
            self.disk.apply(step)
            if step.kind == "resize" and program == "theirs" and self.kind.encrypted and step.length > end:
                await self.play(program, pending)
                pending = []
                self.disk.settle_growth(end, self.theirs.shown())
            if step.kind == "discard":
                await self.play(program, pending)
                pending = []
                shown = self.theirs.shown() if program == "theirs" else await self.ours.shown()
                self.disk.settle(step, shown, self.below)
        await self.play(program, pending)
        await self.judge()

    async def play(self, program: str, steps: list[Step]) -> None:
        if program == "ours":
            await self.ours.play(steps)
        else:
            self.theirs.play(steps)

    async def judge(self) -> None:
        """Both programs find nothing wrong and see the disk, its snapshots and its bitmaps as they must be."""
        disk = self.disk
        self.theirs.check()
        await self.ours.check()
        assert await self.ours.shown() == disk.content, "as we see it"
        assert self.theirs.shown() == disk.content, "as QEMU sees it"
        for name, content in disk.kept.items():
            if len(content) == len(disk.content):  # QEMU reads snapshots at the length that the disk has now
                assert self.theirs.shown(name) == content, name
        for name, state in disk.states.items():
            await self.ours.check_state(name, state)
            if disk.qemu_applies:
                self.theirs.check_state(name, state)
        assert await self.ours.dirty() == {name: len(dirty) * GRANULARITY for name, dirty in disk.bitmaps.items()}
        if self.kind.data == "raw" and not self.kind.encrypted:
            # QEMU's preallocation ends with a whole cluster.
            assert (self.folder / "data.raw").read_bytes()[: len(disk.content)] == disk.content


def tell(folder: Path, kind: Kind, seed: int, turns: int) -> None:
    """Make an image, let both programs do the same kinds of things to it, and then whatever they like, in turns."""

    async def run() -> None:
        async with Host() as host:
            story = Story(folder, kind, seed, host)
            await story.create()
            programs = ("ours", "theirs") if kind.maker == "ours" else ("theirs", "ours")
            for program in programs:
                await story.turn(program, [*story.first_steps()])
            for number in range(turns):
                await story.turn(programs[number % 2], [None] * STEPS_IN_TURN)

    asyncio.run(run())


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_two_features(kind: Kind, tmp_path: Path) -> None:
    tell(tmp_path, kind, seed=KINDS.index(kind), turns=0)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_long_stories(seed: int, tmp_path: Path) -> None:
    tell(tmp_path, random_kind(random.Random(seed), Kind()), seed, turns=4)


def test_the_kinds_cover_what_can_meet() -> None:
    met = set().union(*map(pairs_of, KINDS))
    assert met >= all_pairs().keys()
    assert all(kind.can_exist for kind in KINDS)
    for name, values in AXES.items():
        assert {getattr(kind, name) for kind in KINDS} == set(values)
