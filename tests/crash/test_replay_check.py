"""Power cuts while `check -r` repairs: what the image shows stays, nothing gets worse, and a second repair ends it.

Images with everything in them are spoiled in several ways. Each state that a cut may leave of each repair is looked at
by `judge`, and each is repaired once more (spec/durability.md §1, I1, I2, I4, I5, I7).
"""

import asyncio
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from judge import COMPRESSED, COPIED, OFFSET, Verdict
from replay import graph_over, qemu_errors
from sectors import Disks, pages_of, stretches
from short_runs import SETUPS, Setup, disks_of, used

from blockjobs.block.claims import ALL, Perm
from blockjobs.block.drivers.qcow2 import check_counts, check_outline, check_tally, check_walk
from blockjobs.block.drivers.qcow2.check import CheckResult
from blockjobs.block.drivers.qcow2.check_walk import MetadataWalk
from blockjobs.block.drivers.qcow2.repair import repair_image, repair_leaks
from blockjobs.testing.crash import RecordingMedium, WriteLog
from blockjobs.testing.disk import Pages, SimDisk

DIRTY, CORRUPT = 1, 2
PART = 64
"""Clusters of 512 bytes that one block of 64-bit refcounts is for: the smallest window of a check."""


@dataclass
class Image:
    """A qcow2 image to be spoiled."""

    content: bytearray

    def word(self, at: int) -> int:
        return int(struct.unpack_from(">Q", self.content, at)[0])

    def put(self, at: int, word: int) -> None:
        struct.pack_into(">Q", self.content, at, word)

    @property
    def size(self) -> int:
        return 1 << int(struct.unpack_from(">I", self.content, 20)[0])

    @property
    def version(self) -> int:
        return int(struct.unpack_from(">I", self.content, 4)[0])

    @property
    def step(self) -> int:
        """Bytes from one L2 entry to the next."""
        return 16 if self.version > 2 and self.word(72) & 16 else 8

    @property
    def width(self) -> int:
        """Bits of a refcount."""
        return 1 << int(struct.unpack_from(">I", self.content, 96)[0]) if self.version > 2 else 16

    @property
    def l1(self) -> int:
        return self.word(40)

    @property
    def l2(self) -> int:
        """Place of the first L2 table."""
        return self.word(self.l1) & OFFSET

    @property
    def table(self) -> int:
        """Place of the refcount table."""
        return self.word(48)

    def entries(self, flag: int) -> list[int]:
        """Places of entries of the first L2 table for plain clusters with and without the copied flag."""
        places = range(self.l2, self.l2 + self.size, self.step)
        words = [(at, self.word(at)) for at in places]
        return [at for at, word in words if word & OFFSET and not word & COMPRESSED and word & COPIED == flag]

    def set_count(self, cluster: int, count: int) -> None:
        """The refcount of a cluster."""
        per = self.size * 8 // self.width
        block = self.word(self.table + cluster // per * 8)
        bit = cluster % per * self.width
        if self.width >= 8:
            at = block + bit // 8
            self.content[at : at + self.width // 8] = count.to_bytes(self.width // 8, "big")
        else:
            mask = (1 << self.width) - 1 << bit % 8
            byte = self.content[block + bit // 8]
            self.content[block + bit // 8] = byte & ~mask | count << bit % 8


Damage = Callable[[Image], None]


def leaks(image: Image) -> None:
    """Two clusters that nothing refers to any more, and one that is counted twice."""
    image.content.extend(bytes(2 * image.size))
    for cluster in range(len(image.content) // image.size - 2, len(image.content) // image.size):
        image.set_count(cluster, 1)
    if image.width > 1:
        image.set_count(image.l1 // image.size, 2)


def missing_flags(image: Image) -> None:
    for at in image.entries(COPIED):
        image.put(at, image.word(at) & ~COPIED)
    image.put(image.l1, image.word(image.l1) & ~COPIED)


def false_flags(image: Image) -> None:
    """Of clusters that a snapshot shares; whoever believes them spoils the snapshot."""
    for at in image.entries(0):
        image.put(at, image.word(at) | COPIED)


def false_flag_of_a_table(image: Image) -> None:
    """The disk is the snapshot: both have one L2 table, which the disk believes to be its own."""
    snapshot_l1 = image.word(image.word(64))
    image.put(image.l1, image.word(snapshot_l1) | COPIED)
    false_flags(image)


def low_counts(image: Image) -> None:
    """Of data, of the L2 table, of the snapshot table and of the header."""
    for at in image.entries(COPIED)[:2]:
        image.set_count((image.word(at) & OFFSET) // image.size, 0)
    for at in image.entries(0)[:1]:
        image.set_count((image.word(at) & OFFSET) // image.size, 1)
    image.set_count(image.l2 // image.size, 0)
    image.set_count(0, 0)


def no_block(image: Image) -> None:
    image.put(image.table, 0)


def empty_block(image: Image) -> None:
    block = image.word(image.table)
    image.content[block : block + image.size] = bytes(image.size)


def block_beyond(image: Image) -> None:
    image.put(image.table, 1 << 40)


def block_unaligned(image: Image) -> None:
    """Among clusters of 512 bytes it has a reserved bit then."""
    image.put(image.table, image.word(image.table) + image.size // 2)


def block_is_data(image: Image) -> None:
    """Two uses of one cluster: what the disk shows there is what the counts are."""
    [at, *_] = image.entries(COPIED)
    image.put(image.table, image.word(at) & OFFSET)


def entry_beyond(image: Image) -> None:
    """An entry for a cluster right behind the end of the file, where new counts would be put otherwise."""
    end = -(-len(image.content) // image.size) * image.size
    [at, *_] = image.entries(COPIED)
    image.put(at, COPIED | end + image.size)
    if image.step == 16:
        image.put(at + 8, 0xFFFF_FFFF)


def two_entries(image: Image) -> None:
    """For one cluster."""
    [one, *_] = image.entries(COPIED)
    [other, *_] = image.entries(0)
    image.content[other : other + image.step] = image.content[one : one + image.step]


def dirty(image: Image) -> None:
    """As after a crash, with counts too low that nobody may believe."""
    low_counts(image)
    image.put(72, image.word(72) | DIRTY | CORRUPT)


def everything(image: Image) -> None:
    false_flags(image)
    missing_flags(image)
    leaks(image)
    low_counts(image)


def far_apart(image: Image) -> None:
    """Data in three more parts of a longer file, each with its refcount block, and in each one every kind of damage."""
    assert image.size * 8 // image.width == PART
    places = image.entries(COPIED)[:3]
    image.content.extend(bytes(4 * PART * image.size - len(image.content)))
    for part, entry in enumerate(places, 1):
        first = part * PART
        image.put(image.table + part * 8, first * image.size)
        old, new = image.word(entry) & OFFSET, (first + 9) * image.size
        image.content[new : new + image.size] = image.content[old : old + image.size]
        image.put(entry, new | (COPIED if part == 1 else 0))
        # The block itself, the data, which counts too little in one part, and a leak; another is the old place.
        for cluster, count in ((first, 1), (first + 9, part % 2), (first + 20, 1)):
            image.set_count(cluster, count)


DAMAGES: Mapping[str, Callable[[Image], None]] = {
    each.__name__: each
    for each in (leaks, missing_flags, false_flags, false_flag_of_a_table, low_counts, no_block, empty_block,
                 block_beyond, block_unaligned, block_is_data, entry_beyond, two_entries, dirty, everything)
}  # fmt: skip
FAR: Mapping[str, Damage] = {"far_apart": far_apart}
SHARING = {"false_flags", "false_flag_of_a_table", "two_entries"}
"""Damage for images with snapshots: a count of one bit cannot say that two refer to a cluster."""
IMAGES = ("plain", "extended L2", "refcounts of 1 bit", "refcounts of 64 bits", "version 2")
REPAIRS = {"all": repair_image, "leaks": repair_leaks}


def cases() -> Iterator[tuple[str, str]]:
    for name in IMAGES:
        setup = SETUPS[name]
        for damage in DAMAGES:
            if not (damage in SHARING and "create" in setup.without) and not (damage == "dirty" and setup.image.is_v2):
                yield name, damage


async def spoiled(setup: Setup, damage: str) -> Pages:
    pages, _, _ = await used(setup)
    image = Image(bytearray(pages["disk"].read(0, pages["disk"].size)))
    (DAMAGES | FAR)[damage](image)
    return Pages(bytes(image.content))


async def repair(how: str, medium: RecordingMedium | SimDisk) -> CheckResult:
    """As `check -r` does."""
    async with graph_over({"disk": medium}) as graph:
        node = graph.node("disk")
        user = await graph.claim("check", node, needs=Perm.CONSISTENT_READ | Perm.WRITE | Perm.RESIZE, shares=ALL)
        found = await REPAIRS[how](node, offload=graph.offload)
        await graph.release(user)
    return found


def shown(verdict: Verdict) -> tuple[object, ...]:
    """What somebody reads in an image, whatever its counts say."""
    return verdict.content, verdict.snapshots, verdict.bitmaps


def harm(verdict: Verdict) -> dict[str, int]:
    """By how much counts are too low, and which flags are false; of a dirty image nobody believes either."""
    found: dict[str, int] = {}
    for problem in verdict.problems:
        numbers = [int(each) for each in re.findall(r"\d+", problem)]
        if problem.startswith("cluster ") and "copied" in problem:
            found[f"cluster {numbers[0]} is shared"] = 1
        elif problem.startswith("cluster "):
            found[f"cluster {numbers[0]} has too low a count"] = numbers[1] - numbers[2]
        else:
            found[problem.split()[0]] = 1
    return found


@dataclass
class Replay:
    """One repair of one image, and all that a cut may leave of it."""

    setup: Setup
    damage: str
    how: str

    async def run(self) -> int:
        """Returns how many different states there were."""
        pages = await spoiled(self.setup, self.damage)
        log, disk = WriteLog(), SimDisk(pages)
        result = await repair(self.how, RecordingMedium(disk, log, "disk"))
        before = self.setup.verdict(disks_of({"disk": pages}))
        after = self.setup.verdict(disks_of({"disk": disk.pages}))
        assert self.how == "leaks" or (result.is_clean and not after.problems and not after.is_dirty)
        assert result.leaks == 0 or self.damage.startswith("block_"), "only in a block that may be somebody's data"
        seen: set[int] = set()
        for stretch in stretches(log, disks_of({"disk": pages})):
            for story, state in stretch.states():
                if (key := hash((state.key(stretch.key), *state.lengths))) not in seen:
                    seen.add(key)
                    await self.judge(f"log {stretch.end}, {story}", stretch.disks(state), before)
        assert not stretch.pending, "it was called repaired before it was durable"
        assert disk.pages == pages_of(stretch.durable["disk"])
        return len(seen)

    async def judge(self, story: str, disks: Disks, before: Verdict) -> None:
        verdict = self.setup.verdict(disks)
        assert shown(verdict) == shown(before), story
        worst = harm(before)
        assert before.is_dirty or not verdict.is_dirty, story
        assert all(value <= worst.get(what, 0) for what, value in harm(verdict).items()), story
        again = SimDisk(pages_of(disks["disk"]))
        assert (await repair("all", again)).is_clean, story
        verdict = self.setup.verdict(disks_of({"disk": again.pages}))
        assert shown(verdict) == shown(before), f"{story}, repaired"
        assert not verdict.problems and not verdict.is_dirty, f"{story}, repaired: {verdict.problems}"


@pytest.mark.parametrize("how", REPAIRS)
@pytest.mark.parametrize(("name", "damage"), list(cases()))
def test_power_cuts(name: str, damage: str, how: str) -> None:
    count = asyncio.run(Replay(SETUPS[name], damage, how).run())
    assert count > 4 or how == "leaks"


@pytest.mark.parametrize("how", REPAIRS)
def test_power_cuts_between_the_windows_of_a_long_file(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (check_counts, check_outline, check_tally, check_walk):
        monkeypatch.setattr(module, "PAGE_BITS", 3)
    monkeypatch.setattr(check_counts, "COUNTS_BYTES_MAX", 8)
    begins: list[int] = []
    window_end = MetadataWalk._window_end

    def noted(self: MetadataWalk, first: int) -> tuple[int, bool]:
        begins.append(first)
        return window_end(self, first)

    monkeypatch.setattr(MetadataWalk, "_window_end", noted)
    count = asyncio.run(Replay(SETUPS["refcounts of 64 bits"], "far_apart", how).run())
    assert count > 4
    assert {0, PART, 2 * PART, 3 * PART} <= set(begins)


@pytest.mark.qemu
@pytest.mark.parametrize("name", IMAGES)
def test_real_tools_agree(name: str, tmp_path: Path) -> None:
    async def repaired(damage: str) -> Pages:
        disk = SimDisk(await spoiled(SETUPS[name], damage))
        await repair("all", disk)
        return disk.pages

    for damage in [damage for each, damage in cases() if each == name]:
        assert not (errors := qemu_errors({"disk": asyncio.run(repaired(damage))}, tmp_path)), f"{damage}: {errors}"
