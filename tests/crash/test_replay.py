"""Every state that a power cut may leave of a qcow2 image is whole, keeps what was flushed, and shows nothing foreign.

The runs are random, of one seed each in the suite; `make crash` goes on for longer.
"""

import asyncio
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from replay import SEEDS, Guest, opened, own_errors, qemu_errors, shown, snapshot_content
from workload import SETUPS, Setup, Workload, record, states_of

from blockjobs.base.errors import BlockjobsError
from blockjobs.testing.crash import CrashState, WriteLog, crash_states
from blockjobs.testing.disk import Act, Change, SimDisk

QEMU_SAMPLE = 3
"""States per run that qemu-img looks at too: it takes 20 ms each, our own check much less."""
RESUMED_SAMPLE = 2
"""States per run in which the guest goes on after the crash."""


async def complaint(state: CrashState, guest: Guest, setup: Setup) -> str:
    """What is wrong with a crash state; empty if nothing."""
    if errors := await own_errors(state.images):
        return f"{state.story}: {errors}"
    try:
        content = await shown(state.images, setup.options)
    except BlockjobsError as error:
        return f"{state.story}: cannot be read: {error!r}"
    if len(content) not in (lengths := guest.possible_lengths(state.issued)):
        return f"{state.story}: {len(content)} bytes long, not one of {lengths}"
    if lies := guest.lies(content, state.issued):
        return f"{state.story}: sectors {lies[:10]} show neither what was promised nor what was written later"
    return ""


async def goes_on(state: CrashState, setup: Setup, seed: int) -> str:
    """Use the image after the crash; says what is wrong then."""
    media = {name: SimDisk(pages) for name, pages in state.images.items()}
    before = await shown(state.images, setup.options)
    guest = Guest(WriteLog(), before.ljust(max(setup.grows_to, len(before)), b"\0"))
    async with opened(media, setup.options) as node:
        await Workload(guest, node, replace(setup, steps=12), random.Random(seed)).run()
    images = {name: disk.pages for name, disk in media.items()}
    content = await shown(images, setup.options)
    if content.ljust(len(guest.start), b"\0") != guest.now():
        return f"{state.story}: lost content after going on"
    return await own_errors(images)


@pytest.mark.parametrize("name", SETUPS)
def test_random_runs(name: str, tmp_path: Path) -> None:
    setup = SETUPS[name]

    async def judge(states: list[CrashState], guest: Guest, seed: int) -> None:
        for state in states:
            assert not (wrong := await complaint(state, guest, setup)), f"seed {seed}, {wrong}"
        for state in random.Random(seed).sample(states, RESUMED_SAMPLE):
            assert not (wrong := await goes_on(state, setup, seed)), f"seed {seed}, {wrong}"

    for seed in range(SEEDS):
        guest, start = record(setup, seed)
        states = states_of(guest.log, start, seed)
        asyncio.run(judge(states, guest, seed))
        if shutil.which("qemu-img"):
            for state in random.Random(seed).sample(states, QEMU_SAMPLE):
                assert not (errors := qemu_errors(state.images, tmp_path)), f"seed {seed}, {state.story}: {errors}"


@pytest.mark.qemu
@pytest.mark.parametrize("name", ["4k", "version 2", "extended L2"])
def test_writes_to_what_a_snapshot_shares(name: str, tmp_path: Path) -> None:
    setup = SETUPS[name]
    for seed in range(SEEDS):
        guest, start = record(setup, seed, snapshot_in=tmp_path)
        frozen = snapshot_content(start, tmp_path)
        states = states_of(guest.log, start, seed)

        async def judge(seed: int = seed, states: list[CrashState] = states, guest: Guest = guest) -> None:
            for state in states:
                assert not (wrong := await complaint(state, guest, setup)), f"seed {seed}, {wrong}"

        asyncio.run(judge())
        for state in random.Random(seed).sample(states, QEMU_SAMPLE):
            assert not (errors := qemu_errors(state.images, tmp_path)), f"seed {seed}, {state.story}: {errors}"
            assert snapshot_content(state.images, tmp_path) == frozen, f"seed {seed}, {state.story}"


def test_the_replay_finds_missing_syncs() -> None:
    """The tool itself: were the syncs inside the commits missing, many states would be bad."""
    setup = SETUPS["4k"]
    guest, start = record(setup, 1)
    syncs = [index for index, change in enumerate(guest.log.changes) if change.act is Act.SYNC]
    for index in syncs[:-1]:
        guest.log.changes[index] = Change(Act.MARK, label="a sync that was skipped")

    async def count_bad() -> int:
        states = crash_states(guest.log, start, seed=1, samples=60)
        return sum([bool(await complaint(state, guest, setup)) for state in states])

    assert asyncio.run(count_bad()) > 10
