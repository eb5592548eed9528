"""Records a run over simulated disks and judges every state in which a power cut may leave them (design §4.5).

A `Guest` works on a disk and remembers what it wrote and what was promised to it: everything that had ended before a
flush began is there after that flush, whatever happens. Each crash state is held against that: the image has no
errors, shows every promise, and nothing that nobody wrote there.
"""

import json
import os
import random
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from blockjobs.base.bus import Bus
from blockjobs.base.clock import SystemClock
from blockjobs.base.entropy import SeededEntropy
from blockjobs.base.offload import InlineOffload
from blockjobs.base.span import Span
from blockjobs.block.claims import ALL, Perm
from blockjobs.block.drivers.qcow2.check import check_image
from blockjobs.block.drivers.qcow2.create import NewImage, create_image
from blockjobs.block.graph import Graph
from blockjobs.block.medium import Medium
from blockjobs.block.node import Node
from blockjobs.block.options import BlockdevOptions
from blockjobs.schema.command import convert
from blockjobs.testing.crash import WriteLog
from blockjobs.testing.disk import SECTOR, Pages, SimDisk

SEEDS = int(os.environ.get("BLOCKJOBS_CRASH_SEEDS", "1"))
"""How many random runs of each kind: 1 in the suite, thousands over night."""


NEVER = 1 << 60


@dataclass(slots=True)
class Op:
    """A change by the guest: `content` at `at`; `issued` and `ended` are places in the write log."""

    at: int
    content: bytes
    issued: int
    ended: int = NEVER

    def apply(self, start: int, content: bytes) -> bytes:
        """What a run of the disk that begins at `start` holds after this change."""
        low, high = max(self.at, start), min(self.at + len(self.content), start + len(content))
        if low >= high:
            return content
        return content[: low - start] + self.content[low - self.at : high - self.at] + content[high - start :]


@dataclass(slots=True)
class Guest:
    """Somebody who writes to a disk and believes in flushes.

    Attributes:
        start: what the disk showed at first, with zeroes up to the greatest length that it is to have.
        length: how long it was at first.
        behind: what the backing shows.
        lengths: changes of the length: `at` is the new one. They are durable once they have ended.
    """

    log: WriteLog
    start: bytes
    length: int = 0
    behind: bytes = b""
    ops: list[Op] = field(default_factory=list)
    lengths: list[Op] = field(default_factory=list)
    promises: list[tuple[int, int]] = field(default_factory=list)
    """(place of the log where a flush began, where it was acknowledged)"""
    _latest: tuple[int, bytes] | None = None

    async def change(self, at: int, content: bytes, work: Callable[[], Awaitable[None]]) -> None:
        """Do `work`, which is to leave `content` at `at`. A failed change counts as begun and never ended."""
        op = Op(at, content, self.log.mark("issued"))
        self.ops.append(op)
        await work()
        op.ended = self.log.mark("ended")

    async def discard(self, at: int, length: int, node: Node) -> None:
        """Discard a run; what it shows afterwards (zeroes, the backing, or the old content) is what was written."""
        op = Op(at, bytes(length), self.log.mark("issued"))
        self.ops.append(op)
        before = await node.read(at, length)
        await node.discard(Span(at, length))
        op.content = await node.read(at, length)
        for start in range(0, length, SECTOR):
            shown = op.content[start : start + SECTOR]
            assert shown == before[start : start + SECTOR] or not any(shown) or node.backing is not None
        op.ended = self.log.mark("ended")

    async def resize(self, length: int, node: Node) -> None:
        """Change the length; what is cut off must not come back, but shows the backing while it is being cut off."""
        uncovered = Op(length, self.behind[length:], self.log.mark("issued"))
        zeroed = Op(length, bytes(len(self.start) - length), self.log.mark("issued"))
        resized = Op(length, b"", self.log.mark("issued"))
        self.ops += uncovered, zeroed
        self.lengths.append(resized)
        await node.resize(length)
        for op in (uncovered, zeroed, resized):
            op.ended = self.log.mark("ended")

    async def flush(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do `work`, a flush; if it returns, it is a promise."""
        began = self.log.mark("flush")
        await work()
        self.promises.append((began, self.log.mark("flushed")))

    def promised(self, until: int) -> tuple[bytes, list[Op]]:
        """What was promised before a place of the log, and the changes issued before it that were not yet."""
        began = max((began for began, acknowledged in self.promises if acknowledged < until), default=-1)
        later = [op for op in self.ops if op.ended >= began and op.issued < until]
        return self._content([op for op in self.ops if op.ended < began]), later

    def now(self) -> bytes:
        """What the disk shows if every change that ended is there."""
        return self._content([op for op in self.ops if op.ended < NEVER])

    def _content(self, ops: list[Op]) -> bytes:
        # States come in the order of the log, so the same question is asked many times over.
        if self._latest is None or self._latest[0] != len(ops):
            content = bytearray(self.start)
            for op in sorted(ops, key=lambda op: op.ended):
                content[op.at : op.at + len(op.content)] = op.content
            self._latest = len(ops), bytes(content)
        return self._latest[1]

    def possible_lengths(self, until: int) -> set[int]:
        """How long the disk may be."""
        ended = [self.length, *(op.at for op in self.lengths if op.ended < until)]
        return {*ended[-1:], *(op.at for op in self.lengths if op.issued < until <= op.ended)}

    def lies(self, shown: bytes, until: int) -> list[int]:
        """Sectors that show neither what was promised nor what was issued later."""
        promised, later = self.promised(until)
        shown = shown.ljust(len(promised), b"\0")
        if shown == promised:
            return []
        wrong = []
        for at in range(0, len(shown), SECTOR):
            seen = shown[at : at + SECTOR]
            if seen == promised[at : at + SECTOR]:
                continue
            possible = {promised[at : at + SECTOR]}
            for op in later:
                if op.at < at + SECTOR and at < op.at + len(op.content):
                    possible |= {op.apply(at, content) for content in possible}
            if seen not in possible:
                wrong.append(at // SECTOR)
        return wrong


async def blank(image: NewImage, *, backing: bool = False, seed: int = 0) -> dict[str, Pages]:
    """The disks of a new image: `disk`, `data` if it has a data file, `base` with random bytes if `backing`."""
    names = ["disk", "data"] if image.data_file_name else ["disk"]
    disks = {name: SimDisk() for name in names}
    async with graph_over(disks) as graph:
        users = [
            await graph.claim("a test", graph.node(name), needs=Perm.WRITE | Perm.RESIZE, shares=ALL) for name in names
        ]
        await create_image(graph.node("disk"), graph.node("data") if "data" in names else None, image)
        for user in users:
            await graph.release(user)
    pages = {name: disk.pages for name, disk in disks.items()}
    if backing:
        pages["base"] = Pages(random.Random(seed).randbytes(image.size * 3 // 4))
    return pages


async def with_snapshot(start: Mapping[str, Pages], options: Mapping[str, object], folder: Path) -> dict[str, Pages]:
    """The same disks with some content and an internal snapshot of it, made by qemu-img: its clusters are shared."""
    disks = {name: SimDisk(pages) for name, pages in start.items()}
    async with opened(disks, options) as node:
        await node.write(0, random.Random(1).randbytes(node.length // 2))
    disks["disk"].pages.save(str(folder / "disk"))
    command = ["qemu-img", "snapshot", "-c", "before", "disk"]
    subprocess.run(command, check=True, cwd=folder)
    return {**{name: disk.pages for name, disk in disks.items()}, "disk": Pages((folder / "disk").read_bytes())}


def snapshot_content(images: Mapping[str, Pages], folder: Path) -> bytes:
    """What the snapshot of `with_snapshot` shows."""
    images["disk"].save(str(folder / "disk"))
    command = ["qemu-img", "convert", "-f", "qcow2", "-l", "before", "-O", "raw", "disk", "raw"]
    subprocess.run(command, check=True, cwd=folder)
    return (folder / "raw").read_bytes()


async def own_errors(images: Mapping[str, Pages]) -> str:
    """What our own check finds wrong, leaks aside; empty if nothing."""
    async with graph_over({"disk": SimDisk(images["disk"])}, read_only=True) as graph:
        result = await check_image(graph.node("disk"), offload=graph.offload)
    return "; ".join(result.problems) if result.corruptions or result.check_errors else ""


@asynccontextmanager
async def graph_over(media: Mapping[str, Medium], *, read_only: bool = False) -> AsyncIterator[Graph]:
    """A graph with one node per medium, of the same name."""
    graph = Graph(clock=SystemClock(), offload=InlineOffload(), entropy=SeededEntropy(1), bus=Bus())
    for name, medium in media.items():
        await graph.open_medium(medium, name, read_only=read_only)
    yield graph
    await graph.close()


@asynccontextmanager
async def opened(
    media: Mapping[str, Medium], options: Mapping[str, object], *, read_only: bool = False
) -> AsyncIterator[Node]:
    """A qcow2 node over the media, with a user who may do anything; flushed and closed at the end."""
    async with graph_over(media, read_only=read_only) as graph:
        described = {"driver": "qcow2", "node-name": "image", "read-only": read_only, "discard": "unmap", **options}
        node = await graph.open(convert(described, BlockdevOptions))
        needs = Perm.CONSISTENT_READ if read_only else Perm.CONSISTENT_READ | Perm.WRITE | Perm.RESIZE
        user = await graph.claim("a guest", node, needs=needs, shares=ALL)
        yield node
        await graph.release(user)


async def shown(images: Mapping[str, Pages], options: Mapping[str, object]) -> bytes:
    """Everything the image shows to somebody who opens it."""
    media = {name: SimDisk(pages) for name, pages in images.items()}
    async with opened(media, options, read_only=True) as node:
        return await node.read(0, node.length)


def qemu_errors(images: Mapping[str, Pages], folder: Path) -> str:
    """What `qemu-img check` finds wrong, leaks aside; empty if nothing. Writes the disks to `folder`."""
    for name, pages in images.items():
        pages.save(str(folder / name))
    command = ["qemu-img", "check", "-f", "qcow2", "--output", "json", "disk"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    if run.returncode not in (0, 3):
        return run.stdout + run.stderr
    report = json.loads(run.stdout)
    return run.stdout if report.get("corruptions") or report.get("check-errors") else ""
