"""Every subset of unsynced writes, for every short sequence of requests to the same few clusters.

Two requests in a row in the suite; three, which take minutes, with BLOCKJOBS_CRASH_SEEDS.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
from itertools import product

import pytest
from replay import SEEDS, Guest, blank, opened, shown
from test_replay import complaint
from workload import KIB, Setup

from blockjobs.base.span import Span
from blockjobs.block.drivers.qcow2.create import NewImage
from blockjobs.block.node import Node
from blockjobs.block.vocabulary import ZeroMode
from blockjobs.testing.crash import RecordingMedium, WriteLog, crash_states
from blockjobs.testing.disk import Pages, SimDisk

CLUSTER = 4 * KIB
SETUPS = {
    "plain": Setup(NewImage(size=32 * CLUSTER, cluster_size=CLUSTER)),
    "backing": Setup(NewImage(size=32 * CLUSTER, cluster_size=CLUSTER, refcount_bits=64), backing=True),
}
Request = Callable[[Guest, Node], Awaitable[None]]


def writing(at: int, length: int, mark: bytes) -> Request:
    content = mark * length
    return lambda guest, node: guest.change(at, content, lambda: node.write(at, content))


def zeroing(at: int, length: int, mode: ZeroMode) -> Request:
    return lambda guest, node: guest.change(at, bytes(length), lambda: node.zero(Span(at, length), mode=mode))


def compressing(at: int, length: int) -> Request:
    content = b"compressible" * (length // 12) + b"c" * (length % 12)
    return lambda guest, node: guest.change(at, content, lambda: node.write(at, content, compressed=True))


REQUESTS: dict[str, Request] = {
    "write a part of three clusters": writing(CLUSTER // 2, 2 * CLUSTER, b"w"),
    "write a new cluster": writing(8 * CLUSTER, CLUSTER, b"n"),
    "zero": zeroing(0, 2 * CLUSTER, ZeroMode.UNMAP),
    "zero and keep": zeroing(512, 3 * CLUSTER, ZeroMode.KEEP),
    "discard": lambda guest, node: guest.discard(CLUSTER, 2 * CLUSTER, node),
    "compress": compressing(0, 2 * CLUSTER),
    "flush": lambda guest, node: guest.flush(node.flush),
}


async def used(setup: Setup) -> dict[str, Pages]:
    """An image with four plain and four compressed clusters."""
    start = await blank(setup.image, backing=setup.backing)
    disks = {name: SimDisk(pages) for name, pages in start.items()}
    async with opened(disks, setup.options) as node:
        await node.write(0, random.Random(1).randbytes(4 * CLUSTER))
        await node.write(4 * CLUSTER, b"old" * CLUSTER + bytes(CLUSTER), compressed=True)
    return {name: disk.pages for name, disk in disks.items()}


async def judge(setup: Setup, start: dict[str, Pages], requests: tuple[str, ...]) -> None:
    log = WriteLog()
    media = {name: RecordingMedium(SimDisk(pages), log, name) for name, pages in start.items()}
    guest = Guest(log, await shown(start, setup.options), setup.image.size)
    async with opened(media, setup.options) as node:
        for name in (*requests, "flush"):
            await REQUESTS[name](guest, node)
    for state in crash_states(log, start, seed=0, exhaustive_up_to=7, samples=20):
        assert not (wrong := await complaint(state, guest, setup)), f"{requests}: {wrong}"


@pytest.mark.parametrize("first", REQUESTS)
@pytest.mark.parametrize("name", SETUPS)
def test_short_runs(name: str, first: str) -> None:
    setup = SETUPS[name]

    async def all_of_them() -> None:
        start = await used(setup)
        for rest in product(REQUESTS, repeat=1 if SEEDS == 1 else 2):
            await judge(setup, start, (first, *rest))

    asyncio.run(all_of_them())
