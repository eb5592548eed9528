"""Random stacks of drivers under random requests, in simulated time with latency: a stack is a byte array.

Each seed builds a stack of formats, filters and quorums over disks in memory. Guests write, zero, discard, flush and
read; meanwhile filters are put between and taken out, and frozen views are begun. In the end the stack shows what
guests wrote, each view what its node held at its first moment, and the same stack opened anew shows the same.

`BLOCKJOBS_SIM_SEEDS=1000 pytest tests/sim` goes on for longer; a failure names its seed.
"""

import asyncio
import os
import random
from dataclasses import dataclass, field

import pytest

from blockjobs.base.span import Span
from blockjobs.block.claims import ALL, Perm
from blockjobs.block.driver import FormatDriver
from blockjobs.block.drivers.copy_before_write import CopyBeforeWriteOptions
from blockjobs.block.drivers.qcow2.check import check_image
from blockjobs.block.drivers.qcow2.create import NewImage
from blockjobs.block.drivers.throttle import ThrottleOptions
from blockjobs.block.node import Node
from blockjobs.block.objects import AnyObjectOptions, add_object
from blockjobs.block.options import driver_named
from blockjobs.block.users import Root
from blockjobs.block.vocabulary import Kind, ZeroMode
from blockjobs.schema.command import convert
from blockjobs.testing.clock import run
from blockjobs.testing.disk import Pages
from blockjobs.testing.host import SimHost

FIRST, SEEDS = int(os.environ.get("BLOCKJOBS_SIM_FIRST", "0")), int(os.environ.get("BLOCKJOBS_SIM_SEEDS", "24"))
KIB, MIB = 1 << 10, 1 << 20
SECTOR = 512
GUESTS = 3
DEPTH_MAX = 4
HAS_COPY_ON_READ = driver_named("copy-on-read") is not None


@dataclass
class Stack:
    """How to make a stack, as steps that can be done again over the same disks.

    Attributes:
        disks: length of the disk by node name.
        full: disks that are not zeroes at first.
        images: what qcow2 image is on a disk.
        nodes: options for blockdev-add, lower ones first.
        groups: limits of throttle groups.
    """

    chance: random.Random
    disks: dict[str, int] = field(default_factory=dict)
    full: set[str] = field(default_factory=set)
    images: dict[str, NewImage] = field(default_factory=dict)
    nodes: list[dict[str, object]] = field(default_factory=list)
    groups: dict[str, dict[str, int]] = field(default_factory=dict)
    must_be_blank: bool = False

    def add(self, driver: str, **options: object) -> str:
        name = f"{driver}-{len(self.nodes)}"
        given = {key.replace("_", "-"): value for key, value in options.items()}
        self.nodes.append({"driver": driver, "node-name": name, "discard": "unmap", **given})
        return name

    def disk(self, length: int) -> str:
        name = f"disk-{len(self.disks)}"
        self.disks[name] = length
        return name

    def image(self, length: int, *, backing: str | None = None) -> str:
        chance = self.chance
        name = self.disk(0)
        extended = chance.random() < 0.3
        self.images[name] = NewImage(
            size=length,
            cluster_size=chance.choice((16, 64) if extended else (4, 16, 64)) * KIB,
            extended_l2=extended,
            zstd=chance.random() < 0.3,
        )
        if chance.random() < 0.3:
            name = self.add("preallocate", file=name, prealloc_size=chance.choice((0, 64, 300)) * KIB)
        return self.add("qcow2", file=name, **({} if backing is None else {"backing": backing}))

    def overlay(self, length: int) -> str:
        """An image over a shorter, an equal, or a longer disk that holds something."""
        base = self.disk(length + self.chance.choice((0, 0, -9, 9)) * SECTOR)
        self.full.add(base)
        if self.chance.random() < 0.5:
            base = self.add("throttle", file=base, throttle_group=self.group())
        top = self.image(length, backing=base)
        return self.add("copy-on-read", file=top) if HAS_COPY_ON_READ and self.chance.random() < 0.5 else top

    def group(self) -> str:
        name = f"group-{len(self.groups)}"
        kind = self.chance.choice(({"bps-total": 4 * MIB}, {"iops-total": 500}, {"bps-write": MIB, "iops-read": 900}))
        self.groups[name] = kind
        return name

    def build(self, length: int, depth: int) -> str:
        """Describe a stack that shows `length` bytes; returns the name of its top."""
        chance = self.chance
        if depth >= DEPTH_MAX:
            return chance.choice((self.disk, self.image))(length)
        match chance.choice(
            ("disk", "image", "compress", "throttle", "blkdebug", "cbw", "quorum", "raw", "log", "prealloc", "overlay")
        ):
            case "disk":
                return self.disk(length)
            case "image":
                return self.image(length)
            case "overlay" if not self.must_be_blank:
                return self.overlay(length)
            case "compress":
                return self.add("compress", file=self.image(length))
            case "throttle":
                return self.add("throttle", file=self.build(length, depth + 1), throttle_group=self.group())
            case "blkdebug":
                return self.blkdebug(self.build(length, depth + 1))
            case "cbw":
                target = self.build(length, DEPTH_MAX)
                return self.add("copy-before-write", file=self.build(length, depth + 1), target=target)
            case "quorum":
                count = chance.choice((1, 2, 3))
                before, self.must_be_blank = self.must_be_blank, True
                children = [self.build(length, depth + 2) for _ in range(count)]
                self.must_be_blank = before
                pattern = {"read_pattern": "fifo"} if chance.random() < 0.2 else {}
                return self.add("quorum", children=children, vote_threshold=chance.randint(1, count), **pattern)
            case "raw":
                offset = chance.choice((0, 1, 9)) * SECTOR
                below = self.build(length + offset + chance.choice((0, 7)) * SECTOR, depth + 1)
                return self.add("raw", file=below, offset=offset, size=length)
            case "log":
                size = chance.choice((512, 4096))
                below = self.build(length, depth + 1)
                return self.add("blklogwrites", file=below, log=self.disk(0), log_sector_size=size)
            case "overlay":
                return self.image(length)
            case _:
                return self.add("preallocate", file=self.build(length, depth + 1))

    def blkdebug(self, below: str) -> str:
        chance = self.chance
        align = chance.choice((512, 512, 4096))
        limits = {
            "align": align,
            "max_transfer": align * chance.choice((1, 3, 16)),
            "opt_write_zero": align * chance.choice((1, 4)),
            "opt_discard": align * chance.choice((1, 4)),
            "max_write_zero": align * 32,
            "max_discard": align * 64,
        }
        kept = {name: size for name, size in limits.items() if name == "align" or chance.random() < 0.6}
        return self.add("blkdebug", image=below, **kept)

    async def open(self, host: SimHost, disks: dict[str, Pages]) -> None:
        """Make all nodes, over the disks given or over new ones."""
        for name, limits in self.groups.items():
            described = {"qom-type": "throttle-group", "id": name, "limits": limits}
            add_object(host.objects, convert(described, AnyObjectOptions), host.clock)
        for name, length in self.disks.items():
            if name in disks:
                await host.disk(name, disks[name])
            elif name in self.images:
                await host.image(f"{name}-new", self.images[name])
                for node in (f"{name}-new", f"{name}-new-file"):
                    await host.graph.remove(node)
                await host.disk(name, host.disks.pop(f"{name}-new-file").pages)
            else:
                await host.disk(name, random.Random(name).randbytes(length) if name in self.full else bytes(length))
        for options in self.nodes:
            await host.blockdev_add(options)


@dataclass(eq=False)
class Guest:
    """Works on its part of the stack and knows what must be there; `content` is of the whole, shared by all.

    Stands still while its node is drained, as an export does.
    """

    part: Span
    content: bytearray
    start: bytes
    chance: random.Random
    user: Root = field(init=False)
    drains: int = 0
    busy: bool = False

    async def connect(self, host: SimHost, node: Node) -> None:
        needs = Perm.CONSISTENT_READ | Perm.WRITE
        self.user = await host.graph.claim("a guest", node, needs=needs, shares=ALL, user=self)

    def quiesce_begin(self) -> None:
        self.drains += 1

    def quiesce_end(self) -> None:
        self.drains -= 1

    def is_quiet(self) -> bool:
        return not self.busy

    async def quiet(self) -> None:
        while self.busy:
            await asyncio.sleep(0.001)

    async def live(self, requests: int) -> None:
        for _ in range(requests):
            await asyncio.sleep(self.chance.random() * 0.01)
            while self.drains:
                await asyncio.sleep(0.001)
            self.busy = True
            try:
                await self.request()
            finally:
                self.busy = False

    async def request(self) -> None:
        chance = self.chance
        length = min(chance.choice((1, 300, SECTOR, 4096, 5000, 64 * KIB, 100_000)), self.part.length)
        at = self.part.at + chance.randrange(self.part.length - length + 1)
        span, node = Span(at, length), self.user.node
        match chance.choice(("write", "write", "write", "zero", "discard", "flush", "read", "status")):
            case "write":
                text = chance.randbytes(4) * (length // 4 + 1)
                new = chance.choice((text, text, chance.randbytes(length), bytes(length)))[:length]
                await node.write(at, new, fua=chance.random() < 0.1)
                self.content[at : at + length] = new
            case "zero":
                await node.zero(span, mode=chance.choice(list(ZeroMode)))
                self.content[at : at + length] = bytes(length)
            case "discard":
                await node.discard(span)
                shown = await node.read(at, length)
                before = bytes(self.content[at : at + length])
                start = self.start[at : at + length]
                assert all(now in (0, old, first) for now, old, first in zip(shown, before, start, strict=True))
                self.content[at : at + length] = shown
            case "flush":
                await node.flush()
            case "status":
                for extent in await node.block_status(span):
                    if extent.kind is Kind.ZERO:
                        assert not any(self.content[extent.at : extent.at + extent.length])
            case _:
                assert await node.read(at, length) == self.content[at : at + length]


@dataclass
class Tinkerer:
    """Puts filters into the running graph and takes them out; begins frozen views and remembers what they must show."""

    host: SimHost
    chance: random.Random
    views: list[tuple[Root, bytes]] = field(default_factory=list)
    put: list[Node] = field(default_factory=list)
    count: int = 0

    async def live(self, rounds: int) -> None:
        for _ in range(rounds):
            await asyncio.sleep(self.chance.random() * 0.2)
            places = [node for node in self.host.graph.nodes() if node.parents and self.may_be_filtered(node)]
            if self.put and self.chance.random() < 0.4:
                node = self.put.pop(self.chance.randrange(len(self.put)))
                async with self.host.graph.edit() as edit:
                    await edit.drop(node)
            elif places and self.chance.random() < 0.5:
                await self.freeze(self.chance.choice(places))
            elif places:
                await self.slow_down(self.chance.choice(places))

    def may_be_filtered(self, node: Node) -> bool:
        """Tops and formats: a job would choose such nodes."""
        return isinstance(node.driver, FormatDriver) or any(
            isinstance(parent, Root) and parent.follows for parent in node.parents
        )

    async def slow_down(self, node: Node) -> None:
        self.count += 1
        group = {"qom-type": "throttle-group", "id": f"t{self.count}", "limits": {"iops-total": 700}}
        add_object(self.host.objects, convert(group, AnyObjectOptions), self.host.clock)
        options = ThrottleOptions(node_name=f"throttle-t{self.count}", file=node.name, throttle_group=f"t{self.count}")
        async with self.host.graph.edit() as edit:
            self.put.append(await edit.insert(above=node, filter=options))

    async def freeze(self, node: Node) -> None:
        self.count += 1
        target = await self.host.disk(f"saved-{self.count}", bytes(-(-node.length // SECTOR) * SECTOR))
        options = CopyBeforeWriteOptions(node_name=f"cbw-v{self.count}", file=node.name, target=target.name)
        async with self.host.graph.drained(node), self.host.graph.edit() as edit:
            content = await node.read(0, node.length)
            filter_node = await edit.insert(above=node, filter=options)
        view = await self.host.blockdev_add(
            {"driver": "snapshot-access", "node-name": f"view-{self.count}", "file": filter_node.name}
        )
        reader = await self.host.graph.claim("a reader", view, needs=Perm.CONSISTENT_READ, shares=ALL, follows=False)
        self.views.append((reader, content))

    async def look(self, rounds: int) -> None:
        """Read parts of views while guests write."""
        for _ in range(rounds):
            await asyncio.sleep(self.chance.random() * 0.01)
            if self.views:
                reader, content = self.chance.choice(self.views)
                length = min(self.chance.choice((SECTOR, 64 * KIB, 100_000)), len(content))
                at = self.chance.randrange(len(content) - length + 1)
                assert await reader.node.read(at, length) == content[at : at + length], reader.node.name

    async def check(self) -> None:
        """Every view shows what its node held when it was begun."""
        for reader, content in self.views:
            assert await reader.node.read(0, len(content)) == content, reader.node.name
            for extent in await reader.node.block_status(Span(0, len(content))):
                if extent.kind is Kind.ZERO:
                    assert not any(content[extent.at : extent.at + extent.length])


async def whole_life(stack: Stack, top: str, length: int, seed: int) -> None:
    chance = random.Random(seed)
    async with SimHost(seed, latency_s_max=0.02) as host:
        await stack.open(host, {})
        node = host.graph.node(top)
        assert node.length >= length
        reader = await host.graph.claim("a reader", node, needs=Perm.CONSISTENT_READ, shares=ALL)
        start = await node.read(0, length)
        content = bytearray(start)
        await host.graph.release(reader)
        part = length // GUESTS
        guests = [
            Guest(Span(number * part, part), content, start, random.Random(chance.random())) for number in range(GUESTS)
        ]
        for guest in guests:
            await guest.connect(host, node)
        tinkerer = Tinkerer(host, random.Random(chance.random()))
        for _ in range(2):
            async with asyncio.TaskGroup() as tasks:
                for guest in guests:
                    tasks.create_task(guest.live(15))
                tasks.create_task(tinkerer.live(4))
                for _ in range(3):
                    tasks.create_task(tinkerer.look(30))
            await tinkerer.check()
            assert await guests[0].user.node.read(0, length) == content
        await guests[0].user.node.flush()
        for reader, _ in tinkerer.views:
            await host.graph.release(reader)
        for guest in guests:
            await host.graph.release(guest.user)
    async with SimHost(seed) as again:
        await stack.open(again, {name: host.disks[name].pages for name in stack.disks})
        node = again.graph.node(top)
        reader = await again.graph.claim("a reader", node, needs=Perm.CONSISTENT_READ, shares=ALL)
        assert await node.read(0, length) == content
        await again.graph.release(reader)
    for name in stack.images:
        async with SimHost(seed) as checker:
            file = await checker.disk("file", again.disks[name].pages, read_only=True)
            result = await check_image(file, offload=checker.offload)
            assert not result.problems, (name, result.problems)


@pytest.mark.parametrize("seed", range(FIRST, FIRST + SEEDS))
def test_a_stack_is_a_byte_array(seed: int) -> None:
    chance = random.Random(seed)
    stack = Stack(chance)
    length = (300 * KIB + chance.choice((0, 1, 7, 100)) * SECTOR) // SECTOR * SECTOR
    top = stack.build(length, 0)
    try:
        run(whole_life(stack, top, length, seed))
    except BaseException as error:
        error.add_note(f"seed {seed}: {[(node['driver'], node) for node in stack.nodes]}")
        raise
