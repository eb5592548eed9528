"""Key slots under power cuts: at every instant some passphrase opens the disk, and an erased one never does again."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain

import pytest
from replay import graph_over
from sectors import pages_of, sectors_of, stretches

from blockjobs.base.errors import UsageError
from blockjobs.block.amend_options import LuksAmendOptions, QCryptoBlockLUKSKeyslotState
from blockjobs.block.claims import ALL, Perm
from blockjobs.block.luks import volume
from blockjobs.block.luks.slots import Keys
from blockjobs.block.luks.volume import Means, NewVolume
from blockjobs.block.node import Node
from blockjobs.block.objects import Secret
from blockjobs.testing.crash import RecordingMedium, WriteLog, crash_states
from blockjobs.testing.disk import Pages, SimDisk

ONE, TWO = Secret(b"one"), Secret(b"two")
ACTIVE, INACTIVE = QCryptoBlockLUKSKeyslotState.ACTIVE, QCryptoBlockLUKSKeyslotState.INACTIVE


def means(node: Node) -> Means:
    return Means(offload=node.graph.offload, clock=node.graph.clock, entropy=node.graph.entropy)


async def blank(passphrase: bytes) -> Pages:
    disk = SimDisk()
    async with graph_over({"disk": disk}) as graph:
        node = graph.node("disk")
        user = await graph.claim("a test", node, needs=Perm.WRITE | Perm.RESIZE, shares=ALL)
        raw, _ = await volume.new_header(NewVolume(cipher_alg="aes-128", cipher_mode="cbc", iter_time_ms=1), passphrase,
                                         means(node))  # fmt: skip
        await node.write(0, raw)
        await graph.release(user)
    return disk.pages


async def opens(pages: Pages, passphrase: bytes) -> bool:
    async with graph_over({"disk": SimDisk(pages)}, read_only=True) as graph:
        node = graph.node("disk")
        user = await graph.claim("a test", node, needs=Perm.CONSISTENT_READ, shares=ALL)
        try:
            header = await volume.read_header(node, 0)
            await volume.unlock(node, 0, header, passphrase, means(node))
        except UsageError:
            return False
        finally:
            await graph.release(user)
    return True


async def count_of_active(pages: Pages) -> int:
    async with graph_over({"disk": SimDisk(pages)}, read_only=True) as graph:
        user = await graph.claim("a test", graph.node("disk"), needs=Perm.CONSISTENT_READ, shares=ALL)
        header = await volume.read_header(graph.node("disk"), 0)
        await graph.release(user)
    return sum(slot.is_active for slot in header.slots)


CASES: Mapping[str, LuksAmendOptions] = {
    "add": LuksAmendOptions(state=ACTIVE, new_secret="two", iter_time=1),
    "add one that spans sectors": LuksAmendOptions(state=ACTIVE, new_secret="two", iter_time=1, keyslot=6),
}


@pytest.mark.parametrize("name", CASES)
def test_adding(name: str) -> None:
    options = CASES[name]

    async def run() -> None:
        start = {"disk": await blank(b"one")}
        log = WriteLog()
        async with graph_over({"disk": RecordingMedium(SimDisk(start["disk"]), log, "disk")}) as graph:
            node = graph.node("disk")
            user = await graph.claim("a test", node, needs=Perm.CONSISTENT_READ | Perm.WRITE, shares=ALL)
            keys = Keys(file=node, at=0, objects={"one": ONE, "two": TWO}, key_secret="one", means=means(node),
                        force=False)  # fmt: skip
            await keys.amend(await volume.read_header(node, 0), options)
            done = log.mark("added")
            await graph.release(user)
        for state in crash_states(log, start, seed=0, exhaustive_up_to=4, samples=2):
            assert await opens(state.images["disk"], b"one"), state.story
            is_added = await count_of_active(state.images["disk"]) > 1
            assert is_added or state.issued <= done, state.story
            assert await opens(state.images["disk"], b"two") is is_added, f"{state.story}: a slot that opens nothing"

    asyncio.run(run())


def test_erasing() -> None:
    async def run() -> None:
        disk = SimDisk(await blank(b"one"))
        log = WriteLog()
        objects = {"one": ONE, "two": TWO}
        async with graph_over({"disk": disk}) as graph:
            node = graph.node("disk")
            user = await graph.claim("a test", node, needs=Perm.CONSISTENT_READ | Perm.WRITE, shares=ALL)
            keys = Keys(file=node, at=0, objects=objects, key_secret="one", means=means(node), force=False)
            await keys.amend(await volume.read_header(node, 0), CASES["add"])
            await graph.release(user)
        start = {"disk": disk.pages}
        async with graph_over({"disk": RecordingMedium(SimDisk(start["disk"]), log, "disk")}) as graph:
            node = graph.node("disk")
            user = await graph.claim("a test", node, needs=Perm.CONSISTENT_READ | Perm.WRITE, shares=ALL)
            keys = Keys(file=node, at=0, objects=objects, key_secret="two", means=means(node), force=False)
            header = await volume.read_header(node, 0)
            material = header.slots[0].material_sector * 512
            before = bytes(start["disk"].read(material, header.material_bytes))
            await keys.amend(header, LuksAmendOptions(state=INACTIVE, old_secret="one"))
            done = log.mark("erased")
            await graph.release(user)
        for state in crash_states(log, start, seed=0, exhaustive_up_to=4, samples=2):
            pages = state.images["disk"]
            assert await opens(pages, b"two"), state.story
            if state.issued > done:
                assert not await opens(pages, b"one"), state.story
                assert bytes(pages.read(material, header.material_bytes)) != before, state.story

    asyncio.run(run())


PASSPHRASES = (b"one", b"two")


async def amended(pages: Pages, options: LuksAmendOptions, log: WriteLog, *, key: str = "one", force: bool = False,
                  ) -> Pages:  # fmt: skip
    """The disk afterwards; what was written to it is in the log."""
    disk = SimDisk(pages)
    async with graph_over({"disk": RecordingMedium(disk, log, "disk")}) as graph:
        node = graph.node("disk")
        user = await graph.claim("a test", node, needs=Perm.CONSISTENT_READ | Perm.WRITE, shares=ALL)
        keys = Keys(file=node, at=0, objects={"one": ONE, "two": TWO}, key_secret=key, means=means(node), force=force)
        await keys.amend(await volume.read_header(node, 0), options)
        log.mark("amended")
        await graph.release(user)
    return disk.pages


async def what_opens(pages: Pages) -> dict[int, bytes | None]:
    """By number of each active slot, the passphrase that opens it."""
    async with graph_over({"disk": SimDisk(pages)}, read_only=True) as graph:
        node = graph.node("disk")
        user = await graph.claim("a test", node, needs=Perm.CONSISTENT_READ, shares=ALL)
        header = await volume.read_header(node, 0)
        found: dict[int, bytes | None] = {}
        for number, slot in enumerate(header.slots):
            if slot.is_active:
                found[number] = None
                for each in PASSPHRASES:
                    if await volume.open_slot(node, 0, header, number, each, means(node)) is not None:
                        found[number] = each
        await graph.release(user)
    return found


@dataclass(frozen=True)
class Case:
    """A disk with these slots, opened by `one`, and what is done to it."""

    slots: Mapping[int, str]
    options: LuksAmendOptions
    after: Mapping[int, bytes]
    force: bool = False


def activate(number: int) -> LuksAmendOptions:
    return LuksAmendOptions(state=ACTIVE, new_secret="two", iter_time=1, keyslot=number)


EVERY: Mapping[str, Case] = {
    "add": Case({0: "one"}, activate(1), {0: b"one", 1: b"two"}),
    "add one that spans sectors": Case({0: "one"}, activate(6), {0: b"one", 6: b"two"}),
    "erase": Case(
        {0: "one", 1: "two"}, LuksAmendOptions(state=INACTIVE, old_secret="two"), {0: b"one"}),
    "erase one that spans sectors": Case(
        {0: "one", 6: "two"}, LuksAmendOptions(state=INACTIVE, keyslot=6), {0: b"one"}),
    "overwrite": Case({0: "one", 6: "one"}, activate(6), {0: b"one", 6: b"two"}, force=True),
    "overwrite the only one": Case({0: "one"}, activate(0), {0: b"two"}, force=True),
}  # fmt: skip


@pytest.mark.parametrize("name", EVERY)
def test_every_active_slot_opens_the_disk(name: str) -> None:
    """Else the last one that does could be taken for one of several, and be erased."""
    case = EVERY[name]

    async def run() -> None:
        pages, seen = await blank(b"one"), set()
        for number, secret in case.slots.items():
            if number:
                add = LuksAmendOptions(state=ACTIVE, new_secret=secret, iter_time=1, keyslot=number)
                pages = await amended(pages, add, WriteLog())
        log = WriteLog()
        after = await amended(pages, case.options, log, force=case.force)
        assert await what_opens(after) == case.after
        for stretch in stretches(log, {"disk": sectors_of(pages)}):
            for story, state in chain(stretch.states(), stretch.torn_alone()):
                if (key := state.key(stretch.key)) in seen:
                    continue
                seen.add(key)
                found = await what_opens(pages_of(stretch.disks(state)["disk"]))
                assert found and None not in found.values(), f"log {stretch.end}, {story}: {found}"
        assert not stretch.pending, "it was acknowledged before it was durable"
        assert len(seen) > 4

    asyncio.run(run())
